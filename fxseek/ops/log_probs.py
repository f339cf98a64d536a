"""What a language model says of each label, without the logits of all tokens.

A loss outside the model (of preferences, of a policy) reads log-probabilities and a few statistics
of each token's distribution. They are made of hidden states and the vocabulary's weights on chunks
of tokens, in the forward and again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxseek.ops.autocast import autocast_dtype, no_autocast
from fxseek.ops.loss import Scratch, divisor
from fxseek.ops.once import once_differentiable
from fxseek.ops.sweep import chunks_of

__all__ = ["IGNORED", "STATISTICS", "by_weight", "times_weights", "token_statistics"]

IGNORED = -100
STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""The columns, by the names that TRL's `FusedCausalLMOutput` has for them."""


class _Logits(NamedTuple):
    """How logits are made of a projection onto the vocabulary, and in which precision."""

    temperature: float
    softcap: float | None
    scale: float
    dtype: torch.dtype

    def of(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch | None
    ) -> Tensor:
        """[chunk, width] → [chunk, vocabulary], in float32 at least, maybe in `scratch`."""
        hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        if scratch is None:
            logits = F.linear(hidden, weight, bias)
        else:
            out = scratch.empty(hidden, (len(hidden), len(weight)), self.dtype)
            if bias is None:
                logits = torch.mm(hidden, weight.mT, out=out)
            else:
                logits = torch.addmm(bias, hidden, weight.mT, out=out)
        logits = logits.to(torch.promote_types(self.dtype, torch.float32))
        if not _is_one(self.scale):
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if _is_one(self.temperature) else logits.div_(self.temperature)

    def slope(self, slope: Tensor, logits: Tensor) -> Tensor:
        """From ∂ / ∂ logits to ∂ / ∂ the projection. Either may be written to."""
        if not _is_one(self.temperature):
            slope = slope.div_(self.temperature)
        if self.softcap is not None:
            slope = slope.mul_(1 - logits.mul_(self.temperature / self.softcap).square_())
        return (slope if _is_one(self.scale) else slope.mul_(self.scale)).to(self.dtype)


def _is_one(factor: float) -> bool:
    return isinstance(factor, int | float) and factor == 1  # it may be a symbol


@torch.compiler.allow_in_graph
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    wanted: Sequence[str] = STATISTICS,
    chunk_bytes: int = 2**26,
    known: Tensor | None = None,
) -> Tensor:
    """The `STATISTICS` of each token's distribution, all 0 where the label is -100.

    `log_probs` of the label and `entropy` have gradient; `log_sum_sq_probs` (log Σ p²),
    `mean_logits` and `is_top1` (whether the label is the first of the likeliest, 1 or 0) have none.
    A column that is not `wanted` is 0. `chunk_bytes` bounds the logits that exist at once. `known`
    are the statistics themselves, where they have been made: then the forward makes no logits.

    Shapes: hidden [..., width]; weight [vocabulary, width]; bias [vocabulary]; labels [...] →
    [..., 5], of the precision of the projection and float32 at least.
    """
    dtype = autocast_dtype(hidden.device.type) or hidden.dtype
    how = _Logits(temperature, softcap, scale, dtype)
    rows = hidden.flatten(0, -2)
    found: Any = _Statistics.apply(
        rows, weight, bias, labels.flatten(), how, tuple(wanted), chunk_bytes,
        None if known is None else known.flatten(0, -2),
    )  # fmt: skip
    return found.unflatten(0, labels.shape)


@torch.compiler.allow_in_graph
def by_weight(x: Tensor, labels: Tensor | None = None) -> Tensor:
    """A value of each token, `x` itself; that of selected ones is `times_weights`.

    Shapes: x [batch, tokens, ...]; labels [batch, tokens].
    """
    return x.view_as(x)


def times_weights(
    x: Tensor, weights: Tensor, labels: Tensor | None = None, all_labels: Tensor | None = None
) -> Tensor:
    """`x` of kept tokens, with each one's gradient times its selection weight.

    With labels, also times their number over that of the kept ones: a sum over tokens of a loss
    that is linear in `x` has the gradient of its mean over the kept ones, times the number of
    labels, as a loss in the model has (`fxseek.ops.loss.mean_of_parts`).

    Shapes: x [batch, kept, ...]; labels and weights [batch, kept]; all_labels [batch, tokens].
    """
    scale = weights.to(x.dtype)
    if labels is not None and all_labels is not None:
        kept = (labels != IGNORED) & (weights != 0)
        scale = scale * ((all_labels != IGNORED).sum() / divisor(kept.sum()).to(x.dtype))
    return _Scaled.apply(x, scale.reshape(scale.shape + (1,) * (x.dim() - 2)))  # type: ignore[return-value]


class _Scaled(torch.autograd.Function):
    """The value itself, its gradient times a scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return slope * scale, None


def _chunks(rows: Tensor, weight: Tensor, how: _Logits, chunk_bytes: int) -> list[slice]:
    """Chunks of rows by the size of their logits; one, where the number of rows is a symbol."""
    if not isinstance(rows.shape[0], int):
        return [slice(None)]
    size = max(4, how.dtype.itemsize) * weight.shape[0]
    return chunks_of(rows.shape[0], chunk_bytes // size) or [slice(None)]


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor has values, and is not one of a graph that is being traced."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _labelled(labels: Tensor) -> Tensor | slice:
    """The rows that have a label; all, where counting them would wait for a device."""
    if not _is_plain(labels) or labels.device.type != "cpu":
        return slice(None)
    found = (labels != IGNORED).nonzero().squeeze(1)
    return slice(None) if len(found) == len(labels) else found


class _Memory:
    """Where logits and probabilities of each chunk are made: a host is slow to map new pages."""

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        used = _is_plain(rows) and _is_plain(weight)
        self.logits, self.log_shares, self.shares = (Scratch() if used else None for _ in range(3))


def _like(logits: Tensor, scratch: Scratch | None) -> Tensor | None:
    """Where to make a tensor of this shape; None for memory of its own."""
    return None if scratch is None else scratch.empty(logits, logits.shape, logits.dtype)


class _Statistics(torch.autograd.Function):
    """On chunks of tokens; backward makes a chunk's logits again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        how: _Logits,
        wanted: tuple[str, ...],
        chunk_bytes: int,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, labels)
        ctx.how, ctx.has_entropy, ctx.chunk_bytes = how, "entropy" in wanted, chunk_bytes
        if known is not None:
            return known.clone()  # a compiler takes a view of an input for one without gradient
        at, memory = _labelled(labels), _Memory(rows, weight)
        own, targets = rows[at], labels[at]
        with no_autocast(rows.device.type):
            parts = [
                _columns(how.of(own[chunk], weight, bias, memory.logits), targets[chunk], wanted,
                         memory)
                for chunk in _chunks(own, weight, how, chunk_bytes)
            ]  # fmt: skip
        return _all_rows(torch.cat(parts), at, labels)

    @staticmethod
    @once_differentiable("log-probabilities that are made in chunks")
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, bias, labels = ctx.saved_tensors
        how, needed = ctx.how, ctx.needs_input_grad
        wide = slope.dtype  # sums over chunks are of this precision
        of_rows: list[Tensor] = []
        of_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if needed[2] else None
        at, memory = _labelled(labels), _Memory(rows, weight)
        own, targets, slope = rows[at], labels[at], slope[at]
        with no_autocast(rows.device.type):
            for chunk in _chunks(own, weight, how, ctx.chunk_bytes):
                logits = how.of(own[chunk], weight, bias, memory.logits)
                of_logits = _slope(logits, targets[chunk], slope[chunk], ctx.has_entropy, memory)
                made = how.slope(of_logits, logits)
                if needed[0]:
                    of_rows.append(made @ weight.to(made.dtype))
                if of_weight is not None:
                    of_weight += made.mT @ own[chunk].to(made.dtype)
                if of_bias is not None:
                    of_bias += made.sum(0)
        return (
            _all_rows(torch.cat(of_rows).to(rows.dtype), at, labels) if needed[0] else None,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _all_rows(found: Tensor, at: Tensor | slice, labels: Tensor) -> Tensor:
    """What is found of the rows `at`, and 0 for the others: [any, ...] → [rows, ...]."""
    if isinstance(at, slice):
        return found
    return found.new_zeros((len(labels), *found.shape[1:])).index_copy_(0, at, found)


_LEAST = -1e4
"""Stands for log 0: its exponential is 0 in every precision."""


def _columns(logits: Tensor, labels: Tensor, wanted: tuple[str, ...], memory: _Memory) -> Tensor:
    """The statistics of a chunk of tokens: [chunk, vocabulary], overwritten → [chunk, 5]."""
    columns: dict[str, Tensor] = {}
    if "is_top1" in wanted:
        columns["is_top1"] = (logits.argmax(-1) == labels).to(logits.dtype)
    if "mean_logits" in wanted:
        columns["mean_logits"] = logits.mean(-1)
    of_label = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    most = logits.amax(-1, keepdim=True)
    below = torch.sub(logits, most, out=_like(logits, memory.log_shares))
    shares = torch.exp(below, out=logits)  # of their sum
    total = shares.sum(-1)
    log_total = total.log()
    columns["log_probs"] = of_label - (log_total + most.squeeze(-1))  # rounded as TRL does
    if "entropy" in wanted:
        columns["entropy"] = log_total - below.clamp_(min=_LEAST).mul_(shares).sum(-1) / total
    if "log_sum_sq_probs" in wanted:
        columns["log_sum_sq_probs"] = shares.square_().sum(-1).log() - 2 * log_total
    zeros = torch.zeros_like(columns["log_probs"])
    found = torch.stack([columns.get(name, zeros) for name in STATISTICS], -1)
    return found.masked_fill((labels == IGNORED).unsqueeze(-1), 0.0)


def _slope(
    logits: Tensor, labels: Tensor, slope: Tensor, has_entropy: bool, memory: _Memory
) -> Tensor:
    """∂ / ∂ logits from the slopes of `log_probs` and `entropy`, the first two columns."""
    slope = slope.masked_fill((labels == IGNORED).unsqueeze(-1), 0.0)
    of_log_prob, of_entropy = slope[:, :1], slope[:, 1:2]
    if has_entropy:  # times the entropy's slope: -p (log p + entropy)
        terms = torch.log_softmax(logits, -1, out=_like(logits, memory.log_shares))
        terms.clamp_(min=_LEAST)
        found = torch.exp(terms, out=_like(logits, memory.shares))
        terms.mul_(found)
        entropy = -terms.sum(-1, keepdim=True)
        found.mul_(-(of_log_prob + of_entropy * entropy)).sub_(terms.mul_(of_entropy))
    else:
        found = torch.softmax(logits, -1, out=_like(logits, memory.shares)).mul_(-of_log_prob)
    return found.scatter_add_(-1, labels.clamp_min(0).unsqueeze(-1), of_log_prob)
