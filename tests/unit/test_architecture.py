"""The tree keeps its promises: imports run one way, heavy libraries stay in their places, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
import yaml

from pipelines.settings import SECTIONS
from tests.import_graph import (
    component_graph,
    component_of,
    file_graph,
    find_cycle,
    imported_names,
    modules,
    num_layers,
)
from tests.paths import ROOT

LAYERS = {
    "tinygptv": {"pipelines", "jobs", "benchmarks", "tests", "ray", "mlflow", "pyarrow", "fastapi"},
    "pipelines": {"jobs", "benchmarks", "tests"},
    "jobs": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}
"""Package -> top-level names that nothing in it may import."""

_LIBRARY: dict[str, set[str]] = {
    "json_object": set(),
    "folder_fault": set(),
    "lru": set(),
    "bounds": set(),
    "config": set(),
    "data": {"json_object", "config", "lru", "bounds"},
    "metrics": {"data"},
    "model": {"config", "data", "kernels"},
    "training": {"bounds", "config", "data", "kernels", "model", "quantization", "folder_fault"},
    "checkpoint": {"json_object", "config", "data", "model", "folder_fault"},
    "convert": {"json_object", "config", "data", "model", "training", "checkpoint"},
    "convert.sources": set(),
    "hub": {"checkpoint", "folder_fault"},
    "kernels": {"folder_fault"},
    "quantization": {"json_object", "config", "data", "model", "checkpoint", "kernels"},
    "inference": {
        "json_object",
        "lru",
        "hub",
        "config",
        "data",
        "model",
        "metrics",
        "checkpoint",
        "kernels",
        "quantization",
    },
    "miniature": {"json_object", "config", "data", "model", "training", "checkpoint"},
    "auto_classes": {"config", "data", "model"},
    "chat": {"json_object", "data", "inference", "miniature"},
}
_WIRING = {"settings", "cluster", "storage", "progress", "json_files", "redact", "units", "fingerprint", "node_cache"}
_PIPELINES: dict[str, set[str]] = {
    "settings": set(),
    "progress": {"storage"},
    "shared_paths": {"settings", "storage"},
    "cluster": {"settings", "shared_paths"},
    "storage": {"settings", "redact"},
    "node_cache": {"settings", "storage"},
    "units": {"settings", "cluster"},
    "redact": set(),
    "json_files": {"settings", "storage"},
    "fingerprint": {"settings", "storage", "redact", "json_files"},
    "tracking": {*_WIRING},
    "fetch": {*_WIRING, "cli", "data.sources"},
    "data": {*_WIRING},
    "data.sources": {*_WIRING},
    "data.ingest": {*_WIRING, "tracking", "data", "data.sources"},
    "training": {*_WIRING, "tracking", "data"},
    "evaluation.benchmarks": {"storage", "settings", "data.sources"},
    "evaluation": {*_WIRING, "tracking", "evaluation.benchmarks"},
    "evaluation.harnesses": set(),
    "export": {*_WIRING, "tracking", "data"},
    "serving": {*_WIRING, "tracking"},
    "console": set(),
    "feature_plan": set(),
    "recipe": {*_WIRING, "cli", "console", "data", "feature_plan", "fetch"},
    "released": {*_WIRING, "fetch", "export", "serving"},
    "miniature": {
        *_WIRING,
        "tracking",
        "data",
        "data.ingest",
        "training",
        "evaluation",
        "evaluation.benchmarks",
        "export",
        "serving",
    },
    "ablation": {
        *_WIRING,
        "tracking",
        "data",
        "data.ingest",
        "training",
        "evaluation",
        "evaluation.benchmarks",
        "miniature",
    },
    "cli": {*_WIRING, "training"},
}
ALLOWED_IMPORTS = {"tinygptv": _LIBRARY, "pipelines": _PIPELINES}
"""Package -> component (a sub-package, or a file directly in the package) -> components that it may import."""

MOST_LINES = 420

MOST_FREE_OBJECTS = 72
"""Uses of ``dict[str, Any]``, ``JsonObject`` and their aliases: for JSON and keyword arguments of others alone. What we
write ourselves is a dataclass or a ``TypedDict``."""


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported_names(path)
        if name.split(".")[0] in LAYERS[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_components_import_only_what_the_table_allows(package):
    table = {
        f"{package}.{component}": {f"{package}.{name}" for name in allowed}
        for component, allowed in ALLOWED_IMPORTS[package].items()
    }
    assert not find_cycle(table)
    assert set(table) == set(component_graph(package))
    wrong = [
        f"{module} imports {target}"
        for module, targets in file_graph().items()
        if module.startswith(f"{package}.")
        for target in targets
        if target.startswith(f"{package}.")
        if component_of(target) not in {component_of(module), *table[component_of(module)]}
    ]
    assert not wrong


def test_no_import_cycle_between_files():
    assert not find_cycle(file_graph())


def test_cycles_and_layers_are_found():
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert num_layers({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == 3


def test_the_graph_sees_lazy_imports_and_names_in_strings():
    graph = file_graph()
    assert "pipelines.training.run" in graph["pipelines.cli"]  # inside a function
    assert "tinygptv.model.tinygptv" in graph["tinygptv.training.stages"]  # under TYPE_CHECKING
    assert "tinygptv.quantization.linear_bnb" in graph["tinygptv.quantization.artifact"]  # the name of a class
    assert "benchmarks.note" in graph["benchmarks.scaling"]  # a script's neighbour


def test_benchmarks_import_names_that_exist():
    """mypy leaves them out, and no test runs them all."""
    imported = [(path.name, *name.rpartition(".")[::2]) for path in (ROOT / "benchmarks").glob("*.py")
                for name in imported_names(path) if name not in modules()]  # fmt: skip
    ours = [(script, module, name) for script, module, name in imported if module in modules()]
    assert len(ours) > 100
    assert not [entry for entry in ours if not re.search(rf"\b{entry[2]}\b", modules()[entry[1]].read_text())]


def test_the_documented_tree_is_the_code():
    """Every folder, and every file of those whose files are listed by name."""
    block = (ROOT / "docs/architecture.md").read_text().split("```\ntinygptv/")[1].split("\njobs/")[0]
    tree = re.sub(r"\n {18}", " ", f"tinygptv/{block}")
    listed, path = {}, []
    for indent, name, words in re.findall(r"^( *)(\w+)/ +(.+)$", tree, re.MULTILINE):
        path = [*path[: len(indent) // 2], name]
        listed["/".join(path)] = set(words.split())
    found = {}
    for file in modules().values():
        folder = file.relative_to(ROOT).parent.as_posix()
        if folder.startswith(("tinygptv", "pipelines")):
            found.setdefault(folder, set()).add(file.stem)
    assert listed.keys() == found.keys()
    in_words = {folder for folder, words in listed.items() if words & {"of", "and", "by", "for"}}
    assert len(in_words) == 5
    for folder in found.keys() - in_words:
        assert listed[folder] == found[folder] - {"__init__"}, folder


def test_mlflow_is_imported_in_one_folder():
    users = [
        p.parent.name
        for p in (ROOT / "pipelines").rglob("*.py")
        if any(n.split(".")[0] == "mlflow" for n in imported_names(p))
    ]
    assert set(users) == {"tracking"}


def test_files_stay_small():
    sources = [path for name, path in modules().items() if not name.startswith("tests")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def free_objects(text: str) -> int:
    """Uses of ``dict[str, Any]``, ``JsonObject`` and their aliases in the text of a module."""
    if "JsonObject" not in text and "dict[str, Any]" not in text:
        return 0
    tree = ast.parse(text)
    names = {"JsonObject"}
    for node in tree.body:
        if isinstance(node, ast.Assign) and (_is_free(node.value) or getattr(node.value, "id", "") in names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id in names]
    return len(uses) + sum(map(_is_free, ast.walk(tree)))


def _is_free(node: ast.AST) -> bool:
    is_dict = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "dict"
    return is_dict and ast.unparse(node) == "dict[str, Any]"


def test_free_objects_stay_few():
    text = "Row = JsonObject\ndef f(a: Row, b: dict[str, Any]) -> list[dict[str, Any]]: ...\n"
    assert free_objects(text) == 4
    counts = {
        name: free_objects(path.read_text())
        for name, path in modules().items()
        if name.split(".")[0] in ("tinygptv", "pipelines", "jobs")
    }
    assert sum(counts.values()) <= MOST_FREE_OBJECTS, {name: count for name, count in counts.items() if count}


def test_importing_the_library_does_no_work():
    code = "import sys, tinygptv; print([m for m in ('torch', 'ray', 'mlflow', 'pipelines') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"ray", "mlflow", "pipelines"} & set(ast.literal_eval(loaded.stdout.strip().splitlines()[-1]))


def test_peft_is_imported_where_a_model_has_adapters():
    """It takes 60 MB with bitsandbytes, which answers do without."""
    at_import = re.compile(r"^(from|import) peft|^from tinygptv\.model(\.| import )lora\b", re.MULTILINE)
    found = {name for name, path in modules().items() if at_import.search(path.read_text())}
    assert {name for name in found if name.startswith("tinygptv.")} == {"tinygptv.model.lora"}


def test_the_controller_of_a_run_loads_no_model_library():
    heavy = "('torch', 'transformers', 'peft')"
    code = f"import sys, pipelines.training.ray_entry; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_reads_every_configuration(config):
    """Every line of the file reaches the jobs that have such a key, with the value that stands there."""
    content = yaml.safe_load(config.read_text())
    sections = {name: content.pop(name, None) or {} for name in SECTIONS}
    reached = set()
    for name, settings in SECTIONS.items():
        loaded = settings.load(config).model_dump(mode="json")
        wanted = {key: value for key, value in content.items() if key in settings.model_fields} | sections[name]
        assert {key: loaded[key] for key in wanted} == wanted, name
        reached |= wanted.keys()
    assert reached >= content.keys(), "a key that no job takes"


def test_jobs_are_short_and_documented():
    for path in sorted((ROOT / "jobs").glob("*.py")):
        text = path.read_text()
        assert text.startswith("#!/usr/bin/env python3"), path
        assert path.stat().st_mode & 0o111, f"{path} lacks the run bit"
        assert len(text.splitlines()) <= 45, path
        assert f"jobs/{path.name}" in ast.get_docstring(ast.parse(text)), path
