"""Backwards that have no derivatives of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fxseek.errors import InputError

__all__ = ["once_differentiable", "once_in_parts"]


def once_differentiable(
    what: str, remedy: str = "leave it out"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The backward of `what` refuses ``create_graph=True``, and names the remedy.

    `torch.autograd.function.once_differentiable` refuses it only if a gradient arrives that has a
    graph. That of a loss has none, so that second derivatives would be left out silently.

    Raises:
        InputError: in backward, with ``create_graph=True``.
    """

    def checked(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *slopes: Any) -> Any:
            if torch.is_grad_enabled():
                raise InputError(
                    f"create_graph=True: there are no second derivatives of {what}: {remedy}"
                )
            return backward(ctx, *slopes)

        return run

    return checked


once_in_parts = once_differentiable(
    "a step that is learned in parts (learn_chunk)", "leave it out, or compile without learn_chunk"
)
