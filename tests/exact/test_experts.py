"""Mixtures of experts: routed, sorted, multiplied and brought back on selected tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from models import double_throughout
from oracle import WIDTH, Model, assert_exact, inputs_of, model_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe
from tuners import spread

import fxseek
from fxseek.capture.step import step_of
from fxseek.passes.rules import called
from fxseek.run.saved import SavedBytes


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in groups in float64, which torch's own kernel does not have."""
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)


def fallbacks(model: nn.Module) -> list[str]:
    step = step_of(model)
    assert step is not None
    return [
        called(node) for piece in step.recorder.steps[-1].program.learned for node in piece.general
    ]


def checked(
    options: dict[str, Any], batch: int = 2, change: Any = None, **config: Any
) -> nn.Module:
    """A tiny Mixtral whose gradients are those of masked full backprop."""
    family = FAMILIES["mixtral"]
    with double_throughout():
        model = family.make(**{"experts_implementation": "grouped_mm", **config}).double()
        if change is not None:
            change(model)
        fxseek.compile(model, **{"ratio": 0.3, **options})
        fxseek.check_gradients(model, 1e-9, **family.batch(batch, dtype=torch.float64))
    return model


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize(
    ("options", "batch", "config"),
    [
        pytest.param({}, 1, {"num_experts_per_tok": 3}, marks=pytest.mark.sweep),
        ({"learn_chunk": 3, "prefill_chunk": 5}, 2, {}),
        ({}, 2, {"num_experts_per_tok": 1}),
        pytest.param({"recompute": "block", "ratio": 1.0}, 2, {}, marks=pytest.mark.sweep),
        pytest.param({"backend": "aot_eager"}, 2, {}, marks=pytest.mark.sweep),
        pytest.param({}, 1, {"num_experts_per_tok": 1}, marks=pytest.mark.sweep),
    ],
)
def test_entries_in_the_order_of_their_experts(options, batch, config):
    model = checked(options, batch, **config)
    assert fallbacks(model) == []
    step = step_of(model)
    assert step is not None
    program = step.recorder.steps[-1].program
    assert isinstance(program.parts, str) is ("learn_chunk" not in options)
    chunked = any(name.startswith("tokens") for name in program.prefill.parts)
    assert chunked is ("prefill_chunk" in options)
    assert not any(value.name.startswith("perm") for value in program.prefill.outputs)


@pytest.mark.usefixtures("grouped")
def test_router_losses_are_exact():
    """They read the logits of all tokens, of which the selected ones have gradient."""
    model = checked({}, output_router_logits=True, router_aux_loss_coef=0.3)
    assert set(fallbacks(model)) == {"sum"}


@pytest.mark.filterwarnings(
    "ignore:.*did not match any targeted module:RuntimeWarning"
)  # PEFT's own
@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": "all-linear"},
        pytest.param(
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
            marks=pytest.mark.sweep,
        ),
    ],
)
def test_adapters_on_experts(targets):
    family = FAMILIES["mixtral"]
    with double_throughout():
        base: Any = family.make(experts_implementation="grouped_mm").double()
        model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, **targets)).double().train()
        spread(model)
        fxseek.compile(model, 0.3)
        fxseek.check_gradients(model, 1e-9, **family.batch(dtype=torch.float64))
    assert fallbacks(model) == []
    step = step_of(model)
    assert step is not None
    (learn,) = step.recorder.steps[-1].program.learned
    assert not learn.graph.find_nodes(op="call_function", target=torch.baddbmm)  # no adapted stack
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("experts" in name for name in trained)
    experts = base.model.layers[0].mlp.experts.get_base_layer()
    assert isinstance(experts.down_proj, nn.Parameter)  # as it was before the step


def _up_to_capacity(m: Model, x: Tensor) -> Tensor:
    """Each expert takes the first two tokens of a row that have chosen it, and drops the others."""
    router, *experts = m.layers
    shares = router(x).softmax(-1)
    chosen = F.one_hot(shares.argmax(-1), len(experts))
    chosen = chosen * (chosen.cumsum(1) <= 2)
    found = torch.stack([expert(x) for expert in experts], -1)
    return x + (found * (chosen * shares).unsqueeze(2)).sum(-1)


def _weighed_by_others(m: Model, x: Tensor) -> Tensor:
    """A capacity in shares: what the tokens before have taken carries gradient."""
    router, *experts = m.layers
    shares = router(x).softmax(-1)
    left = (2 - shares.cumsum(1)).clamp(min=0)
    found = torch.stack([expert(x) for expert in experts], -1)
    return x + (found * (left * shares).unsqueeze(2)).sum(-1)


@pytest.mark.parametrize(
    ("body", "general"), [(_up_to_capacity, []), (_weighed_by_others, ["cumsum"])]
)
def test_a_capacity_is_decided_by_all_tokens(body, general):
    """What is counted over them is a constant; what carries gradient falls back, and is named."""
    layers = [nn.Linear(WIDTH, 3), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))]
    model = model_of(body, *layers)
    assert_exact(model)
    assert fallbacks(model) == general
    assert [x.operation for x in fxseek.explain(model, **inputs_of()).fallbacks] == general


class Unknown(nn.Module):
    """An activation that no rule knows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x) * x


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("choices", [pytest.param(1, marks=pytest.mark.sweep), 2])
def test_an_unknown_operation_inside_an_expert(choices):
    """It runs on the entries of all tokens, in their order; what is behind it is compact again."""

    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = Unknown()

    model = checked({"learn_chunk": 3}, change=change, num_experts_per_tok=choices)
    assert fallbacks(model) == ["special_i0e"] * 2


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize(
    "kind", [pytest.param("grouped_mm", marks=pytest.mark.sweep), "batched_mm"]
)
def test_frozen_experts_are_looked_up_by_selected_tokens(kind):
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" not in name)

    model = checked({}, change=freeze, experts_implementation=kind)
    assert fallbacks(model) == []
    step = step_of(model)
    assert step is not None
    prefilled = step.recorder.steps[-1].program.prefill.outputs
    assert not any("weights" in value.name or "expert" in value.name for value in prefilled)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("grouped_mm", 0.15), pytest.param("batched_mm", 0.15, marks=pytest.mark.sweep)],
)
def test_saved_bytes_follow_the_ratio(kind, most):
    family = FAMILIES["mixtral"]
    batch = family.batch(1, 120)
    config: dict[str, Any] = {"experts_implementation": kind}
    saved = []
    for ratio in (0.1, 0.2, 0.4):
        model = fxseek.compile(family.make(**config), ratio, score="random")
        model(**batch).loss.backward()
        saved.append(fxseek.report(model).saved_bytes)
    with SavedBytes(exclude=[*(model := family.make(**config)).parameters()]) as ordinary:
        loss = model(**batch).loss
        assert saved[0] <= most * ordinary.total
        del loss
    first, second, third = saved
    assert third - second == pytest.approx(2 * (second - first), rel=0.01)
