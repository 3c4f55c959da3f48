"""TinyGPT-V as a model library: configuration, model, processing, training maths, quantization, decoding.

Nothing in this package imports ray, mlflow or pyarrow, reads the network, or does work when it is imported.
Importing it has the model registered with the Auto classes of transformers once those are imported, so that
``AutoModelForImageTextToText.from_pretrained(checkpoint_dir)`` works without remote code.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from tinygptv.auto_classes import register_when_imported

__version__ = "0.2.0"

# peft (with adapters) imports bitsandbytes, which on some CPUs recommends a download with every start of every process.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from tinygptv.config import TinyGPTVConfig
    from tinygptv.data.processing import TinyGPTVImageProcessor, TinyGPTVProcessor
    from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

__all__ = [
    "TinyGPTVConfig",
    "TinyGPTVForConditionalGeneration",
    "TinyGPTVImageProcessor",
    "TinyGPTVProcessor",
]

# torch and transformers take seconds to import; the pure parts (sample, mixture, stages, boxes, prompts)
# must stay importable without them, so the heavy names load on first use.
_HOME = {
    "TinyGPTVConfig": "tinygptv.config",
    "TinyGPTVForConditionalGeneration": "tinygptv.model.tinygptv",
    "TinyGPTVImageProcessor": "tinygptv.data.processing",
    "TinyGPTVProcessor": "tinygptv.data.processing",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tinygptv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


register_when_imported()
