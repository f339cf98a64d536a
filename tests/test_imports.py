"""Imports run one way: from what graphs call to what trains with them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors", "_torch", "_fsdp"),
    ("ops",),
    ("checks", "plots", "ratios", "scores", "spans", "selecting", "config"),
    ("passes",),
    ("program",),
    ("run", "reports"),
    ("capture",),
    ("inspect",),
    ("api",),
    ("integrations",),
)
"""The first imports nothing of fxseek; each other one may import those before it, and itself."""

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TEST_ONLY = {"unittest", "pytest", "hypothesis"}


def sources() -> dict[str, Path]:
    """Every module by its name, but for the package itself, which imports all."""
    found: dict[str, Path] = {}
    for top in ("fxseek", "passes"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[:2] == ["fxseek", "passes"]:
                continue  # a link to the other
            parts = parts if top == "fxseek" else ["fxseek", *parts]
            if parts[-1] == "__init__":
                parts.pop()
            if parts != ["fxseek"]:
                found[".".join(parts)] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """What a module imports when it runs: not what types alone need."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else str(node.module)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


def layer(module: str) -> str:
    return module.split(".")[1]


def test_imports_run_one_way():
    modules = sources()
    assert {layer(name) for name in modules} == set(RANK)
    graph = nx.DiGraph()
    for name, path in modules.items():
        if "iter_modules" in path.read_text():  # it imports all that lie in its folder
            graph.add_edges_from((name, other) for other in modules if other.startswith(f"{name}."))
        for other in imported(path, set(modules)):
            if other not in modules:
                assert other.split(".")[0] not in TEST_ONLY, f"{name} imports {other}"
                continue
            below = RANK[layer(other)] < RANK[layer(name)]
            assert (
                below or layer(other) == layer(name) or RANK[layer(other)] == RANK[layer(name)]
            ), f"{name} imports {other}, which is above it"
            graph.add_edge(name, other)
    circles = list(nx.simple_cycles(graph))
    assert not circles, circles[:3]


def test_no_file_is_long():
    long = {name: len(path.read_text().splitlines()) for name, path in sources().items()}
    assert not {name: length for name, length in long.items() if length > 450}
