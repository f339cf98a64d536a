"""Spans: how rows are cut, which are kept, and that gradients and samples stay right."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import (
    IGNORED,
    TinyConfig,
    TinyDecoder,
    batch,
    tiny_llama,
    tiny_lora,
    without_casts,
)
from peft import PromptTuningConfig, get_peft_model
from steps import EXACT, exact_step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fxseek
from fxseek.selecting import Selection, count_holding, count_kept, select_sample, select_topk
from fxseek.spans import drawn_scores, means_of_spans, over_spans, spans_of

VOCAB = 37
GROUPED = TinyConfig(depth=3, heads=6, kv_heads=3, positions="rotary", bias=True)


UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)  # each example is captured


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bools(*rows: str) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def runs(spans: Tensor) -> list[list[int]]:
    """The positions of each span of a row."""
    positions = range(len(spans))
    return [list(run) for _, run in itertools.groupby(positions, key=spans.tolist().__getitem__)]


# ---- draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kept", "documents", "labelled"),
    [
        (8, 16, [64], "1" * 64),
        (8, 16, [4, 4, 4, 52], "1" * 64),
        (32, 20, [64], "1" * 64),
        (8, 16, [64], "10" * 4 + "0" * 8 + "1" * 48),
        (8, 56, [64], "10" * 4 + "0" * 8 + "1" * 48),
    ],
)
def test_random_spans_have_every_token_equally_often(
    size: int, kept: int, documents: list[int], labelled: str
):
    rows, tokens = 4000, 64
    first, second = generator(), generator(1)
    begins = torch.zeros(rows, tokens, dtype=torch.bool)
    begins[:, [0, *itertools.accumulate(documents[:-1])]] = True
    valid = torch.ones_like(begins)
    own = bools(labelled).expand(rows, -1)
    required = torch.zeros(rows, 1, dtype=torch.int64)
    sizes = torch.full((rows, 1), size)
    spans = spans_of(
        sizes, valid=valid, labelled=own, begins=begins, required=required, generator=first
    )
    free = valid.clone()
    free[:, 0] = False
    draws = torch.rand(rows, tokens, generator=second)
    scores = drawn_scores(draws, spans, [free & own, free & ~own], first)
    found = select_topk(
        scores, kept, valid=valid, supervised=own, supervised_only=True, required=required
    )
    counts = torch.zeros(tokens).index_add(0, found.kept.flatten(), torch.ones(rows * kept))
    assert counts[0] == rows
    best, left = own[0, 1:], kept - 1
    for tier in (best, ~best):
        if not tier.any():
            continue
        share = min(left, int(tier.sum())) / int(tier.sum())
        left -= min(left, int(tier.sum()))
        deviation = (share * (1 - share) / rows) ** 0.5
        assert float((counts[1:][tier] / rows - share).abs().max()) <= 4.5 * deviation


@pytest.mark.parametrize("padding", ["left", "right"])
def test_random_spans_of_padded_rows_have_every_token_equally_often(padding: str):
    model = decoder()
    fxseek.compile(model, 0.3, span=4, score="random")
    lengths, rows, steps = (13, 20), 400, 5
    inputs = batch(VOCAB, batch=rows, tokens=20)
    padded = slice(0, 7) if padding == "left" else slice(13, 20)
    mask = torch.ones(rows, 20, dtype=torch.long)
    mask[::2, padded] = 0
    inputs["attention_mask"] = mask
    inputs["labels"][mask == 0] = -100
    counts = torch.zeros(2, 20)
    for _ in range(steps):
        model(**inputs)
        selected = fxseek.report(model).selected
        for row, kept in enumerate(selected):
            counts[row % 2, kept[kept >= 0]] += 1
    for at, length in enumerate(lengths):
        share = math.ceil(0.3 * length) / length
        valid = mask[at].bool()
        assert counts[at][~valid].sum() == 0
        draws = rows * steps / 2
        deviation = (share * (1 - share) / draws) ** 0.5
        assert float((counts[at][valid] / draws - share).abs().max()) <= 4.5 * deviation


def test_random_spans_are_whole_but_for_two():
    model = decoder()
    fxseek.compile(model, 0.4, span=4, score="random", supervised_only=True, sinks=1)
    inputs = batch(VOCAB, batch=3, tokens=37, padding="right", labels="some")
    for _ in range(4):
        report = exact_step(model, inputs)
        assert report.spans is not None and report.supervised is not None
        chosen = report.by_position()[0]
        for row in range(3):
            labelled = report.supervised[row]
            cut = 0
            for run in runs(report.spans[row]):
                kept = chosen[row, run][labelled[run]]
                cut += bool(kept.any() and not kept.all())
            assert cut <= 2


def test_a_score_of_minus_infinity_comes_last():
    def odd(given: Any) -> Tensor:
        scores = given.input_ids.double().clone()
        scores[:, 1::2] = -torch.inf
        return scores

    model = decoder()
    fxseek.compile(model, 0.5, score=odd, span=2)
    inputs = batch(VOCAB, batch=2, tokens=20)
    assert exact_step(model, inputs).selected.tolist() == [[*range(0, 20, 2)]] * 2

    def between(given: Any) -> Tensor:
        scores = torch.zeros(given.input_ids.shape, dtype=torch.float64)
        scores[:, [10, 12, 13]], scores[:, 11] = 100.0, -torch.inf
        return scores

    model = decoder()
    options: dict[str, Any] = {"ratio_bounds": (0.01, 0.9)}
    fxseek.compile(model, "mass:0.9", score=between, span=4, **options)
    report = exact_step(model, batch(VOCAB, batch=1, tokens=20))
    assert {10, 12, 13} <= {*report.selected[0].tolist()}
    assert report.selected.shape[1] <= 8


# ---- how a row is cut ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_spans_lie_within_stretches(data: st.DataObject):
    tokens, size = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    valid, labelled, begins = (torch.tensor([data.draw(row)]) for _ in range(3))
    required = torch.tensor([data.draw(st.lists(st.integers(0, tokens - 1), max_size=2))]).long()
    spans = spans_of(
        torch.tensor([[size]]),
        valid=valid,
        labelled=labelled,
        begins=begins,
        required=required,
        generator=generator(data.draw(st.integers(0, 99))),
    )[0]
    found = runs(spans)
    assert spans.tolist() == sorted(spans.tolist())
    assert spans.unique().tolist() == list(range(len(found)))
    alone = set(required[0].tolist())
    for run, following in itertools.pairwise([*found, [tokens]]):
        assert len(run) <= size
        assert not begins[0, run[1:]].any()
        for kind in (valid[0], labelled[0]):
            assert len(kind[run].unique()) == 1
        assert len(run) == 1 or not alone & set(run)
        inside = following[0] < tokens and not (
            begins[0, following[0]]
            or any(kind[run[0]] != kind[following[0]] for kind in (valid[0], labelled[0]))
            or alone & {run[0], following[0]}
        )
        if inside and run is not found[0] and len(run) < size:
            # only the first span of a stretch is shorter, and the last
            before = run[0] - 1
            assert (
                begins[0, run[0]]
                or any(kind[run[0]] != kind[before] for kind in (valid[0], labelled[0]))
                or before in alone
            )


def test_every_offset_is_as_likely():
    size, valid = 5, torch.ones(4000, 20, dtype=torch.bool)
    spans = spans_of(torch.full((4000, 1), size), valid=valid, generator=generator())
    first = (spans == 0).sum(-1)
    counts = torch.bincount(first, minlength=size + 1)[1:]
    assert len(counts) == size
    assert ((counts / 4000 - 1 / size).abs() < 0.03).all()


def test_rows_may_have_spans_of_their_own_size():
    valid = torch.ones(2, 12, dtype=torch.bool)
    spans = spans_of(torch.tensor([[1], [4]]), valid=valid, generator=generator())
    assert spans[0].tolist() == list(range(12))
    assert max(map(len, runs(spans[1]))) == 4


def test_sums_and_means():
    spans = torch.tensor([[0, 0, 1, 2, 2, 2]])
    values = torch.tensor([[1.0, 2, 3, 4, 5, -torch.inf]])
    assert over_spans(values[:, :5], spans[:, :5]).tolist() == [[3, 3, 3, 9, 9]]
    assert means_of_spans(values, spans).tolist() == [[1.5, 1.5, 3, 4.5, 4.5, -torch.inf]]


# ---- which are kept ------------------------------------------------------------------------------


def best_spans(scores: Tensor, spans: Tensor, valid: Tensor, first: Tensor, k: int) -> list[int]:
    """The first `k` positions of a row's spans: valid ones, those `first`, the best mean, early."""
    found = [run for run in runs(spans) if valid[run[0]]]
    found.sort(key=lambda run: (not bool(first[run[0]]), -float(scores[run].mean()), run[0]))
    return sorted([at for run in found for at in run][:k])


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 24), size=st.integers(1, 8), seed=st.integers(0, 999), only=st.booleans()
)
def test_topk_keeps_the_best_spans_and_its_number(tokens: int, size: int, seed: int, only: bool):
    draw = generator(seed)
    scores = torch.randn(3, tokens, generator=draw, dtype=torch.float64)
    valid = torch.ones(3, tokens, dtype=torch.bool)
    labelled = torch.rand(3, tokens, generator=draw) < 0.6
    spans = spans_of(
        torch.full((3, 1), size),
        valid=valid,
        labelled=labelled if only else None,
        generator=draw,
    )
    k = int(torch.randint(1, tokens + 1, (), generator=draw))
    found = select_topk(
        scores,
        k,
        valid=valid,
        supervised=labelled if only else None,
        supervised_only=only,
        spans=spans,
    )
    first = labelled if only else valid
    for row in range(3):
        expected = best_spans(scores[row], spans[row], valid[row], first[row], k)
        assert found.kept[row].tolist() == expected
    assert torch.equal(found.weights, torch.ones(3, k))


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(2, 24), size=st.integers(1, 8), seed=st.integers(0, 999))
def test_a_sample_keeps_whole_spans_to_within_one(tokens: int, size: int, seed: int):
    draw = generator(seed)
    valid = torch.arange(tokens) < torch.randint(1, tokens + 1, (4, 1), generator=draw)
    labelled = (torch.rand(4, tokens, generator=draw) < 0.7) & valid
    k = int(torch.randint(1, tokens + 1, (), generator=draw))
    sizes = torch.full((4, 1), min(size, k))
    spans = spans_of(sizes, valid=valid, labelled=labelled, generator=draw)
    mass = torch.rand(4, tokens, generator=draw, dtype=torch.float64)
    found = select_sample(mass, k, valid=valid, supervised=labelled, generator=draw, spans=spans)
    for row in range(4):
        kept = {at for at in found.selected[row].tolist() if at >= 0}
        drawn = [run for run in runs(spans[row]) if labelled[row, run[0]]]
        assert all(set(run) <= kept or not set(run) & kept for run in drawn)
        short = k - len(kept)
        assert short >= 0
        left = [run for run in drawn if not set(run) <= kept]
        if left:
            assert short < max(map(len, left))
            assert kept <= {at for run in drawn for at in run}
        else:
            assert short == 0  # filled up
        pairs = dict(zip(found.selected[row].tolist(), found.weights[row].tolist(), strict=True))
        for run in drawn:  # one weight for a span
            assert len({pairs[at] for at in run if at in pairs}) <= 1


def weighted_mean(losses: Tensor, labelled: Tensor, selection: Selection) -> Tensor:
    """The loss of a selection: the weighted sum over what it counts."""
    counted = labelled.gather(1, selection.kept) & (selection.selected >= 0)
    weighted = losses.gather(1, selection.kept) * selection.weights * counted
    return weighted.sum() / counted.sum()


def assert_mean(results: list[Tensor], expected: Tensor) -> None:
    """Draws have this mean, to four standard errors."""
    found = torch.stack(results)
    error = found.std() / len(results) ** 0.5
    assert (found.mean() - expected).abs() < 4 * error


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", ["follows losses", "opposes losses", "has zeros"])
def test_the_weighted_loss_of_spans_is_unbiased(size: int, kind: str):
    # Rows of different lengths and labels: spans of several sizes, cut by short stretches.
    valid = bools("1111111111111", "0000111111111", "1111111111100", "1111111111111")
    supervised = bools("1111101111110", "0111111101110", "1110000011111", "0000000000000")
    labelled = supervised & valid
    losses = torch.rand(4, 13, generator=generator(5)).double() ** 3 * 10
    mass = {
        "follows losses": losses,
        "opposes losses": 10 - losses,
        "has zeros": losses * (losses > 2),
    }[kind]
    source, results = generator(11), []
    for _ in range(6000):
        spans = spans_of(torch.full((4, 1), size), valid=valid, labelled=labelled, generator=source)
        selection = select_sample(
            mass, 5, valid=valid, supervised=supervised, generator=source, uniform=0.3, spans=spans
        )
        results.append(weighted_mean(losses, labelled, selection))
    assert_mean(results, losses[labelled].mean())


@pytest.mark.parametrize("counts", ["one", "a row's", "by mass"])
def test_unbiased_with_documents_required_positions_and_counts_of_rows(counts: str):
    valid = bools("1111111111111111", "0000111111111111", "1111111111111100", "1111111111111111")
    supervised = bools(
        "1111101111110111", "0111111101110111", "1110000011111111", "0000000000000000"
    )
    labelled = supervised & valid
    begins = torch.zeros_like(valid)
    begins[0, 6] = begins[2, 9] = True
    required = torch.tensor([[0, 1], [4, 5], [0, 13], [0, 0]])
    losses = torch.rand(4, 16, generator=generator(5)).double() ** 3 * 10
    mass, size = losses * (losses > 2), 3
    source, results = generator(11), []
    fixed = torch.tensor([6, 5, 8, 3]) if counts == "a row's" else None
    given = {"valid": valid, "supervised": supervised, "required": required}
    for _ in range(4000):
        spans = spans_of(
            torch.full((4, 1), size), valid=valid, labelled=labelled, begins=begins,
            required=required, generator=source,
        )  # fmt: skip
        if counts == "by mass":
            held = count_holding(mass, 0.6, supervised_only=True, spans=spans, **given)
            fixed = torch.minimum(held.clamp_min(2 + size), valid.sum(-1))
        most = 7 if fixed is None else int(fixed.max())
        drawn = {"generator": source, "uniform": 0.3, "spans": spans, "counts": fixed}
        selection = select_sample(mass, most, **given, **drawn)
        results.append(weighted_mean(losses, labelled, selection))
    assert_mean(results, losses[labelled].mean())


def test_the_share_of_the_mass_is_held_by_spans():
    mass = torch.tensor([[1.0, 1, 8, 0, 0, 0, 3, 3]])
    valid, spans = torch.ones(1, 8, dtype=torch.bool), torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])
    for share, count in ((0.5, 1), (0.7, 4), (0.9, 5), (1.0, 6)):
        assert count_holding(mass, share, valid=valid, spans=spans).tolist() == [count]
    # by other scores than the mass: the last span first
    scores = torch.tensor([[0.0, 0, 0, 0, 1, 1, 2, 2]])
    found = count_holding(mass, 0.3, valid=valid, spans=spans, scores=scores)
    assert found.tolist() == [2]


def test_the_share_of_the_mass_of_labelled_positions_is_held_by_their_spans():
    scores = torch.tensor([[9.0, 9, 9, 9, 1, 2, 0, 0]])
    labelled, spans = bools("00001111"), torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])
    given: dict[str, Any] = {"valid": bools("11111111"), "supervised": labelled, "spans": spans}
    found = count_holding(scores, 0.9, supervised_only=True, scores=scores, **given)
    assert found.tolist() == [2]
    top = select_topk(scores, 2, supervised_only=True, **given)
    assert top.kept.tolist() == [[4, 5]]


# ---- steps ---------------------------------------------------------------------------------------


def decoder(config: TinyConfig = GROUPED) -> TinyDecoder:
    torch._dynamo.reset()
    return TinyDecoder(config).double().train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "random", "supervised_only": True},
        {"score": "context", "select": "sample"},
        {"ratio": "mass:0.6", "score": "gradient", "ratio_bounds": (0.1, 0.6)},
        {"ratio": "mass:0.6", "select": "sample", "ratio_bounds": (0.1, 0.6)},
        {"learn_chunk": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_gradients_are_exact(options: dict[str, Any], padding: str):
    model = decoder()
    fxseek.compile(model, **{"ratio": 0.4, "span": 4, **options})
    for seed in range(2):
        inputs = batch(VOCAB, batch=3, tokens=23, padding=padding, labels="some", seed=seed)
        report = exact_step(model, inputs)
        assert report.spans is not None
        assert report.spans.shape == (3, 23)
        longest = max(len(run) for row in report.spans for run in runs(row))
        most = count_kept(0.6 if "ratio" in options else 0.4, 23)
        assert longest == (4 if options.get("select") != "sample" else most // 4)
        for row, valid in zip(report.selected, report.valid, strict=True):
            kept = [at for at in row.tolist() if at >= 0]
            if "ratio" not in options:  # to within one span
                wanted = count_kept(0.4, int(valid.sum()))
                assert wanted - 4 < len(kept) <= wanted


RATIOS = (0.05, 0.2, 0.4, 0.9, "mass:0.5", "mass:0.9", "0.1->0.9")


def any_spans(data: st.DataObject) -> None:
    """Whatever goes with spans: gradients are exact, a sample has whole spans of one document."""
    draw, choice = data.draw, st.sampled_from
    options: dict[str, Any] = {
        "span": draw(choice((2, 3, 5, 8, 50))),
        "ratio": draw(choice(RATIOS)),
        "select": draw(choice(("topk", "sample"))),
        "score": draw(choice(("tokenseek", "gradient", "context", "random"))),
        "normalise": draw(choice(("minmax", "rank", "zscore"))),
        "supervised_only": draw(st.booleans()),
        "sinks": draw(choice((0, 0, 1, 3))),
        "learn_chunk": draw(choice((None, 3))),
    }
    if options["ratio"] == "0.1->0.9":
        options["ratio_steps"] = 2
    elif isinstance(options["ratio"], str):
        options["ratio_bounds"] = draw(choice(((0.01, 0.5), (0.2, 0.9), (0.3, 0.3))))
        if options["score"] == "random":  # which has no mass
            options["score"] = "gradient"
    inputs = batch(
        VOCAB,
        batch=draw(choice((1, 3))),
        tokens=draw(choice((7, 22))),
        padding=draw(choice(("none", "left", "right"))),
        labels=draw(choice(("all", "some", "completion", "none_in_row"))),
        packed=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    model = fxseek.compile(decoder(), **options)
    for _ in range(2):
        report = exact_step(model, inputs)
        assert report.spans is not None and report.supervised is not None
        labelled = report.supervised & report.valid
        for row, spans in enumerate(report.spans):
            kept = {at for at in report.selected[row].tolist() if at >= 0}
            for run in runs(spans):
                if options["select"] == "sample" and labelled[row, run[0]]:
                    assert set(run) <= kept or not set(run) & kept
                if "position_ids" in inputs and report.valid[row, run].all():
                    assert (inputs["position_ids"][row, run].diff() == 1).all()


@settings(max_examples=5, deadline=None, phases=UNSHRUNK)
@given(data=st.data())
def test_whatever_goes_with_spans(data: st.DataObject):
    any_spans(data)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@settings(max_examples=100, deadline=None, phases=UNSHRUNK)
@given(data=st.data())
def test_whatever_goes_with_spans_at_length(data: st.DataObject):
    any_spans(data)


def test_documents_of_a_packed_row_share_no_span():
    model = decoder()
    fxseek.compile(model, 0.4, span=5, score="random")
    inputs: dict[str, Any] = batch(VOCAB, batch=2, tokens=20)
    inputs["position_ids"] = torch.tensor([[*range(7), *range(13)], [*range(20)]])
    inputs["position_ids"][1, 7:] += 9  # a document whose positions don't begin at 0
    for _ in range(3):
        report = exact_step(model, inputs)
        assert report.spans is not None
        assert (report.spans[:, 6] != report.spans[:, 7]).all()
    model = decoder()
    fxseek.compile(model, 0.4, span=20, score="random")
    report = exact_step(model, inputs)
    assert report.spans is not None
    assert report.spans[0, 6] != report.spans[0, 7]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": "sample"},
        {"ratio": "mass:0.6", "ratio_bounds": (0.1, 0.6), "select": "sample"},
        {"learn_chunk": 3},
    ],
    ids=str,
)
def test_virtual_tokens_are_beside_spans(options: dict[str, Any]):
    model: Any = without_casts(tiny_llama())
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(model, prompt).double().train()
    fxseek.compile(model, **{"ratio": 0.4, "span": 5, **options})
    inputs: dict[str, Any] = batch(VOCAB, batch=2, tokens=17, padding="right")
    model(**inputs).loss.backward()
    report = fxseek.report(model)
    assert report.spans is not None
    for row, spans in zip(report.selected.tolist(), report.spans, strict=True):
        assert row[:4] == [0, 1, 2, 3]
        assert [len(run) for run in runs(spans)][:4] == [1] * 4
    assert fxseek.check_gradients(model, **inputs).error <= EXACT


def test_adapters_and_draws_of_a_step():
    model = tiny_lora(without_casts(tiny_llama())).double().train()
    fxseek.compile(model, 0.3, span=4, select="sample")
    inputs = batch(VOCAB, batch=3, tokens=29, padding="right", labels="some")
    first, second = exact_step(model, inputs), exact_step(model, inputs)
    assert not torch.equal(first.selected, second.selected)
    fxseek.resume(model, 0)
    again = exact_step(model, inputs)
    assert torch.equal(first.selected, again.selected)
    assert torch.equal(first.weights, again.weights)


def test_a_span_of_one_is_no_span():
    selected = []
    for options in ({}, {"span": 1}):
        model = decoder()
        fxseek.compile(model, 0.3, select="sample", **options)
        report = exact_step(model, batch(VOCAB, batch=2, tokens=19))
        assert report.spans is None
        selected.append(report.selected)
    assert torch.equal(*selected)


def test_explain_names_spans():
    model = fxseek.compile(decoder(), 0.4, span=4)
    inputs: dict[str, Any] = batch(VOCAB, tokens=20)
    assert "spans of 4 tokens, at most what a row keeps" in str(fxseek.explain(model, **inputs))
    assert fxseek.profile(model, **inputs).kept == 8


def test_explain_of_a_sample_of_spans_has_the_fewest():
    model = fxseek.compile(decoder(), 0.4, span=2, select="sample")
    inputs: dict[str, Any] = batch(VOCAB, batch=4, tokens=20)
    found = fxseek.explain(model, **inputs)
    assert (found.fewest_kept, found.kept) == (7, 8)
    for _ in range(8):
        model(**inputs)
        counts = (fxseek.report(model).selected >= 0).sum(-1)
        assert counts.min() >= found.fewest_kept and counts.max() <= found.kept


def test_a_step_in_backward_would_draw_other_spans():
    model = fxseek.compile(decoder(), 0.4, span=4)
    inputs = batch(VOCAB, tokens=20)

    def run(ids: Tensor) -> Tensor:
        return model(**{**inputs, "input_ids": ids}).loss

    with pytest.raises(fxseek.InputError, match="would draw other tokens"):
        checkpoint(run, inputs["input_ids"], use_reentrant=False).backward()


def test_rows_without_a_label_keep_spans_too():
    inputs = batch(VOCAB, batch=2, tokens=20)
    inputs["labels"][1] = IGNORED
    model = decoder()
    fxseek.compile(model, 0.4, span=4, select="sample")
    report = exact_step(model, inputs)
    assert (report.selected >= 0).sum(-1).tolist()[1] == 8
