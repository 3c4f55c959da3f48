"""What the settings of every job have in common: locations, groups, files, and where a mistake was made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest

from pipelines.settings import PrepareDataSettings, ServeSettings, Settings, SettingsError, TrainSettings, base
from pipelines.settings.command_line import Words, parse_words, print_help


def refused(call, *arguments):
    with pytest.raises(SettingsError) as caught:
        call(*arguments)
    return str(caught.value)


# ---------------------------------------------------------------------- where results go


@pytest.mark.parametrize(
    ("output", "location"),
    [
        ("/data/run1", "/data/run1"),
        ("file:///data/run1", "/data/run1"),
        ("s3://bucket/run1//", "s3://bucket/run1"),
        ("memory://bucket/XX/", "memory://bucket/XX"),
        ("", "/by/default"),
        ("file://", "/by/default"),
        ("~/run1", str(Path.home() / "run1")),
    ],
)
def test_an_output_is_an_absolute_path_or_a_uri(output, location):
    assert Settings(output=output).output_location("/by/default") == location


def test_a_relative_output_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Settings(output="runs/1").output_location("x") == str(tmp_path / "runs/1")
    assert Settings().output_location("runs/2") == str(tmp_path / "runs/2")
    (tmp_path / "link").symlink_to(tmp_path)
    assert Settings(output="link/a").output_location("x") == str(tmp_path / "link/a"), "other nodes may link elsewhere"


def test_an_output_folder_is_made_with_its_parents_and_may_be_there(tmp_path):
    settings = Settings(output=str(tmp_path / "deep/er/run"))
    assert settings.output_dir("x") == settings.output_dir("x") == tmp_path / "deep/er/run"
    assert (tmp_path / "deep/er/run").is_dir()


def test_an_output_that_a_job_cannot_use_says_what_to_give(tmp_path, monkeypatch):
    assert refused(Settings(output="s3://bucket/run1").output_dir, "x") == (
        "output=s3://bucket/run1 is a URI: this job writes on this machine's disk; give a folder."
    )
    assert refused(Settings(output="hf://org/name").output_location, "x") == (
        "output=hf://org/name is on the hub, where each file would be a commit: give a folder or a bucket, and "
        "upload a finished checkpoint with `python -m tinygptv.hub push FOLDER org/name`."
    )
    folder = tmp_path / "working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert refused(Settings(output="run1").output_location, "x") == (
        "output=run1 is relative, and Ray removes the working directory of a submitted job after it: give an absolute "
        "path that stays, e.g. output=/data/run1, or a URI, e.g. s3://bucket/run1."
    )
    assert refused(Settings().output_location, "outputs/x").startswith("output=outputs/x is relative")
    assert Settings(output="/data/run1").output_location("x") == "/data/run1"


# ---------------------------------------------------------------------- where a mistake is


def test_a_value_names_its_own_location_or_that_of_the_others():
    wrong = {"seed": -1, "quiet": True}
    assert refused(Settings.parse, wrong, "job.yaml").startswith("job.yaml: seed=-1 is not usable: ")
    assert refused(Settings.parse, wrong, "job.yaml", {"quiet": "a"}).startswith("job.yaml: seed=-1 ")
    assert refused(Settings.parse, wrong, "job.yaml", {"quiet": "a", "seed": "b"}).startswith("b: seed=-1 ")
    message = refused(Settings.parse, {"seeds": 1}, "job.yaml")
    assert message == "job.yaml: unknown key 'seeds'; did you mean 'seed'?"
    message = refused(Settings.parse, {"zzzzzzzz": 1}, "job.yaml")
    assert message == f"job.yaml: unknown key 'zzzzzzzz'; known: {', '.join(sorted(Settings.model_fields))}."


@pytest.mark.security
def test_a_secret_is_not_shown_but_located():
    message = refused(ServeSettings.parse, {"api_keys": ["long-enough-secret", 5]}, "serve.yaml")
    assert message.startswith("serve.yaml: api_keys=... is not usable: ") and "secret" not in message


def test_an_element_of_a_list_is_named_by_its_number():
    message = refused(ServeSettings.parse, {"allowed_image_hosts": ["a.example", "b.example", [1]]}, "serve.yaml")
    assert message.startswith("serve.yaml: allowed_image_hosts.2=[1] is not usable: "), message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "the command line: unknown key 'max_step'; did you mean 'max_steps'?"),
        (
            "train.stage.title=a.b",
            "the command line: 'train.stage.title=a.b' names the section; write 'stage.title=a.b'.",
        ),
        ("train.max_steps=3", "the command line: 'train.max_steps=3' names the section; write 'max_steps=3'."),
        ("sead.x=1", "the command line: unknown key 'sead'; did you mean 'seed'?"),
        ("=3", "cannot read '=3': write settings as key=value."),
        ("seed", "cannot read 'seed': write settings as key=value."),
        ("stage.title.x=1", "cannot set 'stage.title.x': 'title' is a plain value, not a group of settings."),
    ],
)
def test_an_override_that_cannot_be_read_says_what_was_meant(override, message):
    assert refused(TrainSettings.load, None, ["stage.title=x", override]) == message


def test_an_unknown_key_of_the_sections_name_is_unknown():
    message = refused(TrainSettings.load, None, ["train.nonsense=1"])
    assert message.startswith("the command line: unknown key 'train'; ")
    message = refused(TrainSettings.load, None, ["other.max_steps=1"])
    assert message.startswith("the command line: unknown key 'other'; ")


def test_yaml_that_is_damaged_is_one_line():
    message = refused(TrainSettings.load, None, ["stage.sources={a: [1"])
    assert message.startswith("cannot read the value of 'stage.sources={a: [1': ")
    assert message.endswith(".") and "\n" not in message and "  " not in message


@pytest.mark.parametrize("key", ["seed", "num_cpus", "object_store_mb"])
def test_numbers_of_every_job_begin_at_0(key):
    assert getattr(Settings.parse({key: 0}, "x"), key) == 0
    assert refused(Settings.parse, {key: -1}, "x").startswith(f"x: {key}=-1 is not usable: ")


def test_a_seed_is_one_that_every_library_takes():
    assert Settings.parse({"seed": 2**32 - 1}, "x").seed == 2**32 - 1
    message = refused(Settings.parse, {"seed": 1795861234567}, "x")
    assert message == "x: seed=1795861234567 is not usable: Input should be less than or equal to 4294967295."


@pytest.mark.parametrize("key", ["min_side", "min_letters"])
def test_true_is_neither_a_whole_number_nor_a_fraction(key):
    message = refused(PrepareDataSettings.parse, {key: True}, "x")
    assert message == f"x: {key}=True is not usable: a number is wanted, not true or false."
    assert PrepareDataSettings.parse({"quiet": True}, "x").quiet is True


# ---------------------------------------------------------------------- values as text


def test_a_group_is_a_mapping_on_the_command_line():
    assert TrainSettings.load(None, ["stage={title: x, lora_rank: 4}"]).stage == {"title": "x", "lora_rank": 4}
    assert TrainSettings.load(None, ["stage="]).stage == {}
    assert TrainSettings.load(None, ["stage.title="]).stage == {"title": ""}
    assert TrainSettings.load(None, ["stage.sources=", "stage.a.b.c=1"]).stage == {"sources": "", "a": {"b": {"c": 1}}}


def test_a_group_that_is_empty_in_the_file_takes_keys(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("train:\n  stage:\n    sources:\n")
    assert TrainSettings.load(path, ["stage.sources.own=1"]).stage == {"sources": {"own": 1}}


def test_a_list_in_brackets_may_follow_spaces():
    assert ServeSettings.load(None, ["allowed_image_hosts= [a, b] "]).allowed_image_hosts == ["a", "b"]
    assert ServeSettings.load(None, ["allowed_image_hosts= a , ,b]"]).allowed_image_hosts == ["a", "b]"]


def test_kinds_are_the_types_that_an_annotation_names():
    kinds = [list(base._kinds(kind)) for kind in (list[str] | None, dict[str, int], Literal[1, 2], int)]
    assert kinds == [[list, str, type(None)], [dict, str, int], [int], [int]]
    assert set(base._kinds(Literal["a", 2, None] | float)) == {str, int, type(None), float}


def test_every_job_is_found_by_its_section():
    assert base.SECTIONS["train"] is TrainSettings and base.SECTIONS["serve"] is ServeSettings
    assert base.SECTIONS["prepare_data"] is PrepareDataSettings and "" not in base.SECTIONS


# ---------------------------------------------------------------------- files


def test_a_shipped_configuration_is_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainSettings.load("paper.yaml").recipe == TrainSettings.load("configs/paper.yaml").recipe == "paper"
    assert TrainSettings.load("mini.yaml").recipe == "mini"
    (tmp_path / "paper.yaml").write_text("recipe: mini\n")
    assert TrainSettings.load("paper.yaml").recipe == "mini", "a file of one's own wins"
    for name in ("other/paper.yaml", "configs/none.yaml", str(tmp_path / "configs/paper.yaml")):
        message = refused(TrainSettings.load, name)
        assert message == f"configuration {name} does not exist; the shipped ones are in {base.shipped_configs()}."


def test_the_shipped_configurations_of_a_tree_and_of_a_package(tmp_path, monkeypatch):
    assert base.shipped_configs() == base.ROOT / "configs" and (base.ROOT / "configs/paper.yaml").is_file()
    monkeypatch.setattr(base, "ROOT", tmp_path)
    assert base.shipped_configs() == Path(base.__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "holds a list; it must be a mapping of keys."),
        ("5", "holds a int; it must be a mapping of keys."),
        ("a: [", "is no valid YAML: "),
    ],
)
def test_a_file_that_is_no_mapping_says_what_it_is(tmp_path, text, message):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    assert refused(TrainSettings.load, path).startswith(f"configuration {path} {message}")


def test_an_empty_file_has_the_defaults(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("# nothing yet\n")
    assert TrainSettings.load(path) == TrainSettings()
    path.write_text("train:\nseed: 3\n")
    assert TrainSettings.load(path).seed == 3


def test_a_mistake_is_told_where_it_was_made(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("seed: -1\ntrain: {stage: [1], max_steps: -1}\n")
    for overrides, start in (
        ((), f"{path}: seed=-1"),
        (("seed=0",), f"{path}, section train: "),
        (("seed=-2",), "the command line: seed='-2'"),
        (("seed=0", "max_steps=-3"), "the command line: max_steps='-3'"),
    ):
        changed = list(overrides)
        assert refused(TrainSettings.load, path, changed).startswith(start), changed
    path.write_text("train: {stage: {title: a}}\n")
    with pytest.raises(SettingsError) as caught:
        TrainSettings.parse({"stage": 3}, "here", {"stage": "there"})
    assert str(caught.value).startswith("there: stage=3")


def test_a_section_that_is_a_list_is_shown(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("train: [1]\n")
    message = refused(TrainSettings.load, path)
    assert message == f"{path}: section 'train' holds [1]; it must be a mapping of keys."
    path.write_text("trian: {}\n2: 3\n")
    assert refused(TrainSettings.load, path).startswith(f"{path}: unknown key '2'; "), "the first one"
    path.write_text("trian: {}\n")
    assert refused(TrainSettings.load, path) == f"{path}: unknown key 'trian'; did you mean 'train'?"


# ---------------------------------------------------------------------- the command line


def test_the_words_of_the_process_are_read_where_none_are_given(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "seed=3", "max_steps=5"])
    loaded = TrainSettings.from_command_line(None, "x")
    assert (loaded.seed, loaded.max_steps) == (3, 5)
    assert TrainSettings.from_command_line([], "x").seed == 0


@pytest.mark.parametrize(("description", "shown"), [("what it does", "what it does"), (None, "")])
def test_help_has_the_jobs_description(capsys, description, shown):
    with pytest.raises(SystemExit) as ended:
        TrainSettings.from_command_line(["--help"], description)
    assert ended.value.code == 0
    before_keys = capsys.readouterr().out.partition("keys, ")[0]
    without_usage = re.sub(r"(?s)^usage:.*?\n\n", "", before_keys)
    assert without_usage.startswith(shown) and "XX" not in before_keys


def test_help_is_a_column_of_values_and_one_of_texts(capsys):
    fields = {"data": Settings.model_fields["output"], "x": Settings.model_fields["seed"]}
    for config, told in (
        ("a.yaml", "keys, with the values of a.yaml:"),
        (None, "keys, with their defaults; --config FILE --help shows a file's:"),
    ):
        print_help(fields, {"data": "d" * 40, "x": 5}, "What it does.", config)
        shown = capsys.readouterr().out
        assert shown.partition("\n")[0].startswith("usage: ") and "[-h] [--config FILE] [key=value ...]" in shown
        texts = (f"  {'x=5':32}  {fields['x'].description}", f"  data={'d' * 40}  {fields['data'].description}")
        assert shown.splitlines()[-3:] == [told, texts[1], texts[0]]
    for told in ("show this text and exit", "YAML file, e.g. configs/mini.yaml", "override the file's values"):
        assert told in shown
    print_help({"x": fields["x"]}, {"x": 5}, "", None)
    assert capsys.readouterr().out.endswith(f"\n  x=5  {fields['x'].description}\n"), "no wider than its values"


def test_options_are_written_out():
    fields = TrainSettings.model_fields
    for word in ("--conf", "--dry", "--packin"):
        assert refused(parse_words, fields, [word]).startswith(f"{word} is no option: write settings as key=VALUE")
    words = parse_words(fields, ["a=1", "--config", "x.yaml", "--packing", "b=2"])
    assert words == Words("x.yaml", ["a=1", "b=2", "packing=true"], False)
    assert parse_words(fields, ["-h"]) == parse_words(fields, ["--help"]) == Words(None, [], True)
