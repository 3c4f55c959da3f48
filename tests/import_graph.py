"""The import graph of the tree, read from the source without importing anything.

An edge is any import: at the top of a file, inside a function, under TYPE_CHECKING, or a string that names one of our
modules (``"tinygptv.quantization.linear_cpu.Int8Linear"``, ``"pipelines.serving.app:build_app"``).

A component is a sub-package, or a file directly in ``tinygptv/`` or ``pipelines/``.

    python -m tests.import_graph        files per folder, edges and layers
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.paths import ROOT

PACKAGES = ("tinygptv", "pipelines", "jobs", "benchmarks", "tests")

Graph = Mapping[str, set[str]]


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file; of the tests those that they share."""
    patterns = {package: "**/*.py" for package in PACKAGES} | {"tests": "*.py"}
    return {_name(path): path for package in PACKAGES for path in sorted((ROOT / package).glob(patterns[package]))}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported_names(path: Path) -> tuple[str, ...]:
    """Absolute dotted names that a file imports, with what it takes from them (``pipelines.storage.join``)."""
    return tuple(_imported_names(path))


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.replace(":", ".")
            if name.startswith(PACKAGES) and "." in _module_of(name):
                yield name


@cache
def _module_of(name: str) -> str:
    """The module that a dotted name lies in; empty where it is none of ours."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name


@cache
def file_graph() -> Graph:
    """Module -> our modules that it imports."""
    return {name: set(_targets(name, path)) - {name} for name, path in modules().items()}


def _targets(name: str, path: Path) -> Iterator[str]:
    for target in imported_names(path):
        beside = f"{name.rpartition('.')[0]}.{target.split('.')[0]}"
        if name.startswith("benchmarks.") and beside in modules():  # a script imports its neighbours by their own name
            yield beside
        if (module := _module_of(target)) not in ("", "tinygptv", "pipelines"):
            yield module


def component_of(module: str) -> str:
    """The sub-package of a module; a file directly in a package is a component of its own."""
    if modules()[module].name == "__init__.py":
        return module
    folder, _, _ = module.rpartition(".")
    return module if folder in PACKAGES else folder


def component_graph(package: str) -> Graph:
    """Component -> components of the same package that it imports; the package's own ``__init__`` is left out."""
    graph: dict[str, set[str]] = {}
    for module, targets in file_graph().items():
        if module.startswith(f"{package}."):
            component = component_of(module)
            found = {component_of(target) for target in targets if target.startswith(f"{package}.")}
            graph[component] = graph.get(component, set()) | found - {component}
    return graph


def within(package: str) -> Graph:
    """The file graph of one package."""
    inside = {module for module in modules() if module.split(".")[0] == package}
    return {module: file_graph()[module] & inside for module in inside}


def find_cycle(graph: Graph) -> list[str]:
    """A cycle of imports; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def num_layers(graph: Graph) -> int:
    """Length of the longest chain of imports, in files or components; the graph has no cycle."""
    layers: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():
        layers[node] = 1 + max((layers[target] for target in graph[node]), default=0)
    return max(layers.values(), default=0)


def _summary(graph: Graph) -> str:
    cycle = find_cycle(graph)
    layers = f"cycle {' <- '.join(cycle)}" if cycle else f"{num_layers(graph)} layers"
    return f"{len(graph):4} nodes {sum(map(len, graph.values())):5} edges  {layers}"


def main(packages: Iterable[str] = ("tinygptv", "pipelines")) -> None:
    """Print the numbers."""
    for package in packages:
        print(f"{package:12} files      {_summary(within(package))}")
        print(f"{package:12} components {_summary(component_graph(package))}")
    folders = Counter(str(path.parent.relative_to(ROOT)) for path in modules().values())
    for folder, count in sorted(folders.items()):
        print(f"{count:4} {folder}")


if __name__ == "__main__":
    main()
