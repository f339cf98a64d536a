"""Steps with a ratio such as "mass:0.9": what each row keeps, and that gradients stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import IGNORED, TinyConfig, TinyDecoder, batch, tiny_llama, tiny_lora, without_casts
from steps import EXACT, exact_step
from strategies import batches, tiny_configs
from torch import Tensor, nn

import fxseek
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop
from fxseek.run.stages import Scores, Select
from fxseek.scores.tokenseek import mass
from fxseek.selecting import count_kept

VOCAB = 37
GROUPED = TinyConfig(depth=3, heads=6, kv_heads=3, positions="rotary", bias=True)
WIDE: dict[str, Any] = {"ratio_bounds": (1e-6, 1.0)}


def decoder(**options: Any) -> nn.Module:
    torch._dynamo.reset()
    return TinyDecoder(GROUPED if not options else TinyConfig(**options)).double().train()


def step(model: nn.Module, inputs: dict[str, Any]) -> list[list[int]]:
    """An exact step; what each row keeps."""
    report = exact_step(model, inputs)
    return [[at for at in row if at >= 0] for row in report.selected.tolist()]


def valid_of(inputs: dict[str, Tensor]) -> Tensor:
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def supervised_of(inputs: dict[str, Tensor]) -> Tensor:
    return (F.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:] != IGNORED) & valid_of(inputs)


def longest(kept: list[list[int]]) -> int:
    return max(map(len, kept))


def mass_of(report: fxseek.StepReport, valid: Tensor) -> Tensor:
    return mass(report.context, report.gradient, report.scores, valid).double()


def expected(
    weights: Tensor, valid: Tensor, labelled: Tensor, share: float, low: float, high: float
) -> list[list[int]]:
    """Of each row the fewest best tokens that hold the share, and one with a label, in Python."""
    rows = []
    for row in range(len(weights)):
        positions = valid[row].nonzero().flatten().tolist()
        order = sorted(positions, key=lambda at: (-float(weights[row, at]), at))
        own = [float(weights[row, at]) for at in order]
        enough = [n for n in range(len(own) + 1) if sum(own[:n]) >= share * sum(own) - 1e-8]
        n = len(order)
        count = min(max(enough[0], count_kept(low, n)), count_kept(high, n)) if n else 0
        chosen = order[:count]
        with_label = [at for at in order if labelled[row, at]]
        if chosen and with_label and not labelled[row, chosen].any():
            chosen[-1] = with_label[0]
        rows.append(sorted(chosen))
    return rows


def own_scores(*rows: list[float]) -> Any:
    return lambda inputs: torch.tensor(rows)


# ---- hand-made scores ----------------------------------------------------------------------------

TEN = [[0.0, 8, 0, 0, 0, 1, 0, 0, 1, 0], [1.0, 2, 1, 1, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("ratio", "bounds", "kept"),
    [
        ("mass:0.8", (1e-6, 1.0), [[1], [0, 1, 2, 3, 5, 6, 7]]),
        ("mass:0.9", (1e-6, 1.0), [[1, 5], [0, 1, 2, 3, 5, 6, 7, 8]]),
        ("mass:1", (1e-6, 1.0), [[1, 5, 8], [0, 1, 2, 3, 5, 6, 7, 8, 9]]),
        ("mass:0.9", (0.01, 0.5), [[1, 5], [0, 1, 2, 3, 5]]),
        ("mass:0.5", (0.3, 0.4), [[1, 5, 8], [0, 1, 2, 3]]),
        ("mass:0.5", (0.41, 0.41), [[0, 1, 2, 5, 8], [0, 1, 2, 3, 5]]),
    ],
)
def test_rows_keep_what_holds_the_share(ratio, bounds, kept):
    model = decoder()
    fxseek.compile(model, ratio, score=own_scores(*TEN), ratio_bounds=bounds)
    assert step(model, batch(VOCAB, tokens=10)) == kept
    selected = fxseek.report(model).selected
    assert selected.shape == (2, longest(kept))
    assert [row[row >= 0].tolist() for row in selected] == kept


def test_bounds_are_shares_of_the_own_tokens():
    inputs = batch(VOCAB, batch=3, tokens=10)
    inputs["attention_mask"] = (torch.arange(10) < torch.tensor([[10], [4], [0]])).long()
    model = decoder()
    flat = own_scores([1.0] * 10, [1.0] * 10, [1.0] * 10)
    fxseek.compile(model, "mass:0.9", score=flat, ratio_bounds=(0.3, 0.5))
    assert step(model, inputs) == [[0, 1, 2, 3, 4], [0, 1], []]
    fxseek.uncompile(model)
    zero = own_scores([0.0] * 10, [0.0] * 10, [0.0] * 10)
    fxseek.compile(model, "mass:0.9", score=zero, ratio_bounds=(0.3, 0.5))
    assert step(model, inputs) == [[0, 1, 2], [0, 1], []]


def test_equal_bounds_are_a_fixed_ratio():
    for padding in ("none", "left"):
        inputs = batch(VOCAB, batch=3, tokens=13, padding=padding, labels="some")
        found = []
        for ratio in ("mass:0.7", 0.3):
            model = decoder()
            fxseek.compile(model, ratio, ratio_bounds=(0.3, 0.3))
            found.append(step(model, inputs))
        assert found[0] == found[1]


def test_a_row_keeps_a_token_with_a_label():
    inputs = batch(VOCAB, tokens=10, labels="none_in_row")
    inputs["labels"][0, :8] = IGNORED  # positions 7 and 8 predict one
    model = decoder()
    fxseek.compile(model, "mass:0.7", score=own_scores(TEN[0], TEN[0]), **WIDE)
    assert step(model, inputs) == [[8], [1]]
    fxseek.uncompile(model)
    fxseek.compile(model, "mass:0.9", score=own_scores(TEN[1], TEN[0]), **WIDE)
    assert step(model, inputs) == [[0, 1, 2, 3, 5, 6, 7, 8], [1, 5]]


def test_labelled_mass_alone_with_supervised_only():
    inputs = batch(VOCAB, tokens=10)
    inputs["labels"][:, :5] = IGNORED  # positions 4 to 8 predict one
    model = decoder()
    options: dict[str, Any] = {"score": own_scores(*TEN), "supervised_only": True}
    fxseek.compile(model, "mass:0.5", **options, **WIDE)
    assert step(model, inputs) == [[5], [5, 6]]
    fxseek.uncompile(model)
    fxseek.compile(model, "mass:0.5", **options, ratio_bounds=(0.6, 1.0))
    assert step(model, inputs) == [[1, 4, 5, 6, 7, 8], [1, 4, 5, 6, 7, 8]]


def test_a_tail_of_minus_infinity_has_no_mass_and_negative_scores_are_refused():
    inf = float("inf")
    model = decoder()
    rows = [[-inf, 2.0, 1.0, *[-inf] * 7], [1.0, 0.0, *[-inf] * 8]]
    fxseek.compile(model, "mass:1", score=own_scores(*rows), **WIDE)
    assert step(model, batch(VOCAB, tokens=10)) == [[1, 2], [0]]
    fxseek.uncompile(model)
    fxseek.compile(model, "mass:0.9", score=own_scores(*([[1.0] * 9 + [-1.0]] * 2)))
    with pytest.raises(fxseek.ScoreError, match=r"ratio='mass:\.\.\.'.*row 0, token 9.*exp\(\)"):
        model(**batch(VOCAB, tokens=10))


def test_rows_of_a_length_that_keep_different_numbers_and_fill_up_with_labelled_tokens():
    """Fill has labels here; a labelled token that replaced the last one of a row is not fill."""
    inputs = batch(VOCAB, batch=3, tokens=7)
    inputs["labels"][1, :6] = IGNORED  # only position 5 predicts one
    rows = [[1.0] * 7, [9.0, 0, 0, 0, 0, 0, 0], [0.0, 0, 5, 5, 0, 0, 0]]
    for labels in (True, False):
        model = decoder()
        fxseek.compile(model, "mass:1", score=own_scores(*rows), **WIDE)
        if not labels:
            inputs["labels"][:] = IGNORED
        assert step(model, inputs) == [[*range(7)], [5 if labels else 0], [2, 3]]


# ---- scores of models ----------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("score", ["tokenseek", "context", "gradient"])
def test_built_in_scores_keep_the_shortest_that_hold_the_share(score, padding):
    inputs: dict[str, Any] = batch(VOCAB, batch=4, tokens=17, padding=padding, labels="some")
    model = decoder()
    fxseek.compile(model, "mass:0.7", score=score, ratio_bounds=(0.01, 0.9))
    kept = step(model, inputs)
    valid, report = valid_of(inputs), fxseek.report(model)
    weights = mass_of(report, valid)
    assert kept == expected(weights, valid, supervised_of(inputs), 0.7, 0.01, 0.9)
    assert len({len(row) for row in kept}) > 1
    check = fxseek.check_gradients(model, **inputs)
    assert check.tolerance == EXACT
    assert check.error <= EXACT


@pytest.mark.parametrize("score", ["tokenseek", "context", "gradient"])
def test_a_row_alone_keeps_what_it_keeps_in_a_batch(score):
    inputs = batch(VOCAB, batch=3, tokens=17, padding="right")
    model = decoder()
    fxseek.compile(model, "mass:0.7", score=score, ratio_bounds=(0.01, 0.9))
    together = step(model, inputs)
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        one = {name: x[row : row + 1, :length] for name, x in inputs.items()}
        assert step(model, one) == together[row : row + 1]
        del one["attention_mask"]
        assert step(model, one) == together[row : row + 1]
        assert fxseek.report(model).selected.shape[1] == len(together[row])


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_causal", "eager"])
@pytest.mark.parametrize("select", ["topk", "sample"])
def test_kinds_of_attention(attention, select):
    model = decoder(heads=4, kv_heads=2, attention=attention)
    fxseek.compile(model, "mass:0.8", select=select)
    inputs = batch(VOCAB, batch=2, tokens=19, padding="left", labels="completion")
    lengths = [len(row) for row in step(model, inputs)]
    assert lengths[0] <= 10


@settings(max_examples=10, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.data())
def test_random_models(data):
    torch._dynamo.reset()
    config = data.draw(tiny_configs(), label="config")
    inputs = data.draw(batches(config), label="inputs")
    score = data.draw(st.sampled_from(["tokenseek", "context", "gradient"]), label="score")
    options = {
        "select": data.draw(st.sampled_from(["topk", "sample"]), label="select"),
        "supervised_only": data.draw(st.booleans(), label="supervised_only"),
        "ratio_bounds": data.draw(st.sampled_from([(0.01, 0.5), (0.01, 1.0), (0.3, 0.4)])),
    }
    share = data.draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]), label="share")
    model = fxseek.compile(TinyDecoder(config).double(), f"mass:{share}", score=score, **options)
    kept = step(model, inputs)
    for row, valid in enumerate(valid_of(inputs)):
        low, high = (count_kept(x, int(valid.sum())) for x in options["ratio_bounds"])
        assert low <= len(kept[row]) <= high
        assert valid[kept[row]].all()
        supervised = supervised_of(inputs)[row]
        assert supervised[kept[row]].any() == supervised.any()


# ---- sampling ------------------------------------------------------------------------------------


def test_samples_are_as_many_as_hold_the_labelled_mass():
    inputs = batch(VOCAB, tokens=10)
    inputs["labels"][:, :4] = IGNORED  # positions 3 to 8 predict one
    model = decoder()
    rows = [[9.0, 9, 9, 5, 0, 0, 0, 1, 0, 9], [9.0, 9, 9, 1, 1, 1, 1, 1, 1, 9]]
    fxseek.compile(model, "mass:0.5", score=own_scores(*rows), select="sample", **WIDE)
    drawn = set()
    for _ in range(8):
        kept = step(model, inputs)
        assert [len(row) for row in kept] == [1, 3]
        assert all(3 <= at <= 8 for row in kept for at in row)
        drawn.add(str(kept))
    assert len(drawn) > 2


def test_the_expected_loss_of_samples_is_that_of_all_tokens():
    inputs = batch(VOCAB, batch=3, tokens=11, padding="left")
    model = decoder(depth=1)
    wanted = model(**inputs).loss.detach()
    options: dict[str, Any] = {"select": "sample", "uniform": 0.9, "ratio_bounds": (0.01, 0.6)}
    fxseek.compile(model, "mass:0.5", score="gradient", **options)
    losses = torch.stack([model(**inputs).loss.detach() for _ in range(300)])
    lengths = (fxseek.report(model).selected >= 0).sum(1).tolist()
    assert len(set(lengths)) > 1
    assert max(lengths) < int(supervised_of(inputs).sum(1).max())
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - wanted) < 4 * error
    assert 0 < error < 0.04 * wanted


# ---- the stage -----------------------------------------------------------------------------------


def scores_of(values: list[list[float]], **options: Any) -> Scores:
    own = torch.tensor(values)
    valid = torch.ones(own.shape, dtype=torch.bool)
    return Scores(valid, None, own, own, **options)


def test_virtual_and_required_positions_are_kept_beside_the_share():
    select = Select(fxseek.SeekConfig("mass:0.8", ratio_bounds=(1e-6, 1.0)))
    virtual = [[9.0, 9, 0, 4, 0, 1], [9.0, 9, 1, 1, 1, 1]]  # their mass counts for nothing
    first = torch.tensor([[0, 1]] * 2)
    found = select(scores_of(virtual, required=first, virtual=2), 0, None)
    assert found.selected.tolist() == [[0, 1, 3, -1, -1, -1], [0, 1, 2, 3, 4, 5]]
    narrow = Select(fxseek.SeekConfig("mass:0.8", ratio_bounds=(0.4, 0.5)))
    found = narrow(scores_of(virtual, required=first, virtual=2), 0, None)
    assert found.selected.tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]
    last = torch.tensor([[5]] * 2)
    pooled = [[4.0, 0, 0, 0, 0, 1], [1.0, 0, 0, 0, 0, 4]]
    found = select(scores_of(pooled, required=last), 0, None)
    assert found.selected.tolist() == [[0, 5], [5, -1]]
    found = narrow(scores_of(pooled, required=torch.tensor([[1, 2, 3, 4]] * 2)), 0, None)
    assert found.selected.tolist() == [[1, 2, 3, 4]] * 2


def test_a_fixed_ratio_asks_for_no_mass_and_fills_nothing():
    select = Select(fxseek.SeekConfig(0.5, ratio_bounds=(0.01, 0.02)))
    scores = scores_of([[1.0, 2, 3, 4]] * 2)
    scores.mass = torch.full((2, 4), float("nan"))
    found = select(scores, 0, 0.5)
    assert found.filled is None
    assert found.kept.tolist() == [[2, 3]] * 2


def test_one_row_without_padding_is_not_filled():
    select = Select(fxseek.SeekConfig("mass:0.7", ratio_bounds=(1e-6, 1.0)))
    found = select(scores_of([[1.0, 2, 3, 4]]), 0, None)
    assert found.filled is None
    assert found.kept.tolist() == [[2, 3]]


# ---- what stands around --------------------------------------------------------------------------


def test_explain_tells_the_range():
    inputs: dict[str, Any] = batch(VOCAB, tokens=20)
    model = fxseek.compile(decoder(), "mass:0.9", ratio_bounds=(0.1, 0.5))
    found = fxseek.explain(model, **inputs)
    assert (found.fewest_kept, found.kept, found.tokens) == (2, 10, 20)
    assert "2 to 10 of 20 tokens" in str(found)
    fxseek.uncompile(model)
    found = fxseek.explain(fxseek.compile(model, 0.5), **inputs)
    assert (found.fewest_kept, found.kept) == (10, 10)
    assert "fxseek: 10 of 20 tokens" in str(found)


def test_compile_names_what_a_ratio_may_be():
    model = decoder()
    for ratio in ("mass:1.5", "mass:", "Mass:0.9", "0.1"):
        with pytest.raises(fxseek.ConfigError, match=r"float in \(0, 1\], or one of"):
            fxseek.compile(model, ratio)


def test_the_backend_of_torch_compile():
    model, inputs = decoder(), batch(VOCAB, tokens=10, padding="left")
    options: Any = {"ratio": "mass:0.6", "ratio_bounds": [0.01, 0.9], "score": "context"}
    compiled = torch.compile(model, backend="fxseek", dynamic=True, options=options)
    compiled(**inputs).loss.backward()
    report = fxseek.report()
    reference = masked_backprop(model, inputs, report.selected, weights=report.weights)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert compare(grads, reference.gradients).error <= EXACT


def test_numbers_that_change_from_step_to_step_with_a_lowered_stage():
    model = decoder(depth=1)
    fxseek.compile(model, "mass:0.8", backend="aot_eager", ratio_bounds=(0.01, 0.9))
    kept = set()
    for seed in range(6):
        inputs = batch(VOCAB, tokens=11 + seed, padding="left", seed=seed)
        kept.add(longest(step(model, inputs)))
    assert len(kept) > 2


def test_transformers_and_adapters():
    model = tiny_lora(without_casts(tiny_llama())).double().train()
    fxseek.compile(model, "mass:0.8", ratio_bounds=(0.01, 0.9))
    kept = step(model, batch(VOCAB, batch=3, tokens=13, padding="right", labels="some"))
    assert len({len(row) for row in kept}) > 1
