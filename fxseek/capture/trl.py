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
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxseek.ops.log_probs import STATISTICS, token_statistics

__all__ = ["traceable_log_probs"]

_LOCK = threading.RLock()
_users = 0
_original: dict[str, Any] = {}


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


@contextlib.contextmanager
def traceable_log_probs() -> Iterator[None]:
    """TRL's function is one that can be traced, where TRL is imported and has it."""
    global _users
    module = sys.modules.get("trl.trainer.utils")
    if module is None or not all(hasattr(module, name) for name in _STAND_INS):
        yield
        return
    with _LOCK:
        if _users == 0:
            for name, stand_in in _STAND_INS.items():
                _original[name] = getattr(module, name)
                setattr(module, name, stand_in)
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if _users == 0:
                for name in _STAND_INS:
                    setattr(module, name, _original.pop(name))
