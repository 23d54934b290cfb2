"""The modules of flatops have no circular imports, not even inside functions."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"flatops": ROOT / "flatops", "flatops.kernels": ROOT / "kernels", "flatops.benchmarks": ROOT / "benchmarks"}


def import_graph(packages: dict[str, Path]) -> dict[str, set[str]]:
    """For each module of these packages, the modules of the packages that it imports, at the top or in a function."""
    parts = {
        file: (*name.split("."), *file.relative_to(folder).with_suffix("").parts)
        for name, folder in packages.items()
        for file in folder.rglob("*.py")
    }
    names = {file: ".".join(p for p in parts[file] if p != "__init__") for file in parts}
    graph: dict[str, set[str]] = {name: set() for name in names.values()}
    for file, name in names.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & graph.keys()
            elif isinstance(node, ast.ImportFrom):
                above = parts[file][: -node.level] if node.level else ()
                base = ".".join([*above, *filter(None, [node.module])])
                found = {f"{base}.{alias.name}" for alias in node.names} & graph.keys()
                # a name that is not a module is defined in the base itself
                graph[name] |= found | ({base} & graph.keys() if len(found) < len(node.names) else set())
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A circular import, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_there_are_no_circular_imports():
    graph = import_graph(PACKAGES)
    assert "flatops.train.order" in graph["flatops.train.dataset"] and "flatops.benchmarks.bench" in graph
    # Imported by name, without an import statement.
    graph["flatops.backend"] |= {"flatops.kernels"}
    graph["flatops.train.datasets"] |= {name for name in graph if name.startswith("flatops.train.datasets.")}
    assert not cycle(graph)


def reached(graph: dict[str, set[str]], *modules: str) -> set[str]:
    """All that these modules import, by way of others too; not the package's own __init__, which imports everything."""
    found: set[str] = set()
    left = [*modules]
    while left:
        for name in graph[left.pop()] - found - {"flatops"}:
            found.add(name)
            left.append(name)
    return found


def test_noise_and_landscapes_need_no_optimizer():
    graph = import_graph(PACKAGES)
    landscape = [f"flatops.landscape.{name}" for name in ("probe", "surface", "sharpness", "hessian")]
    found = reached(graph, "flatops.perturb", *landscape)
    assert "flatops.restore" in found and not [name for name in found if name.startswith("flatops.optim")]
    users = {name for name, imported in graph.items() if "flatops.optim.base" in imported}
    assert {".".join(name.split(".")[:2]) for name in users} <= {"flatops.optim", "flatops.integrations"}


@pytest.mark.parametrize(
    "hidden", ["from . import a", "from .a import x", "import p.a", "from p.a import x", "from ..p import a"]
)
def test_a_cycle_inside_a_function_is_found(tmp_path, hidden):
    package = tmp_path / "p"
    package.mkdir()
    for name, content in {"__init__": "", "a": "from .b import f", "b": f"def f():\n    {hidden}"}.items():
        (package / f"{name}.py").write_text(content)
    assert set(cycle(import_graph({"p": package}))) == {"p.a", "p.b"}
