"""Calls that ask a model of transformers for more than its loss: hidden states, attentions, ...

transformers records them by hooks that the first call installs, in a way that cannot be captured.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from families import DENSE, EXPERTS, VOCAB
from models import batch, cache_name, double_throughout, without_casts
from sweeps import sampled
from torch import Tensor
from tuners import TUNERS

import fxseek
from fxseek.capture.recorders import install_recorders


def mixture(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**DENSE, **EXPERTS, "num_local_experts": 5, "router_aux_loss_coef": 0.5, **options}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    return model.double().train()


def decoder(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = DENSE | {"attn_implementation": attention}
    config = transformers.Qwen2Config(**options)
    return without_casts(transformers.Qwen2ForCausalLM(config)).double().train()


def sees() -> Any:
    """LLaVA: it asks its vision tower for hidden states in every call."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
        image_size=12, patch_size=4, projection_dim=24,
    )  # fmt: skip
    text = transformers.LlamaConfig(**{**DENSE, "num_hidden_layers": 1})
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCAB - 1
    )
    return transformers.LlavaForConditionalGeneration(config).double().train()


def with_images(tokens: int = 23) -> dict[str, Tensor]:
    found = batch(VOCAB - 1, 2, tokens, padding="right")
    generator = torch.Generator().manual_seed(3)
    found["pixel_values"] = torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64)
    found["input_ids"][:, 1:10] = VOCAB - 1  # nine patches
    found["labels"][:, 1:10] = -100
    return found


def same(found: Any, wanted: Any) -> bool:
    assert len(found) == len(wanted) > 0
    return all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(autouse=True)
def _in_double() -> Any:
    with double_throughout():
        yield


def test_router_losses_in_the_first_call():
    arguments = batch(VOCAB, 2, 23, padding="right") | {"output_router_logits": True}
    wanted = mixture()(**arguments)
    model = fxseek.compile(mixture(), 0.3, outputs="full")
    found = model(**arguments)
    assert torch.allclose(found.aux_loss, wanted.aux_loss)
    assert same(found.router_logits, wanted.router_logits)
    fxseek.check_gradients(model, 1e-9, **arguments)
    without = fxseek.compile(mixture(router_aux_loss_coef=0.0), 0.3)
    token_loss = without(**arguments).loss
    assert torch.equal(fxseek.report(without).selected, fxseek.report(model).selected)
    assert torch.allclose(found.loss, token_loss + 0.5 * wanted.aux_loss)


def test_router_losses_by_the_configuration():
    model = fxseek.compile(mixture(output_router_logits=True), 0.3)
    fxseek.check_gradients(model, 1e-9, **batch(VOCAB, 2, 23, padding="right"))


@pytest.mark.parametrize("attention", sampled(["sdpa", "eager"], ["sdpa"]))
def test_recorded_values_are_those_of_the_model(attention):
    arguments = batch(VOCAB, 2, 23, padding="right")
    plain = decoder(attention)
    model = fxseek.compile(decoder(attention), 0.3, outputs="full")
    asked: list[dict[str, Any]] = [
        {"output_hidden_states": True},
        {},
        {"output_hidden_states": [0, -1]},
    ]
    if attention == "eager":
        asked += [{"output_attentions": True}]
        asked += [{"output_attentions": True, "output_hidden_states": True}]
    for options in asked:
        wanted, found = (
            plain(**arguments, **options, use_cache=False),
            model(**arguments, **options),
        )
        assert set(found) == set(wanted)
        for name in {"hidden_states", "attentions"} & set(wanted):
            present = [x is not None for x in wanted[name]]
            assert [x is not None for x in found[name]] == present
            assert same(*([x for x in xs[name] if x is not None] for xs in (found, wanted)))
        fxseek.check_gradients(model, 1e-9, **arguments, **options)


def test_hooks_that_a_part_of_the_model_has_already():
    """The part was called by itself before: its hooks are not installed twice."""
    arguments = batch(VOCAB, 2, 23)
    model = decoder()
    model.model(arguments["input_ids"], output_hidden_states=True)
    wanted = decoder()(**arguments, output_hidden_states=True).hidden_states
    found = fxseek.compile(model, 0.3, outputs="full")(**arguments, output_hidden_states=True)
    assert same(found.hidden_states, wanted)


def test_a_model_that_asks_for_itself():
    arguments = with_images()
    model = fxseek.compile(sees(), 0.3)
    fxseek.check_gradients(model, 1e-9, **arguments)
    fxseek.check_gradients(model, 1e-9, **with_images(29))
    model = fxseek.compile(sees(), 0.3, outputs="full")
    found = model(**arguments, output_hidden_states=True)
    wanted = sees()(**arguments, output_hidden_states=True)
    assert same(found.hidden_states, wanted.hidden_states)


def test_explaining_a_first_call():
    model = fxseek.compile(mixture(), 0.3)
    arguments = batch(VOCAB, 2, 23) | {"output_router_logits": True}
    assert fxseek.explain(model, **arguments).kept == 7


def test_another_failure_installs_nothing(monkeypatch):
    model = mixture()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert not install_recorders(model, RuntimeError("no stack"))
    monkeypatch.delitem(sys.modules, "transformers.utils.output_capturing")
    assert not install_recorders(model, RuntimeError("no stack"))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class Plain:
    """An output of a class that says nothing of its fields."""

    def __init__(self, output: Any) -> None:
        self.loss, self.logits, self.more = output.loss, output.logits, [output.logits]


def test_an_output_of_any_class():
    """None for what is not computed; the object stays, and the loss in it."""
    model = decoder()
    forward = model.forward
    model.forward = lambda **inputs: Plain(forward(**inputs))
    fxseek.compile(model, 0.5)
    output = model(**batch(VOCAB))
    assert isinstance(output, Plain)
    assert output.logits is None and output.more == [None]
    output.loss.backward()


def test_a_cache_of_keys_and_values_is_not_computed(caplog: pytest.LogCaptureFixture):
    """Prefix tuning's: an output of all tokens that the model returns in an object of its own."""
    model: Any = TUNERS["prefix"].make()
    name = cache_name(model.get_base_model())
    assert getattr(model(**batch(37)), name) is not None
    fxseek.compile(model, 0.5)
    output = model(**batch(37))
    assert getattr(output, name) is None
    output.loss.backward()
    assert "a hook or the model keeps" not in caplog.text
