"""Shard sets of numbered rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.data.shard_format import Manifest, ShardWriter, record_batch
from tinygptv.data.sample import SampleRow, Turn


def make_row(number: int) -> SampleRow:
    """Every seventh without an image."""
    if number % 7 == 0:
        return SampleRow(f"s/{number}", "set", "text", (Turn(f"q{number}", ("a", "a", "b")),))
    return SampleRow(
        f"s/{number}",
        "set",
        "refer",
        (Turn("", (f"thing {number}", "caf\xe9")), Turn("again", ("x",))),
        bytes([number % 256]) * (number % 50 + 1),
        number,
        number + 1,
        ((0.1 * number, 1 / 3, -2.0, 4.0),),
    )


def write_set(folder: Path, counts: Sequence[int], pieces: Sequence[int] = (1000,)) -> str:
    """A shard set with ``counts`` rows per shard, written in batches of the given lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    infos, number = [], 0
    for shard, count in enumerate(counts):
        writer = ShardWriter(str(folder / f"part-{shard:05d}.arrow"))
        end, turn = number + count, 0
        while number < end:
            stop = min(end, number + pieces[turn % len(pieces)])
            writer.write(record_batch([make_row(n) for n in range(number, stop)]))
            number, turn = stop, turn + 1
        infos.append(writer.close())
    manifest = Manifest("set", tuple(infos), {"rows_in": number}, {"image_size": 1})
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return str(folder)
