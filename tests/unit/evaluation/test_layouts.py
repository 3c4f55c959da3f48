"""docs/datasets.md: every layout of a benchmark's files is built in small, and read by the command below it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.evaluation.benchmarks import BENCHMARKS, find_benchmarks
from pipelines.evaluation.benchmarks import files as files_module
from pipelines.evaluation.benchmarks.files import DataFolder
from pipelines.evaluation.run import evaluate
from pipelines.settings import ScoreSettings, SettingsError
from tests import benchmark_files
from tests.paths import ROOT
from tests.serving_model import make_image, save_checkpoint


@dataclass(frozen=True)
class Layout:
    benchmark: str
    number: int
    files: tuple[str, ...]
    command: str

    def __str__(self) -> str:
        return f"{self.benchmark}-{self.number}"


def layouts_of(text: str) -> list[Layout]:
    """Blocks of files, each with the next command in its section."""
    found: list[Layout] = []
    for section in re.split(r"^### ", text, flags=re.M)[1:]:
        files: list[tuple[str, ...]] = []
        for kind, content in re.findall(r"^```(\w*)\n(.*?)^```", section, flags=re.M | re.S):
            if kind == "layout":
                files.append(tuple(content.splitlines()))
            elif "jobs/score.py" in content:
                name = dict(word.split("=", 1) for word in shlex.split(content)[2:])["benchmark"]
                found += [Layout(name, number, block, content.strip()) for number, block in enumerate(files)]
                files = []
        assert not files, f"a layout without a command: {files}"
    return found


LAYOUTS = layouts_of((ROOT / "docs/datasets.md").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Every official file in small: by name, and by folder and name where several data sets share a name."""
    root, found = tmp_path_factory.mktemp("originals"), {}
    writers = [
        *(benchmark_files.iconqa, benchmark_files.iconqa_as_released, benchmark_files.vizwiz, benchmark_files.vsr),
        *(benchmark_files.vqav2, benchmark_files.vqav2_as_lavis_has_it, benchmark_files.okvqa, benchmark_files.gqa),
        *(benchmark_files.aokvqa, benchmark_files.pope, benchmark_files.hateful_memes),
        *(benchmark_files.refcoco_as_published, benchmark_files.refcoco_as_lists),
    ]
    for number, write in enumerate(writers):
        write(root / str(number))
    benchmark_files.okvqa(root / "clean", "_clean")
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix not in (".jpg", ".png"):
            found[path.name] = found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    benchmark_files.aokvqa_as_lavis_has_it(root / "lavis")
    found["aokvqa_v1p0_val.json (LAVIS)"] = (root / "lavis/aokvqa_v1p0_val.json").read_bytes()
    memes = found["dev.jsonl"]
    return {
        **found,
        "hateful_memes/dev_seen.jsonl": memes,
        "hateful_memes/dev_unseen.jsonl": memes.replace(b"08291", b"99999"),
        "zeroshot/dev.jsonl": found["zeroshot/test.jsonl"],
        "random/test.jsonl": found["zeroshot/test.jsonl"] * 3,  # the other split, with more questions
    }


def build(layout: Layout, originals, root: Path) -> None:
    for number, line in enumerate(layout.files):
        path = root / line.removesuffix(" (LAVIS)")
        name = line.rsplit("/", 1)[-1]
        if path.suffix in (".jpg", ".png"):
            content = make_image(number, kind="PNG" if path.suffix == ".png" else "JPEG")
        else:
            content = originals.get("/".join(line.split("/")[-2:])) or originals[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def settings_of(layout: Layout, checkpoint, data: Path, output: Path, **changes) -> ScoreSettings:
    """The settings of the documented command, at another place."""
    script, *words = shlex.split(layout.command)[1:]
    assert script == "jobs/score.py"
    loaded = ScoreSettings.load(None, words)
    fields = {"checkpoint": str(checkpoint), "data": str(data), "output": str(output), "num_workers": 0}
    quick = {"tracking_uri": "none", "quiet": True, "threads_per_worker": 1, "baselines": False, "page_cases": 0}
    return loaded.model_copy(update={**fields, **quick, **changes})


def test_every_benchmark_is_documented():
    documented = {benchmark.name for layout in LAYOUTS for benchmark in find_benchmarks(layout.benchmark)}
    assert documented == {name for name in BENCHMARKS if not name.startswith("miniature_")}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_layout_is_read_and_every_image_found(layout, originals, tmp_path):
    build(layout, originals, tmp_path)
    for benchmark in find_benchmarks(layout.benchmark):
        folder = DataFolder(tmp_path)
        questions = list(benchmark.read(folder))
        assert questions and all(question.image.is_file() for question in questions), [q.image for q in questions]
        assert {Path(question.image).resolve() for question in questions} <= set(tmp_path.resolve().rglob("*"))
        assert folder.opened and folder.opened[0].used


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.number == 0], ids=str)
def test_the_command_scores_and_names_its_files(layout, originals, checkpoint, tmp_path):
    build(layout, originals, tmp_path / "data")
    result = evaluate(settings_of(layout, checkpoint, tmp_path / "data", tmp_path / "out"))
    for benchmark in find_benchmarks(layout.benchmark):
        score = result["benchmarks"][benchmark.name]
        assert score["unanswered"] == 0 and score["n"] >= 1
        for file in score["files"]:
            assert Path(file["path"]).is_relative_to(tmp_path / "data") and len(file["sha256"]) == 64
    assert json.loads((tmp_path / "out/result.json").read_text())["benchmarks"] == result["benchmarks"]


def test_vsr_takes_the_zeroshot_split_and_hateful_memes_its_own_file(originals, tmp_path):
    by_name = {str(layout): layout for layout in LAYOUTS}
    build(by_name["vsr-0"], originals, tmp_path)
    build(by_name["hateful_memes-0"], originals, tmp_path)
    folder = DataFolder(tmp_path)
    assert len(list(BENCHMARKS["vsr"].read(folder))) == 2
    assert [q.id for q in BENCHMARKS["hateful_memes"].read(folder)] == ["8291", "46971"]
    assert [files.used[0].name for files in folder.opened] == ["test.jsonl", "dev_seen.jsonl"]


def test_another_benchmarks_file_of_the_same_name_is_refused_by_name(originals, tmp_path):
    path = tmp_path / "visual-spatial-reasoning/data/splits/zeroshot/dev.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(originals["zeroshot/dev.jsonl"])
    with pytest.raises(
        FileNotFoundError, match=r"needs hateful_memes's dev.jsonl or dev_seen.jsonl .* there is none\."
    ):
        list(BENCHMARKS["hateful_memes"].read(DataFolder(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"dev\.jsonl is another's: its entries have no 'id'"):
        list(BENCHMARKS["hateful_memes"].read(DataFolder(path.parent)))


def test_refcoco_plus_never_takes_refcocos_references(originals, tmp_path):
    for name in ("refs(unc).p", "instances.json"):
        (tmp_path / "refcoco").mkdir(exist_ok=True)
        (tmp_path / "refcoco" / name).write_bytes(originals[f"refcoco/{name}"])
    for data in (tmp_path, tmp_path / "refcoco"):
        with pytest.raises(FileNotFoundError, match=r"needs refcoco\+'s refs\(unc\)\.p"):
            list(BENCHMARKS["refcocop_val"].read(DataFolder(data)))
        assert list(BENCHMARKS["refcoco_val"].read(DataFolder(data)))


def test_an_archive_that_was_not_unpacked_is_named(tmp_path):
    (tmp_path / "questions1.2.zip").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"questions1\.2\.zip may hold it: unpack it first"):
        list(BENCHMARKS["gqa"].read(DataFolder(tmp_path)))


def test_images_may_lie_anywhere_and_the_error_says_where_it_looked(originals, checkpoint, tmp_path):
    (pope,) = [layout for layout in LAYOUTS if layout.benchmark == "pope"]
    build(pope, originals, tmp_path / "data")
    elsewhere = tmp_path / "disk/photos/2014"
    elsewhere.mkdir(parents=True)
    image = tmp_path / "data/coco/val2014/COCO_val2014_000000000042.jpg"
    image.rename(elsewhere / image.name)
    run = settings_of(pope, checkpoint, tmp_path / "data", tmp_path / "out", benchmark="pope_random")
    with pytest.raises(SettingsError) as missing:
        evaluate(run)
    text = str(missing.value)
    assert "COCO_val2014_000000000042.jpg, is not in" in text and str(image.parent) in text and "images=DIR" in text
    with pytest.raises(SettingsError, match="images=/nowhere is no folder"):
        evaluate(run.model_copy(update={"images": "/nowhere"}))
    found = evaluate(run.model_copy(update={"images": str(elsewhere.parent)}))
    assert found["benchmarks"]["pope_random"]["unanswered"] == 0


def test_a_folder_with_thousands_of_folders_and_a_circle_of_links_is_listed_at_once(originals, tmp_path):
    (gqa,) = [layout for layout in LAYOUTS if str(layout) == "gqa-1"]
    build(gqa, originals, tmp_path)
    for number in range(1100):
        (tmp_path / f"items/{number}/more").mkdir(parents=True)
    (tmp_path / "gqa/again").symlink_to(tmp_path)
    folder = DataFolder(tmp_path)
    assert len(list(BENCHMARKS["gqa"].read(folder))) == 1
    assert len(folder.image_folders) < 20


def test_each_real_folder_is_listed_once_and_hidden_ones_never(tmp_path):
    for name in ("a/b", ".cache/c", "d"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("x.json", "a/b/y.jsonl", "d/z.p", ".cache/c/w.json", "a/v.txt", "a/u.tar"):
        (tmp_path / name).write_text("")
    (tmp_path / "a/again").symlink_to(tmp_path / "a")
    (tmp_path / "a/other").symlink_to(tmp_path / "d")
    (tmp_path / "d/root").symlink_to(tmp_path)
    files, folders = files_module._list(tmp_path)
    real = {path.resolve() for path in folders}
    assert real == {tmp_path / name for name in ("a", "d", "a/b")} and len(folders) == 3, "each once"
    assert folders == sorted(folders, key=lambda path: len(path.parts)) and files == sorted(files)
    assert {path.name for path in files} == {"x.json", "y.jsonl", "z.p", "u.tar"} and len(files) == 4


def test_a_folder_of_too_many_folders_keeps_its_own_files(tmp_path, monkeypatch):
    """IconQA has a folder for each question; its list of questions may lie beside them."""
    monkeypatch.setattr(files_module, "_MOST_FOLDERS", 3)
    for place in ("three/1/x", "three/2", "three/3", "four/1/y", "four/2", "four/3", "four/4"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "four/problems.json").write_text("{}")
    (tmp_path / "four/1/inside.json").write_text("{}")
    files, folders = files_module._list(tmp_path)
    assert files == [tmp_path / "four/problems.json"]
    listed = ("four", "three", "three/1", "three/2", "three/3", "three/1/x")
    assert folders == [tmp_path / name for name in listed], "shallow ones first"


def test_a_data_sets_own_folder_comes_first_and_then_the_users(tmp_path):
    """Whatever the preference of names; hidden folders and those of other data sets are not looked into."""
    places = ("deep/er/a.json", "other/a.json", "b.json", "a.json", "gqa/sub/b.json", "gqa/b.json")
    for name in (*places, ".cache/a.json", "vizwiz/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    files = DataFolder(tmp_path).of("gqa")
    found = [str(path.relative_to(tmp_path)) for path in files._candidates(("a.json", "b.json"), (), False)]
    assert found == ["gqa/b.json", "gqa/sub/b.json", "a.json", "b.json", "other/a.json", "deep/er/a.json"]
    turned = [str(path.relative_to(tmp_path)) for path in files._candidates(("b.json", "a.json"), (), False)]
    assert turned == ["gqa/b.json", "gqa/sub/b.json", "b.json", "a.json", "other/a.json", "deep/er/a.json"]
    own = [str(path.relative_to(tmp_path)) for path in files._candidates(("a.json", "b.json"), ("sub",), True)]
    assert own == ["gqa/b.json"]
    assert files.find("a.json", "b.json") == tmp_path / "gqa/b.json" and files.used == [tmp_path / "gqa/b.json"]


def test_an_archive_is_named_where_it_may_hold_the_file(tmp_path):
    for place, named in (("far/away/a.zip", False), ("vizwiz/a.zip", False), ("a.zip", True), ("gqa/in/a.tar", True)):
        data = tmp_path / place.replace("/", "_")
        (data / place).parent.mkdir(parents=True)
        (data / place).write_bytes(b"x")
        with pytest.raises(FileNotFoundError, match=r"the benchmark needs gqa's x\.json or y\.json below") as missing:
            DataFolder(data).of("gqa").find("x.json", "y.json")
        assert ("may hold it: unpack it first" in str(missing.value)) == named, place


def test_a_list_of_expressions_counts_by_its_fields_wherever_it_lies(tmp_path):
    benchmark_files.refcoco_as_published(tmp_path / "data")
    (tmp_path / "data/refcoco_val.json").write_text(json.dumps([{"img_id": "x", "sentences": []}]))
    assert len(list(BENCHMARKS["refcoco_val"].read(DataFolder(tmp_path / "data")))) == 2, "another's list of that name"
    benchmark_files.refcoco_as_lists(tmp_path / "lists")
    (tmp_path / "lists/refcoco/refcoco_val.json").rename(tmp_path / "lists/refcoco_val.json")
    (found,) = BENCHMARKS["refcoco_val"].read(DataFolder(tmp_path / "lists"))
    assert found.instruction.endswith("refcoco val")


def test_images_are_looked_for_in_order_of_likelihood(tmp_path):
    """Named folders, those around the file, the user's, those called images, and named ones beside the user's."""
    data = tmp_path / "a/b/c/data"
    for place in ("vqa/annotations/deep", "val2014", "x/pictures", "y/val2014", "a/train2014"):
        (data / place).mkdir(parents=True)
    for place in ("a/b/c/val2014", "a/b/coco/val2014", "a/images/val2014", "val2014", "a/b/c/other"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    files = DataFolder(data).of("vqav2")
    files.used.append(data / "vqa/annotations/deep/q.json")
    images = files.images("val2014", "train2014", "none")
    named = [data / "val2014", data / "y/val2014", data / "a/train2014"]
    around = [data / "vqa/annotations/deep", data / "vqa/annotations", data / "vqa"]
    beside = [tmp_path / place for place in ("a/b/c/val2014", "a/b/coco/val2014", "a/images/val2014")]
    assert images.folders == files.looked_in == [*named, *around, data, data / "x/pictures", *beside]
    given = DataFolder(data, tmp_path / "a").of("vqav2").images("val2014")
    first = ["a/images/val2014", "a/b/c/val2014", "a/b/coco/val2014", "a/b/c/data/val2014", "a/b/c/data/y/val2014"]
    assert given.folders[:8] == [tmp_path / place for place in (*first, "a", "a/images", "a/b/c/data/x/pictures")]
    assert set(given.folders) == {tmp_path / "a", *(path for path in (tmp_path / "a").rglob("*") if path.is_dir())}
    for number in range(250):
        (tmp_path / f"many/{number:03d}").mkdir(parents=True)
    assert len(DataFolder(data, tmp_path / "many").of("vqav2").images("val2014").folders) == 200


@pytest.mark.parametrize(
    ("root", "file", "far"),
    [
        ("d", "gqa/a.json", 0),
        ("gqa", "a.json", 0),
        ("gqa", "sub/a.json", 0),
        ("d", "x.json", 1),
        ("d", "some/x.json", 2),
        ("d", "vizwiz/x.json", None),
        ("d", "gqa/vizwiz/x.json", None),
        ("d", "vizwiz/GQA/x.json", 0),
        ("vizwiz", "x.json", 2),  # the user may have named the folder after anything
        ("vizwiz", "sub/x.json", 2),
        ("vizwiz", "okvqa/x.json", None),
    ],
)
def test_how_far_a_file_is_from_its_data_set(tmp_path, root, file, far):
    (tmp_path / root).mkdir()
    assert DataFolder(tmp_path / root).of("gqa")._distance(tmp_path / root / file) == far


@pytest.mark.parametrize(
    ("data_set", "folders"),
    [
        ("vqav2", "VQAv2 vqa-2 coco_vqa"),
        ("okvqa", "OK-VQA"),
        ("aokvqa", "A-OKVQA aokvqa_v1p0"),
        ("vizwiz", "VizWiz vizwiz_vqa"),
        ("gqa", "GQA"),
        ("vsr", "vsr vsr_zeroshot visual-spatial-reasoning"),
        ("iconqa", "IconQA iconvqa iconqa_data"),
        ("pope", "POPE"),
        ("hateful_memes", "hateful_memes hateful_meme HM"),
        ("refcoco", "refcoco"),
        ("refcoco+", "refcoco+ refercoco+ refcocop refcoco_plus"),
        ("refcocog", "refcocog refercocog"),
    ],
)
def test_folders_of_a_data_set_as_publishers_and_other_projects_name_them(tmp_path, data_set, folders):
    for name in folders.split():
        file = tmp_path / name / "a.json"
        assert DataFolder(tmp_path).of(data_set)._distance(file) == 0, name
        other = "gqa" if data_set != "gqa" else "pope"
        assert DataFolder(tmp_path).of(other)._distance(file) is None, name


@pytest.mark.parametrize(
    ("build", "benchmark", "file", "fields"),
    [
        (benchmark_files.okvqa, "okvqa", "mscoco_val2014_annotations.json", "annotations question_id answers"),
        (benchmark_files.okvqa, "okvqa", "OpenEnded_mscoco_val2014_questions.json", "questions question_id question"),
        (benchmark_files.vizwiz, "vizwiz", "Annotations/val.json", "image question answers"),
        (benchmark_files.gqa, "gqa", "questions1.2/testdev_balanced_questions.json", "question answer"),
        (
            *(benchmark_files.aokvqa, "aokvqa_choice", "aokvqa_v1p0_val.json"),
            "question_id question choices correct_choice_idx direct_answers",
        ),
        (benchmark_files.iconqa, "iconqa", "iconqa_data/problems.json", "question choices answer"),
        (benchmark_files.vsr, "vsr", "zeroshot/test.jsonl", "image caption label"),
        (benchmark_files.pope, "pope_popular", "output/coco/coco_pope_popular.json", "question_id image text label"),
        (benchmark_files.hateful_memes, "hateful_memes", "dev.jsonl", "id img label text"),
    ],
)
def test_a_file_of_the_right_name_without_a_field_is_anothers(tmp_path, build, benchmark, file, fields):
    """Data sets share file names such as ``val.json``: what the entries are made of tells them apart."""
    build(tmp_path)
    path = tmp_path / file
    whole = path.read_text()
    for field in fields.split():
        assert f'"{field}": ' in whole
        path.write_text(whole.replace(f'"{field}": ', '"other": '))
        with pytest.raises(FileNotFoundError, match=f"{path} is another's: its entries have no '{field}'"):
            list(BENCHMARKS[benchmark].read(DataFolder(tmp_path)))
    for content, told in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "a Git LFS pointer: fetch the file"),
        ("", "empty: download it again"),
        ("<!DOCTYPE html><html>Quota exceeded", "no JSON but begins with '<!DOCTYPE html><html'"),
    ):
        path.write_text(content)
        with pytest.raises(FileNotFoundError, match=f"{path} is {told}"):
            list(BENCHMARKS[benchmark].read(DataFolder(tmp_path)))
