"""Which tables of a folder are the data set, and what img2dataset's tables hold."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.sources import locate
from pipelines.data.sources.base import Rejected
from pipelines.settings import PrepareDataSettings, SettingsError
from tests.source_files import jpeg


def read(source, given, **more):
    chosen, source_input = locate(PrepareDataSettings(source=source, input=str(given), **more))
    return [found for unit in chosen.reader.plan(source_input) for found in chosen.reader.read(unit)]


def questions(found):
    return [entry.reason if isinstance(entry, Rejected) else entry.turns[0].question for entry in found]


def write(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"question": list(names), "answer": ["a"] * len(names)})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def test_a_saved_set_is_what_its_list_says(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"question": ["one", "two"], "answer": ["1", "2"]})
    saved.save_to_disk(tmp_path / "set", num_shards=2)
    loaded = datasets.load_from_disk(tmp_path / "set")
    loaded.map(lambda row: {"question": f"draft {row['question']}"})
    loaded.shuffle(seed=1)
    assert len(list((tmp_path / "set").glob("*.arrow"))) > 2
    assert questions(read("hf", tmp_path / "set")) == ["one", "two"]
    (tmp_path / "set/data-00001-of-00002.arrow").unlink()
    with pytest.raises(SettingsError, match=r"incomplete: its state\.json lists data-00001"):
        read("hf", tmp_path / "set")
    (tmp_path / "set/state.json").write_text("{}")
    with pytest.raises(SettingsError, match="not as `save_to_disk` writes it"):
        read("hf", tmp_path / "set")


def test_arrow_does_not_shut_out_parquet(tmp_path):
    write(tmp_path / "a.parquet", "from parquet")
    write(tmp_path / "b.arrow", "from arrow")
    for source in ("hf", "parquet"):
        assert questions(read(source, tmp_path)) == ["from parquet", "from arrow"]


@pytest.mark.parametrize(
    "names",
    [
        (
            "data/train-00000-of-00001.parquet",
            "data/validation-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ),
        ("set-train.arrow", "set-validation.arrow", "set-test.arrow"),
        ("train/0000.parquet", "validation/0000.parquet", "test/0000.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet", "default/validation/0000.parquet"),
        ("train.parquet", "val.parquet", "dev.parquet"),
    ],
)
def test_the_training_split_alone_is_read(tmp_path, names):
    for name in names:
        write(tmp_path / name, name)
    assert questions(read("hf", tmp_path)) == [names[0]]


@pytest.mark.parametrize("split", ["validation", "valid", "val", "dev", "test"])
@pytest.mark.parametrize("pattern", ["{}.parquet", "a-{}.parquet", "a_{}-0.parquet", "a.{}.parquet", "{}0.parquet"])
def test_what_is_left_out_for_its_split_is_told(tmp_path, caplog, split, pattern):
    names = [pattern.format(name) for name in (split, split.upper(), "train")]
    for name in names:
        write(tmp_path / name, name)
    assert questions(read("hf", tmp_path)) == [names[2]]
    left_out = ", ".join(sorted(names[:2]))
    assert caplog.messages == [f"{tmp_path}: the training split alone is read; left out: {left_out}"]


@pytest.mark.parametrize("name", ["trainer.parquet", "contest.parquet", "devil-1.parquet", "invalid.parquet"])
def test_words_that_hold_the_name_of_a_split_tell_none(tmp_path, caplog, name):
    for each in ("a.parquet", name):
        write(tmp_path / each, each)
    assert questions(read("hf", tmp_path)) == ["a.parquet", name] and not caplog.messages


def test_files_of_no_split_count_where_none_is_named_train(tmp_path):
    for name in ("a.parquet", "test.parquet"):
        write(tmp_path / name, name)
    assert questions(read("hf", tmp_path)) == ["a.parquet"]


def test_of_a_saved_set_of_splits_the_training_one_is_read(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    write(tmp_path / "test/data-00000.arrow", "of the test")
    with pytest.raises(SettingsError) as error:
        read("hf", tmp_path)
    assert str(error.value) == (
        f"input={str(tmp_path)!r} has several splits and none is named train: name one, as input=.../SPLIT."
    )
    write(tmp_path / "train/data-00000.arrow", "of the training")
    write(tmp_path / "a.parquet", "beside")
    assert questions(read("hf", tmp_path)) == ["of the training"]
    assert questions(read("hf", tmp_path / "test")) == ["of the test"]


def test_a_folder_without_tables_is_told(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SettingsError) as error:
        read("hf", tmp_path)
    assert str(error.value) == f"input={str(tmp_path)!r} holds neither .arrow nor .parquet files."
    (tmp_path / "all.zip").touch()
    told = f"{tmp_path}/all.zip may hold it: unpack it first"
    for source, lacks in (
        ("hf", "arrow nor .parquet files"),
        ("laion", "images with captions (key.jpg beside key.json)"),
    ):
        with pytest.raises(SettingsError) as error:
            read(source, tmp_path)
        assert str(error.value).endswith(f"{lacks}; {told}.")
    for name in ("vqa/train-0.parquet", "captions/train-0.parquet", "captions/train-1.parquet"):
        write(tmp_path / name, name)
    with pytest.raises(SettingsError) as error:
        read("hf", tmp_path)
    assert str(error.value) == (
        f"input={str(tmp_path)!r} holds neither .arrow nor .parquet files itself, but in captions, vqa: name one of "
        "these folders."
    )


def test_leftovers_of_a_cache_are_no_data(tmp_path):
    for name in ("set-train.arrow", "cache-0123456789abcdef.arrow", "tmpx8f2.arrow", "._set-train.arrow"):
        write(tmp_path / name, name)
    assert questions(read("hf", tmp_path)) == ["set-train.arrow"]


def test_splits_without_a_training_one_are_named(tmp_path):
    write(tmp_path / "validation-0.parquet", "v")
    assert questions(read("hf", tmp_path)) == ["v"], "the only split"
    write(tmp_path / "test-0.parquet", "t")
    with pytest.raises(SettingsError, match="splits test, validation and no train"):
        read("hf", tmp_path)
    assert questions(read("hf", tmp_path / "test-*.parquet")) == ["t"]


def test_empty_tables_are_told(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.arrow")
    with pytest.raises(SettingsError, match="its tables have no rows"):
        read("parquet", tmp_path)
    write(tmp_path / "c.parquet", "q")
    (tmp_path / "d.parquet").write_bytes(b"")
    found = read("parquet", tmp_path)
    assert questions(found[:1]) == ["q"]
    assert "no readable" in found[1].reason


def img2dataset(path, rows):
    columns = ("url", "key", "status", "error_message", "caption", "width", "height", "jpg")
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)


def test_img2datasets_table_of_images(tmp_path):
    good = {"url": "http://x/a", "key": "0", "status": "success", "caption": "A star", "jpg": jpeg(0)}
    gone = {
        "url": "http://x/b",
        "key": "1",
        "status": "failed_to_download",
        "error_message": "HTTP 404",
        "caption": "b",
    }
    img2dataset(tmp_path / "00000.parquet", [good, gone])
    row, removed = read("parquet", tmp_path, name="mine")
    assert (row.image, row.task, row.turns[0].answers) == (jpeg(0), "caption", ("A star",))
    assert (removed.filter, removed.reason) == ("not_downloaded", "img2dataset: HTTP 404")


def test_img2datasets_table_of_notes_says_where_the_images_are(tmp_path):
    img2dataset(
        tmp_path / "00000.parquet", [{"url": "http://x/a", "key": "0", "status": "success", "caption": "A star"}]
    )
    (found,) = read("parquet", tmp_path)
    assert "source=webdataset" in found.reason


def test_img2datasets_folders_of_files(tmp_path):
    for shard in (0, 1):
        folder = tmp_path / f"{shard:05d}"
        folder.mkdir()
        for n in range(2):
            key = f"{shard:05d}{n:04d}"
            (folder / f"{key}.jpg").write_bytes(jpeg(n))
            (folder / f"{key}.json").write_text(json.dumps({"caption": f"star {key}", "key": key}))
            (folder / f"{key}.txt").write_text(f"star {key}")
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    (tmp_path / "00001/000010001.jpg").write_bytes(b"")
    for source in ("laion", "webdataset"):
        found = read(source, tmp_path)
        assert [entry.reason if isinstance(entry, Rejected) else entry.id for entry in found] == [
            "00000/000000000",
            "00000/000000001",
            "00001/000010000",
            "image 000010001.jpg is empty (0 bytes)",
        ]
    with pytest.raises(SettingsError, match="neither tars nor images with captions"):
        (tmp_path / "none").mkdir()
        read("laion", tmp_path / "none")


def test_tables_without_splits_are_all_of_them_in_order_without_leftovers(tmp_path):
    for name in ("b.parquet", "data/a.arrow", "a.arrow", "c.feather", "cache-0123456789abcdef.arrow", "tmpx8f2.arrow"):
        write(tmp_path / name, name)
    write(tmp_path / "indices-1.arrow", "order")
    write(tmp_path / "data/cache-0123456789abcdef.arrow", "of a folder")
    assert questions(read("hf", tmp_path)) == ["a.arrow", "b.parquet", "c.feather", "data/a.arrow"]


def test_a_saved_sets_files_come_in_the_order_of_its_list(tmp_path):
    names = ["data-00001.arrow", "data-00000.arrow"]
    for name in (*names, "data-00002.arrow"):
        write(tmp_path / name, name)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert questions(read("hf", tmp_path)) == names


def test_a_folder_of_files_has_their_size(tmp_path):
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000/a.jpg").write_bytes(jpeg(0))
    (tmp_path / "00000/a.json").write_text('{"caption": "x"}')
    chosen, given = locate(PrepareDataSettings(source="laion", input=str(tmp_path)))
    (unit,) = chosen.reader.plan(given)
    assert (unit.num_bytes, unit.shard) == (len(jpeg(0)) + 16, "00000.files")
