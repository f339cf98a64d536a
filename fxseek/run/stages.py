"""The stages of a compiled step beside the score: prefill, select, gather, learn.

Prefill and gather put values into the `Env`, select returns a `Selection`, and learn empties the
`Env` and returns what the step does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxseek import selecting
from fxseek.config import SeekConfig
from fxseek.ops.attention import CausalRows
from fxseek.ops.masks import MaskRows
from fxseek.ops.offload import HostTensor, link
from fxseek.ops.rows import gather_rows, owned
from fxseek.passes.ir import Gathered, Piece
from fxseek.ratios import Labelled
from fxseek.run.boxed import Boxed
from fxseek.run.env import Env
from fxseek.run.lowering import Run
from fxseek.run.piece import root_of
from fxseek.run.saved import Known
from fxseek.run.score import Scores
from fxseek.scores import scorer_of
from fxseek.scores.base import Stream, step_generator
from fxseek.selecting import Selection
from fxseek.spans import drawn_scores, spans_of

__all__ = ["LEAST_SPANS", "Gather", "Learn", "Prefill", "Select", "least_kept"]


class Prefill(nn.Module):
    """All tokens once, without grad, up to the values that later stages read.

    `bases`: values that live until the backward; `on_host`: those that wait in host memory.
    """

    def __init__(self, piece: Piece, bases: set[fx.Node], on_host: Sequence[fx.Node] = ()) -> None:
        super().__init__()
        self.on_host = on_host
        self.graph = piece.graph
        self.run = Boxed(root_of(piece), piece.graph)
        self.nodes = piece.reads()
        self.outputs = piece.outputs
        self.bases = bases

    def forward(self, env: Env) -> None:
        """Put the full values of `outputs` into the step's values."""
        values = env.values
        with torch.no_grad():
            found = list(self.run([env.read(node) for node in self.nodes]))
            for node in reversed(self.outputs):  # one by one: a view dies when its copy is made
                value = found.pop()
                values[node] = owned(value) if node in self.bases else value
                del value
        link([x for node in self.on_host if isinstance(x := values[node], HostTensor)])


LEAST_SPANS = 4
"""Spans that a sample keeps at least: with fewer draws a weight may be very large."""


class Select(nn.Module):
    """Scores → kept positions and their loss weights."""

    def __init__(self, config: SeekConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, scores: Scores, step: int, ratio: float | None) -> selecting.Selection:
        """``ceil(ratio · tokens)`` positions of every row, of its own tokens where it is padded.

        Where `ratio` is None the rows decide: by ``"mass:0.9"`` as few as hold that share of the
        row's mass, within ``ratio_bounds``, or all that have a label. Then a step waits for the
        device once: the largest count is the size of the learn stage's tensors. Virtual tokens and
        positions that the model reads by their place are always kept. At ratio 1.0 all positions
        are, padding too, as in ordinary training: its labels count, such as that of the first token
        behind padding on the left.
        """
        config = self.config
        if ratio == 1.0:
            batch, tokens = scores.valid.shape
            kept = torch.arange(tokens, device=scores.valid.device).repeat(batch, 1)
            weights = torch.ones_like(kept, dtype=torch.float32)
            return Selection(kept, weights, consecutive=range(tokens))
        if isinstance(config.parsed_ratio, Labelled):
            labelled = scores.supervised
            if labelled is None:  # probabilities: every position has some
                labelled = torch.ones_like(scores.valid)
            return selecting.select_labelled(labelled, scores.required)
        cuts = step_generator(config.seed, step, Stream.SPANS) if config.draws_spans else None
        most = config.ratio_bounds[1] if ratio is None else ratio
        spans = None if cuts is None else self._spans(scores, cuts, most)
        if ratio is None:
            k, counts = self._by_mass(scores, spans)
        else:
            k, counts = self._fixed(scores, ratio)
        common = {
            "valid": scores.valid,
            "supervised": scores.supervised,
            "counts": counts,
            "required": scores.required,
            "spans": spans,
        }
        if config.select == "sample":
            generator = step_generator(config.seed, step, Stream.SAMPLE)
            return selecting.select_sample(
                scores.mass, k, generator=generator, uniform=config.uniform, **common
            )
        # of probabilities every position has some
        supervised_only = config.supervised_only and scores.supervised is not None
        if spans is None or cuts is None or not scorer_of(config).equal:
            return selecting.select_topk(
                scores.scores, k, supervised_only=supervised_only, **common
            )
        drawn = drawn_scores(scores.scores, spans, _tiers(scores, supervised_only), cuts)
        single = {**common, "spans": None}  # the draw has them already
        found = selecting.select_topk(drawn, k, supervised_only=supervised_only, **single)
        return dataclasses.replace(found, spans=spans)

    def _spans(self, scores: Scores, cuts: torch.Generator, most: float) -> Tensor:
        """The span of each position; none is longer than what the ratio `most` lets a row keep."""
        config, valid = self.config, scores.valid
        labelled = None
        if scores.supervised is not None and (config.supervised_only or config.select == "sample"):
            labelled = scores.supervised & valid
        _, counts = self._fixed(scores, most, each=True)
        assert counts is not None
        if scores.required is not None:
            counts = counts - scores.required.shape[1]
        if config.select == "sample":
            counts = counts // LEAST_SPANS
        return spans_of(
            counts.clamp(1, config.span).unsqueeze(-1),
            valid=valid,
            labelled=labelled,
            begins=scores.begins,
            required=scores.required,
            generator=cuts,
        )

    def _fixed(
        self, scores: Scores, ratio: float, *, each: bool = False
    ) -> tuple[int, Tensor | None]:
        """The largest number that a row keeps, and that of each where they may differ."""
        valid, virtual = scores.valid, scores.virtual
        k = selecting.count_kept(ratio, valid.shape[1] - virtual) + virtual
        k, counts = max(k, self._least(scores)), None
        if scores.padded or each:
            counts = selecting.count_kept_of_rows(ratio, valid[:, virtual:]) + virtual
            counts = self._at_least_required(counts, scores)
        return k, counts

    def _by_mass(self, scores: Scores, spans: Tensor | None) -> tuple[int, Tensor | None]:
        """The same by mass. Virtual tokens have none, and are kept beside the bounds.

        A sample of spans keeps as many as it needs at least: no span may be out of reach.
        """
        config, valid, virtual = self.config, scores.valid, scores.virtual
        share = config.mass_share
        assert share is not None
        own = valid.clone()
        own[:, :virtual] = False
        counts = selecting.count_holding(
            scores.mass,
            share,
            valid=own,
            supervised=scores.supervised,
            supervised_only=config.supervised_only or config.select == "sample",
            required=scores.required,
            spans=spans,
            scores=None if config.select == "sample" else scores.scores,
        )
        low, high = (selecting.count_kept_of_rows(x, own) + virtual for x in config.ratio_bounds)
        if spans is not None and config.select == "sample":
            required = 0 if scores.required is None else scores.required.shape[1]
            low = torch.minimum(low.clamp_min(LEAST_SPANS * config.span + required), high)
        counts = self._at_least_required(counts.clamp(low, high), scores)
        k = max(1, int(counts.max()))  # waits for the device
        same = len(counts) == 1 and not scores.padded  # nothing to fill up
        return k, None if same else counts

    def _at_least_required(self, counts: Tensor, scores: Scores) -> Tensor:
        """The counts, but enough for the required positions; no row keeps more than it has."""
        if scores.required is None:
            return counts
        return torch.minimum(counts.clamp_min(self._least(scores)), scores.valid.sum(-1))

    def _least(self, scores: Scores) -> int:
        required = 0 if scores.required is None else scores.required.shape[1]
        least = least_kept(self.config, required, labelled=scores.supervised is not None)
        return min(least, scores.valid.shape[1])


def _tiers(scores: Scores, supervised_only: bool) -> list[Tensor]:
    """The positions among which a draw decides, in the order in which they are kept."""
    free = scores.valid
    if scores.required is not None:
        free = free.scatter(-1, scores.required, False)
    if not supervised_only or scores.supervised is None:
        return [free]
    return [free & scores.supervised, free & ~scores.supervised]


def least_kept(config: SeekConfig, required: int, *, labelled: bool) -> int:
    """How many tokens a row keeps at least: what is required, and one to draw or with a label."""
    return required + (labelled or config.select == "sample")


class Gather(nn.Module):
    """The rows of constants that the learn stage reads: masks, positions, targets.

    `masks`: those that attentions alone read, which take large ones in chunks of rows.
    """

    def __init__(self, reads: Sequence[Gathered], masks: Container[Gathered]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.masks = masks

    def forward(self, env: Env, selection: Selection) -> None:
        """One gather per read."""
        kept = selection.kept
        with torch.no_grad(), env.unsharded(item.node for item in self.reads):
            for item in self.reads:
                value = env.read(item.node)
                if isinstance(value, MaskRows):
                    env.rows[item] = self._mask(item, value, selection)
                    continue
                value = value[(None,) * item.unsqueezed]
                env.rows[item] = gather_rows(value, kept, item.rows)

    def _mask(self, item: Gathered, mask: MaskRows, selection: Selection) -> Any:
        """The rows of a mask: as such, or as what attentions make them of."""
        kept = selection.kept
        if item in self.masks:
            causal = CausalRows(kept, selection.consecutive, mask)
            if causal.may_be_flag and mask.causal(kept.device):
                return causal
            if mask.large(kept):
                return mask
        return mask.rows(kept)


class Learn(nn.Module):
    """The selected tokens once, with grad; keys and values of the others come from the prefill."""

    def __init__(self, piece: Piece, run: Run) -> None:
        super().__init__()
        self.graph = piece.graph
        self.inputs = piece.inputs
        self.run = run

    def forward(self, env: Env, selection: Selection) -> tuple[tuple[Any, ...], int]:
        """The captured graph's outputs for the selection, and the bytes saved for backward."""
        arguments = env.take(self.inputs, selection)
        with torch.enable_grad():
            return self.run(arguments, Known.of(env.arguments))
