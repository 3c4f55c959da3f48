"""The written world: file formats of the real sets, the same bytes for any number of workers, facts that hold."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pipelines.miniature.world import _RESULTS, SOURCES_FILE
from tinygptv.data.boxes import parse_boxes
from tinygptv.data.prompts import clean_caption
from tinygptv.miniature import meaning, writers
from tinygptv.miniature.entries import DESCRIBE
from tinygptv.miniature.formats import INVERSE, SOURCE_FORMATS
from tinygptv.miniature.question_files import BENCHMARK_SPLITS, BENCHMARKS
from tinygptv.miniature.scenes import HELD_OUT, SHAPES, SceneKey, SceneObject, make_scene
from tinygptv.miniature.writers import mini_sources, write_world
from tinygptv.training.stages import RECIPES

SCENES = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root, SCENES, 12, seed=1, sources=[*SOURCE_FORMATS, *INVERSE])
    return root


def _read(path: Path):
    return json.loads(path.read_text())


def _is_image(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "JPEG"
        return image.size


def test_every_data_set_of_the_recipes_can_be_written():
    named = {source.name for stages in RECIPES.values() for stage in stages for source in stage.sources}
    assert named <= {*SOURCE_FORMATS, *INVERSE}
    assert set(SOURCE_FORMATS) == set(DESCRIBE)
    assert set(mini_sources()) == {source.name for stage in RECIPES["mini"] for source in stage.sources}


def test_sources_json_leads_to_files(world):
    listed = _read(world / "sources.json")
    assert set(listed) == {*SOURCE_FORMATS, *INVERSE}
    for place in listed.values():
        assert list(world.glob(place["input"])), place
        assert place["images"] is None or (world / place["images"]).is_dir()


@pytest.mark.parametrize("name", ["laion", "cc_sbu"])
def test_web_shards_have_img2datasets_layout(world, name):
    with tarfile.open(world / name / "00000.tar") as tar:
        members = tar.getnames()
        data = {member: tar.extractfile(member).read() for member in members}
    keys = list(dict.fromkeys(member.split(".")[0] for member in members))
    assert members == [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "txt", "json")]
    assert keys == [f"{n:09d}" for n in range(SCENES // SOURCE_FORMATS[name].every)]
    for key in keys:
        fields = json.loads(data[f"{key}.json"])
        assert fields["key"] == key
        assert fields["status"] == "success"
        assert fields["caption"].encode() == data[f"{key}.txt"]
        assert clean_caption(fields["caption"]) == fields["caption"]
        assert Image.open(io.BytesIO(data[f"{key}.jpg"])).size == (fields["width"], fields["height"])


def test_align(world):
    annotations = _read(world / "cc_sbu_align/filter_cap.json")["annotations"]
    assert len(annotations) == SCENES // 4
    for entry in annotations:
        assert set(entry) == {"image_id", "caption"}
        _is_image(world / f"cc_sbu_align/image/{entry['image_id']}.jpg")


@pytest.mark.parametrize(
    "path",
    [
        "llava/conversation_58k.json",
        "llava/detail_23k.json",
        "llava/complex_reasoning_77k.json",
        "multitask_conversation/multitask_conversation.json",
    ],
)
def test_llava(world, path):
    entries = _read(world / path)
    assert entries
    for entry in entries:
        assert entry["image"] == f"{entry['id']}.jpg"
        _is_image(world / f"train2014/COCO_train2014_{entry['id']}.jpg")
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert "<image>" in turns[0]["value"]
        assert not any("<image>" in turn["value"] or "!@#" in turn["value"] for turn in turns[1:])


@pytest.mark.parametrize(("folder", "partition"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
def test_refs(world, folder, partition):
    data = (world / f"refs/{folder}/refs({partition}).p").read_bytes()
    assert data[:2] == b"\x80\x02"
    assert not any(op.name in ("GLOBAL", "REDUCE", "BUILD") for op, _, _ in pickletools.genops(data))
    refs = pickle.loads(data)
    instances = _read(world / f"refs/{folder}/instances.json")
    images = {image["id"]: image for image in instances["images"]}
    boxes = {annotation["id"]: annotation for annotation in instances["annotations"]}
    categories = {category["id"]: category["name"] for category in instances["categories"]}
    assert tuple(categories.values()) == SHAPES
    assert len(refs) >= SCENES // 2
    for ref in refs:
        image, box = images[ref["image_id"]], boxes[ref["ann_id"]]
        assert ref["split"] == "train"
        assert box["image_id"] == ref["image_id"]
        assert image["file_name"] == f"COCO_train2014_{ref['image_id']:012d}.jpg"
        assert _is_image(world / "train2014" / image["file_name"]) == (image["width"], image["height"])
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        scene = make_scene(1, "train", ref["image_id"] - 1)
        for sentence in ref["sentences"]:
            (index,) = meaning.find(scene.objects, sentence["raw"])
            assert box["bbox"] == pytest.approx(_xywh(scene.pixel_box(scene.objects[index])), abs=0.01)
            assert clean_caption(sentence["raw"]) == sentence["raw"]
            assert not (folder == "refcoco+" and {"left", "right", "upper", "lower"} & set(sentence["tokens"]))


def _xywh(box: tuple[float, ...]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def test_visual_genome(world):
    images = {image["image_id"]: image for image in _read(world / "visual_genome/image_data.json")}
    for entry in _read(world / "visual_genome/region_descriptions.json"):
        path = images[entry["id"]]["url"].split("/")[-2:]
        width, height = _is_image(world.joinpath("visual_genome", *path))
        for region in entry["regions"]:
            assert region["x"] + region["width"] <= width + 1
            assert region["y"] + region["height"] <= height + 1
            assert region["width"] * region["height"] < 16384


def test_flickr(world):
    folder = world / "flickr30k"
    fields = {
        "groundedcaption": {"image_id", "grounded_caption"},
        "captiontobbox": {"image_id", "caption", "output"},
        "phrasetobbox": {"image_id", "phrase", "bbox"},
    }
    for name, expected in fields.items():
        for entry in _read(folder / f"{name}.json"):
            assert set(entry) == expected
            _is_image(folder / "flickr30k-images" / f"{entry['image_id']}.jpg")
            assert parse_boxes(entry.get("grounded_caption") or entry.get("output") or entry["bbox"])


def test_captions(world):
    for entry in _read(world / "coco_caption/coco_karpathy_train.json"):
        assert set(entry) == {"caption", "image", "image_id"}
        _is_image(world / entry["image"])
        assert entry["caption"] == clean_caption(entry["caption"])
    for entry in _read(world / "textcaps/TextCaps_0.1_train.json")["data"]:
        _is_image(world / f"textcaps/train_images/{entry['image_id']}.jpg")
        assert entry["caption_str"]


def test_questions(world):
    vqa = [*_read(world / "coco_vqa/vqa_train.json"), *_read(world / "coco_vqa/vqa_val.json")]
    assert len(vqa) == 2 * SCENES
    assert len({entry["question_id"] for entry in vqa}) == len(vqa)
    for entry in vqa:
        scene = make_scene(1, "train", int(entry["image"][-16:-4]) - 1)
        assert len(entry["answer"]) == 10
        assert set(entry["answer"]) == {meaning.answer(scene.objects, entry["question"])}
        _is_image(world / entry["image"])
    for entry in _read(world / "ok_vqa/okvqa_train.json"):
        assert set(entry) == {"question_id", "question", "answer", "image", "dataset"}
        _is_image(world / entry["image"])
    for entry in _read(world / "gqa/train_balanced_questions.json"):
        assert {"image", "question", "answer", "question_id", "fullAnswer"} == set(entry)
        _is_image(world / "gqa/images" / entry["image"])
    for entry in _read(world / "aok_vqa/aokvqa_v1p0_train.json"):
        assert entry["direct_answers"] == [entry["choices"][entry["correct_choice_idx"]]] * 10
        assert len(set(entry["choices"])) == 4
        _is_image(world / entry["image"])


def test_ocrvqa(world):
    for key, entry in _read(world / "ocrvqa/dataset.json").items():
        assert len(entry["questions"]) == len(entry["answers"]) > 1
        assert entry["split"] == 1
        _is_image(world / "ocrvqa/images" / f"{key}{Path(entry['imageURL']).suffix}")


def test_text_only(world):
    for entry in _read(world / "unnatural_instruction/filtered_unnatural_instruction.json"):
        (instance,) = entry["instances"]
        assert set(instance) == {"instruction_with_input", "input", "constraints", "output"}
        assert clean_caption(instance["instruction_with_input"]) == instance["instruction_with_input"]


def test_benchmarks_hold_true_facts(world):
    folder = world / "benchmarks"
    for name in BENCHMARKS:
        records = _read(folder / f"{name}.json")
        splits = [record["split"] for record in records]
        expected = [split for split in BENCHMARK_SPLITS if split != "wording" or name in ("vqa", "refer")]
        assert list(dict.fromkeys(splits)) == expected
        assert splits.count("test") >= 12 * (name != "conversation")
        for record in records:
            assert _is_image(folder / "images" / record["image"]) == (record["width"], record["height"])
    for record in _read(folder / "refer.json"):
        assert record["img_id"][:27] + ".jpg" == record["image"]
        assert isinstance(record["sents"], str)
        assert len(record["bbox"]) == 4


def _objects(record) -> tuple[SceneObject, ...]:
    return tuple(SceneObject.from_dict(fields) for fields in record["objects"])


def test_benchmark_records_are_scored_by_meaning(world):
    for record in _read(world / "benchmarks/identify.json"):
        objects = _objects(record)
        assert all(meaning.find(objects, phrase) == [record["index"]] for phrase in record["phrases"])
        if record["split"] == "combination":
            item = objects[record["index"]]
            assert (item.colour, item.shape) in HELD_OUT
    for record in _read(world / "benchmarks/caption.json"):
        objects = _objects(record)
        assert all(meaning.check_caption(objects, caption).all_right for caption in record["captions"])
        for fact in record["facts"]:
            if fact["relation"]:
                words = {"left": "left of", "right": "right of"}.get(fact["relation"], fact["relation"])
                a, b = f"{fact['colour']} {fact['shape']}", f"{fact['other_colour']} {fact['other_shape']}"
                claim = f"a {a} {words} a {b}"
                assert meaning.check_caption(objects, claim).all_right, (claim, record)
    for record in _read(world / "benchmarks/grounding.json"):
        assert {box.box for box in parse_boxes(record["caption"])} == {
            parse_boxes(named["box"])[0].box for named in record["grounded"]
        }


def _digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_world_does_not_depend_on_the_number_of_workers(tmp_path):
    sources = ["laion", "refcoco", "coco_vqa", "gqa", "llava_detail", "unnatural_instruction"]
    seen: list[tuple[int, int]] = []
    for workers in (1, 2):
        write_world(
            tmp_path / str(workers), 8, 8, seed=2, sources=sources, workers=workers, progress=lambda *p: seen.append(p)
        )
    one, two = _digests(tmp_path / "1"), _digests(tmp_path / "2")
    assert one == two
    assert len(one) > 20
    assert seen == seen[: len(seen) // 2] * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen[: len(seen) // 2]) * 2
    assert seen[-1][0] == seen[-1][1] == 8 + 8 + 4 * 2


@pytest.fixture
def sketches(monkeypatch):
    """Scenes that are drawn: a file says which scene it is of."""
    found = []
    monkeypatch.setattr(writers, "encode_jpeg", lambda scene: found.append(scene.key) or str(scene.key).encode())
    return found


def test_a_world_in_several_chunks_holds_what_one_chunk_holds(tmp_path, sketches, monkeypatch):
    sources = ["laion", "cc_sbu", "refcoco", "llava_conversation", "coco_vqa", "invrefcoco"]
    told = []
    for name, chunk in (("one", 500), ("many", 7)):
        monkeypatch.setattr(writers, "CHUNK", chunk)
        sketches.clear(), told.clear()
        listed = write_world(tmp_path / name, 16, 9, 1, sources, progress=lambda *p: told.append(p))
        assert list(listed) == sources == list(_read(tmp_path / name / "sources.json"))
        assert len(sketches) == len(set(sketches)) == 16 + 9 + 4 * 3, "each scene is drawn once"
        assert {key.split for key in sketches} == {"train", *BENCHMARK_SPLITS}
    assert told == [(n, 37) for n in (7, 14, 16, 23, 25, 28, 31, 34, 37)]
    one, many = _digests(tmp_path / "one"), _digests(tmp_path / "many")
    shards = [name for name in (*one, *many) if name.endswith(".tar")]
    assert shards == [
        "cc_sbu/00000.tar", "laion/00000.tar",
        "cc_sbu/00000.tar", "cc_sbu/00001.tar", "laion/00000.tar", "laion/00001.tar", "laion/00002.tar",
    ]  # fmt: skip
    assert {k: v for k, v in one.items() if k not in shards} == {k: v for k, v in many.items() if k not in shards}
    with tarfile.open(tmp_path / "many/laion/00002.tar") as tar:
        assert tar.getnames()[::3] == ["000020000.jpg", "000020001.jpg"]
        assert tar.extractfile("000020001.jpg").read() == str(SceneKey(1, "train", 15)).encode()
    with tarfile.open(tmp_path / "many/cc_sbu/00001.tar") as tar:
        assert tar.getnames()[::3] == ["000010000.jpg"], "every eighth: scene 8"
        assert tar.extractfile("000010000.jpg").read() == str(SceneKey(1, "train", 8)).encode()


def test_without_test_scenes_there_are_no_benchmarks_and_without_a_choice_all_of_the_recipe(tmp_path, sketches):
    listed = write_world(tmp_path, 1, 0)
    assert tuple(listed) == mini_sources() and not (tmp_path / "benchmarks").exists()
    written = {path.name for path in tmp_path.iterdir()}
    assert written <= set(_RESULTS) and {*written, "benchmarks"} >= {SOURCES_FILE, "laion"}, (
        "overwrite=true removes them"
    )
    assert sketches == [SceneKey(0, "train", 0)]
    assert write_world(tmp_path / "none", 3, 0, sources=[]) == {} == _read(tmp_path / "none/sources.json")


def test_one_source_alone(tmp_path):
    listed = write_world(tmp_path, 5, 0, sources=["invrefcoco"])
    assert listed == {"invrefcoco": {"input": "refs/refcoco", "images": "train2014"}}
    assert len(list((tmp_path / "train2014").iterdir())) == 5
    listed = write_world(tmp_path / "laion", 5, 0, seed=1, sources=["laion"])
    assert listed == {"laion": {"input": "laion/*.tar", "images": None}}
    assert (tmp_path / "laion/laion/00000.tar").is_file()


def test_what_is_said_follows_the_seed(tmp_path):
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        write_world(tmp_path / str(number), 8, 0, seed=seed, sources=["coco_caption"])
        texts.append((tmp_path / str(number) / "coco_caption/coco_karpathy_train.json").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_an_unknown_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data set 'imagenet'; it has aok_vqa"):
        write_world(tmp_path, 4, 0, sources=["laion", "imagenet"])
    assert not list(tmp_path.iterdir())
