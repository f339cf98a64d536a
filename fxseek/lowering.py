"""How the learn stage is run: interpreted eagerly, or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException

from fxseek.errors import GraphError
from fxseek.saved import SavedBytes
from fxseek.stages import run_boxed

BACKENDS = {"aot_eager": "aot_eager_decomp_partition", "inductor": "inductor"}
"""torch.compile's names; the plain ``aot_eager`` would not partition by min-cut."""


def lower(
    module: fx.GraphModule, backend: str
) -> Callable[[list[Any], tuple[Any, ...]], tuple[Any, int]]:
    """A function of a boxed list of arguments (which it empties) and of what is not counted.

    It returns the outputs and the bytes saved for backward. ``"eager"`` interprets the graph
    and lets go of each value after its last use; ``"aot_eager"`` runs AOTAutograd with the
    min-cut partitioner, ``"inductor"`` compiles; both with dynamic shapes.
    """
    if backend == "eager":

        def interpret(arguments: list[Any], exclude: tuple[Any, ...]) -> tuple[Any, int]:
            with SavedBytes(exclude) as saved:
                outputs = run_boxed(module, arguments)
            return outputs, saved.total

        return interpret
    compiled = torch.compile(module, backend=BACKENDS[backend], dynamic=True, fullgraph=True)

    def run(arguments: list[Any], exclude: tuple[Any, ...]) -> tuple[Any, int]:
        taken = tuple(arguments)
        arguments.clear()
        with warnings.catch_warnings():
            # Dynamo reads .grad of every tensor it wraps, non-leaves too, when it captures
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
            try:
                outputs = compiled(*taken)
            except TorchDynamoException as error:
                raise GraphError(
                    f"backend={backend!r} could not compile the learn stage: {error}\n"
                    'Use backend="eager", which runs the same graph without compiling it.'
                ) from error
        return outputs, _saved_by_functions(outputs, exclude)

    return run


def _saved_by_functions(outputs: Any, exclude: tuple[Any, ...]) -> int:
    """Bytes that compiled autograd functions hold; hooks would be traced into the graph."""
    saved = SavedBytes(exclude)
    counted = [
        saved.count(tensor)
        for node in _functions(outputs)
        for tensor in getattr(node, "saved_tensors", ()) or ()
        if isinstance(tensor, Tensor)
    ]
    return saved.total if counted else 0


def _functions(outputs: Any) -> Iterator[Any]:
    queue = [x.grad_fn for x in _flat(outputs) if isinstance(x, Tensor) and x.grad_fn is not None]
    seen: set[Any] = set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        queue.extend(following for following, _ in node.next_functions if following is not None)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
