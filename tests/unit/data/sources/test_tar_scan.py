"""Where the members of a tar are, and what is told of what cannot be read."""

from __future__ import annotations

import io
import tarfile

from pipelines.data.sources.tar_scan import TarScan


def scan(data):
    walk = TarScan(io.BytesIO(data), len(data))
    return [(member.name, member.start, member.size) for member in walk.members()], walk.problems


def blocks(*members, form=tarfile.GNU_FORMAT, records=None):
    """Headers and data without an end mark; a size may be told by a pax record."""
    found = b""
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = len(data), dict(records or {})
        found += info.tobuf(form) + data + bytes(-len(data) % 512)
    return found


def test_members_lie_behind_one_another_at_whole_blocks():
    data = blocks(("a", b"x" * 512), ("b", b""), ("c", b"x" * 513), ("d", b"x")) + bytes(1024)
    assert scan(data) == ([("a", 512, 512), ("b", 1536, 0), ("c", 2048, 513), ("d", 3584, 1)], [])


def test_a_size_in_a_pax_record_counts():
    header = blocks(("a", b"x" * 600), form=tarfile.PAX_FORMAT, records={"size": "600", "path": "long"})
    plain = header.rfind(b"ustar") - 257  # the member's own header: its size is a lie
    info = tarfile.TarInfo("a")
    info.size = 0
    data = header[:plain] + info.tobuf(tarfile.USTAR_FORMAT) + header[plain + 512 :] + blocks(("b", b"y")) + bytes(1024)
    assert scan(data) == ([("long", plain + 512, 600), ("b", plain + 512 + 1024 + 512, 1)], [])


def test_the_walk_continues_at_the_next_readable_header():
    good = blocks(("a", b"x" * 10), ("b", b"y"))
    data = good[:1024] + b"\xff" * 512 * 3 + good[1024:] + bytes(1024)
    members, problems = scan(data)
    assert members == [("a", 512, 10), ("b", 3072, 1)]
    assert problems == ["the tar is damaged: bytes 1024 to 2560 hold no readable member"]


def test_what_is_told_of_a_tars_end():
    one = blocks(("a", b"x"))
    assert scan(one + bytes(1024))[1] == []
    assert scan(one)[1] == ["the tar has no end mark, so it may be cut off between two samples"]
    assert scan(one + b"\xff" * 100)[1] == ["the tar is cut off or damaged after byte 1024: nothing readable follows"]
    assert scan(blocks(("a", b"x" * 600))[:-500])[1] == [], "its sample says so"
    assert scan(b"")[1] == ["the tar is empty (0 bytes)"]


def test_links_have_no_data_whatever_they_say():
    info = tarfile.TarInfo("l")
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "a", 700
    members, _ = scan(info.tobuf(tarfile.GNU_FORMAT) + blocks(("b", b"y")) + bytes(1024))
    assert members == [("l", 512, 0), ("b", 1024, 1)]


def test_one_damaged_block_costs_its_member_alone():
    good = blocks(("a", b"x"), ("b", b"y"), ("c", b"z"))
    members, problems = scan(good[:1024] + b"\xff" * 512 + good[1536:] + bytes(1024))
    assert [name for name, _, _ in members] == ["a", "c"]
    assert problems == ["the tar is damaged: bytes 1024 to 2048 hold no readable member"]
    members, problems = scan(good[:1024] + b"\xff" * 512 + good[1024:] + bytes(1024))
    assert [name for name, _, _ in members] == ["a", "b", "c"]
    assert problems == ["the tar is damaged: bytes 1024 to 1536 hold no readable member"]
