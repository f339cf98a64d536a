"""Tokens that no argument counts: a count of them, handed to the module where they begin.

A vision transformer makes its tokens itself, and their number is a constant of what is captured.
The passes find the module where they begin (`fxseek.passes.uncounted`). In front of it a hook puts
`rows_at`, whose result is as long as the positions that it is given: a symbol of the graph, as the
length of ids is. The hook is there while a step is run, and no longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxseek import _torch
from fxseek.ops.rows import rows_at
from fxseek.passes.facts import POSITIONS
from fxseek.passes.uncounted import Uncounted, UncountedTokens

__all__ = ["Counted"]

_TOKENS = "tokens"


class Counted:
    """The count of the tokens that a model makes itself.

    `place`: where they begin, None for a model whose arguments count its tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.place: Uncounted | None = None
        self._lengths: dict[torch.Size, int] = {}
        """The number of tokens by what is known of it: the sizes of a row's image."""
        self._given: dict[str, Any] = {}

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = self._given
            args = tuple(_counted(x, given) for x in args)
            return args, {name: _counted(x, given) for name, x in kwargs.items()}

        self._hook = count

    def found(self, error: Exception, image: Tensor) -> bool:
        """Whether a capture failed since nothing counts the tokens, and another one goes further.

        `image`: the argument that the tokens are made of.
        """
        cause = getattr(error, "inner_exception", None)  # what the backend has raised
        if not isinstance(cause, UncountedTokens):
            return False
        known = self.place, self._lengths.get(image.shape[1:])
        self.place = cause.place
        self._lengths[image.shape[1:]] = cause.place.tokens
        return known != (self.place, self.place.tokens)

    @contextmanager
    def on(self, image: Tensor) -> Iterator[None]:
        """Meanwhile the module where tokens begin counts them."""
        if self.place is None:
            yield
            return
        tokens = self._lengths.get(image.shape[1:], self.place.tokens)
        positions = torch.arange(tokens, device=image.device).repeat(image.shape[0], 1)
        for dim in (1, 0) if image.shape[0] > 1 else (1,):
            _torch.mark_dynamic(positions, dim)
        self._given.update({_TOKENS: tokens, POSITIONS: positions})
        module = self.model.get_submodule(self.place.module)
        try:
            with module.register_forward_pre_hook(self._hook, with_kwargs=True):
                yield
        finally:
            self._given.clear()


def _counted(x: Any, given: dict[str, Any]) -> Any:
    """A value of all tokens with as many rows as there are positions; others as they are.

    One of another number of tokens is left alone too, so that what is captured has no count.
    """
    if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == given[_TOKENS]:
        return rows_at(x, given[POSITIONS])
    return x
