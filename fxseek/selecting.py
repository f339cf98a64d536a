"""Selecting: from scores to the kept positions of every row and their weights in the loss.

Pure tensor functions, under ``no_grad``. All but `select_labelled` are told how many positions are
kept, and none of these waits for the device: all cases (rows with few labels, much padding) are
orders, not branches.

Sizes: batch, tokens, kept (k, the same for all rows of a batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxseek import _torch
from fxseek.errors import ConfigError, InputError
from fxseek.spans import means_of_spans, over_spans

__all__ = [
    "Selection",
    "count_holding",
    "count_kept",
    "count_kept_of_rows",
    "ranking_of",
    "select_labelled",
    "select_sample",
    "select_topk",
]


@dataclass(frozen=True)
class Selection:
    """The kept positions of every row and what each weighs in the loss.

    Shapes: ``kept`` Long [batch, k], ascending and without repetition in each row; ``weights``
    float32 [batch, k], meant for ``sum(weight · loss) / number of kept positions with a label``;
    ``filled`` Bool [batch, k], True at the end of a row that keeps fewer than k positions and is
    filled up with positions that it does not keep (weight 0), None where no row can be.
    ``consecutive``: the kept positions where they are known to be consecutive, and the same in all
    rows. ``spans``: Long [batch, tokens], the span that each position was selected with.
    """

    kept: Tensor
    weights: Tensor
    filled: Tensor | None = None
    consecutive: range | None = None
    spans: Tensor | None = None

    @property
    def selected(self) -> Tensor:
        """``kept`` with -1 where a row is filled up. Long [batch, k]."""
        return self.kept if self.filled is None else self.kept.masked_fill(self.filled, -1)


def count_kept(ratio: float, tokens: int) -> int:
    """``ceil(ratio · tokens)``, at least 1 and at most ``tokens``, free of rounding errors.

    A product within one part in 10⁹ of an integer is that integer: 0.1 of 1000 is 100, and 0.3 of
    10 is 3 even if the ratio was computed as 0.1 + 0.2.

    Raises:
        ConfigError: ratio is outside (0, 1].
        InputError: there are no tokens.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio is {ratio!r}; it must be above 0 and at most 1, such as 0.1")
    if tokens < 1:
        raise InputError(f"there are {tokens} tokens to select from; give the model at least one")
    product = ratio * tokens
    nearest = round(product)
    whole = nearest if math.isclose(product, nearest, rel_tol=1e-9) else math.ceil(product)
    return max(1, min(whole, tokens))


@torch.no_grad()
def count_kept_of_rows(ratio: float, valid: Tensor) -> Tensor:
    """`count_kept` of each row's own valid positions; 0 where a row has none.

    Shapes: valid Bool [batch, tokens] → Long [batch].
    """
    tokens = valid.sum(-1)
    product = ratio * tokens.to(_torch.widest(valid.device))
    nearest = product.round()
    whole = torch.where((product - nearest).abs() <= 1e-9 * nearest, nearest, product.ceil())
    return torch.minimum(whole.long().clamp_min(1), tokens)


# Mass is counted in whole units, 2⁴⁰ for the best token of a row: sums of 2²² tokens fit in int64,
# and are the same in any order, on any device.
_UNITS = 2**40


@torch.no_grad()
def count_holding(
    mass: Tensor,
    share: float,
    *,
    valid: Tensor,
    supervised: Tensor | None = None,
    supervised_only: bool = False,
    required: Tensor | None = None,
    spans: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """How many of each row's best positions hold ``share`` of its mass.

    The ranking is that of `select_topk`: required positions come first, and the others follow by
    mass. With ``supervised_only`` the mass is that of labelled positions; this also counts the
    draws of `select_sample`, which are fixed before the draw. Positions that lack one part in 10⁹
    of the share hold it. A row without mass needs one position. With ``spans`` the others follow
    span by span, by the mean of their ``scores`` where given, else of their mass.

    Shapes: mass, scores [batch, tokens], mass finite and nonnegative; valid, supervised Bool
    [batch, tokens]; required Long [batch, any]; spans Long [batch, tokens] → Long [batch], each
    from 1 to tokens.
    """
    population = valid
    if supervised_only and supervised is not None:
        population = valid & supervised
    dtype = _torch.widest(mass.device)
    parts = mass.to(dtype).masked_fill(~population, 0.0)
    highest = parts.amax(-1, keepdim=True)
    units = torch.where(highest > 0, parts / highest * _UNITS, 0.0).round().long()
    ranked = units
    if spans is not None:
        ranked = means_of_spans(units.to(dtype) if scores is None else scores, spans)
    ranking = ranking_of(ranked, _with_required(population.long(), required))
    held = units.gather(-1, ranking).cumsum(-1)
    needed = held[:, -1:].to(dtype) * (share * (1 - 1e-9))
    return (held[:, :-1].to(dtype) < needed).sum(-1) + 1


@torch.no_grad()
def select_topk(
    scores: Tensor,
    k: int,
    *,
    valid: Tensor,
    supervised: Tensor | None = None,
    supervised_only: bool = False,
    counts: Tensor | None = None,
    required: Tensor | None = None,
    spans: Tensor | None = None,
) -> Selection:
    """The ``k`` best-scoring positions of each row, all with weight 1.

    Valid positions come before invalid ones; with ``supervised_only`` labelled ones come first of
    all, and unlabelled ones only fill up rows that have fewer than ``k``. Equal scores go to the
    lower position, on every device. If none of a row's chosen positions has a label although the
    row has one, the row's best labelled position replaces the worst chosen that is not required.
    Labels at invalid positions don't count.

    ``counts`` are the numbers that the rows keep, where they keep fewer than ``k``; positions
    that they don't keep fill them up, with weight 0, invalid ones before others. ``required``
    positions come before all others. ``spans`` (`fxseek.spans.spans_of`) are ranked by the mean of
    their scores and kept whole, but for the last, of which a row keeps the first positions (or the
    labelled one that takes their place), and for positions whose score is ``-inf``, which have no
    part in the mean and come last.

    `k` is from 1 to tokens; supervised_only needs supervised.

    Shapes: scores [batch, tokens], without NaN; valid, supervised Bool [batch, tokens]; counts
    Long [batch]; required Long [batch, any]; spans Long [batch, tokens].
    """
    labelled = valid if supervised is None else supervised & valid
    tier = valid.long()
    if supervised_only:
        tier = tier + labelled
    if spans is not None:
        scores = means_of_spans(scores, spans)
    ranking = ranking_of(scores, _with_required(tier, required))

    if supervised is not None and not supervised_only:
        tokens = ranking.shape[-1]
        size = _counts(counts, ranking, k)
        rank = torch.arange(tokens, device=ranking.device)
        first = torch.where(labelled.gather(-1, ranking), rank, tokens).amin(-1, keepdim=True)
        replaces = (first >= size) & (first < tokens) & (size > 0)
        if required is not None:  # they come first: if the worst is one, all are
            worst = ranking.gather(-1, (size - 1).clamp_min(0))
            replaces &= (required.unsqueeze(-1) != worst.unsqueeze(1)).all(1)
        ends = torch.cat(((size - 1).clamp_min(0), first.clamp_max(tokens - 1)), -1)
        pair = ranking.gather(-1, ends)
        ranking = ranking.scatter(-1, ends, torch.where(replaces, pair.flip(-1), pair))
    kept, filled = _take(ranking, counts, k, valid)
    weights = torch.ones_like(kept, dtype=torch.float32)
    return Selection(kept, _without(weights, filled), filled, spans=spans)


@torch.no_grad()
def select_labelled(supervised: Tensor, required: Tensor | None = None) -> Selection:
    """The positions that have a label, padding or not, and ``required`` ones, all with weight 1.

    The first position of a row that has neither. Waits for the device, to learn the largest number
    that a row keeps.

    Shapes: supervised Bool [batch, tokens]; required Long [batch, any].
    """
    own = supervised if required is None else supervised.scatter(-1, required, True)
    own = torch.cat((own[:, :1] | ~own.any(-1, keepdim=True), own[:, 1:]), -1)
    counts = own.sum(-1)
    k = int(counts.max())
    if len(counts) == 1:
        counts = None  # nothing to fill up
    found = torch.zeros(own.shape, device=own.device)
    return select_topk(found, k, valid=own, counts=counts)


@torch.no_grad()
def select_sample(
    mass: Tensor,
    k: int,
    *,
    valid: Tensor,
    supervised: Tensor | None,
    generator: torch.Generator,
    uniform: float = 0.5,
    counts: Tensor | None = None,
    required: Tensor | None = None,
    spans: Tensor | None = None,
) -> Selection:
    """``k`` labelled positions of each row, drawn by mass, weighted so that the loss is unbiased.

    Priority sampling without replacement: position i with share ``s_i`` gets the priority ``s_i /
    u_i``, ``u_i`` uniform in (0, 1]; the k highest are kept; with τ the next one, each kept
    position weighs ``max(1, τ / s_i)``, and the expectation of ``Σ weight · loss`` over the kept
    positions is the sum of all losses, whatever the losses are. The shares mix the row's mass
    with a uniform floor, ``s = (1 - uniform) · mass / Σ mass + uniform / labelled``, which bounds
    what a mass near 0 does to a weight.

    The weights returned are those times ``kept positions with a label / positions with a label``,
    both counted over the whole batch: ``Σ weight · loss / kept positions with a label`` estimates
    the batch's mean loss over all labelled positions without bias.

    A row that has no more labelled positions than it keeps beside ``required`` ones keeps them all;
    unlabelled valid positions fill it up by mass, then invalid ones, with weight 1 (they have no
    label). Labels at invalid positions don't count. ``supervised=None`` takes every valid position
    as labelled.

    The draws come from ``generator``, on the CPU, so that all devices select alike.

    ``counts`` and ``required`` are those of `select_topk`. With ``spans`` (`fxseek.spans.spans_of`,
    cut where labels begin and end), a span has the share of all its positions, one draw and one
    weight. A row keeps the spans of the highest priorities that have ``k`` positions or fewer in
    all; τ is the priority of the next one, and the expectation is the same: whether a span is kept
    depends on its own draw and a threshold that the others make. No span may be larger than what
    its row keeps beside required positions, and the fewer spans a row keeps, the larger weights may
    become.

    `k` is from 1 to tokens, ``uniform`` in (0, 1].

    Shapes: mass [batch, tokens], finite and nonnegative; valid, supervised Bool [batch, tokens];
    spans Long [batch, tokens].

    Source: Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums",
    JACM 54(6), 2007.
    """
    tokens = mass.shape[-1]
    labelled = valid if supervised is None else supervised & valid
    dtype = _torch.widest(mass.device)
    mass = mass.to(dtype)
    labelled_mass = mass.masked_fill(~labelled, 0.0)
    total = labelled_mass.sum(-1, keepdim=True)
    count = labelled.sum(-1, keepdim=True)
    floor = 1.0 / count.clamp_min(1).to(dtype)
    # A row whose labelled positions have no mass at all is drawn uniformly.
    by_mass = torch.where(total > 0, labelled_mass / total, floor)
    share = ((1.0 - uniform) * by_mass + uniform * floor).masked_fill(~labelled, 0.0)

    # 1 - [0, 1) = (0, 1]: no division by zero
    uniforms = 1.0 - torch.rand(mass.shape, generator=generator, dtype=dtype, device="cpu")
    uniforms = uniforms.to(mass.device, non_blocking=True)
    if spans is not None:
        share, mass = over_spans(share, spans), over_spans(mass, spans)
        uniforms = uniforms.gather(-1, spans)
    priority = share / uniforms
    tier = _with_required(valid.long() + labelled, required)
    ranking = ranking_of(torch.where(labelled, priority, mass), tier)
    if spans is not None:
        counts = _whole_spans(ranking, spans, labelled, _counts(counts, ranking, k))
    kept, filled = _take(ranking, counts, k, valid)

    # Unlabelled positions have priority 0, so that τ = 0 in rows that keep all their labels.
    size = _counts(counts, ranking, k)
    following = ranking.gather(-1, size.clamp_max(tokens - 1))
    threshold = priority.gather(-1, following).masked_fill(size >= tokens, 0.0)
    kept_labelled = _without(labelled.gather(-1, kept), filled)
    if required is not None:  # certain to be kept: they stand for themselves alone
        share = share.scatter(-1, required, math.inf)
    weights = (threshold / share.gather(-1, kept)).clamp_min(1.0)
    weights = weights * kept_labelled.sum() / labelled.sum().clamp_min(1)
    weights = weights.masked_fill(~kept_labelled, 1.0).to(torch.float32)
    return Selection(kept, _without(weights, filled), filled, spans=spans)


def _whole_spans(ranking: Tensor, spans: Tensor, labelled: Tensor, size: Tensor) -> Tensor:
    """The most positions of each ranking, `size` or fewer, that end with a span; Long [batch].

    Unlabelled positions, which nothing is drawn of, end anywhere.
    """
    drawn, ranked = labelled.gather(-1, ranking), spans.gather(-1, ranking)
    ends = ~drawn
    ends[:, -1] = True
    ends[:, :-1] |= ranked[:, 1:] != ranked[:, :-1]
    count = torch.arange(1, ranking.shape[-1] + 1, device=ranking.device)
    return torch.where(ends & (count <= size), count, 0).amax(-1)


def _counts(counts: Tensor | None, ranking: Tensor, k: int) -> Tensor:
    """How many positions each row keeps, [batch, 1]."""
    if counts is None:
        return ranking.new_full((ranking.shape[0], 1), k)
    return counts.unsqueeze(-1)


def _without(values: Tensor, filled: Tensor | None) -> Tensor:
    """Values with 0, or False, in slots that are filled up."""
    return values if filled is None else values.masked_fill(filled, 0)


def _with_required(tier: Tensor, required: Tensor | None) -> Tensor:
    """Tiers in which required positions come first."""
    if required is None:
        return tier
    return tier.scatter(-1, required, 4)


def _take(
    ranking: Tensor, counts: Tensor | None, k: int, valid: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The first positions of each ranking, ascending, then what fills up; and which slots do."""
    if counts is None:
        return ranking[:, :k].sort(dim=-1).values, None
    size = counts.unsqueeze(-1)
    slot = torch.arange(k, device=ranking.device)
    filled = slot >= size
    # Invalid positions are at the end of a ranking. Where there are too few of them (rows of one
    # length that keep different numbers), the last of the valid ones fill up as well.
    skipped = (valid.sum(-1, keepdim=True) - size).clamp_max(ranking.shape[-1] - k)
    kept = ranking.gather(-1, slot + filled * skipped)
    order = (kept + filled * ranking.shape[-1]).argsort(dim=-1)
    return kept.gather(-1, order), filled


def ranking_of(scores: Tensor, tier: Tensor) -> Tensor:
    """Positions of each row, higher tiers first, then higher scores, then lower positions."""
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_tier = tier.gather(-1, by_score).argsort(dim=-1, descending=True, stable=True)
    return by_score.gather(-1, by_tier)
