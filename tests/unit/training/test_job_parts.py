"""How settings become a job: which paths, which rows, which plan, what is checked and claimed in which order."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from pipelines import storage
from pipelines.fingerprint import Fingerprint
from pipelines.progress import PROGRESS_FILE
from pipelines.settings import SettingsError, TrainSettings
from pipelines.tracking.described import run_title
from pipelines.tracking.identity import RUN_FILE
from pipelines.tracking.outbox import JOURNAL_FILE
from pipelines.training import job as module
from pipelines.training.job import (
    DRIVER_FILES,
    RESULTS,
    TrainJob,
    _hold_out,
    _load_plan,
    refuse_other_model,
    refuse_trained_parts,
    resolve_paths,
    training_fingerprint,
    with_start_adapters,
)
from pipelines.training.ray_entry import WORKER_RESULT
from pipelines.training.record import WORKER_FILES
from pipelines.training.result import RESULT_FILE
from pipelines.training.run import LOSS_PLOT
from pipelines.training.worker_failures import FAILURES_FILE
from tinygptv.miniature.tiny import tiny_config
from tinygptv.training.stages import get_stage

pytestmark = pytest.mark.usefixtures("still_titles")

STAGE = get_stage("mini", 4)


@pytest.mark.parametrize(
    ("changes", "evaluates"), [({}, False), ({"eval_data": "x"}, True), ({"eval_fraction": 0.1}, True)]
)
def test_a_job_names_itself_and_knows_whether_it_evaluates(changes, evaluates):
    job = TrainJob(TrainSettings(recipe="paper", **changes), STAGE, None, 3, "out")
    assert job.title == run_title("paper", f"stage 4 {STAGE.title}") and job.evaluates is evaluates


def test_files_of_the_workers_and_of_the_driver_are_results():
    assert DRIVER_FILES == (RUN_FILE, RESULT_FILE, JOURNAL_FILE)
    others = (
        "checkpoint",
        "states",
        "config.yaml",
        "ray_train",
        LOSS_PLOT,
        PROGRESS_FILE,
        WORKER_RESULT,
        FAILURES_FILE,
    )
    assert set(RESULTS) == {*WORKER_FILES, *DRIVER_FILES, *others} and len(set(RESULTS)) == len(RESULTS)


# ---------------------------------------------------------------------- paths


def test_local_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(module, "reachable_uri", lambda *a: asked.append(a) or "tracked")
    found = resolve_paths(
        TrainSettings(init_from="start", data="data", eval_data="held", storage_path="shared", output="mine"), 4, "out"
    )
    here = {"init_from": "start", "data": "data", "eval_data": "held", "storage_path": "shared"}
    assert {name: getattr(found, name) for name in here} == {
        name: f"{tmp_path}/{value}" for name, value in here.items()
    }
    assert (found.output, found.tracking_uri) == ("out", "tracked") and asked == [("", "shared")]
    bare = resolve_paths(TrainSettings(init_from="s3://b/start", data="s3://b/data", tracking_uri="x"), 4, "s3://b/out")
    assert (bare.init_from, bare.data, bare.eval_data, bare.storage_path) == ("s3://b/start", "s3://b/data", "", "")
    assert asked[1] == ("x", "s3://b/out"), "the tracker is reached from where the results are written"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": "d"}, r"stage 3 needs a start: give init_from=DIR"),
        ({"init_from": "s"}, r"stage 3 needs data=DIR"),
    ],
)
def test_what_a_stage_needs_is_told_with_its_number(changes, told):
    with pytest.raises(SettingsError, match=told):
        resolve_paths(TrainSettings(**changes), 3, "out")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_rnk": 3}, "stage.lora_rnk is no field of a stage; did you mean 'lora_rank'?"),
        ({"limits": {"max_txt_tokens": 3}}, "'max_txt_tokens' is unknown; did you mean 'max_text_tokens'?"),
        ({"limits": 3}, "stage.limits=3 is not usable: a mapping of max_text_tokens, "),
        ({"trainable": "lora"}, "stage.trainable='lora' is not usable: a list of parts is wanted"),
        (
            {"sources": {"a": {"weight": 1}}},
            "source 'a' is not one of the stage's; a new one needs weight and batch_size",
        ),
        (
            {"sources": [{"name": "a"}]},
            "write {NAME: {weight: 1, batch_size: 1}} or [{name: NAME, weight: 1, batch_size: 1}]",
        ),
        (
            {"sources": {"gqa": {"weight": 1, "size": 2}}},
            "write {NAME: {weight: 1, batch_size: 1}} or [{name: NAME, weight: 1, batch_size: 1}]",
        ),
        (
            {"schedule": {"peak": -1}},
            "={'peak': -1} is not usable: schedule.peak is -1; it must be a number of at least 0.",
        ),
        ({"beta2": 7}, "beta2"),
        ({"beta2": 1}, "beta2 is 1, with which AdamW"),
        ({"template": ["human"]}, "template ['human']; known: "),
        ({"limits": {"mask_inner_bos": "off"}}, "limits.mask_inner_bos is 'off'; it must be true or false."),
    ],
)
def test_a_wrong_field_of_a_stage_is_named_with_the_right_one(changes, told):
    with pytest.raises(SettingsError) as caught:
        module.apply_stage_settings(STAGE, changes)
    assert told in str(caught.value) and not str(caught.value).endswith("..")


def test_fields_are_changed_at_any_depth():
    changed = module.apply_stage_settings(
        STAGE,
        {
            "weight_decay": 5e-3,
            "schedule": {"peak": 2e-4},
            "sources": {"gqa": {"weight": 1e1}},
            "trainable": ["lora", "projector"],
        },
    )
    assert changed.trainable == ("lora", "projector")
    weights = {source.name: source.weight for source in changed.sources}
    assert (changed.weight_decay, changed.schedule.peak, weights["gqa"]) == (5e-3, 2e-4, 10.0)
    both = {"x": {"weight": 2, "batch_size": 3}, "a": {"weight": 1, "batch_size": 4}}
    for given in (both, [{"name": name, **fields} for name, fields in both.items()]):
        sources = module.apply_stage_settings(STAGE, {"sources": given}).sources
        assert [(s.name, s.weight, s.batch_size) for s in sources] == [("x", 2, 3), ("a", 1, 4)], "in the given order"


@pytest.mark.parametrize("as_list", [False, True])
def test_a_source_of_weight_0_is_left_out_and_a_number_can_be_its_name(as_list):
    given = {2024: {"weight": 1, "batch_size": 2}, "a": {"weight": 0, "batch_size": 1}}
    given = [{"name": name, **fields} for name, fields in given.items()] if as_list else given
    (source,) = module.apply_stage_settings(STAGE, {"sources": given}).sources
    assert (source.name, source.weight, source.batch_size) == ("2024", 1, 2)
    changed = module.apply_stage_settings(STAGE, {"sources": {"gqa": {"weight": 0}}})
    assert changed.sources == tuple(source for source in STAGE.sources if source.name != "gqa")


def test_the_configuration_that_is_kept_has_no_password():
    settings = TrainSettings(init_from="s3://key:secret@host/start", tracking_uri="http://me:secret@host")
    found = module.resolved_config(settings, STAGE)
    assert "secret" not in str(found) and found["init_from"].endswith("host/start")
    assert found["stage"]["number"] == 4 and set(found) == {*settings.model_dump(), "stage"}


# ---------------------------------------------------------------------- held-out rows


SHARDS = {"a": range(10), "b": range(4)}


def test_rows_are_held_out_by_their_share_and_counted(monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = []
    held = {"a": np.array([1, 4]), "b": np.array([], dtype=int)}
    monkeypatch.setattr(module, "hold_out", lambda *a: asked.append(a) or held)
    assert _hold_out(TrainSettings(eval_fraction=0.2), SHARDS) is held and asked == [(SHARDS, 0.2)]
    assert caplog.messages == ["a: 2 of 10 rows are held out of training", "b: 0 of 4 rows are held out of training"]
    assert _hold_out(TrainSettings(), SHARDS) == {} and len(asked) == 1


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"a": np.arange(2), "b": np.arange(4)}, "eval_fraction=0.2 leaves no row of b to train on"),
        ({"a": np.arange(0), "b": np.arange(0)}, "eval_fraction=0.2 holds out none of so few rows"),
    ],
)
def test_nothing_to_train_on_and_nothing_held_out_are_refused(monkeypatch, held, told):
    monkeypatch.setattr(module, "hold_out", lambda shards, fraction: held)
    with pytest.raises(SettingsError, match=told):
        _hold_out(TrainSettings(eval_fraction=0.2), SHARDS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"early_stop": 2}, "^early_stop needs held-out rows: give eval_data=DIR or eval_fraction=0.05"),
        ({"use_best": True}, "^use_best needs held-out rows"),
        ({"eval_data": "x", "eval_fraction": 0.1}, "^eval_data and eval_fraction are both given: give the one that"),
    ],
)
def test_held_out_rows_are_asked_for_where_they_decide(changes, told):
    with pytest.raises(SettingsError, match=told):
        _hold_out(TrainSettings(**changes), SHARDS)


def test_either_kind_of_held_out_rows_decides_an_end(monkeypatch):
    asked = []
    rows = {"x/a": 0, "x/b": 1}
    monkeypatch.setattr(module, "refuse_no_folder", lambda *given: asked.append(given))
    monkeypatch.setattr(module, "find_shard_sets", lambda folder: list(rows))
    monkeypatch.setattr(module, "ShardSet", SimpleNamespace(open=lambda folder: range(rows[folder])))
    assert _hold_out(TrainSettings(early_stop=2, use_best=True, eval_data="x"), SHARDS) == {}
    assert asked == [("eval_data", "x", "held-out shard sets")]
    asked.clear()
    rows["x/b"] = 0
    with pytest.raises(SettingsError, match=r"^eval_data=x holds no row"):  # their loss would be 0
        _hold_out(TrainSettings(use_best=True, eval_data="x"), SHARDS)
    held = {"a": np.array([1]), "b": np.array([2])}
    monkeypatch.setattr(module, "hold_out", lambda shards, fraction: held)
    assert _hold_out(TrainSettings(early_stop=2, use_best=True, eval_fraction=0.1), SHARDS) is held and len(asked) == 1


# ---------------------------------------------------------------------- the plan and the adapters


@pytest.mark.parametrize(("setting", "size"), [("auto", 1), (5, 5)])
@pytest.mark.parametrize("features", ["inline", "cached"])
def test_the_plan_of_the_loader_has_what_the_settings_and_the_start_say(monkeypatch, setting, size, features):
    monkeypatch.setattr(module, "feature_key", lambda start, side: f"{start} at {side}")
    settings = TrainSettings(data="data", init_from="start", seed=7, micro_batch_size=setting, features=features)
    config = SimpleNamespace(image_token_id=9, num_query_tokens=5)
    plan = _load_plan(settings, STAGE, "local", config)
    assert (plan.data, plan.tokenizer, plan.seed, plan.stage) == ("data", "start", 7, STAGE)
    assert (plan.image_token_id, plan.num_query_tokens, plan.micro_batch_size, plan.pack_length) == (9, 5, size, 0)
    assert plan.feature_key == ("local at 128" if features == "cached" else "")


@pytest.mark.parametrize(
    ("start", "stage", "found", "named"),
    [
        ((0, 16), (4, 8), (4, 8), []),
        ((2, 16), (0, 8), (0, 8), []),
        ((4, 8), (4, 8), (4, 8), []),
        ((2, 8), (4, 8), (2, 8), ["stage.lora_rank=4 is ignored: the start has LoRA adapters of rank 2"]),
        (
            (2, 16),
            (4, 8),
            (2, 16),
            ["stage.lora_rank=4 is ignored: the start has LoRA adapters of rank 2", "stage.lora_alpha=8 is ignored"],
        ),
    ],
)
def test_adapters_of_the_start_keep_their_size(caplog, start, stage, found, named):
    config = SimpleNamespace(lora_rank=start[0], lora_alpha=start[1], lora_dropout=0.9)
    given = replace(STAGE, lora_rank=stage[0], lora_alpha=stage[1], lora_dropout=0.25)
    result = with_start_adapters(given, config)
    assert (result.lora_rank, result.lora_alpha, result.lora_dropout) == (*found, 0.25)
    assert len(caplog.messages) == len(named)
    fix = "and these are trained. A start without them (merged) gets new ones."
    for message, text in zip(caplog.messages, named, strict=True):
        assert message.startswith(text) and message.endswith(fix)


@pytest.mark.parametrize(
    ("stage", "start_rank", "message"),
    [
        ({"image_size": 28}, 0, ""),
        ({"image_size": 30}, 0, "stage.image_size=30 is no multiple of 14, the side of a patch."),
        ({"lora_rank": 0}, 2, ""),
        ({"lora_rank": 0}, 0, "stage.trainable names lora, and neither the start nor the stage has adapters"),
        ({"lora_rank": 0, "trainable": ("projector",)}, 0, ""),
    ],
)
def test_a_start_that_cannot_be_the_stages_model_is_refused(stage, start_rank, message):
    given = replace(STAGE, **{"image_size": 28, **stage})
    with pytest.raises(SettingsError, match=message) if message else nullcontext():
        refuse_other_model(given, tiny_config(lora_rank=start_rank))


@pytest.mark.parametrize(
    ("given", "trainable", "message"),
    [
        (
            {"frozen_weights": "nf4"},
            ("language_model", "lora"),
            "frozen_weights=nf4: stage.trainable names language_model",
        ),
        ({"frozen_weights": "full", "features": "cached"}, ("language_model",), ""),
        ({"frozen_weights": "int8", "features": "cached"}, ("projector", "lora"), ""),
        (
            {"features": "cached"},
            ("lora", "qformer"),
            "features=cached: stage.trainable names qformer, .*features=inline",
        ),
        ({"features": "cached"}, ("qformer", "vision_encoder"), "names vision_encoder and qformer"),
        ({"features": "inline"}, ("qformer", "vision_encoder"), ""),
    ],
)
def test_what_is_kept_in_low_bits_or_cached_does_not_train(given, trainable, message):
    with pytest.raises(SettingsError, match=message) if message else nullcontext():
        refuse_trained_parts(TrainSettings(**given), replace(STAGE, trainable=trainable))


@pytest.mark.parametrize(("encoder", "precision"), [(None, "bf16"), ("fp32", "fp32")])
def test_the_identity_of_a_training_has_all_that_decides_its_weights(tmp_path, monkeypatch, encoder, precision):
    monkeypatch.setattr(module, "checkpoint_digest", lambda folder: f"digest of {folder.name}")
    settings = TrainSettings(recipe="paper", seed=5, precision="bf16", encoder_precision=encoder)
    found = training_fingerprint(settings, STAGE, tmp_path / "start", {"gqa": "9f"})
    sources = {source.name: {"weight": source.weight, "batch_size": source.batch_size} for source in STAGE.sources}
    stage = json.loads(json.dumps({**asdict(STAGE), "sources": sources, "source_order": list(sources)}))
    assert len(sources) == len(STAGE.sources) > 2
    assert found == Fingerprint.of(
        "train",
        recipe="paper",
        seed=5,
        precision="bf16",
        encoder_precision=precision,
        start="digest of start",
        data={"gqa": "9f"},
        stage=stage,
    )
    assert found.inputs["stage.sources.gqa.batch_size"] == sources["gqa"]["batch_size"]


@pytest.mark.parametrize(("fraction", "other"), [(0.1, 0.2), (0.1, 0.0)])
def test_another_share_of_held_out_rows_is_another_training(tmp_path, monkeypatch, fraction, other):
    monkeypatch.setattr(module, "checkpoint_digest", str)
    made = [training_fingerprint(TrainSettings(eval_fraction=each), STAGE, tmp_path, {}) for each in (fraction, other)]
    assert made[0].inputs != made[1].inputs
    assert made[0].inputs["eval_fraction"] == fraction


def test_rows_of_the_trained_sets_are_no_data_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_shard_sets", lambda folder: pytest.fail("no folder is given"))
    inputs = module._held_out_inputs(TrainSettings(eval_fraction=0.1, early_stop=2, eval_every=7, eval_rows=9))
    assert inputs.pop("eval_data") == module.digest_of([])
    assert inputs == {"eval_fraction": 0.1, "eval_every": 7, "eval_rows": 9, "early_stop": 2, "use_best": False}


# ---------------------------------------------------------------------- a whole job


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """Resolve a job whose parts note that they were asked."""

    def resolve(*, feature_key="", **changes):
        notes = []

        def note(name, result=None):
            return lambda *a, **k: notes.append((name, *a, *([k] if k else []))) or result

        shards = {
            name: SimpleNamespace(uri=f"{name}/uri", manifest=SimpleNamespace(digest=f"{name} digest"))
            for name in ("a", "b")
        }
        plan = replace(_load_plan(TrainSettings(), STAGE, "local", tiny_config()), feature_key=feature_key)
        monkeypatch.setattr(module, "checked_checkpoint", note("start", "local"))
        monkeypatch.setattr(module.storage, "check_access", note("access"))
        monkeypatch.setattr(module, "refuse_unwritable", note("unwritable"))
        monkeypatch.setattr(module, "refuse_no_folder", note("folder"))
        monkeypatch.setattr(module, "open_shards", note("shards", shards))
        monkeypatch.setattr(module, "_hold_out", note("held", {"a": np.array([1])}))
        monkeypatch.setattr(module, "build_mixture", note("mixture"))
        config = tiny_config()
        monkeypatch.setattr(module, "read_config", note("config", config))
        monkeypatch.setattr(
            module, "with_start_adapters", lambda stage, of: replace(stage, lora_rank=77 if of is config else 78)
        )
        monkeypatch.setattr(module, "refuse_other_model", note("model"))
        monkeypatch.setattr(module, "_load_plan", note("plan", plan))
        monkeypatch.setattr(module.FeatureSet, "open", note("features"))
        monkeypatch.setattr(module, "training_fingerprint", note("fingerprint", "print"))
        monkeypatch.setattr(module, "manifest_digest", lambda start: f"{start} digest")
        monkeypatch.setattr(module, "claim", note("claim"))
        fields = {"output": str(tmp_path), "init_from": "/start", "data": "/data", "recipe": "mini", "max_steps": 5}
        job, work = module.resolve_job(TrainSettings(**{**fields, **changes}), 4)
        return SimpleNamespace(job=job, work=work, notes=notes, asked={note[0]: note[1:] for note in notes})

    return resolve


def test_everything_is_checked_before_the_folder_is_claimed(resolved, tmp_path):
    found = resolved(seed=3)
    order = [note[0] for note in found.notes]
    assert order == [
        *("start", "access", "folder", "shards", "held", "mixture", "config", "model", "plan", "fingerprint", "claim")
    ]
    assert found.asked["start"] == ("/start", {"weights": False})
    assert found.asked["access"] == (str(tmp_path), {"writes": True})
    _, _, seed, held = found.asked["mixture"]
    assert (seed, held["a"].tolist()) == (3, [1])
    settings, before = found.job.settings, found.asked["shards"][1]
    assert settings.output == str(tmp_path) and before == found.asked["mixture"][0] == STAGE
    assert found.asked["folder"] == ("data", "/data", "prepared shard sets (jobs/prepare_data.py)")
    assert found.asked["shards"][0] == "/data"
    assert found.asked["held"][0] is found.asked["plan"][0] is found.asked["fingerprint"][0] is settings
    assert set(found.asked["held"][1]) == set(found.asked["mixture"][1]) == {"a", "b"}
    assert found.asked["config"] == ("local",) and found.asked["plan"][2] == "local"
    stages = [found.job.stage, found.asked["plan"][1], found.asked["fingerprint"][1]]
    assert [stage.lora_rank for stage in stages] == [77, 77, 77], "with the start's adapters"
    assert found.asked["fingerprint"][2:] == ("local", {"a": "a digest", "b": "b digest"})
    claimed = {"overwrite": False, "inputs": ("/start", "/data")}
    assert found.asked["claim"] == (str(tmp_path), "print", RESULTS, claimed)
    job = found.job
    assert (job.num_steps, job.output, job.plan.held_out["a"].tolist(), job.run) == (5, str(tmp_path), [1], None)
    assert found.work.path == tmp_path and job.start == "local digest"
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (written["seed"], written["stage"]["number"], next(iter(written))) == (
        3,
        4,
        next(iter(job.settings.model_dump())),
    )


def test_a_stage_has_a_folder_of_its_own_and_a_start(resolved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolved(output="").job.output == f"{tmp_path}/outputs/mini/stage4"
    with pytest.raises(SettingsError, match=r"^stage 4 needs a start"):
        resolved(init_from="")
    with pytest.raises(SettingsError, match=r"^attention=flex_attention: torch has its gradient on GPUs only"):
        resolved(attention="flex_attention")
    assert resolved(attention="flex_attention", use_gpu=True).job.settings.attention == "flex_attention"


def test_both_folders_are_checked_and_claimed_where_the_storage_is_another(resolved, tmp_path):
    shared = str(tmp_path / "shared")
    found = resolved(storage_path=shared, overwrite=True)
    assert [note[1] for note in found.notes if note[0] == "access"] == [str(tmp_path), shared]
    assert [note[1] for note in found.notes if note[0] == "claim"] == [shared, str(tmp_path)]
    assert all(note[-1]["overwrite"] for note in found.notes if note[0] == "claim")
    assert found.asked["unwritable"][0] == "storage_path"
    assert "unwritable" not in resolved(storage_path=f"memory://bucket/{tmp_path.name}").asked


def test_cached_features_need_the_weights_of_the_start_and_each_source_its_own(resolved):
    found = resolved(features="cached", feature_key="key")
    assert found.asked["start"] == ("/start", {"weights": True})
    assert [note[1:] for note in found.notes if note[0] == "features"] == [("a/uri", "key"), ("b/uri", "key")]


def test_what_the_driver_reads_again_is_fetched_and_the_configuration_published(resolved, tmp_path):
    bucket = f"memory://bucket/{tmp_path.name}"
    for name in DRIVER_FILES:
        storage.write_atomically(f"{bucket}/{name}", name.encode())
    found = resolved(output=bucket)
    assert [(found.work.path / name).read_text() for name in DRIVER_FILES] == list(DRIVER_FILES)
    assert storage.read_bytes(f"{bucket}/config.yaml") == (found.work.path / "config.yaml").read_bytes()
