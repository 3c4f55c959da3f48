"""Rows as CSV and TSV."""

from __future__ import annotations

import codecs
import gzip

import pytest

from pipelines import storage
from pipelines.data.sources import SOURCES, delimited
from pipelines.data.sources.base import Rejected, SourceInput
from pipelines.data.sources.delimited import is_delimited, read_delimited
from pipelines.settings import SettingsError
from tests.serving_model import make_image
from tinygptv.data.sample import SampleRow


def read(path):
    return list(read_delimited(storage.Location.parse(str(path))))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'image,question,answer\r\na.jpg,"a\nb, c",d\r\n'),
        ("a.csv", '\ufeffimage;question;answer\na.jpg;"a\nb, c";d\n\n'),
        ("a.tsv", 'image\tquestion\tanswer\na.jpg\t"a\nb, c"\td\n'),
        ("a.csv", 'image\tquestion\tanswer\na.jpg\t"a\nb, c"\td'),
    ],
)
def test_separators_quotes_and_line_breaks(tmp_path, name, text):
    path = tmp_path / name
    plain = text.removeprefix("\ufeff")
    for data in (text.encode(), plain.encode("utf-16"), codecs.BOM_UTF16_BE + plain.encode("utf-16-be")):
        path.write_bytes(data)
        [(key, fields)] = read(path)
        assert key == "line 2" and fields["answer"] == "d" and fields["question"].split() == ["a", "b,", "c"]


@pytest.mark.parametrize(
    "text", ["image,question,answer\ra.jpg,a\tb,d\r", "\n\r\nimage;question;answer\n\na.jpg;a\tb;d\n"]
)
def test_old_line_ends_and_blank_lines_before_the_header(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    [(_, fields)] = read(tmp_path / "a.csv")
    assert fields == {"image": "a.jpg", "question": "a\tb", "answer": "d"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_table_is_read_piece_by_piece(tmp_path, monkeypatch, end, size):
    """A file of gigabytes must not be held in memory; whatever a piece cuts is one row all the same."""
    monkeypatch.setattr(storage, "COPY_BYTES", size)
    text = end.join(["", "image,question", "a.jpg,caf\u00e9 \x0c \u2028", f'b.jpg,"two{end}lines"', "", 'c.jpg,"'])
    (tmp_path / "a.csv").write_bytes(codecs.BOM_UTF8 + text.encode())
    *rows, (_, broken) = read(tmp_path / "a.csv")
    first, second = ("line 3", {"image": "a.jpg", "question": "caf\u00e9 \x0c \u2028"}), {"image": "b.jpg"}
    assert rows == [first, ("line 4", {**second, "question": f"two{end}lines"})]
    assert isinstance(broken, Rejected) and broken.reason.startswith("no valid row")


def test_another_encoding_is_told_as_such(tmp_path):
    (tmp_path / "a.csv").write_bytes("question,answer\ncaf\u00e9,yes\nwhat,no\n".encode("latin-1"))
    found, sound = read(tmp_path / "a.csv")
    assert found[1] == Rejected("line 2", "a.csv", "question is not UTF-8 text: save the file as UTF-8")
    assert sound[1] == {"question": "what", "answer": "no"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", ["a.tsv.gz", "a.csv"])
def test_compressed_tables_are_read_up_to_their_damage(tmp_path, name, encoding):
    rows = [{"question": f"{n}", "answer": "y" * 50 + f"{n * n}"} for n in range(500)]
    text = "question\tanswer\n" + "".join(f"{row['question']}\t{row['answer']}\n" for row in rows)
    packed = gzip.compress(text.encode(encoding))
    (tmp_path / name).write_bytes(packed)
    assert [fields for _, fields in read(tmp_path / name)] == rows
    assert is_delimited(storage.Location.parse(str(tmp_path / name))) == (encoding == "utf-8")
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    *found, (key, damage) = read(tmp_path / name)
    assert 9 < len(found) < 500 and [fields for _, fields in found] == rows[: len(found)], "no row is cut"
    assert key == "" and damage.reason.startswith("the compressed data is damaged or cut off")
    source = SourceInput("csv", str(tmp_path), str(tmp_path), "own", "")
    assert [unit.shard for unit in SOURCES["csv"].reader.plan(source)] == [name]


def test_lists_are_json_and_broken_rows_are_set_apart_alone(tmp_path):
    path = tmp_path / "a.csv"
    deep = "[" * 100_000
    path.write_text(f'image,answers,boxes\na,"[""x"", ""y""]",\nb,c\nd,[x,\ne,,"[[1, 2, 3, 4]]"\nf,,{deep}\ng,red,\n')
    rows = dict(read(path))
    assert rows["line 2"] == {"image": "a", "answers": ["x", "y"]}
    assert isinstance(rows["line 3"], Rejected) and "2 fields, and the header names 3" in rows["line 3"].reason
    assert isinstance(rows["line 4"], Rejected) and "answers is no JSON list" in rows["line 4"].reason
    assert rows["line 5"] == {"image": "e", "boxes": [[1, 2, 3, 4]]}
    assert isinstance(rows["line 6"], Rejected) and "boxes is no JSON list: '[[[" in rows["line 6"].reason
    assert rows["line 7"] == Rejected("line 7", "a.csv", "answers is no JSON list: 'red'")
    for line in ("line 3", "line 4", "line 6"):
        assert (rows[line].key, rows[line].shard, rows[line].filter) == (line, "a.csv", "")


@pytest.mark.parametrize("name", ["answers", "boxes", "turns", "conversations", "messages", "conversation", "texts"])
def test_these_fields_are_lists_and_all_others_words(tmp_path, name):
    (tmp_path / "a.csv").write_text(f'image,{name},answer\n[1],"[2, ""3""]",[4]\n')
    assert read(tmp_path / "a.csv") == [("line 2", {"image": "[1]", name: [2, "3"], "answer": "[4]"})]


def test_a_file_without_header_or_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,,c\n1,2,3\n")
    with pytest.raises(SettingsError, match="the first line must name every column once"):
        read(path)
    path.write_text("image,caption\n")
    with pytest.raises(SettingsError, match="holds no rows"):
        list(SOURCES["csv"].reader.plan(SourceInput("csv", str(path), "", "own", "")))


def test_rows_with_their_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(make_image(1, 20, 10, "JPEG"))
    (tmp_path / "own.csv").write_text("image,caption\na.jpg,a mug\nb.jpg,gone\na.jpg,a,b\n")
    reader = SOURCES["csv"].reader
    [unit] = reader.plan(SourceInput("csv", str(tmp_path), "", "own", ""))
    row, missing, broken = reader.read(unit)
    assert (broken.key, broken.shard) == ("line 4", "own.csv") and broken.reason.startswith("3 fields, and the header")
    assert isinstance(row, SampleRow) and row.image and row.turns[0].answers == ("a mug",) and row.id == "own/line 2"
    assert isinstance(missing, Rejected) and "b.jpg" in missing.reason


@pytest.mark.parametrize("text", ["image\tcaption\na.jpg\ta mug\n", '\ufeff"image","caption"\na.jpg,a mug\n'])
def test_a_table_with_the_name_of_json_lines_is_told(tmp_path, text):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"own\.jsonl is a table .* use source=csv"):
        list(SOURCES["jsonl"].reader.plan(SourceInput("jsonl", str(path), "", "own", "")))
    (tmp_path / "a.jpg").write_bytes(make_image(1, 20, 10, "JPEG"))
    [unit] = SOURCES["csv"].reader.plan(SourceInput("csv", str(path), "", "own", ""))
    assert [row.turns[0].answers for row in SOURCES["csv"].reader.read(unit)] == [("a mug",)]


@pytest.mark.parametrize(
    ("text", "is_table"),
    [
        ('{"question": "a, b", "answer": "c"}\n', False),
        ("{question, caption\n", False),
        ("[caption, question\n", False),
        ('["caption", "question"]', False),
        ("", False),
        ("\n", False),
        ("caption\na\n", False),  # of one column
        ("a,b\nimage,caption\n", False),  # none of a row's fields
        ("image,caption\n", True),
        ("image,answers,boxes\n", True),
        (' "image" ;"caption"\n', True),
        ("\ufeffconversations\timage", True),
    ],
)
def test_a_table_is_known_by_its_header(tmp_path, text, is_table):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    assert is_delimited(storage.Location.parse(str(path))) is is_table


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("\ufeffimage,caption\na,b\n", {"image": "a", "caption": "b"}),
        ("image,caption;more\na,b;c\n", {"image": "a", "caption;more": "b;c"}),
        (",image,caption\n0,a,b\n", {"image": "a", "caption": "b"}),  # pandas gives its index no name
        (" image , caption\na, b\n", {"image": "a", "caption": " b"}),
        ("image,caption,task\na, ,\n", {"image": "a", "caption": " "}),
    ],
)
def test_names_of_columns_are_plain(tmp_path, text, fields):
    (tmp_path / "a.csv").write_text(text)
    assert read(tmp_path / "a.csv") == [("line 2", fields)]


def test_a_column_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,image\na,b\n")
    with pytest.raises(SettingsError, match="must name every column once; it is 'image,image'"):
        read(tmp_path / "a.csv")


def test_rows_are_called_by_the_line_on_which_they_begin(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\n\na,"b\nc"\nd,e\n')
    assert [key for key, _ in read(tmp_path / "a.csv")] == ["line 3", "line 5"]
    odd = "c\u2028d\x85e\x0bf\x0cg\x1ch"  # no ends of lines, whatever str.splitlines() says
    (tmp_path / "a.csv").write_text(f'image,caption\na,{odd}\nb,"{odd}"\nc,d\n')
    assert read(tmp_path / "a.csv") == [
        (f"line {number}", {"image": image, "caption": caption})
        for number, image, caption in ((2, "a", odd), (3, "b", odd), (4, "c", "d"))
    ]


def test_a_row_with_broken_quotes_costs_itself_alone(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\na,b\n"c"d,e\nf,g\n')
    (_, first), (key, broken), (_, last) = read(tmp_path / "a.csv")
    assert (first["image"], last["image"], key) == ("a", "f", "line 3")
    assert isinstance(broken, Rejected) and (broken.key, "no valid row" in broken.reason) == ("line 3", True)


@pytest.mark.parametrize("size", [7, 1 << 20])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_slices_of_a_table_are_its_rows(tmp_path, monkeypatch, end, mark, size):
    """Cut where rows end: quoted fields hold line breaks and quotes, rows are broken, and lines keep their numbers."""
    monkeypatch.setattr(storage, "COPY_BYTES", size)
    monkeypatch.setattr(delimited, "ENTRIES_PER_UNIT", 3)
    rows = [f'a{n}.jpg,"caf\u00e9 ""{n}""{end}{end}\u2028, {n}",voil\u00e0' if n % 3 else f"b{n},x" for n in range(11)]
    rows[4:4] = ["", '"half" of a quote,x,y', "c,\ufeffd,e"]
    path = tmp_path / "a.csv"
    path.write_bytes(mark + end.join(["", "image,voil\u00e0,answer", *rows, ""]).encode() + b'd.jpg,"never closed')
    whole = read(path)
    source = SourceInput("csv", str(path), str(tmp_path), "own", "")
    units = list(SOURCES["csv"].reader.plan(source))
    assert len(units) == 5 and units[0].start and units[-1].stop == path.stat().st_size
    assert [row for unit in units for row in delimited._read_slice(unit, unit.details)] == whole
    assert len(whole) == 14 and sum(isinstance(fields, Rejected) for _, fields in whole) == 6


@pytest.mark.parametrize(("name", "encoding"), [("a.csv", "utf-16"), ("a.csv.gz", "utf-8")])
def test_a_table_that_can_only_be_read_from_its_start_is_one_unit(tmp_path, monkeypatch, name, encoding):
    monkeypatch.setattr(delimited, "ENTRIES_PER_UNIT", 1)
    data = "question,answer\n1,a\n2,b\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    [unit] = SOURCES["csv"].reader.plan(SourceInput("csv", str(tmp_path), str(tmp_path), "own", ""))
    assert [row.turns[0].answers for row in SOURCES["csv"].reader.read(unit)] == [("a",), ("b",)]
    assert (unit.start, unit.stop, unit.first) == (0, 0, 0)
