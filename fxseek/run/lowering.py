"""How the learn stage is run: eagerly or compiled, kept or recomputed by block."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fxseek import _torch
from fxseek.config import SeekConfig
from fxseek.errors import GraphError
from fxseek.ops.shards import Unshard
from fxseek.passes.ir import Piece
from fxseek.passes.schedule import Schedule
from fxseek.run.boxed import Boxed
from fxseek.run.piece import root_of
from fxseek.run.saved import Known, SavedBytes, functions_of
from fxseek.run.selective import Selectively

BACKENDS = {"aot_eager": "aot_eager_decomp_partition", "inductor": "inductor"}
"""torch.compile's names; the plain ``aot_eager`` would not partition by min-cut."""

Run = Callable[[list[Any], Known], tuple[Any, int]]
"""Takes a list of arguments, which it empties, and the memory not to count; returns the outputs and
the bytes saved for backward."""


def run_segment(module: fx.GraphModule, backend: str, recompute: str) -> Callable[..., Any]:
    """A function that runs a segment of the learn stage, or the head.

    With ``recompute="block"`` only its inputs are kept for backward, which runs it again.
    """
    if backend != "eager":
        return _compiled(module, backend, recompute)
    return _recomputed(module) if recompute == "block" else module


def _recomputed(module: fx.GraphModule) -> Callable[..., Any]:
    """A segment that backward runs again; its gather of sharded parameters is told of that."""
    gathers = [child for child in module.children() if isinstance(child, Unshard)]
    if not gathers:
        return partial(checkpoint, module, use_reentrant=False)
    (gather,) = gathers  # a segment's parameters are of one team

    def run(*arguments: Any) -> Any:
        outputs = checkpoint(module, *arguments, use_reentrant=False, context_fn=gather.contexts)
        tensors = (x for x in tree_leaves(outputs) if isinstance(x, Tensor))
        gather.learns = any(x.requires_grad for x in tensors)
        return outputs

    return run


def lower(piece: Piece, schedule: Schedule, config: SeekConfig, **modules: nn.Module) -> Run:
    """A function that runs the learn stage, a piece with this `schedule`.

    ``backend="eager"`` runs the graph and lets go of each value after its last use;
    ``"aot_eager"`` runs AOTAutograd with the min-cut partitioner, ``"inductor"`` compiles; both
    with dynamic shapes, block by block, so that blocks that look alike are compiled once.
    ``recompute="selective"`` keeps products and recomputes what follows from them cheaply, as the
    partitioner does in any case. ``recompute="block"`` keeps the inputs of each block and runs it
    again in backward. `modules`: as `root_of` takes them.
    """
    eager, root = config.backend == "eager", root_of(piece, **modules)
    if schedule.regions is not None:
        return Selectively(root, piece.graph, schedule.regions)
    if schedule.segments is None:
        return _hooked(Boxed(root, piece.graph))
    module = fx.GraphModule(root, piece.graph)
    module = split_module(module, module, schedule.segments.__getitem__, keep_original_order=True)
    alike: dict[Any, Callable[..., Any]] = {}
    for name, part in list(module.named_children()):
        assert isinstance(part, fx.GraphModule)
        part = fx.GraphModule(part, part.graph)  # Dynamo reads no lazy one, as split_module makes
        if part.graph.find_nodes(op="call_module", target="head"):
            continue  # it sees to itself
        key = name if eager else _likeness(part)
        if key not in alike:
            alike[key] = run_segment(part, config.backend, config.recompute)
        setattr(module, name, _Called(alike[key]))
    boxed = Boxed(module, module.graph)
    return _hooked(boxed) if eager else _counted(boxed)


class _Called(nn.Module):
    """A function in the place of a submodule."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        """Call it."""
        return self.function(*arguments)


def _hooked(boxed: Boxed) -> Run:
    def run(arguments: list[Any], exclude: Known) -> tuple[Any, int]:
        if not exclude.counts:
            return boxed(arguments), 0
        with SavedBytes(exclude) as saved:
            outputs = boxed(arguments)
        return outputs, saved.total

    return run


def _counted(boxed: Boxed) -> Run:
    """Compiled autograd functions say what they hold."""

    def run(arguments: list[Any], exclude: Known) -> tuple[Any, int]:
        outputs, saved = boxed(arguments), SavedBytes(exclude)
        held = [  # counted for as long as this lives; hooks would be traced into the graph
            saved.count(tensor)
            for node in functions_of(outputs)
            for tensor in getattr(node, "saved_tensors", ()) or ()
            if isinstance(tensor, Tensor)
        ]
        return outputs, saved.total if held else 0

    return run


def _likeness(module: fx.GraphModule) -> tuple[Any, ...]:
    """Equal for segments that do the same to their inputs."""
    number: dict[fx.Node, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, *(plain(item) for item in value))
        if isinstance(value, dict):
            return ("dict", *((key, plain(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        return (type(value).__name__, repr(value))

    found: list[Any] = []
    for index, node in enumerate(module.graph.nodes):
        number[node] = index
        target = node.target if node.op in ("call_function", "call_method") else None
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(module)
            target = _likeness(value) if isinstance(value, fx.GraphModule) else id(value)
        found.append((node.op, target, plain(node.args), plain(node.kwargs)))
    return tuple(found)


def _compiled(module: fx.GraphModule, backend: str, recompute: str) -> Callable[..., Any]:
    """A function of the segment's inputs, compiled when it is first called."""
    _restore_functions(module)
    compiled = torch.compile(module, backend=BACKENDS[backend], dynamic=True, fullgraph=True)

    def call(*arguments: Any) -> Any:
        budget = _torch.saving_inputs_only() if recompute == "block" else nullcontext()
        with warnings.catch_warnings(), budget:
            # Dynamo reads .grad of every tensor it wraps, non-leaves too, when it captures
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
            try:
                return compiled(*arguments)
            except Exception as error:
                if not _torch.failed_capture(error):
                    raise
                raise GraphError(
                    f"backend={backend!r} could not compile the learn stage: {error}\n"
                    'Use backend="eager", which runs the same graph without compiling it.'
                ) from error

    return call


def _restore_functions(module: fx.GraphModule) -> None:
    """Turn captured autograd functions into autograd functions again (in place).

    Dynamo captures ``Function.apply`` as an operator on two graphs, and does not trace that.
    """
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "") != "autograd_function_apply":
            continue
        forward, backward = (
            _traceable(module.get_submodule(str(body.target))) for body in node.args[:2]
        )
        name = f"applied_{node.name}"
        fixed = node.kwargs.get("non_differentiable_idx", ())
        module.add_submodule(name, _applied(forward, backward, fixed))
        with module.graph.inserting_before(node):
            made = module.graph.call_module(name, node.args[2:])
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _traceable(body: Any) -> nn.Module:
    """A body without ``x.data``, which Dynamo captures as a call that it cannot capture."""
    for node in body.graph.nodes:
        if getattr(node.target, "__name__", "") == "_get_data_attr":
            node.target = torch.detach
    body.recompile()
    return body


def _applied(forward: nn.Module, backward: nn.Module, fixed: Sequence[int]) -> _Called:
    """An autograd function of a graph ``operands → (results, saved)`` and a backward graph."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *operands: Any) -> Any:
            results, saved = forward(*operands)
            ctx.tensors = [isinstance(x, Tensor) for x in saved]
            ctx.save_for_backward(*[x for x in saved if isinstance(x, Tensor)])
            ctx.numbers = [x for x in saved if not isinstance(x, Tensor)]
            if fixed:
                each = results if isinstance(results, (tuple, list)) else (results,)
                ctx.mark_non_differentiable(*[each[index] for index in fixed])
            return results

        @staticmethod
        def backward(ctx: Any, *slopes: Any) -> Any:
            tensors, numbers = iter(ctx.saved_tensors), iter(ctx.numbers)
            saved = [next(tensors if tensor else numbers) for tensor in ctx.tensors]
            return backward(*slopes, *saved)

    return _Called(Function.apply)
