"""Captured graphs for tests: a call → graph and facts, and how to run them and their stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.node import map_arg

from fxseek import _torch
from fxseek.capture.patches import capture_settings
from fxseek.passes.ditch import ditch
from fxseek.passes.entries import Entries
from fxseek.passes.facts import Facts, Rows, example, is_tensor, needs_grad
from fxseek.passes.functionalise import functionalise
from fxseek.passes.ir import Piece, Prefilled, Selected
from fxseek.passes.normalise import normalise
from fxseek.passes.sizes import find_sizes
from fxseek.passes.tokens import find_tokens
from fxseek.run.piece import module_of


@dataclass
class Captured:
    """A graph as Dynamo hands it over, as the passes read it, and the inputs of the last call."""

    raw: fx.Graph
    graph: fx.Graph
    facts: Facts
    inputs: list[Any] = field(default_factory=list)
    compiled: Callable[..., Any] | None = None

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that the graph returns, in order, as often as they are returned."""
        found: list[fx.Node] = []
        map_arg(self.graph.output_node().args[0], lambda node: found.append(node))
        return found

    def feed(self, *tensors: Tensor) -> None:
        """Take other inputs; the graph must serve them without another capture."""
        assert self.compiled is not None
        self.compiled(*tensors)


def capture(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    dynamic: Sequence[Sequence[int]],
    token_dim: int = 1,
) -> Captured:
    """Capture a call and find the facts of its graph.

    `dynamic` lists the dynamic dimensions of each tensor. The passes run where a backend runs:
    Dynamo forgets where inputs came from when the compilation is over.
    """
    made: list[Captured] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        assert not made, "the call was captured twice"
        graph = normalise(functionalise(gm.graph).graph)
        graph.lint()
        facts = find_tokens(graph, find_sizes(graph, token_dim))
        made.append(Captured(gm.graph, graph, facts))

        def run(*given: Any) -> Any:
            made[0].inputs[:] = given
            return gm(*given)

        return run

    torch._dynamo.reset()
    for tensor, dims in zip(tensors, dynamic, strict=True):
        for dim in dims:
            _torch.mark_dynamic(tensor, dim)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    with capture_settings(captures=8):
        try:
            compiled(*tensors)
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
    made[0].compiled = compiled
    return made[0]


def dims_of(spec: str) -> list[str]:
    """The dimensions of a spelled shape: ``"int:b t"`` → ``["b", "t"]``."""
    return spec.removeprefix("int:").split()


def spelled(spec: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """A tensor of a spelled shape: float64, or indices from 0 and 1 for ``"int:..."``."""
    sizes = [{"b": batch, "t": tokens}.get(dim) or int(dim) for dim in dims_of(spec)]
    if spec.startswith("int:"):
        return torch.randint(0, 2, sizes, generator=generator)
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


def dynamic_dims(specs: Sequence[str], batch: int) -> list[list[int]]:
    """Which dimensions of spelled shapes are dynamic: tokens, and a batch above 1."""
    names = ("t", "b") if batch > 1 else ("t",)
    return [[i for i, dim in enumerate(dims_of(spec)) if dim in names] for spec in specs]


def evaluate(
    graph: fx.Graph, inputs: Sequence[Any], mask: NodeMask | None = None
) -> dict[fx.Node, Any]:
    """Every node's value. `mask` may give the elements of a value that gradient passes."""
    values: dict[fx.Node, Any] = {}
    of_rows: set[fx.Node] = set()
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
            if mask is not None and mask.of_rows(values[node]):
                of_rows.add(node)
            continue
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        elif node.op == "get_attr":
            assert graph.owning_module is not None
            values[node] = graph.owning_module.get_submodule(str(node.target))
        else:
            assert node.op == "output", node.op
            values[node] = args[0]
            continue
        value = values[node]
        if not (isinstance(value, int) or of_rows.isdisjoint(node.all_input_nodes)):
            of_rows.add(node)  # a length is no part of a row
        if mask is not None and isinstance(value, Tensor) and value.requires_grad:
            passes = mask(value, node in of_rows)
            if passes is not None:
                values[node] = torch.where(passes, value, value.detach())
    return values


class NodeMask:
    """Which elements of a result belong to selected tokens, by sizes that differ from all others.

    A result with one token dimension belongs to those tokens, and one with batch × tokens in one
    dimension too where these are `packed` row by row. A result with no token dimension, or with
    two, is left alone: what reads it has one again. So is, of a batch of 1, what is made of no
    row's tokens (learned positions, a bias for each lag): all rows of a larger batch would share
    it.
    """

    def __init__(self, kept: Tensor, tokens: int, *, packed: bool = True) -> None:
        self.batch, self.tokens, self.packed = kept.shape[0], tokens, packed
        at = kept.where(kept >= 0, tokens)
        marked = torch.zeros(self.batch, tokens + 1).bool().scatter_(1, at, True)
        self.marked = marked[:, :tokens]

    def of_rows(self, given: Any) -> bool:
        """Whether an input has tokens of the rows: [batch, tokens, ...]."""
        return isinstance(given, Tensor) and self.tokens in given.shape[1:]

    def __call__(self, value: Tensor, of_rows: bool) -> Tensor | None:
        """The elements that gradient passes, None for all; `of_rows`: made from such an input."""
        shape, batch, tokens = list(value.shape), self.batch, self.tokens
        if self.packed and batch > 1 and shape.count(batch * tokens) == 1 and tokens not in shape:
            rows = Rows(shape.index(batch * tokens), packed=True)
        elif shape.count(tokens) == 1 and batch == 1 and of_rows:
            rows = Rows(shape.index(tokens))
        elif shape.count(tokens) == 1 and batch > 1 and shape.count(batch) == 1:
            rows = Rows(shape.index(tokens), shape.index(batch))
        else:
            return None
        return elements_of(self.marked, value.shape, rows)


def run_stage(
    stage: Piece,
    captured: Captured,
    values: dict[fx.Node, Any],
    kept: Tensor,
    weights: Tensor | None = None,
) -> list[Any]:
    """The outputs of a stage on the captured inputs and full values; weights are 1 by default."""
    stage.graph.lint()
    weights = torch.ones(kept.shape) if weights is None else weights
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, captured.inputs, strict=True))
    given: list[Any] = []
    for item in stage.inputs:
        if isinstance(item, Selected):
            given.append({"kept": kept, "weights": weights, "filled": None}[item.part])
        elif isinstance(item, Prefilled):
            value = values[item.node]
            given.append(value.detach() if isinstance(value, Tensor) else value)
        else:
            given.append(inputs[item.node])
    module = module_of(stage, "Stage")
    return list(module(*given))


def carrying_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that carry gradient, as the pipeline chooses them."""
    return {node for node in graph.nodes if needs_grad(node)}


def replay(
    captured: Captured,
    outputs: Sequence[tuple[str, fx.Node]],
    values: dict[fx.Node, Any],
    kept: Tensor,
    *,
    also: Iterable[fx.Node] = (),
) -> list[Any]:
    """Outputs of the graph replayed on selected rows."""
    carrying = carrying_nodes(captured.graph) | set(also)
    stage = ditch(captured.graph, captured.facts, carrying=carrying, outputs=outputs)
    return run_stage(stage, captured, values, kept)


def selections(batch: int, tokens: int) -> list[Tensor]:
    """One token, some, and all: positions [batch, kept], ascending."""
    generator = torch.Generator().manual_seed(1)
    counts = sorted({1, math.ceil(0.4 * tokens), tokens})
    return [
        torch.stack(
            [
                torch.randperm(tokens, generator=generator)[:count].sort().values
                for _ in range(batch)
            ]
        )
        for count in counts
    ]


def elements_of(marked: Tensor, shape: Sequence[int], rows: Rows | Entries) -> Tensor:
    """Whether each element of a value belongs to a marked token; `marked` is [batch, tokens]."""
    if isinstance(rows, Entries):
        assert rows.order is None
        entries = marked.repeat_interleave(rows.inner, 1)
        if not rows.packed:
            return elements_of(entries.tile(rows.outer), shape, rows.rows)
        single = list(shape)
        single[rows.row] //= rows.outer
        times = [rows.outer if dim == rows.row else 1 for dim in range(len(shape))]
        return elements_of(entries, single, rows.rows).tile(*times)
    if rows.packed:
        mask, places = marked.reshape(-1), (rows.row,)
    elif rows.batch is None:
        assert marked.shape[0] == 1
        mask, places = marked[0], (rows.row,)
    elif rows.batch < rows.row:
        mask, places = marked, (rows.batch, rows.row)
    else:
        mask, places = marked.T, (rows.row, rows.batch)
    sizes = [1] * len(shape)
    for place, size in zip(places, mask.shape, strict=True):
        sizes[place] = size
    return mask.reshape(sizes).expand(*shape)


def _tokens_of(shape: Sequence[int], rows: Rows, batch: int) -> int:
    return shape[rows.row] // batch if rows.packed else shape[rows.row]


def take(value: Tensor, rows: Rows | Entries, kept: Tensor) -> Tensor:
    """The selected rows of a full value, one by one; shares nothing with fxseek.ops.rows."""
    if isinstance(rows, Entries):
        assert rows.order is None
        inner = torch.arange(rows.inner)
        entries = (kept[:, :, None] * rows.inner + inner).flatten(1)
        return torch.cat(
            [take(copy, rows.rows, entries) for copy in value.chunk(rows.outer, rows.row)], rows.row
        )
    pieces: list[Tensor] = []
    tokens = _tokens_of(value.shape, rows, kept.shape[0])
    for index, positions in enumerate(kept.tolist()):
        if rows.packed:
            at = torch.tensor([index * tokens + position for position in positions])
            pieces.append(value.index_select(rows.row, at))
        elif rows.batch is None:
            return value.index_select(rows.row, torch.tensor(positions))
        else:
            row = value.narrow(rows.batch, index, 1)
            pieces.append(row.index_select(rows.row, torch.tensor(positions)))
    along = rows.row if rows.packed else rows.batch
    assert along is not None
    return torch.cat(pieces, along)


def gradients(result: Tensor, inputs: Sequence[Any], cotangent: Tensor) -> list[Tensor | None]:
    """Gradients of ``(result · cotangent).sum()`` at the inputs that require grad."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not result.requires_grad:
        return [None for _ in leaves]
    total = (result * cotangent).sum()
    total = total.real if total.is_complex() else total
    return list(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True))


def assert_equal_gradients(
    found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], tolerance: float = 1e-9
) -> None:
    """Equal to rounding; a missing gradient is zero."""
    for got, want in zip(found, wanted, strict=True):
        if got is None and want is None:
            continue
        zero = torch.zeros_like(got if got is not None else want)  # type: ignore[arg-type]
        torch.testing.assert_close(
            zero if got is None else got,
            zero if want is None else want,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
        )


__all__ = [
    "Captured",
    "NodeMask",
    "assert_equal_gradients",
    "capture",
    "carrying_nodes",
    "dims_of",
    "dynamic_dims",
    "elements_of",
    "evaluate",
    "example",
    "gradients",
    "is_tensor",
    "replay",
    "run_stage",
    "selections",
    "spelled",
    "take",
]
