"""The five modules of a compiled step: prefill, score, select, gather, learn.

Each takes the inputs of the captured graph (`inputs`, a tuple) and hands on boxed values:
`Values` is a dict of full prefill values that is emptied as they are consumed, so that no
frame keeps a layer's keys and values alive after the learn stage has taken them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxseek import _torch, scoring, selecting
from fxseek.boxed import Boxed
from fxseek.chunks import RowsRegion
from fxseek.config import SeekConfig
from fxseek.errors import ScoreError
from fxseek.head import ChunkedHead, chunks_of
from fxseek.loss import Scratch, divisor, mass_of, mean_of_parts
from fxseek.lowering import Run
from fxseek.masks import MaskRows, read_tokens
from fxseek.offload import HostTensor, link
from fxseek.passes.ditch import StageGraph, StageInput
from fxseek.passes.facts import Rows
from fxseek.passes.structure import Place
from fxseek.rows import gather_rows, owned, put_rows_

Values = dict[fx.Node, Any]


@dataclass
class Scores:
    """What the score stage found. Shapes: [batch, tokens]; `full_loss` a scalar in nats."""

    valid: Tensor
    supervised: Tensor | None
    scores: Tensor
    mass: Tensor
    context: Tensor | None = None
    gradient: Tensor | None = None
    full_loss: Tensor | None = None
    padded: bool = False
    """`valid` came from a padding mask, so that rows may have different lengths."""
    required: Tensor | None = None
    """Positions that are always kept: [batch, any]. Those that the model reads by their place,
    such as a pooled token, and the virtual ones."""
    virtual: int = 0
    """Tokens that the model put in front (prompt tuning): parameters, kept beside the ratio."""


class Prefill(nn.Module):
    """All tokens once, without grad, up to the values that later stages read."""

    def __init__(
        self, stage: StageGraph, bases: set[fx.Node], on_host: Sequence[fx.Node] = ()
    ) -> None:
        super().__init__()
        self.on_host = on_host
        self.graph_module = stage.module("Prefill")
        self.run = Boxed(self.graph_module)
        self.inputs = stage.inputs
        self.outputs = stage.outputs
        self.bases = bases

    def forward(self, inputs: tuple[Any, ...], positions: dict[fx.Node, int]) -> Values:
        """The full values of `outputs`."""
        with torch.no_grad():
            found = self.run([inputs[positions[i.node]] for i in self.inputs])  # type: ignore[index]
            found = list(found)
            values: Values = {}
            for node in reversed(self.outputs):  # one by one: a view dies when its copy is made
                value = found.pop()
                values[node] = owned(value) if node in self.bases else value
                del value
        link([x for node in self.on_host if isinstance(x := values[node], HostTensor)])
        return values


@dataclass(frozen=True)
class ScorePlan:
    """What the score stage reads, decided when the graph is built; see `fxseek.pipeline`."""

    ids: fx.Node | None = None
    mask: fx.Node | None = None
    primary: fx.Node | None = None
    batch_dim: int | None = None
    target: fx.Node | None = None
    ignore_index: int = -100
    full: tuple[fx.Node | None, ...] = ()
    """Targets, class weights and scale of all positions: what `fxseek.loss.mass_of` takes.

    Empty without a token loss; no targets where these are probabilities."""
    sums: bool = False
    """The captured loss is a sum over tokens (the caller divides it), not their mean."""
    hidden: fx.Node | None = None
    hidden_rows: Rows | None = None
    """Where the tokens of `hidden` are."""
    block: StageGraph | None = None
    """block input → the cuts (or the loss), and values that the context part reads."""
    lead: RowsRegion | None = None
    """block input → what the block takes instead of it; None where the block begins there."""
    exit: fx.Node | None = None
    """The value that the model's head starts from, where there is one; see `passes.head`."""
    tail: RowsRegion | None = None
    """cuts → the exit, on chunks of tokens; None where the block ends there."""
    head: StageGraph | None = None
    """cuts → loss, on chunks of tokens, where attention is spelled out and `exit` is not."""
    cuts: tuple[fx.Node, ...] = ()
    """Values that `head`, or `tail`, takes over from the block; `exit` where there is neither of
    them, and none where the block ends in the loss."""
    logit_bytes: int = 0
    """Bytes of one token's logits in one row of the batch."""
    map_bytes: int = 0
    """Bytes of one entry of a spelled-out attention map over its heads; 0 for fused attention."""
    context: Callable[[dict[fx.Node, Any], Tensor, int], Tensor] | None = None
    context_reads: tuple[fx.Node, ...] = ()
    required: tuple[Place, ...] = ()
    """Places in a row that the model reads one by one."""
    virtual: int = 0
    """Tokens that the model puts in front of those it is given (prompt tuning)."""


class Score(nn.Module):
    """Scores of all tokens: context, gradient, random, or the caller's own."""

    def __init__(self, plan: ScorePlan, config: SeekConfig, chunked: ChunkedHead | None) -> None:
        super().__init__()
        self.plan = plan
        self.config = config
        self.chunked = chunked
        self.block = None if plan.block is None else Boxed(plan.block.module("Block"))
        self.head = None if plan.head is None else Boxed(plan.head.module("Head"))

    def forward(
        self,
        inputs: tuple[Any, ...],
        positions: dict[fx.Node, int],
        values: Values,
        step: int,
        padding_mask: Tensor | None,
    ) -> Scores:
        """Scores by the configured rule (docs/scoring.md).

        `padding_mask`: Bool[batch or 1, tokens], False at padding, is the caller's: a model that
        does not read its attention mask has none in its graph.
        """
        plan, config = self.plan, self.config

        def read(node: fx.Node) -> Any:
            return inputs[positions[node]] if node in positions else values[node]

        primary = read(plan.primary) if plan.primary is not None else None
        assert primary is not None
        batch, tokens = _extent(primary, plan.batch_dim, config.token_dim)
        tokens += plan.virtual
        device = primary.device
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        if padding_mask is None and plan.mask is not None:
            padding_mask = read_tokens(read(plan.mask))
        padded = padding_mask is not None and padding_mask.shape[-1] == tokens - plan.virtual
        if padded:
            assert padding_mask is not None
            own = padding_mask.expand(batch, -1)
            valid = torch.cat((valid[:, : plan.virtual], own), dim=1)
        supervised = targets = None
        if plan.target is not None:
            targets = read(plan.target).reshape(batch, tokens)
            supervised = targets != plan.ignore_index
        if plan.full and plan.full[2] is not None:
            counts = read(plan.full[2]).reshape(batch, tokens) != 0
            supervised = counts if supervised is None else supervised & counts
        context = gradient = full_loss = None
        kind = config.score

        def frozen(node: fx.Node) -> Any:
            return _constant(read(node))

        generator = scoring.step_generator(config.seed, step)
        if callable(kind):
            given = scoring.ScoreInputs(
                input_ids=read(plan.ids) if plan.ids is not None else None,
                valid=valid,
                supervised=supervised,
                targets=targets,
                hidden=None
                if plan.hidden is None
                else _batch_major(read(plan.hidden), plan.hidden_rows, valid),
                step=step,
                generator=generator,
            )
            with torch.no_grad():
                scores = kind(given)
            scores = scoring.check_scores(scores, batch, tokens, valid=valid).to(device)
        elif kind == "random":
            scores = scoring.random_scores(
                (batch, tokens), seed=config.seed, step=step, device=device
            ).masked_fill(~valid, -torch.inf)
        else:
            if kind in ("gradient", "tokenseek"):
                context, gradient, full_loss = self._by_gradient(frozen, valid, supervised)
            else:
                reads = {node: read(node) for node in plan.context_reads}
                assert plan.context is not None
                context = plan.context(reads, valid, config.chunk_bytes)
            scores = scoring.combine(context, gradient, valid, config.alpha, config.beta)
            bad = ~torch.isfinite(scores.masked_fill(~valid, 0.0))
            if bool(bad.any()):
                raise ScoreError(_not_finite(bad, context, gradient, valid))
        uniform = kind == "random"
        mass = (
            valid.to(torch.float32)
            if uniform
            else scoring.mass(context, gradient, scores, valid)
            if config.select == "sample" or config.mass_share is not None
            else scores
        )
        required = [
            _position(place, read, batch, tokens, device)
            for place in (*map(Place, range(plan.virtual)), *plan.required)
        ]
        return Scores(
            valid, supervised, scores, mass, context, gradient, full_loss, padded,
            torch.cat(required, dim=1) if required else None, plan.virtual,
        )  # fmt: skip

    def _by_gradient(
        self, read: Callable[[fx.Node], Any], valid: Tensor, supervised: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradient of the full-token loss at the input of the last block, and its loss.

        `read` answers values without gradient.
        """
        plan, config = self.plan, self.config
        assert plan.block is not None and self.block is not None and plan.hidden is not None

        hidden = read(plan.hidden).requires_grad_()
        given = {plan.hidden: hidden}
        with torch.enable_grad():
            if plan.lead is not None:
                given.update(plan.lead.forward(read, hidden, valid.shape[0]))
            found = self.block(
                [given[i.node] if i.node in given else read(i.node) for i in plan.block.inputs],  # type: ignore[arg-type]
            )
        made = given | dict(zip(plan.block.outputs, found, strict=True))
        del found, given
        context = None
        if plan.context is not None:
            reads = {
                node: _constant(made[node]) if node in made else read(node)
                for node in plan.context_reads
            }
            context = plan.context(reads, valid, config.chunk_bytes)
            del reads
        ends = {node: made[node] for node in plan.cuts}
        if plan.exit is not None:
            assert supervised is not None
            mass = self._mass(read, valid)
            slopes, full_loss = self._slopes_of_rows(read, ends, supervised, mass)
        elif self.head is not None:
            assert supervised is not None
            mass = self._mass(read, valid)
            slopes, full_loss = self._head_in_chunks(read, ends, supervised, mass)
        else:
            end = plan.block.outputs[0]
            loss = made[end]
            ends, slopes = {end: loss}, [torch.ones_like(loss)]
            full_loss = loss.detach()
            if plan.sums and plan.full:
                full_loss = mean_of_parts(full_loss, self._mass(read, valid))
        del made
        pairs = [(y, dy) for y, dy in zip(ends.values(), slopes, strict=True) if y.requires_grad]
        (slope,) = torch.autograd.grad([y for y, _ in pairs], hidden, [dy for _, dy in pairs])
        slope = _batch_major(slope, plan.hidden_rows, valid)
        return context, scoring.gradient_magnitude(slope, config.gradient_norm), full_loss

    def _mass(self, read: Callable[[fx.Node], Any], valid: Tensor) -> Tensor:
        """The mass of all positions, by which their losses are divided."""
        target, *rest = [None if node is None else read(node) for node in self.plan.full]
        target = valid.numel() if target is None else target
        mass = mass_of(target, *rest, ignore_index=self.plan.ignore_index)
        return torch.as_tensor(mass, device=valid.device)

    def _slopes_of_rows(
        self,
        read: Callable[[fx.Node], Any],
        ends: dict[fx.Node, Tensor],
        supervised: Tensor,
        mass: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """∂ loss / ∂ each end, and the loss, with what follows on chunks of labelled tokens."""
        plan = self.plan
        assert self.chunked is not None and plan.exit is not None
        kept = _labelled_first(supervised)
        weights = supervised.gather(1, kept).to(torch.float32)
        total = divisor(mass)
        rows_of = {plan.exit: self.chunked.head.rows} if plan.tail is None else plan.tail.rows
        slopes = [torch.zeros_like(end) for end in ends.values()]
        loss = torch.zeros((), dtype=_torch.widest(kept.device), device=kept.device)
        chunks: list[slice] = []
        if kept.numel():
            most = self.chunked.chunks(*kept.shape)
            chunks = most if plan.tail is None else chunks_of(kept.shape[1], plan.tail.size)
        for chunk in _torch.few(chunks, kept):
            places = kept[:, chunk]
            rows = {
                node: gather_rows(end.detach(), places, *rows_of[node].where).requires_grad_()
                for node, end in ends.items()
            }
            starts = tuple(rows.values())
            with torch.enable_grad():
                (entry,) = starts if plan.tail is None else plan.tail.run(read, places, *starts)
            share = weights[:, chunk]
            found, part = self._slope_of_head(read, entry.detach(), places, share, total)
            parts = torch.autograd.grad(entry, starts, found, allow_unused=True)
            for node, slope, dx in zip(ends, slopes, parts, strict=True):
                if dx is not None:
                    put_rows_(slope, dx, places, *rows_of[node].where)
            loss += part
        return slopes, loss.to(torch.promote_types(slopes[0].dtype, torch.float32))

    def _slope_of_head(
        self,
        read: Callable[[fx.Node], Any],
        entry: Tensor,
        kept: Tensor,
        weights: Tensor,
        total: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """∂ loss / ∂ the rows `entry` of the positions `kept`, and their part of the loss."""
        assert self.chunked is not None
        head = self.chunked.head
        slope = torch.zeros_like(entry)
        loss = torch.zeros((), dtype=_torch.widest(entry.device), device=entry.device)
        places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        scratch = Scratch()
        for chunk in _torch.few(self.chunked.chunks(*kept.shape), kept):
            stage = selecting.Selection(kept[:, chunk], weights[:, chunk])
            rows = gather_rows(entry, places[:, chunk], *head.rows.where).requires_grad_()
            values = []
            for item in head.stage.inputs:
                if item.kind == "rows":
                    values.append(rows)
                elif item.node is None:
                    values.append(getattr(stage, item.kind))
                else:
                    values.append(read(item.node))
            found, part = self.chunked.slope(rows, values, scratch)
            put_rows_(slope, found / total, places[:, chunk], *head.rows.where)
            loss += part / total
        return slope, loss

    def _head_in_chunks(
        self,
        read: Callable[[fx.Node], Any],
        cuts: dict[fx.Node, Tensor],
        supervised: Tensor,
        mass: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """∂ loss / ∂ each cut, with what follows (head and cross-entropy) on chunks of tokens.

        The logits of `chunk` tokens are alive at a time (and their rows of an attention map
        that is spelled out): `chunk_bytes` bounds either.
        """
        plan = self.plan
        assert plan.head is not None and self.head is not None
        batch, tokens = supervised.shape
        row_bytes = max(1, plan.logit_bytes, plan.map_bytes * tokens)
        chunk = max(1, min(tokens, self.config.chunk_bytes // (batch * row_bytes)))
        total = divisor(mass)
        leaves = {node: value.detach().requires_grad_() for node, value in cuts.items()}
        slopes = [torch.zeros_like(value) for value in leaves.values()]
        loss = supervised.new_zeros((), dtype=_torch.widest(supervised.device))
        for start in _torch.few(range(0, tokens, chunk), supervised):
            length = min(chunk, tokens - start)
            kept = torch.arange(start, start + length, device=supervised.device)
            weights = supervised[:, start : start + length].to(torch.float32)
            stage = selecting.Selection(kept.expand(batch, length), weights)
            values = []
            for item in plan.head.inputs:
                if item.node is None:
                    values.append(getattr(stage, item.kind))
                elif item.node in leaves:
                    values.append(leaves[item.node])
                else:
                    values.append(read(item.node))
            with torch.enable_grad():
                part, _ = self.head(values)
                part = part / total
            parts = torch.autograd.grad(part, list(leaves.values()), allow_unused=True)
            for index, slope in enumerate(slopes):
                if parts[index] is not None:
                    slope += parts[index]
            loss += part.detach()
            del part, parts  # gradients as large as all tokens
        return slopes, loss.to(torch.promote_types(slopes[0].dtype, torch.float32))


def _constant(value: Any) -> Any:
    """A value without gradient; a mask by rows has none."""
    return value.detach() if isinstance(value, Tensor) else value


def _labelled_first(supervised: Tensor) -> Tensor:
    """Labelled positions of each row, ascending, filled up to the longest with others.

    Shapes: Bool [batch, tokens] → LongTensor [batch, any]. Waits for the device.
    """
    order = supervised.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order if _torch.is_fake(order) else order[:, : int(supervised.sum(1).max())]


def _extent(primary: Tensor, batch_dim: int | None, token_dim: int) -> tuple[int, int]:
    batch = primary.shape[batch_dim] if batch_dim is not None else 1
    return batch, primary.shape[token_dim]


def _batch_major(x: Tensor, rows: Rows | None, valid: Tensor) -> Tensor:
    """A value of the stream as [batch, tokens, ...]."""
    if rows is None or (rows.packed and x.dim() == 2):
        return x.unflatten(0, valid.shape) if x.dim() == 2 else x
    if rows.batch is None:
        return x.movedim(rows.row, 0).reshape(*valid.shape, -1)
    return x.movedim((rows.batch, rows.row), (0, 1))


def _position(
    place: Place,
    read: Callable[[fx.Node], Any],
    batch: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """A place in the rows as [batch, any]; negative ones count from the end."""
    at = place.position
    found = torch.tensor([at], device=device) if isinstance(at, int) else read(at)
    found = found.reshape(batch, 1) if place.each else found.reshape(1, -1).expand(batch, -1)
    return torch.where(found < 0, found + tokens, found)


def _not_finite(bad: Tensor, context: Tensor | None, gradient: Tensor | None, valid: Tensor) -> str:
    parts = []
    for name, part in (("attention (context)", context), ("loss gradient", gradient)):
        if part is not None and not bool(torch.isfinite(part.masked_fill(~valid, 0.0)).all()):
            parts.append(name)
    row, position = (int(x) for x in bad.nonzero()[0])
    return (
        f"token scores are not finite: {int(bad.sum())} of {bad.numel()} positions, first at row "
        f"{row}, position {position}; the {' and the '.join(parts) or 'combination'} holds NaN or "
        "infinity. The model's activations or loss overflowed: look at the loss, lower the "
        "learning rate, or compute in bfloat16 or float32 instead of float16."
    )


class Select(nn.Module):
    """Scores → kept positions and their loss weights."""

    def __init__(self, config: SeekConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, scores: Scores, step: int) -> selecting.Selection:
        """``ceil(ratio · tokens)`` positions of every row, of its own tokens where it is padded.

        Or, by a ratio such as ``"mass:0.9"``, as few as hold that share of the row's mass, within
        ``ratio_bounds``. The longest row's count is then waited for, once a step: it is the size
        of what the learn stage makes.
        """
        config = self.config
        share = config.mass_share
        k, counts = self._fixed(scores) if share is None else self._by_mass(scores, share)
        common = {
            "valid": scores.valid,
            "supervised": scores.supervised,
            "counts": counts,
            "required": scores.required,
        }
        if config.select == "sample":
            generator = scoring.step_generator(config.seed, step)
            return selecting.select_sample(
                scores.mass, k, generator=generator, uniform=config.uniform, **common
            )
        return selecting.select_topk(
            scores.scores, k, supervised_only=config.supervised_only, **common
        )

    def _fixed(self, scores: Scores) -> tuple[int, Tensor | None]:
        """The largest number that a row keeps, and that of each where they may differ."""
        ratio, valid, virtual = self.config.ratio, scores.valid, scores.virtual
        assert isinstance(ratio, float)
        k = selecting.count_kept(ratio, valid.shape[1] - virtual) + virtual
        counts = None
        if scores.padded:
            counts = selecting.count_kept_of_rows(ratio, valid[:, virtual:]) + virtual
        if scores.required is not None:
            k = max(k, min(scores.required.shape[1], valid.shape[1]))
            counts = None if counts is None else self._at_least_required(counts, scores)
        return k, counts

    def _by_mass(self, scores: Scores, share: float) -> tuple[int, Tensor | None]:
        """The same by mass. Virtual tokens have none, and are kept beside the bounds."""
        config, valid, virtual = self.config, scores.valid, scores.virtual
        own = valid.clone()
        own[:, :virtual] = False
        counts = selecting.count_holding(
            scores.mass,
            share,
            valid=own,
            supervised=scores.supervised,
            supervised_only=config.supervised_only or config.select == "sample",
            required=scores.required,
        )
        low, high = (selecting.count_kept_of_rows(x, own) + virtual for x in config.ratio_bounds)
        counts = self._at_least_required(counts.clamp(low, high), scores)
        k = max(1, int(counts.max()))  # waits for the device
        same = len(counts) == 1 and not scores.padded  # nothing to fill up
        return k, None if same else counts

    @staticmethod
    def _at_least_required(counts: Tensor, scores: Scores) -> Tensor:
        """The counts, raised to that of the required positions in rows that have as many."""
        if scores.required is None:
            return counts
        least = min(scores.required.shape[1], scores.valid.shape[1])
        return torch.minimum(counts.clamp_min(least), scores.valid.sum(-1))


class Gather(nn.Module):
    """The rows of constants that the learn stage reads: masks, positions, targets.

    `masks`: those that attentions alone read, which take large ones in chunks of rows.
    """

    def __init__(
        self, reads: Sequence[tuple[StageInput, tuple[Any, ...]]], masks: Container[StageInput]
    ) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.masks = masks

    def forward(
        self,
        inputs: tuple[Any, ...],
        positions: dict[fx.Node, int],
        values: Values,
        kept: Tensor,
    ) -> dict[StageInput, Tensor | MaskRows]:
        """One gather per read."""
        rows: dict[StageInput, Tensor | MaskRows] = {}
        with torch.no_grad():
            for key, (unsqueezed, *where) in self.reads:
                node = key.node
                assert node is not None
                value = inputs[positions[node]] if node in positions else values[node]
                if isinstance(value, MaskRows):
                    chunks = key in self.masks and value.large(kept)
                    rows[key] = value if chunks else value.rows(kept)
                    continue
                for _ in range(unsqueezed):
                    value = value.unsqueeze(0)
                rows[key] = gather_rows(value, kept, *where)
        return rows


class Learn(nn.Module):
    """The selected tokens once, with grad; keys and values of the others come from the prefill."""

    def __init__(self, stage: StageGraph, lower: Callable[[fx.GraphModule], Run]) -> None:
        super().__init__()
        self.graph_module = stage.module("Learn")
        self.inputs = stage.inputs
        self.run = lower(self.graph_module)
        self.saved_bytes = 0

    def forward(
        self,
        inputs: tuple[Any, ...],
        positions: dict[fx.Node, int],
        values: Values,
        rows: dict[StageInput, Tensor | MaskRows],
        selection: selecting.Selection,
    ) -> tuple[Any, ...]:
        """The captured graph's outputs, for the selection."""
        arguments: list[Any] = []
        for item in self.inputs:
            if item.kind == "input":
                arguments.append(inputs[positions[item.node]])  # type: ignore[index]
            elif item.kind == "value":
                arguments.append(values.pop(item.node))  # type: ignore[arg-type]
            elif item.kind == "gathered":
                arguments.append(rows.pop(item))
            else:
                arguments.append(getattr(selection, item.kind))
        values.clear()
        rows.clear()
        with torch.enable_grad():
            outputs, self.saved_bytes = self.run(arguments, inputs)
        return outputs
