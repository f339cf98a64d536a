"""What a step changes of a model, put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxseek import _torch
from fxseek.capture.backend import latest_kept
from fxseek.errors import InputError

__all__ = ["accelerator_of", "as_before", "devices_of", "state_of", "without_gradients"]


@contextlib.contextmanager
def without_gradients(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Leaves have no gradients at first, and have their own again in the end."""
    before = {leaf: leaf.grad for leaf in leaves}
    for leaf in before:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in before.items():
            leaf.grad = gradient


@contextlib.contextmanager
def as_before(model: nn.Module, *others: Tensor) -> Iterator[None]:
    """Gradients and random generators are put back; meanwhile there are no gradients.

    Gradients of the model's parameters, and of `others`. Nor is a step in this context the last one
    of the thread, which `fxseek.report()` is about.

    Raises:
        InputError: a hook of the model's might change weights in a backward.
    """
    for name, parameter in model.named_parameters():
        if _torch.accumulation_hooked(parameter):
            raise InputError(
                f"{name} has a hook from register_post_accumulate_grad_hook, which may change "
                "weights in the backward, as an optimizer's does: remove it first"
            )
    with (
        latest_kept(),
        without_gradients([*model.parameters(), *others]),
        torch.random.fork_rng(devices=devices_of(model)),
    ):
        yield


def accelerator_of(device: torch.device) -> torch.device | None:
    """A device that has to be waited for and has an allocator of its own; None of the CPU."""
    kind = torch.accelerator.current_accelerator()
    return device if kind is not None and kind.type == device.type else None


def devices_of(model: nn.Module) -> list[int]:
    """The CUDA devices whose generators a step may move, for `torch.random.fork_rng`."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def state_of(model: nn.Module) -> Callable[[], None]:
    """Keeps what a forward may change: the model's buffers, and the numbers in its attributes.

    The result puts back those that have changed, or that the forward has bound to another value.
    """
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    bound = [
        (module, dict(module._buffers), {k: v for k, v in vars(module).items() if _is_number(v)})
        for module in model.modules()
    ]

    @torch.no_grad()
    def restore() -> None:
        for module, buffers, attributes in bound:
            module._buffers.update(buffers)
            vars(module).update(attributes)
        for buffer, before in values:
            if not torch.equal(buffer, before):
                buffer.copy_(before)

    return restore


def _is_number(value: Any) -> bool:
    return type(value) in (bool, int, float)
