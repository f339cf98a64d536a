"""The score stage: it measures what the scorer asks for, and lets it score the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxseek import _torch
from fxseek.config import SeekConfig
from fxseek.ops.loss import Scratch, divisor, mass_of, mean_of_parts
from fxseek.ops.masks import MaskRows
from fxseek.ops.rows import Rows, gather_rows
from fxseek.ops.sweep import Collector, Put, Sum, chunks_of, slices_of, sweep
from fxseek.passes.score_plan import (
    AttentionMap,
    EndsInHead,
    EndsInLoss,
    EndsInMap,
    FusedMap,
    GradientPlan,
    ScorePlan,
    SpelledMap,
    Targets,
)
from fxseek.passes.structure import Place
from fxseek.run.env import Env
from fxseek.run.head import ChunkedHead
from fxseek.run.piece import Runner, SweptRegion, at_positions, every_position
from fxseek.run.row_inputs import (
    beginnings,
    first_tokens,
    ids_of,
    labels_of,
    positions_at,
    valid_tokens,
)
from fxseek.scores import ScoreInputs, scorer_of
from fxseek.scores.base import Stream, step_generator
from fxseek.scores.measures import (
    accumulate_columns,
    attention_column_sums,
    gradient_magnitude,
)
from fxseek.selecting import Selection

__all__ = ["Score", "Scores"]


@dataclass
class Scores:
    """What the score stage found. Shapes: [batch, tokens]; `full_loss` a scalar in nats."""

    valid: Tensor
    supervised: Tensor | None
    scores: Tensor
    mass: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    """What the scores are made of, by name."""
    full_loss: Tensor | None = None
    padded: bool = False
    """`valid` came from a padding mask, so that rows may have different lengths."""
    required: Tensor | None = None
    """Positions that are always kept: [batch, any]. Those that the model reads by their place,
    such as a pooled token, the virtual ones, and the first ones (`sinks`)."""
    virtual: int = 0
    """Tokens that the model put in front (prompt tuning): parameters, kept beside the ratio."""
    begins: Tensor | None = None
    """Where a document of a packed row begins, for spans; None without positions of tokens."""
    input_ids: Tensor | None = None
    """Of the tokens that are scored, for the report: a copy, -1 at virtual ones."""
    labels: Tensor | None = None
    """What the prediction at each position is compared with, for the report: a copy."""


class Score(nn.Module):
    """Scores of all tokens (docs/scoring.md)."""

    def __init__(self, plan: ScorePlan, config: SeekConfig, head: ChunkedHead | None) -> None:
        super().__init__()
        self.plan = plan
        self.config = config
        self.scorer = scorer_of(config)
        self.context = None if plan.context is None else _columns_of(plan.context)
        self.gradient = None if plan.gradient is None else _Slope(plan, plan.gradient, config, head)

    def forward(self, env: Env, step: int, padding_mask: Tensor | None) -> Scores:
        """The scores of all tokens, by the configured scorer.

        `padding_mask`: Bool[batch or 1, tokens], False at padding, is the caller's: a model that
        does not read its attention mask has none in its graph.
        """
        inputs = self.plan.tokens
        valid, padded = valid_tokens(inputs, env, padding_mask, self.config.token_dim)
        targets, supervised = labels_of(self.plan.targets, env, valid)
        parts: dict[str, Tensor] = {}
        full_loss = None
        with env.unsharded(self.plan.reads()):
            made = {} if self.gradient is None else self.gradient.begin(env, valid.shape[0])
            if self.context is not None:
                parts["context"] = self.context.sums(env, made, valid, self.config.most_chunk_bytes)
            if self.gradient is not None:
                parts["gradient"], found = self.gradient.finish(env, made, valid, supervised)
                full_loss = found if self.plan.of_loss else None
        at = self.plan.hidden
        given = ScoreInputs(
            input_ids=None if self.plan.tokens.ids is None else env.read(self.plan.tokens.ids),
            valid=valid,
            supervised=supervised,
            targets=targets,
            hidden=None if at is None else _batch_major(env.read(at.node), at.rows, valid),
            step=step,
            generator=step_generator(self.config.seed, step, Stream.OWN_SCORE),
        )
        scores = self.scorer.scores(given, parts)
        weighed = self.config.select == "sample" or self.config.mass_share is not None
        virtual = inputs.virtual
        places = (*map(Place, range(virtual)), *inputs.required)
        required = [positions_at(place, env, valid) for place in places]
        if self.config.sinks:
            required.append(first_tokens(valid, self.config.sinks, virtual))
        return Scores(
            valid,
            supervised,
            scores,
            self.scorer.mass(scores, parts, valid) if weighed else scores,  # nobody reads it then
            parts,
            full_loss,
            padded,
            torch.cat(required, dim=1) if required else None,
            virtual,
            beginnings(inputs, env, valid) if self.config.draws_spans else None,
            ids_of(inputs, env, valid),
            None if targets is None else targets.clone(),
        )


# ---- context -------------------------------------------------------------------------------------


class _FusedColumns:
    """Column sums of a fused attention, from its operands."""

    def __init__(self, plan: FusedMap) -> None:
        self.plan = plan

    def sums(
        self, env: Env, made: dict[fx.Node, Tensor], valid: Tensor, chunk_bytes: int
    ) -> Tensor:
        plan = self.plan
        values = {node: _read(env, made, node) for node in plan.reads}
        mask = None if plan.mask is None else values[plan.mask]
        if plan.square and isinstance(mask, Tensor):
            mask = MaskRows.of(mask)
        flagged = isinstance(mask, MaskRows) and mask.causal(valid.device)
        sums = attention_column_sums(
            values[plan.query],
            values[plan.key],
            mask=None if flagged else mask,
            scale=values[plan.scale] if isinstance(plan.scale, fx.Node) else plan.scale,
            is_causal=plan.is_causal or flagged,
            query_valid=valid,
            chunk_bytes=chunk_bytes,
        )
        return sums[:, -valid.shape[1] :]  # keys of a prefix come first


class _SpelledColumns:
    """Column sums of a map that is spelled out, some of its rows at a time."""

    def __init__(self, plan: SpelledMap) -> None:
        self.plan = plan
        self.rows = Runner(plan.piece)

    def sums(
        self, env: Env, made: dict[fx.Node, Tensor], valid: Tensor, chunk_bytes: int
    ) -> Tensor:
        batch, tokens = valid.shape
        values = {node: _read(env, made, node) for node in self.plan.reads}
        most = chunk_bytes // max(1, 2 * batch * tokens * self.plan.entry_bytes)
        places = every_position(batch, tokens, valid.device)

        def run(chunk: slice) -> tuple[Tensor]:
            kept = places[:, chunk]
            (probabilities,) = self.rows(env, values, at_positions(kept))
            if probabilities.dim() == 3:
                probabilities = probabilities.unflatten(0, (batch, -1))
            return (accumulate_columns(probabilities, valid[:, chunk]),)

        with torch.no_grad():
            (total,) = sweep(slices_of(tokens, most), run, (Sum(),), valid)
        return total[:, -tokens:]  # keys of a prefix come first


def _columns_of(plan: AttentionMap) -> _FusedColumns | _SpelledColumns:
    return _FusedColumns(plan) if isinstance(plan, FusedMap) else _SpelledColumns(plan)


def _read(env: Env, made: dict[fx.Node, Tensor], node: fx.Node) -> Any:
    """A value without gradient, from the last block where that has made it."""
    value = made.get(node)
    if value is None:
        return env.constant(node)
    return value.detach() if isinstance(value, Tensor) else value  # a mask by rows has no gradient


# ---- gradient ------------------------------------------------------------------------------------


class _Slope:
    """The gradient of the full-token loss at the input of the last block."""

    def __init__(
        self, plan: ScorePlan, gradient: GradientPlan, config: SeekConfig, head: ChunkedHead | None
    ) -> None:
        self.plan = gradient
        self.norm = config.gradient_norm
        self.lead = None if gradient.lead is None else SweptRegion(gradient.lead)
        self.block = Runner(gradient.block)
        self.end: _LossEnd | _HeadEnd | _MapEnd
        match gradient.end:
            case EndsInLoss():
                self.end = _LossEnd(gradient.end, plan.targets)
            case EndsInHead():
                assert head is not None
                self.end = _HeadEnd(gradient.end, head, plan.targets)
            case EndsInMap():
                self.end = _MapEnd(gradient.end, config.most_chunk_bytes, plan.targets)

    def begin(self, env: Env, batch: int) -> dict[fx.Node, Tensor]:
        """Run the block: its input, a leaf, and all that is made of it."""
        start = self.plan.start.node
        hidden = env.constant(start).requires_grad_()
        given = {start: hidden}
        with torch.enable_grad():
            if self.lead is not None:
                given.update(self.lead.all(env, hidden, batch))
            found = self.block(env, given)
        return given | dict(zip(self.plan.block.outputs, found, strict=True))

    def finish(
        self, env: Env, made: dict[fx.Node, Tensor], valid: Tensor, supervised: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The magnitude of the gradient at each token, and the full-token loss."""
        ends = {node: made[node] for node in self.end.cuts}
        hidden = made[self.plan.start.node]
        made.clear()
        cotangents, loss, factor = self.end.cotangents(env, ends, valid, supervised)
        pairs = [
            (y, dy) for y, dy in zip(ends.values(), cotangents, strict=True) if y.requires_grad
        ]
        del ends, cotangents
        (slope,) = torch.autograd.grad([y for y, _ in pairs], hidden, [dy for _, dy in pairs])
        slope = _batch_major(slope, self.plan.start.rows, valid)
        # Divided last: float16 would lose the gradient of a mean over many labels.
        return gradient_magnitude(slope, self.norm) / factor, loss


def _mass(env: Env, targets: Targets, valid: Tensor) -> Tensor:
    """The mass of all positions, by which their losses are divided."""
    target, *rest = [None if node is None else env.constant(node) for node in targets.full]
    target = valid.numel() if target is None else target
    mass = mass_of(target, *rest, ignore_index=targets.ignore_index)
    return torch.as_tensor(mass, device=valid.device)


Cotangents = tuple[Sequence[Tensor], Tensor, Tensor]

_MOST = 2**14
"""Of the factor where the loss itself, which may be float16, is multiplied."""


class _LossEnd:
    """The block has made the loss."""

    def __init__(self, end: EndsInLoss, targets: Targets | None) -> None:
        self.cuts = (end.loss,)
        self.targets = targets

    def cotangents(
        self,
        env: Env,
        ends: dict[fx.Node, Tensor],
        valid: Tensor,
        supervised: Tensor | None,
    ) -> Cotangents:
        """∂ loss / ∂ each end, times a factor; the loss, and the factor."""
        (loss,) = ends.values()
        value, factor = loss.detach(), torch.ones_like(loss)
        if self.targets is not None:
            mass = _mass(env, self.targets, valid)
            if self.targets.sums:
                value = mean_of_parts(value, mass)
            else:
                factor = divisor(mass).clamp(max=_MOST).to(loss.dtype)
        return [factor], value, factor


class _HeadEnd:
    """What follows the block's attention runs on chunks of labelled tokens, with the head."""

    def __init__(self, end: EndsInHead, head: ChunkedHead, targets: Targets | None) -> None:
        self.cuts = end.cuts
        self.targets = targets
        self.head = head
        self.size = None if end.tail is None else end.tail.size
        self.tail = None if end.tail is None else SweptRegion(end.tail)
        self.rows = {end.head.entry: end.head.rows} if end.tail is None else end.tail.rows

    def cotangents(
        self,
        env: Env,
        ends: dict[fx.Node, Tensor],
        valid: Tensor,
        supervised: Tensor | None,
    ) -> Cotangents:
        """∂ loss / ∂ each end, times a factor; the loss, and the factor."""
        assert supervised is not None and self.targets is not None
        kept = _labelled_first(supervised)
        weights = supervised.gather(1, kept).to(torch.float32)
        total = divisor(_mass(env, self.targets, valid))
        if self.size is None:
            chunks = self.head.chunks(*kept.shape)
        else:
            chunks = chunks_of(kept.shape[1], self.size)

        def run(chunk: slice) -> tuple[Tensor | None, ...]:
            places = kept[:, chunk]
            rows = {
                node: gather_rows(end.detach(), places, self.rows[node]).requires_grad_()
                for node, end in ends.items()
            }
            starts = tuple(rows.values())
            with torch.enable_grad():
                (entry,) = starts if self.tail is None else self.tail.rows(env, places, rows)
            found, loss = self._of_head(env, entry.detach(), places, weights[:, chunk], total)
            return (*torch.autograd.grad(entry, starts, found, allow_unused=True), loss)

        collect = [Put(torch.zeros_like(y), kept, self.rows[node]) for node, y in ends.items()]
        return *_with_loss(chunks, run, collect, kept), total

    def _of_head(
        self, env: Env, entry: Tensor, kept: Tensor, weights: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """∂ loss / ∂ the rows `entry` of the positions `kept`, and their part of the loss."""
        head = self.head.head
        places = every_position(kept.shape[0], kept.shape[1], kept.device)
        scratch = Scratch()

        def run(chunk: slice) -> tuple[Tensor, Tensor]:
            selection = Selection(kept[:, chunk], weights[:, chunk])
            rows = gather_rows(entry, places[:, chunk], head.rows).requires_grad_()
            values = env.constants(head.stage.inputs, {head.entry: rows}, selection)
            found, loss = self.head.slope(rows, values, scratch)
            return found, loss / total

        collect = (Put(torch.zeros_like(entry), places, head.rows), Sum(_zero(entry)))
        slope, loss = sweep(self.head.chunks(*kept.shape), run, collect, kept)
        return slope, loss


class _MapEnd:
    """An attention that is spelled out, and what follows it, on chunks of tokens.

    The logits of a chunk are alive at a time, and their rows of the attention map: `chunk_bytes`
    bounds either.
    """

    def __init__(self, end: EndsInMap, chunk_bytes: int, targets: Targets | None) -> None:
        self.cuts = end.cuts
        self.targets = targets
        self.end = end
        self.chunk_bytes = chunk_bytes
        self.runner = Runner(end.piece)

    def cotangents(
        self,
        env: Env,
        ends: dict[fx.Node, Tensor],
        valid: Tensor,
        supervised: Tensor | None,
    ) -> Cotangents:
        """∂ loss / ∂ each end, times a factor; the loss, and the factor."""
        assert supervised is not None and self.targets is not None
        batch, tokens = supervised.shape
        row_bytes = max(1, self.end.logit_bytes, self.end.map_bytes * tokens)
        chunks = slices_of(tokens, self.chunk_bytes // (batch * row_bytes))
        total = divisor(_mass(env, self.targets, valid))
        leaves = {node: value.detach().requires_grad_() for node, value in ends.items()}
        places = every_position(batch, tokens, supervised.device)

        def run(chunk: slice) -> tuple[Tensor | None, ...]:
            weights = supervised[:, chunk].to(torch.float32)
            with torch.enable_grad():
                part, _ = self.runner(env, leaves, Selection(places[:, chunk], weights))
            found = torch.autograd.grad(part, list(leaves.values()), allow_unused=True)
            return (*found, part.detach() / total)

        collect = [Sum(torch.zeros_like(value)) for value in leaves.values()]
        return *_with_loss(chunks, run, collect, supervised), total


def _with_loss(
    chunks: Sequence[slice],
    run: Callable[[slice], Sequence[Tensor | None]],
    collectors: Sequence[Collector],
    like: Tensor,
) -> tuple[Sequence[Tensor], Tensor]:
    """What the collectors make, and the sum of the chunks' losses, the last that each returns."""
    *cotangents, loss = sweep(chunks, run, (*collectors, Sum(_zero(like))), like)
    return cotangents, loss.to(torch.promote_types(cotangents[0].dtype, torch.float32))


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=_torch.widest(like.device), device=like.device)


def _labelled_first(supervised: Tensor) -> Tensor:
    """Labelled positions of each row, ascending, filled up to the longest with others.

    Shapes: Bool [batch, tokens] → LongTensor [batch, any]. Waits for the device.
    """
    order = supervised.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order[:, : int(supervised.sum(1).max())] if _torch.has_values(order) else order


def _batch_major(x: Tensor, rows: Rows | None, valid: Tensor) -> Tensor:
    """A value of the stream as [batch, tokens, ...]."""
    if rows is None or (rows.packed and x.dim() == 2):
        return x.unflatten(0, valid.shape) if x.dim() == 2 else x
    if rows.batch is None:
        return x.movedim(rows.row, 0).reshape(*valid.shape, -1)
    return x.movedim((rows.batch, rows.row), (0, 1))
