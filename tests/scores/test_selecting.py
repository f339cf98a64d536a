"""Selections: hand examples, the laws they keep, and what sampling promises on average."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxseek.errors import ConfigError, InputError
from fxseek.selecting import Selection, count_holding, count_kept, select_sample, select_topk


def bools(*rows: str) -> Tensor:
    """Rows such as "1101" as a boolean tensor."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# count_kept


@pytest.mark.parametrize(
    ("ratio", "tokens", "kept"),
    [
        (0.1, 1000, 100),
        (0.1, 1001, 101),
        (0.1, 1009, 101),
        (0.1, 1024, 103),
        (0.1, 3, 1),
        (0.7, 10, 7),
        (0.1 + 0.2, 10, 3),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (1.0, 7, 7),
        (1, 7, 7),
        (1e-9, 7, 1),
        (0.999999, 7, 7),
        (0.07, 10**8, 7 * 10**6),
    ],
)
def test_kept_counts(ratio: float, tokens: int, kept: int):
    assert count_kept(ratio, tokens) == kept


@given(percent=st.integers(1, 10_000), tokens=st.integers(1, 200_000))
def test_kept_counts_are_those_of_exact_decimals(percent: int, tokens: int):
    assert count_kept(percent / 10_000, tokens) == math.ceil(Fraction(percent, 10_000) * tokens)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_ratios_that_keep_nothing_or_too_much(ratio: float):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        count_kept(ratio, 10)


def test_no_tokens():
    with pytest.raises(InputError, match="0 tokens"):
        count_kept(0.5, 0)


# count_holding


def holding(mass: list[float], share: float, valid: str = "", **options: Any) -> int:
    row = torch.tensor([mass], dtype=torch.float64)
    return int(count_holding(row, share, valid=bools(valid or "1" * len(mass)), **options))


def test_counts_that_hold_a_share_by_hand():
    mass = [5.0, 1.0, 0.0, 3.0, 1.0]
    assert [holding(mass, share) for share in (0.01, 0.5, 0.51, 0.8, 0.81, 0.9, 1.0)] == [
        1, 1, 2, 2, 3, 3, 4,
    ]  # fmt: skip
    assert holding(mass, 0.75, "01111") == 2  # 3 and 1 of 5
    assert holding(mass, 0.9, "00000") == 1
    assert holding([0.0, 0.0, 0.0], 0.9) == 1
    assert holding([7.0], 1.0) == 1


def test_labelled_mass_and_required_positions():
    mass = [5.0, 1.0, 0.0, 3.0, 1.0]
    some = bools("01011")
    assert holding(mass, 0.5, supervised=some) == 1
    assert holding(mass, 0.5, supervised=some, supervised_only=True) == 1
    assert holding(mass, 0.9, supervised=some, supervised_only=True) == 3
    assert holding(mass, 0.9, "10111", supervised=some, supervised_only=True) == 2
    assert holding(mass, 0.8, required=torch.tensor([[2]])) == 3  # 0, then 5 and 3 of 10
    assert holding(mass, 0.8, required=torch.tensor([[1, 2]])) == 4
    assert holding(mass, 0.1, required=torch.tensor([[1, 2]])) == 1


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e300])
@pytest.mark.parametrize(("tokens", "share"), [(10, 0.9), (10, 0.3), (30, 0.7), (1000, 0.29)])
def test_equal_masses_need_no_more_than_their_share(tokens: int, share: float, scale: float):
    assert holding([scale / 3] * tokens, share) == math.ceil(round(share * tokens, 9))


def test_half_precision_masses_hold_their_share():
    mass = torch.tensor([[60000.0] * 10, [1.0] * 10])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = count_holding(mass.to(dtype), 0.7, valid=torch.ones(2, 10, dtype=torch.bool))
        assert found.tolist() == [7, 7]


# select_topk

SCORES = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]])


def topk(
    k: int,
    valid: str = "11111",
    supervised: str | None = None,
    supervised_only: bool = False,
    scores: Tensor = SCORES,
) -> list[int]:
    labels = None if supervised is None else bools(supervised)
    selection = select_topk(
        scores, k, valid=bools(valid), supervised=labels, supervised_only=supervised_only
    )
    assert selection.weights.eq(1).all()
    assert selection.weights.shape == selection.kept.shape
    return selection.kept[0].tolist()


def test_the_best_come_in_order_of_position():
    assert topk(1) == [0]
    assert topk(3) == [0, 2, 4]
    assert topk(5) == [0, 1, 2, 3, 4]


def test_invalid_positions_only_fill_up():
    assert topk(2, valid="01010") == [1, 3]
    assert topk(3, valid="01010") == [0, 1, 3]
    assert topk(2, valid="00000") == [0, 2]


def test_ties_go_to_the_lower_position():
    flat = torch.zeros(1, 5)
    assert topk(3, scores=flat) == [0, 1, 2]
    assert topk(3, scores=flat, valid="10111") == [0, 2, 3]
    many = torch.arange(6000).fmod(3).view(1, -1)
    assert topk(2000 + 7, scores=many, valid="1" * 6000) == sorted(
        [*range(2, 6000, 3), *range(1, 21, 3)]
    )


def test_minus_infinity_comes_last_of_the_valid():
    scores = torch.tensor([[-math.inf, 1.0, -math.inf, -math.inf, 0.0]])
    assert topk(2, scores=scores) == [1, 4]
    assert topk(3, scores=scores, valid="01011") == [1, 3, 4]


def test_one_labelled_position_replaces_the_worst():
    assert topk(2, supervised="01010") == [0, 3]  # 3 is the better of 1 and 3
    assert topk(1, supervised="01000") == [1]
    assert topk(3, supervised="00001") == [0, 2, 4]  # already chosen
    assert topk(2, supervised="00000") == [0, 2]  # there is none
    # a label on padding is none
    assert topk(2, valid="11100", supervised="00010") == [0, 2]
    assert topk(2, valid="11100", supervised="01010") == [0, 1]


def test_supervised_only_takes_labels_first():
    assert topk(2, supervised="01011", supervised_only=True) == [3, 4]
    assert topk(4, supervised="01010", supervised_only=True) == [0, 1, 2, 3]
    assert topk(4, valid="01110", supervised="11000", supervised_only=True) == [0, 1, 2, 3]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Nonnegative scores with ties and zeros, valid, supervised, and how many to keep."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    count = batch * tokens
    values = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    flags = [
        draw(st.lists(st.booleans(), min_size=count, max_size=count))
        if draw(st.booleans())
        else [True] * count
        for _ in range(2)
    ]
    scores, valid, supervised = (torch.tensor(x).view(batch, tokens) for x in (values, *flags))
    return scores.float(), valid, supervised, draw(st.integers(1, tokens))


def assert_lawful(selection: Selection, valid: Tensor, supervised: Tensor, k: int) -> None:
    kept = selection.kept
    assert kept.dtype == torch.long
    assert selection.weights.dtype == torch.float32
    assert kept.shape == selection.weights.shape == (valid.shape[0], k)
    for row, positions in enumerate(kept.tolist()):
        assert all(a < b for a, b in pairwise(positions))
        assert positions[0] >= 0
        assert positions[-1] < valid.shape[1]
        assert valid[row, positions].sum() == min(k, int(valid[row].sum()))
        labelled = supervised[row] & valid[row]
        assert labelled[positions].any() == labelled.any()
    assert selection.weights.isfinite().all()


@given(case=rows(), supervised_only=st.booleans())
def test_topk_keeps_its_laws(case: tuple[Tensor, Tensor, Tensor, int], supervised_only: bool):
    scores, valid, supervised, k = case
    before = scores.clone(), valid.clone(), supervised.clone()
    selection = select_topk(
        scores, k, valid=valid, supervised=supervised, supervised_only=supervised_only
    )
    assert_lawful(selection, valid, supervised, k)
    assert selection.weights.eq(1).all()
    labelled = supervised & valid
    for row, positions in enumerate(selection.kept.tolist()):
        # against sorting in plain Python
        def key(j: int, row: int = row) -> tuple[bool, bool, float, int]:
            first = supervised_only and not labelled[row, j]
            return first, not valid[row, j], -scores[row, j].item(), j

        order = sorted(range(scores.shape[1]), key=key)
        expected = order[:k]
        if labelled[row].any() and not labelled[row, expected].any():
            expected[-1] = next(j for j in order if labelled[row, j])
        assert positions == sorted(expected)
    again = select_topk(
        scores, k, valid=valid, supervised=supervised, supervised_only=supervised_only
    )
    assert torch.equal(selection.kept, again.kept)
    assert all(map(torch.equal, before, (scores, valid, supervised)))


@given(case=rows(), percent=st.integers(1, 100), supervised_only=st.booleans(), data=st.data())
def test_counts_are_the_shortest_that_hold_the_share(
    case: tuple[Tensor, Tensor, Tensor, int],
    percent: int,
    supervised_only: bool,
    data: st.DataObject,
):
    mass, valid, supervised, _ = case
    size = mass.shape[1]
    positions = st.lists(st.integers(0, size - 1), max_size=2, unique=True)
    first = data.draw(positions, label="required")
    required = torch.tensor([first] * len(mass)) if first else None
    options: dict[str, Any] = {"valid": valid, "supervised": supervised, "required": required}
    found = count_holding(mass, percent / 100, supervised_only=supervised_only, **options)
    population = valid & supervised if supervised_only else valid
    for row, count in enumerate(found.tolist()):
        own = [int(x) if p else 0 for x, p in zip(mass[row], population[row], strict=True)]
        order = sorted(range(size), key=lambda j: (j not in first, -own[j]))
        held = [100 * sum(own[j] for j in order[:n]) for n in range(size + 1)]
        enough = [n for n in range(1, size + 1) if held[n] >= percent * sum(own)]
        assert count == enough[0]
    # the same alone, and with more padding
    for row in range(len(mass)):
        one: dict[str, Any] = {
            name: None if x is None else x[row : row + 1] for name, x in options.items()
        }
        alone = count_holding(
            mass[row : row + 1], percent / 100, supervised_only=supervised_only, **one
        )
        assert alone.tolist() == [found[row]]


@given(case=rows(), data=st.data(), kind=st.sampled_from(["topk", "supervised", "sample"]))
def test_rows_of_different_counts_fill_up_with_what_they_do_not_keep(
    case: tuple[Tensor, Tensor, Tensor, int], data: st.DataObject, kind: str
):
    scores, valid, supervised, _ = case
    most = valid.sum(-1).tolist()
    counts = [data.draw(st.integers(min(1, n), n)) for n in most]
    k = max(1, *counts)
    common: dict[str, Any] = {"valid": valid, "supervised": supervised}

    def select(row: slice, k: int, **options: Any) -> Selection:
        given = {name: x[row] for name, x in common.items()} | options
        if kind == "sample":
            return select_sample(scores[row], k, generator=generator(), **given)
        return select_topk(scores[row], k, supervised_only=kind == "supervised", **given)

    found = select(slice(None), k, counts=torch.tensor(counts))
    assert found.filled is not None
    for row, count in enumerate(counts):
        kept = found.kept[row].tolist()
        assert len(set(kept)) == k
        assert found.selected[row].tolist() == sorted(kept[:count]) + [-1] * (k - count)
        assert found.filled[row].tolist() == [False] * count + [True] * (k - count)
        assert found.weights[row, count:].eq(0).all()
        assert found.weights[row, :count].gt(0).all()
        assert valid[row, kept[:count]].all()
        spare = scores.shape[1] - most[row]
        assert valid[row, kept[count:]].sum() == max(0, k - count - spare)
        labelled = supervised[row] & valid[row]
        assert not count or labelled[kept[:count]].any() == labelled.any()
        if count and kind != "sample":
            alone = select(slice(row, row + 1), count)
            assert alone.kept[0].tolist() == kept[:count]


@given(case=rows())
def test_rows_are_selected_independently(case: tuple[Tensor, Tensor, Tensor, int]):
    scores, valid, supervised, k = case
    together = select_topk(scores, k, valid=valid, supervised=supervised).kept
    for row in range(len(scores)):
        one = slice(row, row + 1)
        alone = select_topk(scores[one], k, valid=valid[one], supervised=supervised[one]).kept
        assert torch.equal(together[one], alone)


@given(case=rows())
def test_k_may_be_all_tokens(case: tuple[Tensor, Tensor, Tensor, int]):
    scores, valid, supervised, _ = case
    tokens = scores.shape[1]
    everything = torch.arange(tokens).expand(len(scores), -1)
    top = select_topk(scores, tokens, valid=valid, supervised=supervised)
    drawn = select_sample(scores, tokens, valid=valid, supervised=supervised, generator=generator())
    for selection in (top, drawn):
        assert torch.equal(selection.kept, everything)
        assert selection.weights.eq(1).all()


# select_sample


@given(case=rows(), uniform=st.sampled_from([1e-6, 0.5, 1.0]), seed=st.integers(0, 1000))
def test_samples_keep_their_laws(
    case: tuple[Tensor, Tensor, Tensor, int], uniform: float, seed: int
):
    mass, valid, supervised, k = case

    def draw() -> Selection:
        return select_sample(
            mass,
            k,
            valid=valid,
            supervised=supervised,
            generator=generator(seed),
            uniform=uniform,
        )

    selection = draw()
    assert_lawful(selection, valid, supervised, k)
    labelled = supervised & valid
    for row, positions in enumerate(selection.kept.tolist()):
        count = int(labelled[row].sum())
        assert labelled[row, positions].sum() == min(k, count)
        weights = selection.weights[row]
        assert weights.gt(0).all()
        assert weights[~labelled[row, positions]].eq(1).all()
        if count <= k:
            # the fillers are the heaviest of the valid unlabelled positions
            fillers = [j for j in positions if not labelled[row, j]]
            others = [j for j in range(mass.shape[1]) if not labelled[row, j]]
            others.sort(key=lambda j: (not valid[row, j], -mass[row, j].item(), j))
            assert fillers == sorted(others[: k - count])
    if all(int(n) <= k for n in labelled.sum(-1)):
        assert selection.weights.eq(1).all()
    again = draw()
    assert torch.equal(selection.kept, again.kept)
    assert torch.equal(selection.weights, again.weights)


def test_supervised_none_means_every_valid_position():
    valid = bools("0111111111", "1111111111")
    mass = torch.rand(2, 10, generator=generator(3))
    arguments = {"valid": valid, "uniform": 0.25}
    absent = select_sample(mass, 4, supervised=None, generator=generator(), **arguments)
    explicit = select_sample(mass, 4, supervised=valid, generator=generator(), **arguments)
    assert torch.equal(absent.kept, explicit.kept)
    assert torch.equal(absent.weights, explicit.weights)


def test_draws_come_from_the_generator_alone():
    mass, valid = torch.ones(1, 100), torch.ones(1, 100, dtype=torch.bool)
    state = torch.get_rng_state()
    source = generator()
    first = select_sample(mass, 10, valid=valid, supervised=None, generator=source)
    second = select_sample(mass, 10, valid=valid, supervised=None, generator=source)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.kept, second.kept)


def test_rows_without_mass_or_labels():
    mass = torch.zeros(3, 4)
    selection = select_sample(
        mass,
        2,
        valid=bools("1111", "1111", "0000"),
        supervised=bools("1111", "0000", "1111"),
        generator=generator(),
    )
    assert selection.kept[1].tolist() == [0, 1]
    assert selection.kept[2].tolist() == [0, 1]
    assert selection.weights.isfinite().all()
    assert selection.weights[1:].eq(1).all()


def test_priority_sampling_by_hand():
    # All shares are 1/4: the priorities are 1 / 4u, the two smallest u are kept, and the weight of
    # either is τ / s = 1 / (third smallest u), times 2 kept of 4.
    u = 1.0 - torch.rand(1, 4, generator=generator(7), dtype=torch.float64)
    order = u[0].argsort()
    selection = select_sample(
        torch.ones(1, 4), 2, valid=bools("1111"), supervised=None, generator=generator(7)
    )
    assert selection.kept[0].tolist() == order[:2].sort().values.tolist()
    expected = (1 / u[0, order[2]] * 2 / 4).float()
    torch.testing.assert_close(selection.weights[0], expected.expand(2))


def estimates(
    mass: Tensor,
    losses: Tensor,
    k: int,
    valid: Tensor,
    supervised: Tensor,
    draws: int,
    **options: Tensor,
) -> Tensor:
    """The weighted mean loss of many independent selections of one batch."""
    labelled = supervised & valid
    source = generator(11)
    results = []
    for _ in range(draws):
        selection = select_sample(
            mass,
            k,
            valid=valid,
            supervised=supervised,
            generator=source,
            uniform=0.3,
            **options,
        )
        counted = labelled.gather(1, selection.kept) & (selection.selected >= 0)
        weighted = losses.gather(1, selection.kept) * selection.weights * counted
        results.append(weighted.sum() / counted.sum())
    return torch.stack(results)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kind", ["follows losses", "opposes losses", "has zeros"])
def test_the_weighted_loss_is_unbiased(k: int, kind: str):
    # Rows of different numbers of labels, one of them with fewer than k = 5, one with none; labels
    # on padding, which are not part of the full loss.
    valid = bools("1111111111111", "0000111111111", "1111111111100", "1111111111111")
    supervised = bools("1111111111110", "0111111111110", "0000000011111", "0000000000000")
    labelled = supervised & valid
    losses = torch.rand(4, 13, generator=generator(5)).double() ** 3 * 10
    mass = {
        "follows losses": losses,
        "opposes losses": 1 / (losses + 0.1),
        "has zeros": losses * (losses > 1),
    }[kind]
    found = estimates(mass, losses, k, valid, supervised, draws=4000)
    full = losses[labelled].mean()
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - full) < 5 * error
    # a bound on the error itself, so that the test can't pass by knowing nothing
    assert error < 0.05 * full


@pytest.mark.parametrize("kind", ["follows losses", "opposes losses"])
def test_counts_by_mass_leave_the_weighted_loss_unbiased(kind: str):
    valid = bools("1111111111111", "0000111111111", "1111111111100", "1111111111111")
    supervised = bools("1111111111110", "0111111111110", "0000000011111", "0000000000000")
    labelled = supervised & valid
    losses = torch.rand(4, 13, generator=generator(5)).double() ** 3 * 10
    mass = losses if kind == "follows losses" else 1 / (losses + 0.1)
    counts = count_holding(mass, 0.6, valid=valid, supervised=supervised, supervised_only=True)
    assert len(set(counts.tolist())) > 2
    found = estimates(mass, losses, int(counts.max()), valid, supervised, 4000, counts=counts)
    full = losses[labelled].mean()
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - full) < 5 * error
    assert error < 0.05 * full


def test_required_positions_with_a_label_leave_the_weighted_loss_unbiased():
    valid = torch.ones(1, 8, dtype=torch.bool)
    losses = torch.tensor([[9.0, 1, 2, 1, 1, 2, 1, 1]], dtype=torch.float64)
    mass = torch.ones(1, 8)
    found = estimates(mass, losses, 3, valid, valid, 2000, required=torch.tensor([[0]]))
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - losses.mean()) < 5 * error
    assert error < 0.05 * losses.mean()


def test_topk_is_biased_where_sampling_is_not():
    losses = torch.arange(1.0, 21.0).view(1, -1)
    valid = torch.ones(1, 20, dtype=torch.bool)
    top = select_topk(losses, 4, valid=valid)
    assert losses.gather(1, top.kept).mean() == 18.5
    assert losses.mean() == 10.5


def test_drawing_by_the_losses_varies_less_than_drawing_alike():
    losses = (torch.rand(1, 50, generator=generator(1)) ** 4).double() * 10
    valid = torch.ones(1, 50, dtype=torch.bool)
    by_loss = estimates(losses, losses, 5, valid, valid, draws=500)
    alike = estimates(torch.ones_like(losses), losses, 5, valid, valid, draws=500)
    assert by_loss.std() < 0.6 * alike.std()


def test_half_precision_masses():
    mass = torch.rand(2, 300, generator=generator())
    valid = torch.ones(2, 300, dtype=torch.bool)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        selection = select_sample(
            mass.to(dtype), 30, valid=valid, supervised=None, generator=generator()
        )
        assert_lawful(selection, valid, valid, 30)


def test_selections_are_records_without_grad():
    selection = select_topk(SCORES.clone().requires_grad_(), 2, valid=bools("11111"))
    assert not selection.weights.requires_grad
    with pytest.raises(FrozenInstanceError):
        selection.kept = SCORES  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree_and_selecting_never_waits():
    scores = torch.randint(0, 9, (3, 500), generator=generator()).float()
    valid = torch.rand(3, 500, generator=generator(1)) < 0.9
    supervised = torch.rand(3, 500, generator=generator(2)) < 0.5
    there = scores.cuda(), valid.cuda(), supervised.cuda()

    def every(scores: Tensor, valid: Tensor, supervised: Tensor) -> tuple[Selection, ...]:
        counts = count_holding(scores, 0.05, valid=valid)
        return (
            select_topk(scores, 50, valid=valid, counts=counts.clamp_max(50)),
            select_topk(scores, 50, valid=valid, supervised=supervised),
            select_sample(scores, 50, valid=valid, supervised=supervised, generator=generator(3)),
        )

    torch.cuda.set_sync_debug_mode("error")
    try:
        remote = every(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(every(scores, valid, supervised), remote, strict=True):
        assert torch.equal(a.kept, b.kept.cpu())
        torch.testing.assert_close(a.weights, b.weights.cpu())
