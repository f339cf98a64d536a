"""How a stage's graph is run: interpreted eagerly, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxseek.stages import run_boxed


def lower(module: fx.GraphModule, backend: str) -> Callable[[list[Any]], Any]:
    """A function of a boxed list of arguments (which it empties).

    ``"eager"`` interprets the graph and lets go of each value after its last use; any other
    backend of torch.compile compiles it with dynamic shapes (``"aot_eager"``: AOTAutograd's
    min-cut partitioner; ``"inductor"``).
    """
    if backend == "eager":
        return lambda arguments: run_boxed(module, arguments)
    compiled = torch.compile(module, backend=backend, dynamic=True, fullgraph=True)

    def run(arguments: list[Any]) -> Any:
        taken = tuple(arguments)
        arguments.clear()
        return compiled(*taken)

    return run
