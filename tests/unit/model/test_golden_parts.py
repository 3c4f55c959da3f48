"""Parity of each part with the original release at reduced sizes (fp32, CPU)."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import GOLDEN
from tests.reference_model import relative_error
from tinygptv.convert import load_release
from tinygptv.model.vision_encoder import interpolate_position_embedding
from tinygptv.training.schedule import Schedule

SOURCES = GOLDEN / "4_full/sources"


def load(**files):
    defaults = {
        "vision": SOURCES / "eva_vit_g.pth",
        "qformer": SOURCES / "blip2_pretrained_flant5xxl.pth",
        "language": SOURCES / "phi-2",
    }
    return load_release(**{**defaults, **files}, vision_heads=4, qformer_heads=4)


@pytest.mark.parametrize("side", [56, 112])
def test_vision_encoder(side):
    model = load(vision=GOLDEN / "1_eva_vit/weights.pth", image_size=side)
    golden = load_file(GOLDEN / f"1_eva_vit/io_{side}{'_interpolated' if side == 112 else ''}.safetensors")
    encoder = model.vision_encoder
    with torch.no_grad():
        features = encoder.vit.forward_features(golden["pixel"])
        assert relative_error(features, golden["features"]) < 1e-5
        # weights.pth brings its own ln_vision, but BLIP-2's file is read after it: compare the norm on its own.
        own = torch.load(GOLDEN / "1_eva_vit/weights.pth", weights_only=True)["model"]
        encoder.ln_vision.weight.copy_(own["ln_vision.weight"])
        encoder.ln_vision.bias.copy_(own["ln_vision.bias"])
        assert relative_error(encoder(golden["pixel"]), golden["ln_vision"]) < 1e-5


def test_each_vision_block():
    model = load(vision=GOLDEN / "1_eva_vit/weights.pth")
    golden = load_file(GOLDEN / "1_eva_vit/io_56.safetensors")
    outputs = []
    for block in model.vision_encoder.vit.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model.vision_encoder(golden["pixel"])
    for i, output in enumerate(outputs):
        assert relative_error(output, golden[f"block_{i}"]) < 1e-5


@pytest.mark.parametrize("case", ["16to16", "16to24", "16to32", "32to16", "fp16_4to8"])
def test_position_interpolation(case):
    golden = load_file(GOLDEN / "1_eva_vit/pos_embed_interp.safetensors")
    wanted = golden[f"{case}_dst"]
    ours = interpolate_position_embedding(golden[f"{case}_src"], round((wanted.shape[1] - 1) ** 0.5))
    assert relative_error(ours, wanted) < 1e-5


def test_set_image_size_equals_loading_at_that_size():
    small, large = load(), load(image_size=112)
    small.set_image_size(112)
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small.vision_encoder(pixels), large.vision_encoder(pixels))
    with pytest.raises(ValueError, match=r"takes \[N, 3, 112, 112\]"):
        small.vision_encoder(pixels[..., :56, :56])


@pytest.mark.parametrize("mask", ["ones", "partial"])
def test_qformer(mask):
    model = load(qformer=SOURCES / "blip2_pretrained_flant5xxl.pth", checkpoint=None)
    own = torch.load(GOLDEN / "2_qformer/weights.pth", weights_only=True)["model"]
    theirs = torch.load(SOURCES / "blip2_pretrained_flant5xxl.pth", weights_only=True)["model"]
    merged = GOLDEN / "2_qformer/weights.pth"
    if any(not torch.equal(own[key], theirs[key]) for key in own):
        # The part's own file has no ln_vision; take that from BLIP-2's.
        model = load(qformer=merged, vision=GOLDEN / "1_eva_vit/weights.pth")
    golden = load_file(GOLDEN / "2_qformer/io.safetensors")
    states = []
    for layer in model.qformer.encoder.encoder.layer:
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    with torch.no_grad():
        output = model.qformer(golden["encoder_hidden_states"], golden[f"attention_mask_{mask}"])
    assert relative_error(output, golden[f"last_hidden_state_{mask}"]) < 1e-5
    for i, state in enumerate(states):
        assert relative_error(state, golden[f"hidden_{mask}_{i + 1}"]) < 1e-5


@pytest.fixture(scope="module")
def phi():
    return load(language=GOLDEN / "3_phi/phi_hf_dir"), load_file(GOLDEN / "3_phi/io_base.safetensors")


def test_phi_hidden_states_attentions_logits_loss(phi):
    model, golden = phi
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(
            inputs_embeds=golden["inputs_embeds"],
            attention_mask=golden["attention_mask"],
            labels=golden["labels"],
            output_hidden_states=True,
            output_attentions=True,
        )
    real = golden["attention_mask"].bool()
    for i, state in enumerate(output.hidden_states):
        assert relative_error(state[real], golden[f"hidden_{i}"][real]) < 1e-5, i
    for i, weights in enumerate(output.attentions):
        ours, theirs = weights.transpose(1, 2)[real], golden[f"attn_{i}"].transpose(1, 2)[real]
        assert relative_error(ours, theirs) < 1e-5, i
    assert relative_error(output.logits[real], golden["logits"][real]) < 1e-5
    assert abs(output.loss - golden["loss"]) < 1e-5 * golden["loss"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_phi_masks_and_positions(phi, attention):
    model, golden = phi
    model.set_attn_implementation(attention)
    cases = {
        "logits_no_mask": {},
        "logits_hole": {"attention_mask": golden["attention_mask_hole"]},
        "logits_left_default_positions": {"attention_mask": golden["attention_mask_left"]},
        "logits_left_positions": {
            "attention_mask": golden["attention_mask_left"],
            "position_ids": golden["position_ids_left"],
        },
    }
    for name, arguments in cases.items():
        with torch.no_grad():
            logits = model(inputs_embeds=golden["inputs_embeds"], **arguments).logits
        real = arguments.get("attention_mask", torch.ones(3, 13)).bool()
        assert relative_error(logits[real], golden[name][real]) < 1e-5, name
    with torch.no_grad():
        logits = model(input_ids=golden["input_ids"], attention_mask=golden["attention_mask"]).logits
    real = golden["attention_mask"].bool()
    assert relative_error(logits[real], golden["logits_input_ids"][real]) < 1e-5


def test_phi_greedy_tokens_with_left_padding(phi):
    model, golden = phi
    model.set_attn_implementation("sdpa")
    tokens = model.generate(
        inputs_embeds=golden["gen_inputs_embeds"],
        attention_mask=golden["gen_attention_mask"],
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=198,
    )
    ours, theirs = tokens.tolist(), golden["gen_tokens"].tolist()
    for row, wanted in zip(ours, theirs, strict=True):
        assert row == wanted[: len(row)]


def test_plain_phi2_gets_active_unit_norms(tmp_path):
    """A Phi-2 without the added norms loads, and runs with them at weight 1 and bias 0."""
    shutil.copy(GOLDEN / "3_phi/weights_plain_phi2.pth", tmp_path / "phi2.pth")
    shutil.copy(GOLDEN / "3_phi/phi_hf_dir/config.json", tmp_path)
    model = load(language=tmp_path)
    golden = json.loads((GOLDEN / "3_phi/plain_phi2_init.json").read_text())
    added = [name for name in model.load_report.fresh if name.startswith("language_model.")]
    assert len(added) == len(golden["missing_keys"])
    golden = load_file(GOLDEN / "3_phi/plain_phi2_init.safetensors")
    with torch.no_grad():
        output = model(inputs_embeds=golden["inputs_embeds"], output_hidden_states=True)
    assert relative_error(output.logits, golden["logits"]) < 1e-5
    assert relative_error(output.hidden_states[1], golden["hidden_1"]) < 1e-5


SCHEDULES = [file for file in sorted((GOLDEN / "7_lr_schedule").glob("*.json")) if '"rows"' in file.read_text()]


@pytest.mark.parametrize("file", SCHEDULES, ids=lambda f: f.stem)
def test_learning_rates(file):
    table = json.loads(file.read_text())
    run = table["run"]
    schedule = Schedule(
        "warmup_cosine",
        peak=run["init_lr"],
        minimum=run["min_lr"],
        warmup_start=run["warmup_lr"],
        warmup_steps=run["warmup_steps"],
        steps_per_epoch=run["iters_per_epoch"],
        epochs=run["max_epoch"],
    )
    for epoch, in_epoch, *_, rate in table["rows"]:
        assert schedule.learning_rate(epoch * run["iters_per_epoch"] + in_epoch) == pytest.approx(rate, rel=1e-9)
