"""`fxseek.gradient_quality`: its figures, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import pytest
import torch
from models import TinyConfig, TinyDecoder, batch, tiny_llama, tiny_lora
from torch import Tensor

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect.qualities import GradientQuality
from fxseek.inspect.quality import _choice, _fulls, _Mean, _Measure, _Taken

VOCAB = 37


def decoder() -> TinyDecoder:
    torch._dynamo.reset()
    return TinyDecoder(TinyConfig(depth=2)).double().train()


def batches(count: int, **options: Any) -> list[dict[str, Tensor]]:
    return [batch(VOCAB, tokens=20 + 3 * seed, seed=seed, **options) for seed in range(count)]


def gradient(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def quality(model: Any, given: Any, **options: Any) -> fxseek.GradientQuality:
    return fxseek.gradient_quality(model, given, progress=False, **options)


def test_what_draws_nothing_is_compared_as_it_is():
    given = batches(2)
    model = decoder()
    full = [gradient(model, inputs) for inputs in given]
    fxseek.compile(model, 0.3)
    found = [gradient(model, inputs) for inputs in given]
    fxseek.uncompile(model)
    (choice,) = quality(model, given, ratios=[0.3], spans=[1]).choices
    expected = [cosine(a, b) for a, b in zip(found, full, strict=True)]
    assert choice.cosine == pytest.approx(sum(expected) / 2, abs=1e-9)
    apart = sum(float((a - b).square().sum()) for a, b in zip(found, full, strict=True))
    norm = sum(float(b.square().sum()) for b in full)
    assert choice.bias == pytest.approx((apart / norm) ** 0.5, abs=1e-9)
    assert choice.noise == 0
    assert choice.seconds > 0
    assert choice.peak_bytes is None or choice.peak_bytes > 0


def test_all_tokens_are_the_full_gradient():
    found = quality(decoder(), batches(3), ratios=[1.0, "labelled"], spans=[1, 4])
    assert [(choice.ratio, choice.span) for choice in found.choices] == [(1.0, 1), ("labelled", 1)]
    for choice in (found.ordinary, *found.choices):
        assert choice.cosine == pytest.approx(1, abs=1e-9)
        assert choice.expected_cosine == pytest.approx(1, abs=1e-9)
        assert choice.bias == pytest.approx(0, abs=1e-6)
        assert choice.noise == 0
    assert not found.in_parts
    assert found.between_batches is not None
    assert -1 < found.between_batches < 1


def test_bias_and_noise_are_told_apart():
    given = batches(1)
    few = quality(decoder(), given, ratios=[0.4], spans=[1], score="random", draws=16)
    many = quality(decoder(), given, ratios=[0.4], spans=[1], score="random", draws=64)
    few, many = few.choices[0], many.choices[0]
    assert many.noise > 0.1
    assert many.expected_cosine > many.cosine
    # what is debiased does not hang on the number of draws
    assert few.noise == pytest.approx(many.noise, rel=0.5)
    assert few.bias == pytest.approx(many.bias, rel=0.5)


def test_an_unbiased_loss_on_a_model_without_mixing_has_no_bias():
    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(VOCAB, 7), torch.nn.Linear(7, VOCAB)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            logits = self.head(self.embed(input_ids))
            return {
                "loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            }

    torch._dynamo.reset()
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (3, 16))
    given = [{"input_ids": ids, "labels": ids.roll(1, 1)}]
    options: dict[str, Any] = {"score": "random", "select": "sample", "draws": 200}
    (choice,) = quality(Bag().double().train(), given, ratios=[0.25], spans=[1], **options).choices
    assert choice.noise > 0.3
    assert math.isnan(choice.bias) or choice.bias < 3 * choice.noise / math.sqrt(200)
    options = {"score": lambda inputs: inputs.input_ids.double()}  # the same tokens each time
    (choice,) = quality(Bag().double().train(), given, ratios=[0.25], spans=[1], **options).choices
    assert choice.bias > 0.5
    assert choice.noise == pytest.approx(0, abs=1e-6)


def test_all_is_put_back():
    model = fxseek.compile(decoder(), 0.3, select="sample", seed=3)
    inputs = batches(1)[0]
    model(**inputs).loss.backward()
    step, report = step_of(model), fxseek.report(model)
    assert fxseek.report() is report
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    weights = [p.detach().clone() for p in model.parameters()]
    model.eval()
    state = torch.get_rng_state()
    found = quality(model, batches(2), ratios=[0.5], spans=[1, 3], draws=2)
    assert [choice.span for choice in found.choices] == [1, 3]
    assert all(choice.noise > 0 for choice in found.choices)  # sampled, as it was compiled
    assert step_of(model) is step
    assert fxseek.report(model) is fxseek.report() is report
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in grads)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_without_the_memory_for_ordinary_backprop(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    model = decoder()

    def forward(**inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            if device == "cpu":
                torch.empty(2**60, dtype=torch.uint8)
            raise torch.OutOfMemoryError("no memory")
        return TinyDecoder.forward(model, **inputs)

    monkeypatch.setattr(model, "forward", forward)
    found = quality(model, batches(2), ratios=[0.5], spans=[1])
    assert found.in_parts
    assert "no memory for ordinary backprop" in caplog.text
    plain = quality(decoder(), batches(2), ratios=[0.5], spans=[1])
    assert found.choices[0].cosine == pytest.approx(plain.choices[0].cosine, abs=1e-9)
    assert found.between_batches == pytest.approx(plain.between_batches, abs=1e-9)


def test_a_step_that_lacked_memory_is_let_go_of(monkeypatch: pytest.MonkeyPatch):
    """Parts begin when nothing of it is left."""
    model, alive = decoder(), []

    class Activation:
        pass

    def forward(**inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return TinyDecoder.forward(model, **inputs)
        kept = Activation()  # this frame holds it, and the exception's traceback the frame
        alive.append(weakref.ref(kept))
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model, "forward", forward)
    take, seen = _Measure.take, []

    def watched(self: _Measure, inputs: dict[str, Any]) -> Any:
        seen.append([ref() is None for ref in alive])
        return take(self, inputs)

    monkeypatch.setattr(_Measure, "take", watched)
    assert quality(model, batches(1), ratios=[0.5], spans=[1]).in_parts
    assert seen[0] == [] and all(all(gone) for gone in seen[1:]) and len(seen) > 3


def test_checkpointing_and_its_hooks_are_put_back(caplog: pytest.LogCaptureFixture):
    torch._dynamo.reset()
    model: Any = tiny_lora(tiny_llama()).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    inputs = batches(1)[0]
    expected = gradient(model, inputs)
    found = quality(model, [inputs], ratios=[0.5, 1.0], spans=[1], draws=2)
    assert caplog.text.count("gradient checkpointing is switched off") == 1
    assert torch.equal(gradient(model, inputs), expected)
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    plain = quality(model, [inputs], ratios=[1.0])
    assert found.ordinary.saved_bytes == plain.ordinary.saved_bytes  # without checkpointing


def test_the_noise_of_dropout_is_told_apart():
    torch._dynamo.reset()
    model = tiny_lora(tiny_llama(), lora_dropout=0.5).train()
    options: dict[str, Any] = {"ratios": [1.0, 0.5], "spans": [1], "score": "gradient"}
    found = quality(model, batches(2), draws=16, **options)
    every, half = found.choices
    assert found.ordinary.noise > 0.1
    assert found.ordinary.cosine < 1
    assert every.noise == pytest.approx(found.ordinary.noise, rel=0.5)
    assert math.isnan(every.bias) or every.bias < every.noise
    assert half.noise > 0.1
    still = quality(tiny_lora(tiny_llama()).train(), batches(2), draws=16, **options)
    assert still.ordinary.noise == still.choices[1].noise == 0


def test_a_span_that_a_row_had_no_room_for_is_told():
    options: dict[str, Any] = {"ratios": [0.5], "spans": [2, 9], "select": "sample", "draws": 2}
    found = quality(decoder(), batches(1), **options)  # rows of 20 keep 10: a quarter is 2
    assert [choice.longest_span for choice in found.choices] == [2, 2]
    assert "9 (2)" in str(found)
    assert "the longest that a row allowed" in str(found)
    found = quality(decoder(), batches(1), ratios=[0.5], spans=[9])
    assert found.choices[0].longest_span == 9
    assert "longest" not in str(found)


def test_a_memory_budget_is_fitted_to_each_choice(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def fit(model: Any, config: fxseek.SeekConfig, tokens: int, rows: int) -> fxseek.SeekConfig:
        seen.append((config.ratio, tokens, rows))
        return dataclasses.replace(config, learn_chunk=4, recompute="block")

    monkeypatch.setattr("fxseek.inspect.quality.within_budget", fit)
    options: dict[str, Any] = {"ratios": [0.5, 0.9], "spans": [1], "draws": 2, "score": "random"}
    found = quality(decoder(), batches(1), memory_budget_bytes="1GiB", **options)
    assert seen == [(0.5, 20, 2), (0.9, 20, 2)]
    lean = quality(decoder(), batches(1), learn_chunk=4, recompute="block", **options)
    plain = quality(decoder(), batches(1), **options)
    for fitted, expected, other in zip(found.choices, lean.choices, plain.choices, strict=True):
        assert fitted.saved_bytes == expected.saved_bytes < other.saved_bytes


def test_in_parts_where_the_configuration_is():
    found = quality(decoder(), batches(1), ratios=[0.5], spans=[1], learn_chunk=4)
    assert found.in_parts
    plain = quality(decoder(), batches(1), ratios=[0.5], spans=[1])
    assert found.choices[0].cosine == pytest.approx(plain.choices[0].cosine, abs=1e-9)


def test_a_loss_of_ones_own():
    def loss(outputs: Any, inputs: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1), inputs["input_ids"].flatten()
        )

    model = fxseek.compile(decoder(), loss=loss)
    given = [{"input_ids": inputs["input_ids"]} for inputs in batches(2)]
    found = quality(model, given, ratios=[0.3, 1.0], spans=[1])
    assert found.choices[1].cosine == pytest.approx(1, abs=1e-9)
    assert 0 < found.choices[0].cosine < 1


def test_the_table_and_the_plot(tmp_path: Any):
    found = quality(decoder(), batches(2), ratios=[0.2, 0.5, "labelled"], spans=[1, 4], draws=2)
    text = str(found)
    assert text.splitlines()[0].endswith("against all, 2 batches, up to 2 draws each")
    assert len(text.splitlines()) == 2 + 1 + 5 + 1
    assert "cosine between two batches" in text
    found.plot(tmp_path / "quality.svg")
    assert "spans of 4" in (tmp_path / "quality.svg").read_text()
    labelled = quality(decoder(), batches(1), ratios=["labelled"])
    assert labelled.between_batches is None
    with pytest.raises(fxseek.InputError, match="number as ratio"):
        labelled.plot(tmp_path / "none.svg")
    with pytest.raises(fxseek.InputError, match=r"\.png or \.svg"):
        found.plot(tmp_path / "quality.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"draws": 1}, "draws=1 must be an integer of at least 2"),
        ({"draws": True}, "draws=True"),
        ({"ratios": []}, "at least one value"),
        ({"spans": []}, "at least one value"),
        ({"ratios": ["0.1->0.5"]}, "follows training"),
        ({"ratios": [1.5]}, "outside"),
        ({"spans": [0]}, "span=0"),
        ({"ratio": 0.3}, "ratio= is not for this function"),
        ({"span": 3}, "span= is not for this function"),
        ({"ratios": 0.3}, r"ratios=0.3 must be a list, such as \[0.3\]"),
        ({"ratios": "labelled"}, "must be a list"),
        ({"spans": 4}, "spans=4 must be a list"),
        ({"batches": {"input_ids": torch.zeros(1, 9)}}, "put it in a list"),
        ({"batches": None}, "batches is a NoneType: give a list"),
        ({"batches": [*batches(1), None]}, r"batches\[1\] is a NoneType: each is a mapping"),
        ({"batches": [torch.zeros(1, 9)]}, r"batches\[0\] is a Tensor: each is a mapping"),
        ({"batches": [{}]}, r"batches\[0\] is empty: each is a mapping"),
        ({"scored": "random"}, "did you mean 'score'"),
        ({"batches": [{"input_ids": torch.zeros(2, 9, dtype=torch.long)}]}, "no loss"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str):
    model = decoder()
    given = {"batches": batches(1), **options}
    with pytest.raises(fxseek.FxseekError, match=message):
        fxseek.gradient_quality(model, progress=False, **given)
    assert step_of(model) is None


def test_a_bar_shows_the_steps(capsys: pytest.CaptureFixture[str]):
    fxseek.gradient_quality(decoder(), batches(2), ratios=[0.5], spans=[1], draws=3)
    shown = capsys.readouterr().err
    assert "gradient quality: 100%" in shown and "step/s" in shown


def test_a_gradient_without_direction_is_refused():
    unlabelled = {**batches(1)[0], "labels": torch.full((2, 20), -100)}
    with pytest.raises(fxseek.InputError, match=r"batches\[1\] is (zero everywhere|not finite)"):
        quality(decoder(), [*batches(1), unlabelled])
    model = decoder()
    with torch.no_grad():
        model.get_parameter("head.weight").view(-1)[0] = torch.nan
    with pytest.raises(fxseek.InputError, match=r"batches\[0\] is not finite"):
        quality(model, batches(1), score="random")


def test_a_compiled_model_within_is_refused():
    inner = fxseek.compile(decoder(), 0.1)
    outer = torch.nn.Sequential()
    outer.add_module("inner", inner)
    with pytest.raises(fxseek.InputError, match="'inner' in the model is compiled by fxseek"):
        quality(outer, batches(1))


def test_choices_may_be_given_once():
    found = quality(decoder(), batches(1), ratios=(x for x in (0.3, 0.5)), spans=iter((1, 4)))
    assert [(x.ratio, x.span) for x in found.choices] == [(0.3, 1), (0.5, 1), (0.3, 4), (0.5, 4)]


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the steps took that count, from now on."""
    taken: list[Any] = []
    mean = _Measure.mean

    def noted(self: _Measure, *given: Any, **options: Any) -> Any:
        found = mean(self, *given, **options)
        taken.extend(found[1])
        return found

    monkeypatch.setattr(_Measure, "mean", noted)
    return taken


def test_gradients_of_draws_are_let_go(monkeypatch: pytest.MonkeyPatch):
    kept = counted_steps(monkeypatch)
    quality(decoder(), batches(2), ratios=[0.5], spans=[1], score="random")
    assert {one.gradient.untyped_storage().nbytes() for one in kept} == {0}


def test_a_capture_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    """A batch of one row is captured anew."""
    timed = counted_steps(monkeypatch)
    given = [batch(VOCAB, 2, 20), batch(VOCAB, 1, 20, seed=1)]
    quality(decoder(), given, ratios=[0.5], spans=[1])
    assert not any(one.captured for one in timed)


def test_inputs_with_a_graph_of_their_own_stay_out_of_it():
    model = tiny_llama().double()
    embedded = torch.randn(2, 12, 20, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (2, 12))
    given = [{"inputs_embeds": embedded * 2, "labels": labels}]
    quality(model, given, ratios=[0.5], spans=[1])
    assert embedded.grad is None


def test_an_optimizer_in_backward_is_refused():
    model = decoder()
    model.get_parameter("head.weight").register_post_accumulate_grad_hook(lambda p: None)
    message = r"head.weight has a hook from register_post"
    inputs: dict[str, Any] = batches(1)[0]
    with pytest.raises(fxseek.InputError, match=message):
        quality(model, batches(1))
    fxseek.compile(model, 0.5)
    for call in (fxseek.check_gradients, fxseek.profile):
        with pytest.raises(fxseek.InputError, match=message):
            call(model, **inputs)


def test_what_drowns_in_noise_is_not_told():
    options: dict[str, Any] = {"score": "random", "select": "sample", "draws": 2}
    found = quality(decoder(), batches(1), ratios=[0.04], spans=[1], **options)
    (choice,) = found.choices
    assert choice.noise > 0.5
    if math.isnan(choice.bias):
        assert math.isnan(choice.expected_cosine)
        assert "drowned in the noise" in str(found)
    else:
        assert abs(choice.expected_cosine) <= 1
        assert choice.bias >= choice.noise / math.sqrt(2)  # which of two draws' mean is noise


class Found:
    """A measure whose steps have found these gradients."""

    def __init__(self, *means: _Mean) -> None:
        self.means = means
        self.taken = _Taken(means[0].gradient, 1.0, 0, None, 1, captured=False)

    def by(self, config: Any, batch: Any) -> _Taken:
        return self.taken

    def take(self, batch: Any) -> _Taken:
        return self.taken

    def mean(self, at: int, *args: Any, **kwargs: Any) -> tuple[_Mean, list[_Taken], list[float]]:
        return self.means[at], [self.taken], [0.0]


def test_gradients_that_drown_have_no_cosine():
    """Their squared norms are negative: a root of their product would be a number."""
    drowned = _Mean(torch.tensor([0.1, 0.2]), variance=1.0, steps=2)
    assert drowned.squared < 0
    assert math.isnan(drowned.cosine(drowned))
    measure: Any = Found(drowned, drowned)
    fulls, ordinary = _fulls(None, measure, [{}, {}], 2)
    assert math.isnan(ordinary.cosine) and math.isnan(ordinary.noise)
    config = fxseek.SeekConfig(score="random")
    choice = _choice(config, measure, [{}, {}], fulls, 2)
    assert math.isnan(choice.expected_cosine) and math.isnan(choice.bias)
    text = str(GradientQuality((), ordinary, fulls[0].cosine(fulls[1]), 2, 2, in_parts=False))
    assert "cosine between two batches: ?" in text and "drowned in the noise" in text


def test_a_gradient_of_zero_has_all_the_bias():
    full = _Mean(torch.tensor([3.0, 4.0]), variance=0.0, steps=1)
    measure: Any = Found(_Mean(torch.zeros(2), variance=0.0, steps=1))
    choice = _choice(fxseek.SeekConfig(), measure, [{}], [full], 1)
    assert (choice.cosine, choice.expected_cosine, choice.bias) == (0.0, 0.0, 1.0)


def test_a_call_that_was_compiled_by_torch_stays():
    model = decoder()
    model.compile(backend="eager")
    before = vars(model)["_compiled_call_impl"]
    quality(model, batches(1), ratios=[0.5], spans=[1])
    assert vars(model)["_compiled_call_impl"] is before


def test_a_frozen_model_has_no_gradient():
    model = decoder().requires_grad_(False)
    with pytest.raises(fxseek.InputError, match="no loss with a gradient"):
        quality(model, batches(1))
