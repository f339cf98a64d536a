"""TRL's per-token log-probabilities, written out so that Dynamo can trace them.

TRL's trainers (1.16) call a model with `fused_lm_head=True`, which `add_fused_lm_head` of
`trl.trainer.utils` has put in front of its forward. It projects hidden states by an autograd
function that writes into its buffers, and on CUDA picks the labelled tokens by a mask first. Dynamo
can trace neither. While a step of fxseek is run, `token_statistics` stands in for the function: the
same values, made on chunks of tokens. A model without fxseek that is called by another thread
meanwhile gets these too.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxseek.capture.stand_ins import StandIns
from fxseek.errors import InputError
from fxseek.ops.log_probs import STATISTICS, token_statistics

__all__ = ["rebind_fused_heads", "refuse_untraceable", "traceable_log_probs"]

_REPLACED = StandIns()


class _Statistics:
    """In the place of TRL's autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: Sequence[str],
    ) -> tuple[Tensor | None, ...]:
        wanted = ("log_probs", *outputs)
        found = token_statistics(hidden, weight, bias, targets, temperature, softcap, scale, wanted)
        columns: list[Tensor | None] = []
        for at, name in enumerate(STATISTICS):
            column = found[..., at]
            if name == "is_top1":
                column = column > 0
            elif name in ("log_sum_sq_probs", "mean_logits"):
                column = column.detach()
            columns.append(column if name in wanted else None)
        return tuple(columns)


def _every_token(device: torch.device) -> bool:
    """In the place of `_use_triton`: no token is picked by a mask."""
    return False


_STAND_INS = {"_ChunkedLogProbFunction": _Statistics, "_use_triton": _every_token}


def refuse_untraceable() -> None:
    """Refuse a call with `fused_lm_head=True` of a TRL that has no such function.

    Raises:
        InputError: TRL computes log-probabilities in another way.
    """
    module = sys.modules.get("trl.trainer.utils")
    missing = [name for name in _STAND_INS if not hasattr(module, name)]
    if missing:
        raise InputError(
            f"fused_lm_head=True: trl.trainer.utils has no {missing[0]}, by which TRL 1.16 "
            "computes log-probabilities. Install a version of TRL that has it, or train without "
            "fxseek."
        )


def rebind_fused_heads(copies: Mapping[nn.Module, nn.Module]) -> None:
    """Let the fused heads of copied modules call the copies: their functions hold the originals.

    `copies`: the copy of each module.
    """
    for copy in copies.values():
        forward = vars(copy).get("forward")
        function: Any = getattr(forward, "__func__", None)
        if not _holds_forward(function):
            continue
        cells = [_rebound(cell, copies) for cell in function.__closure__ or ()]
        own = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__,
            tuple(cells),
        )  # fmt: skip
        own.__kwdefaults__ = function.__kwdefaults__
        own.__dict__.update(vars(function))
        copy.forward = types.MethodType(own, copy)


def _holds_forward(function: Any) -> bool:
    """Whether a function has TRL's name for the forward that it replaces."""
    code = getattr(function, "__code__", None)
    return code is not None and "original_forward" in code.co_freevars


def _rebound(cell: types.CellType, copies: Mapping[nn.Module, nn.Module]) -> types.CellType:
    held = cell.cell_contents
    owner = getattr(held, "__self__", None)
    if not isinstance(owner, nn.Module) or owner not in copies:
        return cell
    return types.CellType(types.MethodType(held.__func__, copies[owner]))


@contextlib.contextmanager
def traceable_log_probs() -> Iterator[None]:
    """TRL's function is one that can be traced, where TRL is imported and has it."""
    module = sys.modules.get("trl.trainer.utils")
    if module is None or not all(hasattr(module, name) for name in _STAND_INS):
        yield
        return
    with _REPLACED.on(lambda: [(module, name, lambda _, x=x: x) for name, x in _STAND_INS.items()]):
        yield
