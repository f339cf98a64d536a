"""Every tuner of peft trains with exact gradients, and says which operations take the long way.

Each is made by peft's public API, with values that give every parameter a gradient, on a Llama in
float64. Its step has padding, a batch of two and scores from the last attention and the loss.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from models import IGNORED, batch, tiny_gpt2, without_casts
from torch import Tensor, nn
from torch.nn import functional as F
from tuners import TUNERS, VIRTUAL, Tuner, spread, tuned

import fxseek
from fxseek.capture.step import step_of
from fxseek.errors import CaptureError, InputError
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import Reference, masked_backprop
from fxseek.passes.rules import operation
from fxseek.reports.step import StepReport

# Dynamo makes an instance where a model applies an autograd function of its own (LoHa).
pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)

EXACT = 1e-9
VOCAB, TOKENS, RATIO = 37, 13, 0.3


def inputs_for(model_vocab: int = VOCAB, tokens: int = TOKENS) -> dict[str, Any]:
    return batch(model_vocab, 2, tokens, padding="right", labels="some")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- the reference -----------------------------------------------------------------------------


class Given(nn.Module):
    """A model that puts tokens in front of its own, seen from inside: rows begin with them.

    The reference then counts, masks and selects the tokens that the model works on.
    """

    def __init__(self, model: nn.Module, virtual: int) -> None:
        super().__init__()
        self.model = model
        self.virtual = virtual

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**{name: value[:, self.virtual :] for name, value in inputs.items()})


def reference_of(model: nn.Module, inputs: dict[str, Tensor], report: StepReport) -> Reference:
    """Masked full backprop; a loss that the tuner adds to the model's own stays whole."""
    virtual = report.tokens - inputs["input_ids"].shape[1]
    seen = {name: F.pad(value, (virtual, 0), value=_blank(name)) for name, value in inputs.items()}

    def loss(outputs: Any, given: Any) -> Tensor:
        targets = F.pad(given["labels"], (0, 1), value=IGNORED)[:, 1:]
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), targets, reduction="none")
        labelled = targets != IGNORED
        weights = losses.new_zeros(targets.shape[0], targets.shape[1] + 1)
        at = report.selected.where(report.selected >= 0, targets.shape[1])
        weights = weights.scatter(1, at, report.weights.to(losses))[:, :-1]
        chosen = torch.zeros(targets.shape[0], targets.shape[1] + 1).bool().scatter(1, at, True)
        count = (labelled & chosen[:, :-1]).sum()
        own_terms = outputs.loss - losses.sum() / labelled.sum()
        return (losses * weights).sum() / count + own_terms

    found = masked_backprop(Given(model, virtual), seen, report.selected, loss=loss)
    gradients = {name.removeprefix("model."): g for name, g in found.gradients.items()}
    return dataclasses.replace(found, gradients=gradients)


def _blank(name: str) -> int:
    return {"labels": IGNORED, "attention_mask": 1}.get(name, 0)


def assert_exact(model: nn.Module, inputs: dict[str, Tensor], tolerance: float = EXACT) -> None:
    """One step of a compiled model against masked full backprop of what it selected."""
    loss = model(**inputs).loss
    loss.backward()
    report = fxseek.report(model)
    reference = reference_of(model, inputs, report)
    found = compare({name: p.grad for name, p in trained(model).items()}, reference.gradients)
    assert found.error <= tolerance, f"gradient of {found.name} is off by {found.error:.2e}"
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss.detach(), reference.loss, rtol=tolerance, atol=tolerance)


def general_operations(model: nn.Module) -> tuple[str, ...]:
    """Operations of the learn stage that the last step ran on all tokens."""
    step = step_of(model)
    assert step is not None
    learn = step.recorder.steps[-1].program.learn
    assert learn is not None
    return tuple(sorted({operation(n) or getattr(n.target, "__name__", "") for n in learn.general}))


# ---- every tuner -------------------------------------------------------------------------------


SWEPT = {
    "bat", "fourierft", "hra", "lora_bias", "lora_embedding", "lora_several", "lora_tokens",
    "prefix_projected", "rslora",
}  # fmt: skip
"""Tuners left to the sweep: another one is much like them."""


def cases() -> list[Any]:
    found = []
    for name, tuner in TUNERS.items():
        marks: list[pytest.MarkDecorator] = []
        if tuner.unfinished:
            marks.append(pytest.mark.xfail(reason=tuner.unfinished))
        if name in SWEPT:
            marks.append(pytest.mark.sweep)
        found.append(pytest.param(tuner, id=name, marks=marks))
    return found


@pytest.mark.parametrize("tuner", cases())
def test_gradients_are_those_of_masked_full_backprop(tuner: Tuner):
    model = tuner.make()
    fxseek.compile(model, RATIO, score="tokenseek")
    assert_exact(model, inputs_for())
    for name, parameter in trained(model).items():
        gradient = parameter.grad
        assert gradient is not None and gradient.abs().max() > 1e-6, f"{name} was not tested"
    assert general_operations(model) == tuner.general


@pytest.mark.parametrize("name", ["prompt", "ptuning"])
def test_virtual_tokens_are_tokens_of_the_report(name: str):
    model = TUNERS[name].make()
    inputs = inputs_for()
    fxseek.compile(model, RATIO)
    model(**inputs).loss.backward()
    report = fxseek.report(model)
    assert report.tokens == TOKENS + VIRTUAL
    assert report.scores.shape == (2, TOKENS + VIRTUAL)
    valid = F.pad(inputs["attention_mask"], (VIRTUAL, 0), value=1).bool()
    for row, positions in enumerate(report.selected):
        assert valid[row, positions[positions >= 0]].all()


def test_a_prefix_is_attended_to_and_never_scored():
    model = TUNERS["prefix"].make("eager")
    inputs = inputs_for()
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[-1]
    valid = inputs["attention_mask"].bool()
    received = (attention.mean(1) * valid[:, :, None]).sum(1)
    assert received.shape == (2, VIRTUAL + TOKENS)
    fxseek.compile(model, RATIO, score="context")
    model(**inputs).loss.backward()
    report = fxseek.report(model)
    assert report.context is not None and report.tokens == TOKENS
    torch.testing.assert_close(
        report.context[valid].double(), received[:, VIRTUAL:][valid], rtol=1e-5, atol=1e-5
    )


def test_dora_of_transposed_weights():
    """peft makes a parameter of them in each forward (Conv1D, as GPT-2 has)."""
    config = {"r": 2, "use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_attn"]}
    model = Tuner("dora", "LoraConfig", config).tune(without_casts(tiny_gpt2()))
    spread(model)
    fxseek.compile(model.double().train(), RATIO)
    for tokens in (TOKENS, TOKENS + 4):
        inputs = inputs_for(tokens=tokens)
        assert_exact(model, inputs)
        gradients = [p.grad for p in trained(model).values()]
        assert len(gradients) == 6 and all(g is not None and g.any() for g in gradients)
        model.zero_grad()
        assert fxseek.check_gradients(model, **inputs).error <= EXACT


@pytest.mark.parametrize("chunk", [None, 4])
def test_dora_of_transposed_weights_with_dropout(chunk):
    """The parameter that a forward makes is made again in backward."""
    config = {"r": 2, "use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_attn"]}
    model = Tuner("dora", "LoraConfig", {**config, "lora_dropout": 0.1}).tune(tiny_gpt2())
    fxseek.compile(model.train(), RATIO, recompute="block", learn_chunk=chunk)
    model(**inputs_for()).loss.backward()
    assert all(p.grad is not None for p in trained(model).values())


# ---- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_lora_with_dropout_trains(options: dict[str, Any]):
    model = tuned("LoraConfig", target_modules=["q_proj", "v_proj"], lora_dropout=0.4, **options)
    inputs = inputs_for()
    fxseek.compile(model, RATIO)
    drawn = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        assert torch.isfinite(loss)
        for name, parameter in trained(model).items():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0, name
        drawn.append(loss.item())
    assert drawn[0] != drawn[1]
    assert general_operations(model) == ()
    with pytest.raises(InputError, match="dropout is on"):
        fxseek.check_gradients(model, **inputs)


def test_an_adapter_with_dropout_is_exact_once_it_is_switched_off():
    model = tuned("LoraConfig", target_modules=["q_proj", "v_proj"], lora_dropout=0.4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fxseek.compile(model, RATIO)
    assert_exact(model, inputs_for())


# ---- what Dynamo does not settle by itself -----------------------------------------------------


@pytest.mark.parametrize("config", ["LoHaConfig", "LoKrConfig"])
def test_a_layer_that_is_dropped_by_chance_is_refused_with_the_remedy(config: str):
    model = tuned(config, target_modules=["q_proj", "v_proj"], module_dropout=0.5)
    inputs = inputs_for()
    fxseek.compile(model, RATIO)
    with pytest.raises(CaptureError, match=r"drawn at random.*set that dropout to 0"):
        model(**inputs)
    for module in model.modules():
        chances: Any = getattr(module, "module_dropout", None)
        if chances is not None:
            chances["default"] = 0.0
    assert_exact(model, inputs)
    layer: Any = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    layer.module_dropout["default"] = 0.2
    with pytest.raises(CaptureError, match="drawn at random"):
        model(**inputs)


class Chance(nn.Module):
    """A token model with a layer that is run where a draw says so."""

    def __init__(self, bound: float, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCAB)
        self.bound = bound
        self.how = how

    def runs(self) -> Any:
        draw = torch.rand(1)
        if self.how == "written":
            draw.add_(2)
        if self.how in ("above", "value", "written"):
            return draw > self.bound
        if self.how == "method":
            return draw.ge(self.bound)
        if self.how == "below":
            return draw < self.bound
        return self.bound >= draw

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        if self.how == "value":
            x = x + self.layer(x) * (torch.rand(1) > self.bound)
        elif self.runs():
            x = x + self.layer(x)
        return {"loss": F.cross_entropy(self.head(x).reshape(-1, VOCAB), labels.reshape(-1))}


@pytest.mark.parametrize(
    ("how", "bound", "runs"),
    [
        *(("above", 0.0, True), ("above", -1, True), ("above", 1.0, False)),
        *(("method", 0, True), ("method", 1.5, False)),
        ("value", 0.0, True),
        *(("below", 0.0, False), ("below", 1, True)),
        *(("reflected", 0.0, False), ("reflected", 1.0, True)),
    ],
)
def test_a_draw_is_settled_where_no_draw_could_say_otherwise(how: str, bound: float, runs: bool):
    model = Chance(bound, how)
    assert bool(model.runs()) is runs
    inputs = {name: value for name, value in inputs_for().items() if name != "attention_mask"}
    fxseek.compile(model, RATIO, score="random")
    model(**inputs)["loss"].backward()
    gradient = model.layer.weight.grad
    assert (gradient is not None and bool(gradient.any())) is runs


@pytest.mark.parametrize(("how", "bound"), [("above", 0.3), ("below", 0.3), ("written", 1.0)])
def test_a_draw_that_decides_is_refused(how: str, bound: float):
    model = Chance(bound, how)
    inputs = {name: value for name, value in inputs_for().items() if name != "attention_mask"}
    fxseek.compile(model, RATIO, score="random")
    with pytest.raises(CaptureError, match="drawn at random"):
        model(**inputs)


def test_dynamo_is_left_as_it_was():
    from torch._dynamo import variables

    before = dict(vars(variables.TensorVariable))
    model = Chance(0.0, "above")
    inputs = {name: value for name, value in inputs_for().items() if name != "attention_mask"}
    fxseek.compile(model, RATIO, score="random")
    model(**inputs)["loss"].backward()
    assert dict(vars(variables.TensorVariable)) == before


def test_a_tensor_may_be_told_again_that_it_takes_no_gradient():
    class Told(Chance):
        def runs(self) -> bool:
            table = torch.ones(3)
            table.requires_grad = False
            return type(table).__module__.startswith("torch") and type(self.bound) is float

    model = Told(0.0, "")
    inputs = {name: value for name, value in inputs_for().items() if name != "attention_mask"}
    fxseek.compile(model, RATIO, score="random")
    model(**inputs)["loss"].backward()
    assert model.layer.weight.grad is not None


# ---- a pretrained model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(smollm2_folder: Any) -> nn.Module:
    from common import find_model, load_model

    model = load_model(find_model(str(smollm2_folder)), torch.float32)
    model.config.use_cache = False
    return model


@pytest.mark.sweep
@pytest.mark.model
@pytest.mark.parametrize("name", [n for n, t in TUNERS.items() if not t.unfinished])
def test_one_step_of_a_pretrained_model(name: str, pretrained: nn.Module):
    model = TUNERS[name].tune(copy.deepcopy(pretrained)).train()
    inputs = inputs_for(1000, 64)
    fxseek.compile(model, 0.1, score="tokenseek")
    loss = model(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [p.grad for p in trained(model).values() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)
    reference = reference_of(model, inputs, fxseek.report(model))
    found = compare({n: p.grad for n, p in trained(model).items()}, reference.gradients)
    assert found.error <= 2e-3, f"gradient of {found.name} is off by {found.error:.2e}"
