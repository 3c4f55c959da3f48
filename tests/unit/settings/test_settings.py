"""Settings: files, sections, overrides, bounds, and one sentence for each mistake."""

from __future__ import annotations

import re

import pytest
from pydantic import SecretStr

from pipelines.settings import (
    SECTIONS,
    AblateSettings,
    CacheFeaturesSettings,
    PlanMemorySettings,
    PrepareDataSettings,
    QuantizeSettings,
    ReleasedSettings,
    ScoreSettings,
    ServeSettings,
    Settings,
    SettingsError,
    TrainSettings,
)
from pipelines.settings.command_line import _value
from tinygptv.quantization.artifact import METHODS


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "outputs/set #2",
        "2024",
        "*.jsonl",
        "[ab]*.tar",
        "{00000..00012}.tar",
        "a: b",
        "on",
        "null",
        "~/data",
        "s3://bucket/a?region=x",
        "'quoted'",
        " spaced ",
        "a=b",
        "%2e",
        "",
    ],
)
def test_a_text_key_takes_its_value_as_it_is_written(text):
    assert PrepareDataSettings.load(None, [f"input={text}"]).input == text


def test_numbers_booleans_and_choices_are_read_from_the_command_line():
    loaded = PrepareDataSettings.load(
        None, ["min_side=12", "min_letters=5e-1", "quiet=on", "duplicates=keep", "num_workers="]
    )
    assert (loaded.min_side, loaded.min_letters, loaded.quiet, loaded.duplicates) == (12, 0.5, True, "keep")
    assert loaded.num_workers is None
    assert PrepareDataSettings.load(None, ["num_workers=null"]).num_workers is None
    assert PrepareDataSettings.load(None, ["num_workers=3"]).num_workers == 3
    assert TrainSettings.load(None, ["encoder_precision=bf16"]).encoder_precision == "bf16"
    assert TrainSettings.load(None, ["guard=off"]).guard == "off"
    assert TrainSettings.load(None, ["encoder_precision="]).encoder_precision is None


@pytest.mark.parametrize("kind", [QuantizeSettings, ReleasedSettings])
def test_methods_are_those_of_the_library(kind):
    for method in METHODS:
        assert kind.load(None, [f"method={method}"]).method == method
    with pytest.raises(SettingsError) as error:
        kind.load(None, ["method=gguf"])
    assert str(error.value).startswith("the command line: method='gguf' is not usable: Input should be ")
    assert all(f"'{method}'" in str(error.value) for method in METHODS)


def test_help_says_what_each_method_is_for():
    assert set(METHODS) <= set(re.findall(r"\w+", QuantizeSettings.model_fields["method"].description or ""))


@pytest.mark.parametrize(
    ("kind", "override", "value"),
    [
        (ScoreSettings, "benchmark=[vqa, 2024, on]", ["vqa", "2024", "on"]),
        (ScoreSettings, "benchmark=vqa", "vqa"),
        (AblateSettings, "variants=[full, 'stage.lora_rank=4']", ["full", "stage.lora_rank=4"]),
        (AblateSettings, "stages=1,3", [1, 3]),
        (CacheFeaturesSettings, "sources=laion", ["laion"]),
        (CacheFeaturesSettings, "sources=", []),
    ],
)
def test_lists_are_written_with_brackets_or_commas(kind, override, value):
    loaded = kind.load(None, [override])
    assert getattr(loaded, override.partition("=")[0]) == value


def test_groups_of_settings_are_yaml():
    loaded = TrainSettings.load(None, ["stage.schedule.peak=5e-2", "stage.sources={own: {weight: 1}}", "stage.title=x"])
    assert loaded.stage == {"schedule": {"peak": 0.05}, "sources": {"own": {"weight": 1}}, "title": "x"}
    with pytest.raises(SettingsError, match="'title' is a plain value"):
        TrainSettings.load(None, ["stage.title=x", "stage.title.more=y"])


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        (PrepareDataSettings, "min_side=0"),
        (PrepareDataSettings, "min_side=true"),
        (PrepareDataSettings, "image_size=2.5"),
        (PrepareDataSettings, "jpeg_quality=101"),
        (PrepareDataSettings, "max_megapixels=nan"),
        (PrepareDataSettings, "max_megapixels=inf"),
        (PrepareDataSettings, "duplicates=maybe"),
        (TrainSettings, "micro_batch_size=0"),
        (TrainSettings, "num_workers=-1"),
        (TrainSettings, "max_steps=ten"),
    ],
)
def test_a_value_out_of_its_bounds_is_one_sentence_with_key_and_value(kind, override):
    key, _, value = override.partition("=")
    with pytest.raises(SettingsError, match=rf"^the command line: {key}='{value}' is not usable: ") as error:
        kind.load(None, [override])
    assert "\n" not in str(error.value)


def test_true_is_no_number_in_a_file_either(tmp_path):
    with pytest.raises(SettingsError, match="min_side=True is not usable: a number is wanted"):
        PrepareDataSettings.load(write(tmp_path, "prepare_data: {min_side: true}"))


def test_a_section_wins_over_common_keys_and_overrides_over_both(tmp_path):
    path = write(tmp_path, "seed: 1\nquiet: true\nprepare_data:\n  seed: 2\n  min_side: 9\ntrain:\n  seed: 3\n")
    assert PrepareDataSettings.load(path).seed == 2
    assert TrainSettings.load(path).seed == 3
    assert ScoreSettings.load(path).seed == 1
    assert ScoreSettings.load(path).quiet is True
    loaded = PrepareDataSettings.load(path, ["seed=4"])
    assert (loaded.seed, loaded.min_side) == (4, 9)


def test_files_hold_the_scalars_of_yaml_1_2(tmp_path):
    path = write(
        tmp_path, "\ufeffrecipe: mini\ntrain:\n  guard: off\n  guard_vanishing: 1e-12\n  stage: {lr: 5e-2, at: 12:30}\n"
    )
    loaded = TrainSettings.load(path)
    assert (loaded.guard, loaded.guard_vanishing) == ("off", 1e-12)
    assert loaded.stage == {"lr": 0.05, "at": "12:30"}
    path = write(tmp_path, "prepare_data: {name: 2024, input: 007, quiet: yes}")
    loaded = PrepareDataSettings.load(path)
    assert (loaded.name, loaded.quiet) == ("2024", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {}\n", "unknown key 'trian'; did you mean 'train'"),
        ("prepare_data: {min_sides: 3}\n", "unknown key 'min_sides'; did you mean 'min_side'"),
        ("prepare_data: [1]\n", "section 'prepare_data' holds .* must be a mapping"),
        ("- a\n", "must be a mapping of keys"),
        ("a: [\n", "no valid YAML"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        PrepareDataSettings.load(write(tmp_path, text))


def test_a_file_that_is_missing_or_of_another_encoding(tmp_path):
    with pytest.raises(SettingsError, match=r"does not exist; the shipped ones are in .*configs"):
        PrepareDataSettings.load(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="no valid YAML"):
        PrepareDataSettings.load(write(tmp_path, "recipe: m\xefni", "latin-1"))


@pytest.mark.security
def test_secrets_are_never_shown_in_errors():
    with pytest.raises(SettingsError, match=r"api_keys=\.\.\. is not usable") as error:
        ServeSettings.parse({"api_keys": "hunter2"}, "config.yaml")
    assert "hunter2" not in str(error.value)
    assert error.value.__cause__ is None, "the cause would show the value"


def test_the_command_line_ends_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        PrepareDataSettings.from_command_line(["min_side=0"], "x")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: the command line: min_side='0'")
    assert PrepareDataSettings.from_command_line(["--quiet", "input=a b"], "x").quiet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_step=3"], "the command line: unknown key 'max_step'; did you mean 'max_steps'"),
        (["train.max_steps=3"], "'train.max_steps=3' names the section; write 'max_steps=3'"),
        (["keep_checkpoints=x"], "the command line: keep_checkpoints='x' is not usable"),
        (["--max-steps=3"], "--max-steps=3 is no option: write settings as max_steps=VALUE"),
        (["nonsense.x=1"], "the command line: unknown key 'nonsense'"),
        (["data"], "cannot read 'data': write settings as key=value"),
    ],
)
def test_mistakes_on_the_command_line_say_where_and_what_was_meant(tmp_path, capsys, words, message):
    config = write(tmp_path, "train: {max_steps: 4}")
    with pytest.raises(SystemExit):
        TrainSettings.from_command_line(["--config", str(config), *words], "x")
    assert message in capsys.readouterr().err


def test_mistakes_in_a_section_name_file_and_section(tmp_path):
    config = write(tmp_path, "train: {max_steps: -4}\nseed: 1")
    with pytest.raises(SettingsError, match=r"config.yaml, section train: max_steps=-4"):
        TrainSettings.load(config)
    with pytest.raises(SettingsError, match=r"config.yaml, section train: seed='x'"):
        TrainSettings.load(write(tmp_path, "seed: 1\ntrain: {seed: x}"))
    with pytest.raises(SettingsError, match=r"config.yaml: seed='x'"):
        TrainSettings.load(write(tmp_path, "seed: x\ntrain: {max_steps: 1}"))
    config = write(tmp_path, "train: {max_steps: -4}\nseed: 1")
    with pytest.raises(SettingsError, match=r"^the command line: seed='x'"):
        TrainSettings.load(config, ["max_steps=1", "seed=x"])


@pytest.mark.parametrize("kind", SECTIONS.values(), ids=SECTIONS)
def test_help_shows_every_key_with_the_value_that_will_be_used(tmp_path, capsys, kind):
    config = write(tmp_path, f"seed: 7\n{kind.section}: {{num_cpus: 3}}")
    assert _value([]) == "[]" and _value([SecretStr("hush")]) == "..." == _value(SecretStr("hush"))
    assert (
        _value([1, "a"]) == "[1, a]"
        and _value({"a": {"b": True, "c": 1}}) == "{a: {b: true, c: 1}}"
        and _value(None) == ""
    )
    with pytest.raises(SystemExit) as ended:
        kind.from_command_line(["--help", "--config", str(config), "quiet=true"], "what it does")
    assert ended.value.code == 0
    keys = capsys.readouterr().out.partition("\nkeys, with the values of ")[2].splitlines()[1:]
    assert [key.strip().partition("=")[0] for key in keys] == list(kind.model_fields)
    starts = [key.split()[0] for key in keys]
    assert {"seed=7", "num_cpus=3", "quiet=true"} <= set(starts)
    assert not any("Undefined" in key or "None" in key for key in keys)


def test_results_are_not_written_to_the_hub():
    for kind in (TrainSettings, PrepareDataSettings):
        with pytest.raises(SettingsError, match=r"output=hf://org/name is on the hub.*tinygptv.hub push FOLDER"):
            kind(output="hf://org/name").output_location("outputs")


def test_a_relative_output_of_a_submitted_job_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(SettingsError, match="output=outputs/x is relative, and Ray removes"):
        TrainSettings().output_dir("outputs/x")
    assert TrainSettings(output=str(tmp_path / "kept")).output_dir("x") == tmp_path / "kept"


def test_every_section_belongs_to_one_job():
    sections = [kind.section for kind in Settings.__subclasses__()]
    assert len(set(sections)) == len(sections)


def test_switches_are_written_as_options_too():
    for words, value in ((["--dry-run"], True), (["dry_run=true"], True), ([], False)):
        assert TrainSettings.from_command_line(words, "x").dry_run is value
    loaded = TrainSettings.from_command_line(["data=a", "--use-gpu", "max_steps=3"], "x")
    assert (loaded.data, loaded.use_gpu, loaded.max_steps, loaded.packing) == ("a", True, 3, False)


@pytest.mark.security
def test_help_shows_no_key_of_the_service(tmp_path, capsys):
    config = write(tmp_path, "serve: {api_keys: [hunter2]}")
    with pytest.raises(SystemExit):
        ServeSettings.from_command_line(["--help", "--config", str(config)], "x")
    out = capsys.readouterr().out
    assert "api_keys=..." in out and "hunter2" not in out and "SecretStr" not in out


@pytest.mark.parametrize(
    ("given", "value"), [("true", "on"), ("false", "off"), ("on", "on"), ("off", "off"), ("auto", "auto")]
)
def test_compile_is_a_switch_with_a_third_position(tmp_path, given, value):
    assert TrainSettings.load(None, [f"compile={given}"]).compile == value
    assert TrainSettings.load(write(tmp_path, f"train: {{compile: {given}}}")).compile == value


def test_a_memory_plan_reads_the_trainings_keys_and_its_own_win(tmp_path):
    config = write(
        tmp_path,
        "recipe: paper\ntrain: {precision: bf16, micro_batch_size: 3, packing: true, attention: eager}\n"
        "plan_memory: {micro_batch_size: 2, train: {packing: false}}",
    )
    loaded = PlanMemorySettings.load(config, ["train.attention=sdpa", "gpu=8GB"])
    found = loaded.train_settings()
    assert (loaded.gpu, found.recipe, found.precision, found.micro_batch_size) == ("8GB", "paper", "bf16", 2)
    assert (found.packing, found.attention, found.use_gpu) == (False, "sdpa", True)
    own = PlanMemorySettings.load(config, ["precision=fp16", "features=cached"]).train_settings()
    assert (own.precision, own.features) == ("fp16", "cached")
    with pytest.raises(SettingsError, match=r"^plan_memory: seed=-1 is not usable"):
        PlanMemorySettings(train={"seed": -1}).train_settings()
    with pytest.raises(SettingsError, match="unknown key 'attentionn'; did you mean 'attention'"):
        PlanMemorySettings.load(config, ["train.attentionn=sdpa"])


@pytest.mark.security
def test_a_key_that_is_no_key_is_refused_and_a_sound_one_taken():
    with pytest.raises(SettingsError, match="api_keys= names no key"):
        ServeSettings.load(None, ["port=1", "api_keys="])
    for text, keys in (("a1,b2", ["a1", "b2"]), ("YTE=", ["YTE="])):
        assert [key.get_secret_value() for key in ServeSettings.load(None, [f"api_keys={text}"]).api_keys] == keys
    read = ServeSettings.parse({"api_keys": ["a1"]}, "x").api_keys
    assert ServeSettings.parse({"api_keys": read}, "x").api_keys == read, "keys that were read before"
    for keys in (["a", ""], [" a"], ["a\n"], [3], "a"):
        with pytest.raises(SettingsError, match="api_keys"):
            ServeSettings.parse({"api_keys": keys}, "x")


@pytest.mark.security
@pytest.mark.parametrize(
    ("name", "good", "kept", "bad"),
    [
        ("trusted_proxies", ["10.0.0.1", "10.0.0.0/8", "2001:db8::/64"], None, ["nginx", "*", "10.0.0.1:80", ""]),
        (
            "cors_origins",
            ["*", "null", "https://A.example/", "http://localhost:3000", "chrome-extension://ab"],
            ["*", "null", "https://a.example", "http://localhost:3000", "chrome-extension://ab"],
            ["a.example", "https://a.example/app", "https://*.a.example", ""],
        ),
        (
            "allowed_image_hosts",
            ["a.example", "a.example:8080", "m\u00fcnchen.example"],
            ["a.example", "a.example:8080", "xn--mnchen-3ya.example"],
            ["https://a.example", "a.example/", "*.a.example", "*", "user@a.example", ""],
        ),
    ],
)
def test_an_entry_that_would_match_nobody_is_refused(name, good, kept, bad):
    assert getattr(ServeSettings.parse({name: good}, "x"), name) == (kept or good)
    for entry in bad:
        with pytest.raises(SettingsError, match=rf"^x: {name}=.* {re.escape(repr(entry))} is no "):
            ServeSettings.parse({name: [entry]}, "x")
