"""Registers the model with transformers' Auto classes, as soon as those are imported and not before.

Why not ``AutoConfig.register`` at import: it imports transformers and torch. Measured on two cores (the fastest of
three runs, transformers 5.23, torch 2.15, warm disk):

    import tinygptv, with this hook             0.04 s    14 MB
    ... and AutoConfig.register                 3.0 s    695 MB
    ... and the model and processor classes     6.3 s    918 MB

Every process that imports ``tinygptv`` would pay that: loader actors, ingest tasks, the serving ingress, the training
controller, ``--help`` of each job. They need the pure parts alone. So an import hook registers our classes when an Auto
module is imported; the model's own module (timm, peft) is imported when a model is built.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
_CONFIG = "tinygptv.config"


class _OnFirstUse(type):
    """Metaclass of a stand-in for a class: whatever is asked of it is asked of the real class."""

    def __getattr__(cls, name: str) -> Any:
        module = importlib.import_module("tinygptv.model.tinygptv")
        return getattr(module.TinyGPTVForConditionalGeneration, name)


def _register_config() -> None:
    importlib.import_module(_CONFIG)


def _register_model() -> None:
    auto = sys.modules[_AUTO + "modeling_auto"]
    config = importlib.import_module(_CONFIG).TinyGPTVConfig
    if config in auto.AutoModelForImageTextToText._model_mapping:
        return
    stand_in = _OnFirstUse("TinyGPTVForConditionalGeneration", (), {"config_class": config, "__module__": __name__})
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        getattr(auto, name).register(config, stand_in)


def _register_processors() -> None:
    importlib.import_module("tinygptv.data.processing")


_REGISTER: dict[str, Callable[[], None]] = {
    _AUTO + "configuration_auto": _register_config,
    _AUTO + "modeling_auto": _register_model,
    _AUTO + "image_processing_auto": _register_processors,
    _AUTO + "processing_auto": _register_processors,
}


class _AfterImport(MetaPathFinder):
    """Finds nothing itself; registers once transformers' Auto modules, and our configuration, which imports some of
    them, have been executed: all that were under way."""

    def __init__(self) -> None:
        self.under_way = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CONFIG and fullname not in _REGISTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.under_way += 1
            try:
                execute(module)
            finally:
                self.under_way -= 1
            if not self.under_way:
                register_with_imported()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_imported() -> None:
    """Register with the Auto classes that are imported already; what is registered stays as it is."""
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register()


def register_when_imported() -> None:
    """Register with the Auto classes that are imported already, and with the others when they are."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    register_with_imported()
