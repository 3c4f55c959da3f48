"""Defaults and bounds of every key: they are part of what a command means."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import pytest

from pipelines.settings import SECTIONS, AnswerSettings, Settings

KEYS = {
    "": """
        recipe='mini'; seed=0 ge 0 le 4294967295; output=''; tracking_uri=''; experiment=''; ray_address='';
        ray_loopback=True; num_cpus=0 ge 0; object_store_mb=0 ge 0; quiet=False;
    """,
    "answers": """
        artifact=''; model_name='tinygpt-v' min_length 1; num_gpus=0 ge 0; threads=0 ge 0; max_batch_size=16 ge 1;
        context_length=0 ge 0; prefill_tokens=128 ge 1; kv_cache_dtype='auto'; max_tokens=256 ge 1;
        temperature=0.0 ge 0 le 2; default_task=''; request_timeout_s=300 gt 0; allowed_image_hosts=[];
        max_messages=256 ge 1; max_images=8 ge 0; max_image_mb=10 gt 0; max_image_megapixels=24 gt 0;
        max_body_mb=16 gt 0; image_timeout_s=10 gt 0; image_decoders=2 ge 1; kept_images=256 ge 1;
    """,
    "fetch": """
        what=[]; local=[]; offline=False; mirror=''; hub=''; images='print'; rows=0 ge 0; verify=False;
        accept_changed=False; dry_run=False;
    """,
    "released": """
        stage=4 ge 1 le 4; device='auto'; method=''; memory=''; language='phi-2'; weights=''; drift_samples=8 ge 1;
        serve=True; fetch={}; server={};
    """,
    "whole_recipe": """
        raw=''; weights=''; data=''; features='auto'; tflops=40.0 gt 0; benchmarks=''; benchmark='paper'; serve=False;
        fetch={}; dry_run=False;
    """,
    "prepare_data": """
        source=''; input=''; images=''; name=''; task=''; split='train'; image_size=448 ge 14;
        jpeg_quality=90 ge 1 le 100; shard_rows=10000 ge 1; shard_mb=256 ge 1; min_side=8 ge 1;
        max_aspect_ratio=20.0 ge 1;
        max_megapixels=100.0 gt 0; min_words=1 ge 0; min_letters=0.3 ge 0 le 1; max_repetition=0.7 gt 0 le 1;
        duplicates='drop'; near_duplicate_bits=4 ge 0 le 7; num_workers=None ge 0; overwrite=False;
    """,
    "cache_features": """
        data=''; checkpoint=''; image_size=0 ge 0; batch_size=0 ge 0; dtype='float32'; sources=[]; num_workers=1 ge 0;
        gpus_per_worker=0 ge 0; overwrite=False;
    """,
    "train": """
        data=''; init_from=''; max_steps=0 ge 0; num_workers=1 ge 0; min_workers=0 ge 0; use_gpu=False;
        cpus_per_worker=1.0 gt 0; threads_per_worker=0 ge 0; micro_batch_size='auto'; precision='fp32';
        encoder_precision=None; features='inline'; frozen_weights='full'; packing=False;
        gradient_checkpointing=False; attention='sdpa'; compile='auto'; loader_workers=1 ge 0;
        prefetch_steps=8 ge 1; checkpoint_every=500 ge 1;
        keep_checkpoints=3 ge 1; keep_best=True; storage_path=''; guard='skip'; guard_spike=8.0 ge 0;
        guard_vanishing=1e-09 ge 0; guard_patience=5 ge 1; max_failures=3 ge -1; log_every=10 ge 1; eval_data='';
        eval_fraction=0.0 ge 0 lt 1; eval_rows=256 ge 1; eval_questions=32 ge 0; eval_every=0 ge 0; early_stop=0 ge 0;
        use_best=False; predict_every=200 ge 0; dry_run=False; stage={}; overwrite=False;
    """,
    "score": """
        checkpoint=''; benchmark='miniature'; data=''; images=''; limit=0 ge 0; batch_size=64 ge 1; num_workers=1 ge 0;
        threads_per_worker=0 ge 0; gpus_per_worker=0 ge 0; metric='official'; baselines=True; compare_with='';
        page_cases=24 ge 0; overwrite=False;
    """,
    "ablate": """
        variants=['full', 'no_lora', 'frozen_input_norm', 'no_input_norm', 'no_rms_norm', 'no_qk_norm'];
        stages=[1, 2, 3, 4]; precisions=['fp32', 'fp16_range']; data=''; init_from=''; max_steps=100 ge 0;
        benchmark='miniature_vqa'; benchmark_data=''; score_limit=200 ge 0; world_scenes=1000 ge 1; features='cached';
        num_workers=2 ge 0; cpus_per_worker=1.0 gt 0; threads_per_worker=1 ge 1; use_gpu=False; train={}; stage={};
        overwrite=False;
    """,
    "quantize": """
        checkpoint=''; method='cpu'; encoder=''; keep_lora=False; data=''; drift_samples=64 ge 1; max_drift=0.5 gt 0;
        register_as=''; alias='champion'; overwrite=False;
    """,
    "plan_memory": """
        gpu='24GB'; inference_gpu='8GB'; precision=''; features=''; micro_batch_size=0 ge 0; context_length=2048 ge 1;
        train={};
    """,
    "miniature": """
        task='draw'; train_scenes=4000 ge 1; test_scenes=2000 ge 1; example_scenes=50 ge 1; max_steps=0 ge 0;
        parts='all'; backbones=''; stages=''; overwrite=False;
    """,
    "demo": """
        port=8001 ge 0 le 65535; overwrite=False;
    """,
    "serve": """
        host='127.0.0.1'; port=8000 ge 0 le 65535; num_replicas=1 ge 1; num_ingresses=1 ge 1; max_replicas=0 ge 0;
        cpus_per_replica=1.0 ge 0; max_queue=64 ge 0; max_per_client=0 ge 0; trusted_proxies=[];
        stream_interval_ms=25 ge 0; api_keys=[]; api_keys_file=''; open_paths=[]; cors_origins=[];
        body_timeout_s=60 gt 0; stuck_after_s=300 gt 0;
    """,
    "batch": """
        input=''; overwrite=False;
    """,
}
"""Section -> ``key=default``, with its bounds; "" has the keys of all jobs, ``answers`` those of serve and batch."""

CHOICES = {
    "images": ["print", "run"],
    "device": ["auto", "cuda", "cpu"],
    "method": ["nf4", "int4", "int8", "cpu", "cpu4"],
    "released.method": ["", "nf4", "int4", "int8", "cpu", "cpu4"],
    "language": ["phi-2", "phi-2-susnato"],
    "duplicates": ["drop", "keep"],
    "dtype": ["float32", "float16"],
    "micro_batch_size": ["auto"],
    "precision": ["fp32", "bf16", "fp16", "fp16_range"],
    "plan_memory.precision": ["", "fp32", "bf16", "fp16"],
    "encoder_precision": ["fp32", "bf16", "fp16"],
    "features": ["inline", "cached"],
    "ablate.features": ["cached", "inline"],
    "plan_memory.features": ["", "inline", "cached"],
    "whole_recipe.features": ["auto", "cached", "inline"],
    "attention": ["eager", "sdpa", "flex_attention"],
    "compile": ["auto", "on", "off"],
    "frozen_weights": ["full", "int8", "nf4"],
    "guard": ["skip", "rollback", "stop", "off"],
    "metric": ["official", "released", "exact", "vqa", "iou"],
    "encoder": ["", "half", "int8"],
    "parts": ["all", "vision", "language"],
    "kv_cache_dtype": ["auto", "bfloat16"],
    "default_task": ["", "vqa", "caption", "refer", "grounding", "detection"],
    "open_paths": ["/metrics", "/docs", "/openapi.json"],
}
"""Key (or section and key) -> the words that it takes, where it takes only these."""

BOUNDS = ("ge", "gt", "le", "lt", "min_length")


def as_text(kind, inherited=()):
    found = []
    for name, field in kind.model_fields.items():
        if name not in inherited:
            limits = [
                (bound, getattr(each, bound)) for each in field.metadata for bound in BOUNDS if hasattr(each, bound)
            ]
            told = [f"{bound} {limit}" for bound, limit in limits if limit is not None]
            found.append(" ".join([f"{name}={field.get_default(call_default_factory=True)!r}", *told]))
    return found


@pytest.mark.parametrize("section", KEYS)
def test_defaults_and_bounds_are_these(section):
    kind = {"": Settings, "answers": AnswerSettings, **SECTIONS}[section]
    parents = [] if section == "" else [parent for parent in kind.__mro__[1:] if issubclass(parent, Settings)]
    inherited = {name for parent in parents for name in parent.model_fields}
    assert as_text(kind, inherited) == " ".join(KEYS[section].split()).removesuffix(";").split("; ")


def test_every_section_is_in_the_table():
    assert set(KEYS) == {"", "answers", *SECTIONS}


FRACTIONS = """
    tflops max_aspect_ratio max_megapixels min_letters max_repetition gpus_per_worker cpus_per_worker guard_spike
    guard_vanishing eval_fraction max_drift num_gpus temperature request_timeout_s max_image_mb max_image_megapixels
    max_body_mb image_timeout_s cpus_per_replica stream_interval_ms body_timeout_s stuck_after_s
"""


def test_these_numbers_and_no_others_may_have_fractions():
    fields = [(key, field.annotation) for kind in SECTIONS.values() for key, field in kind.model_fields.items()]
    assert {key for key, kind in fields if kind is float} == set(FRACTIONS.split())
    assert {kind for key, kind in fields if key in FRACTIONS.split()} == {float}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("score", {"benchmark": ["gqa", "vsr"]}),
        ("score", {"benchmark": "gqa"}),
        ("ablate", {"benchmark": ["gqa", "vsr"], "train": {"seed": 3}, "stage": {"lora_rank": 4}, "stages": [2]}),
        ("ablate", {"benchmark": "gqa", "variants": ["full"], "precisions": ["fp32"]}),
        ("train", {"micro_batch_size": 3, "stage": {"lora_rank": 4}, "encoder_precision": "bf16"}),
        ("plan_memory", {"train": {"seed": 3}}),
        ("whole_recipe", {"fetch": {"rows": 5}}),
        ("released", {"fetch": {"rows": 5}, "server": {"port": 5}}),
        ("fetch", {"what": ["start", "gqa"], "local": ["/a", "/b"]}),
        ("cache_features", {"sources": ["gqa", "vsr"]}),
        ("prepare_data", {"num_workers": 3}),
        ("serve", {"trusted_proxies": ["10.0.0.1"], "cors_origins": ["http://a"], "allowed_image_hosts": ["a.org"]}),
    ],
)
def test_lists_mappings_and_one_of_two_kinds_stay_what_they_are(section, values):
    found = SECTIONS[section](**values)
    assert {key: getattr(found, key) for key in values} == values


def choices(annotation):
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in choices(part)]


def test_keys_of_few_words_take_these():
    found = {
        (section, key): told
        for section, kind in SECTIONS.items()
        for key, field in kind.model_fields.items()
        if (told := choices(field.annotation))
    }
    expected = {key: CHOICES.get(".".join(key), CHOICES.get(key[1])) for key in found}
    assert found == expected
    assert {key.rpartition(".")[2] for key in CHOICES} == {key for _, key in found}
