"""Masked full backprop, the definition that fxseek's gradients are held to.

For a selection of positions S in each row, masked full backprop is the ordinary eager model in
which every per-token result ``x`` is replaced by ``where(S, x, x.detach())``, with the
cross-entropy taken over the selected positions. Values are unchanged; gradients reach the
parameters through selected positions only. Written with module forward hooks, at the cost of an
ordinary training step, and sharing no code with the passes:

    x = module(...)                         [batch, tokens, ...]
    x = where(S[b, t], x, x.detach())       after every module whose result is per-token
    loss = Σ_i w_i · ce_i / (selected positions with a label)

Hooks see the results of modules, not of the operations inside them. That is the same thing wherever
each path from an unselected token to a parameter passes through the result of a module, as in a
model whose projections are modules. A model that projects keys or values by a plain function
(``torch.nn.MultiheadAttention``'s packed projection, say) has such paths inside one module, which
hooks cannot cut.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxseek._fsdp import is_sharded
from fxseek._torch import compiled_call, set_compiled_call
from fxseek.errors import InputError
from fxseek.inspect.lengths import (
    IGNORED,
    Lengths,
    field_of,
    labels_of,
    lengths_of,
    logits_of,
    selected_of,
)
from fxseek.inspect.state import devices_of, state_of, without_gradients

__all__ = ["Reference", "masked_backprop"]

_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "decoder_attention_mask")
"""Where an encoder has tokens of its own, those that are selected are the decoder's."""

_TOKENS = (
    *("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds"),
    "pixel_values",
)
"""What gives a row its tokens, the decoder's first: labels, where its inputs are made of them."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What masked full backprop gives.

    Attributes:
        loss: The loss over selected positions, a scalar without graph.
        gradients: For every parameter that requires a gradient, by name: its gradient, zeros
            where the loss does not depend on it.
    """

    loss: Tensor
    gradients: dict[str, Tensor]


def masked_backprop(
    model: nn.Module,
    batch: Mapping[str, Any],
    kept: Tensor,
    *,
    weights: Tensor | None = None,
    shift: bool | None = None,
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
    virtual: int = 0,
    tokens: int | None = None,
) -> Reference:
    """Loss and gradients of masked full backprop for the selection ``kept``.

    The model is left as it was: hooks, ``.grad``, buffers, training mode, the random state and a
    compiled call (which is bypassed) are all put back. The model runs in the mode it is in; it runs
    once with gradient and, beforehand, twice without, to learn which dimension of each module's
    result counts tokens, and whether the loss shifts its labels. A batch of 1 is tried beside a row
    of other tokens, if the model takes that: what is the same for both is made of no row's tokens.

    Args:
        model: Any module that takes ``batch`` as keyword arguments.
        batch: The arguments of one training step. With ``labels`` ``[batch, tokens]``, where -100
            is no label; ``num_items_in_batch``, if there, divides the summed loss as in the
            transformers Trainer.
        kept: Selected positions, ``[batch, kept]``, in any order; -1 is an unused slot.
        weights: Loss weights of ``kept``, the same shape. Default: 1 everywhere.
        shift: Whether position ``t`` predicts the label of ``t + 1`` (True) or its own (False).
            Default: found out by comparing the model's own loss with both.
        loss: ``loss(outputs, batch)``, the whole loss of a model that is given no labels. It is
            back-propagated as it is, so ``weights``, ``shift`` and labels are not used.
        virtual: How many tokens the model puts in front of those it is given; ``kept`` counts
            them.
        tokens: How many tokens a row has where no argument counts them, such as the patches of an
            image. No other size may be the same then, since none can be tried beforehand.

    Raises:
        InputError: Sizes that disagree, no labels, no logits, or a loss that is neither kind of
            token cross-entropy; the message says what to pass.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    seq2seq = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    counting = _DECODER if seq2seq else tuple(batch)
    if tokens is None:
        sizes = lengths_of({name: batch[name] for name in counting if name in batch}, kept)
        sizes = Lengths(sizes.batch, sizes.tokens + virtual)
    else:
        sizes = Lengths(kept.shape[0], tokens)
    selected = selected_of(kept, sizes)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = ("labels", "num_items_in_batch") if loss is None else ()
    if seq2seq and not any(name in batch for name in _DECODER[:2]):
        own = ("num_items_in_batch",)  # the decoder's inputs are made from the labels
    inputs = {key: value for key, value in batch.items() if key not in own}

    def default_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        targets = _targets(labels_of(batch, sizes, virtual), bool(shift))
        items = batch.get("num_items_in_batch")
        return _selected_loss(logits_of(outputs, sizes), targets, kept, weights, items)

    with _left_as_it_was(inner) as restore, torch.enable_grad():
        if loss is None and shift is None:
            shift = _finds_shift(inner, inputs, labels_of(batch, sizes), virtual)
            restore()
        probed = None
        for rows in (2, 1) if sizes.batch == 1 else (sizes.batch,):
            if tokens is None and probed is None:
                probed = _run_recorded(inner, inputs, sizes, counting, virtual, rows)
        functions = {n for n, m in inner.named_modules() if next(m.parameters(), None) is None}
        layout = _Layout(sizes, probed, functions)
        restore()
        with _hooked(inner, lambda name, call, x: layout.mask(name, call, x, selected)):
            outputs = _run(inner, inputs)
            value = (loss or default_loss)(outputs, batch)
            gradients = _gradients(value, [p for _, p in named])
    return Reference(
        loss=value.detach(),
        gradients={name: g for (name, _), g in zip(named, gradients, strict=True)},
    )


# ---- which results are per-token -------------------------------------------------------------


Shapes = dict[str, list[list[tuple[int, ...]]]]  # module name -> calls -> tensors of its result


class _Layout:
    """Knows, for each result of each module, which dimension counts the tokens of a row.

    Sizes alone cannot tell: the batch, a width or a head count may equal the number of tokens. So
    the model is run beforehand on another number of tokens; the dimensions that changed are
    those that count tokens. With one row alone, what all rows would share (learned positions) looks
    like that row's own; so it is run on another row as well, and results that are equal are shared.

    Nor do sizes tell the order of rows that are merged with the batch: a mixture of experts calls
    its activation on rows in the order of the experts. So results of `functions`, modules without
    parameters, are left alone there. What they are made of, and what is made of them, is masked.
    """

    def __init__(
        self, sizes: Lengths, probed: tuple[Lengths, Shapes] | None, functions: set[str]
    ) -> None:
        self.sizes = sizes
        self.probed = probed
        self.functions = functions

    def mask(self, name: str, call: int, result: Any, selected: Tensor) -> Any:
        """``result`` of the module's ``call``-th call, with unselected positions detached."""
        calls = [] if self.probed is None else self.probed[1].get(name, [])
        # a checkpointed block runs again in backward
        others = iter(calls[call % len(calls)] if calls else ())

        def masked(x: Tensor) -> Tensor:
            other = next(others, None)
            if not (x.requires_grad and x.is_floating_point()):
                return x
            kind = self._kind(tuple(x.shape), other)
            if kind is None or (kind == "packed" and name in self.functions):
                return x
            size = [1] * x.ndim
            if isinstance(kind, int):
                size[0], size[kind] = selected.shape
            else:
                size[0] = selected.numel()
            return torch.where(selected.to(x.device).reshape(size), x, x.detach())

        return _map_tensors(masked, result)

    def _kind(self, shape: tuple[int, ...], other: tuple[int, ...] | None) -> int | str | None:
        """Where the tokens are: a dimension of [batch, ..., tokens, ...], or ``"packed"``."""
        batch, tokens = self.sizes
        # Position embeddings may have one row for the whole batch: no part of them is one row's
        # token, and what they are added to is masked after it.
        row = 1 if len(shape) >= 2 and shape[0] == batch and shape[1] == tokens else None
        packed = len(shape) >= 2 and shape[:1] == (batch * tokens,)
        if other is not None and self.probed is not None and 2 <= len(other) == len(shape):
            rows, fewer = self.probed[0]
            changed = [d for d, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
            inner = [d for d in changed if d > 0]
            row = inner[0] if len(inner) == 1 else None
            if row is not None:
                ours = (batch, rows, tokens, fewer)
                if (*shape[:1], *other[:1], shape[row], other[row]) != ours:
                    row = None  # heads before tokens are fine, anything else is not one token's
            packed = packed and changed == [0] and other[:1] == (rows * fewer,)
        return row if row is not None else "packed" if packed else None


def _run_recorded(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sizes: Lengths,
    counting: Sequence[str],
    virtual: int,
    rows: int,
) -> tuple[Lengths, Shapes] | None:
    """Shapes of every module's results on another number of tokens; None where that fails.

    `rows`: how many the batch is to have. Two of a batch of 1 are it and one of other tokens; what
    is equal for both has the shape of one row.
    """
    shapes: Shapes = defaultdict(list)
    another = rows != sizes.batch

    def shape_of(x: Tensor) -> tuple[int, ...]:
        equal = another and x.ndim > 1 and x.shape[0] == rows and bool((x[0] == x[1]).all())
        return (1, *x.shape[1:]) if equal else tuple(x.shape)

    def record(name: str, call: int, result: Any) -> Any:
        found: list[tuple[int, ...]] = []
        _map_tensors(lambda x: (found.append(shape_of(x)), x)[1], result)
        shapes[name].append(found)
        return result

    # One token fewer: more might exceed a position table.
    given = sizes.tokens - virtual
    tokens = given - 1 if given > 1 else 2
    keep = torch.arange(tokens).clamp(max=given - 1)

    def resized(value: Any, counts_tokens: bool, has_tokens: bool) -> Any:
        if isinstance(value, dict):
            return {key: resized(x, counts_tokens, has_tokens) for key, x in value.items()}
        if not isinstance(value, Tensor):
            return value
        for dim in range(1, value.ndim):  # embeddings have a width, which may be the same number
            counts = dim == 1 or value.ndim == 4 or not value.is_floating_point()
            if counts_tokens and counts and value.shape[dim] == given:
                value = value.index_select(dim, keep.to(value.device))
        if another and value.ndim > 1:  # positions may be [3, batch, tokens]
            first = 1 if value.ndim == 3 and value.shape[0] > 1 == value.shape[1] else 0
            if value.shape[first] == 1:
                other = value.roll(1, -1 if value.ndim == 4 else 1) if has_tokens else value
                value = torch.cat([value, other], first)
        return value

    tensors = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim > 1]
    own = next((name for name in (*_TOKENS, *tensors) if name in tensors), None)
    if another and (own is None or bool((inputs[own] == inputs[own].roll(1, 1)).all())):
        return None  # one token throughout: no other row is known
    other = {name: resized(x, name in counting, name == own) for name, x in inputs.items()}
    try:
        with torch.no_grad(), _hooked(model, record):
            _run(model, other)
    except Exception:
        return None  # a length the model does not take: sizes must do
    return Lengths(rows, tokens + virtual), dict(shapes)


@contextlib.contextmanager
def _hooked(model: nn.Module, hook: Callable[[str, int, Any], Any]) -> Iterator[None]:
    """Passes every result of every module through ``hook(module name, call number, result)``."""
    calls: dict[str, Iterator[int]] = defaultdict(itertools.count)

    def forward_hook(name: str, module: nn.Module, args: Any, result: Any) -> Any:
        return hook(name, next(calls[name]), result)

    with contextlib.ExitStack() as handles:
        for name, module in model.named_modules():
            handles.enter_context(module.register_forward_hook(partial(forward_hook, name)))
        yield


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in it, in order, passed through ``function``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [_map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_map_tensors(function, part) for part in value]
    if isinstance(value, dict):  # transformers' ModelOutput among them
        result = copy.copy(value)
        for key, part in value.items():
            result[key] = _map_tensors(function, part)
        return result
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {
            field.name: _map_tensors(function, getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **parts)
    return value


# ---- the loss --------------------------------------------------------------------------------


def _targets(labels: Tensor, shift: bool) -> Tensor:
    """What each position is to predict, ``[batch, tokens]``; -100 for nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, ``[batch, tokens]``; 0 where there is no label."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat = nn.functional.cross_entropy(
        logits.flatten(0, 1),
        targets.to(logits.device).flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return flat.view(targets.shape)


def _selected_loss(
    logits: Tensor,
    targets: Tensor,
    kept: Tensor,
    weights: Tensor | None,
    items: Tensor | float | None,
) -> Tensor:
    """The weighted mean of the cross-entropy over kept positions that have a label."""
    kept, targets = kept.to(logits.device), targets.to(logits.device)
    used = kept >= 0
    at = kept.clamp(min=0)
    # Only kept logits enter, so that no other position's NaN can reach the result.
    kept_logits = logits.gather(1, at.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    kept_targets = targets.gather(1, at).masked_fill(~used, IGNORED)
    losses = _losses(kept_logits, kept_targets)
    if weights is not None:
        losses = losses * weights.to(losses).masked_fill(~used, 0)
    value = losses.sum() / (kept_targets != IGNORED).sum().clamp(min=1)
    if items is not None:
        value = value * (targets != IGNORED).sum() / items
    return value


def _finds_shift(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, virtual: int) -> bool:
    """Whether the model's own loss is that of the next token (True) or of the same one (False)."""
    with torch.no_grad():
        outputs = _run(model, {**inputs, "labels": labels[:, virtual:]})
    logits, own = field_of(outputs, "logits"), field_of(outputs, "loss")
    if logits is None or own is None:
        raise InputError(
            f"the model's output ({type(outputs).__name__}) lacks "
            f"{'a loss' if own is None else 'logits'}, so it cannot be seen whether its labels are "
            f"shifted; pass shift=True (a causal language model), shift=False, or "
            f"loss=loss(outputs, batch)"
        )
    coarse = logits.dtype in (torch.float16, torch.bfloat16)
    tolerance = 2e-2 if coarse else 1e-4
    distances: dict[bool, float] = {}
    candidates = {True: math.nan, False: math.nan}
    for shift in (True, False):
        targets = _targets(labels, shift)
        count = (targets != IGNORED).sum()
        if count == 0:
            if own.isnan() or own == 0:
                return shift  # no position has a label: either way nothing is learned
            continue
        candidates[shift] = (_losses(logits.detach(), targets).sum() / count).item()
        distances[shift] = abs(candidates[shift] - own.item()) / max(abs(own.item()), 1e-12)
    best = min(distances, key=lambda key: distances[key], default=None)
    if best is None or not distances[best] <= tolerance:
        raise InputError(
            f"the model's own loss is {own.item():.6g}, but cross-entropy of its logits is "
            f"{candidates[True]:.6g} with labels shifted by one token and "
            f"{candidates[False]:.6g} without; if it is one of them, pass shift=True or "
            f"shift=False, and otherwise loss=loss(outputs, batch)"
        )
    return best


def _gradients(value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients without touching ``.grad``; zeros for what ``value`` does not depend on."""
    if not value.requires_grad or not parameters:
        return [torch.zeros_like(p) for p in parameters]
    if any(map(is_sharded, parameters)):  # FSDP2 hands gradients to `.grad` alone
        with without_gradients(parameters):
            value.backward()
            found = [p.grad for p in parameters]
    else:
        found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g.detach()
        for p, g in zip(parameters, found, strict=True)
    ]


# ---- the model and its batch -----------------------------------------------------------------


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's output; every run starts from the same random state and leaves it so."""
    with torch.random.fork_rng(devices=devices_of(model)):
        return model(**inputs)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Calls go to eager modules; what a forward changes is put back, also when the result asks."""
    compiled = [(x, call) for x in model.modules() if (call := compiled_call(x)) is not None]
    restore = state_of(model)
    try:
        for module, _ in compiled:
            set_compiled_call(module, None)
        yield restore
    finally:
        for module, call in compiled:
            set_compiled_call(module, call)
        restore()
