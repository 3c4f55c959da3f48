"""The hook that registers with transformers' Auto classes: when it acts, and that it stands in nobody's way."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from tinygptv import auto_classes
from tinygptv.auto_classes import _AfterImport, register_when_imported, register_with_imported
from tinygptv.config import TinyGPTVConfig
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

AUTO = "transformers.models.auto."


class Loader:
    """Executes a module by calling a function."""

    def __init__(self, execute):
        self.exec_module = execute


@pytest.fixture
def hook(monkeypatch):
    """The hook, what it registered, and modules that another finder finds."""
    registered, modules = [], {}
    monkeypatch.setattr(auto_classes, "register_with_imported", lambda: registered.append("all"))
    finder = SimpleNamespace(
        find_spec=lambda name, path, target: ModuleSpec(name, modules[name]) if name in modules else None
    )
    nothing = SimpleNamespace(find_spec=lambda name, path, target: None)
    own = _AfterImport()
    monkeypatch.setattr(sys, "meta_path", [own, nothing, finder])
    return own, registered, modules


def test_other_modules_are_left_to_other_finders(hook):
    own, _, modules = hook
    modules["transformers.models.auto"] = Loader(None)
    assert own.find_spec("transformers.models.auto") is None and own.find_spec("json") is None


@pytest.mark.parametrize(
    "name", ["tinygptv.config", *(f"{AUTO}{part}_auto" for part in ("modeling", "processing", "image_processing"))]
)
def test_classes_are_registered_after_the_module_has_run(hook, name):
    own, registered, modules = hook
    modules[name] = Loader(lambda module: registered.append(module.__name__))
    spec = own.find_spec(name)
    spec.loader.exec_module(ModuleType("ran"))
    assert spec.name == name and registered == ["ran", "all"]


def test_modules_within_modules_wait_for_the_outermost(hook):
    own, registered, modules = hook
    inner = Loader(lambda module: registered.append("inner"))

    def outer(module):
        own.find_spec(f"{AUTO}modeling_auto").loader.exec_module(module)
        registered.append("outer")

    modules.update({"tinygptv.config": Loader(outer), f"{AUTO}modeling_auto": inner})
    own.find_spec("tinygptv.config").loader.exec_module(ModuleType("x"))
    assert registered == ["inner", "outer", "all"]


def test_a_module_that_fails_registers_nothing_and_the_next_does(hook):
    own, registered, modules = hook
    modules[f"{AUTO}modeling_auto"] = Loader(lambda module: 1 / 0)
    modules[f"{AUTO}processing_auto"] = Loader(lambda module: None)
    with pytest.raises(ZeroDivisionError):
        own.find_spec(f"{AUTO}modeling_auto").loader.exec_module(ModuleType("x"))
    assert registered == []
    own.find_spec(f"{AUTO}processing_auto").loader.exec_module(ModuleType("x"))
    assert registered == ["all"]


def test_what_is_not_found_or_has_no_loader_is_passed_on(hook):
    own, _, modules = hook
    assert own.find_spec("tinygptv.config") is None
    modules["tinygptv.config"] = None
    assert own.find_spec("tinygptv.config").loader is None


def test_only_what_is_imported_is_registered_with(monkeypatch):
    told = []
    register = {f"{AUTO}{name}": lambda name=name: told.append(name) for name in ("a", "b", "c")}
    monkeypatch.setattr(auto_classes, "_REGISTER", register)
    for name in ("a", "c"):
        monkeypatch.setitem(sys.modules, AUTO + name, ModuleType(name))
    register_with_imported()
    assert told == ["a", "c"]


def test_the_hook_is_there_once_and_before_the_others(monkeypatch):
    told = []
    monkeypatch.setattr(auto_classes, "register_with_imported", lambda: told.append("registered"))
    other = SimpleNamespace(find_spec=None)
    monkeypatch.setattr(sys, "meta_path", [other])
    register_when_imported(), register_when_imported()
    first, second = sys.meta_path
    assert isinstance(first, _AfterImport) and second is other and told == ["registered"] * 2


def test_the_model_is_registered_once_with_each_class(monkeypatch):
    asked = []

    class Auto:
        def __init__(self, name):
            self.name, self._model_mapping = name, {}

        def register(self, config, model):
            asked.append(self.name)
            self._model_mapping[config] = model

    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    auto = SimpleNamespace(**{name: Auto(name) for name in names})
    monkeypatch.setitem(sys.modules, AUTO + "modeling_auto", auto)
    auto_classes._register_model(), auto_classes._register_model()
    assert asked == list(names)
    stand_in = auto.AutoModel._model_mapping[TinyGPTVConfig]
    assert stand_in.config_class is TinyGPTVConfig and stand_in.__name__ == "TinyGPTVForConditionalGeneration"
    assert stand_in.from_pretrained == TinyGPTVForConditionalGeneration.from_pretrained
