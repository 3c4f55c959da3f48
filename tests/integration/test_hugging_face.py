"""The model in a fresh interpreter, as a user of transformers meets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.serving_model import save_checkpoint

pytestmark = pytest.mark.integration


def test_importing_tinygptv_is_enough_for_a_pipeline(tmp_path):
    """The Auto classes know the model, and the pipeline speaks with it."""
    folder = save_checkpoint(tmp_path / "checkpoint")
    code = f"""
import tinygptv
from transformers import pipeline
from PIL import Image
chat = pipeline("image-text-to-text", model={str(folder)!r})
picture = Image.new("RGB", (40, 30), (200, 10, 10))
turn = [{{"role": "user", "content": [{{"type": "image", "image": picture}}, {{"type": "text", "text": "what?"}}]}}]
answers = chat(text=[turn, turn], max_new_tokens=3, batch_size=2, return_full_text=False)
print(len(answers), answers[0][0]["generated_text"] == answers[1][0]["generated_text"], type(chat.model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["2", "True", "TinyGPTVForConditionalGeneration"], done.stderr
