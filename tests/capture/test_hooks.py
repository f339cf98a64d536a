"""Hooks on a compiled model: those added or removed later count, and what they keep is no lie."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, tiny_llama, without_casts
from sweeps import sampled
from torch import Tensor, nn

import fxseek
from fxseek.errors import CaptureError, GraphError, InputError

Gradients = dict[str, Tensor]


def model_of() -> Any:
    return without_casts(tiny_llama().double())


def arguments_of() -> dict[str, Tensor]:
    return batch(37, padding="right")


def step(model: Any, arguments: dict[str, Any]) -> Gradients:
    """The gradients of step 0, and the proof that they are those of masked full backprop."""
    fxseek.resume(model, 0)
    model.zero_grad()
    model(**arguments).loss.backward()
    assert fxseek.check_gradients(model, **arguments).error <= 1e-9
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(a: Gradients, b: Gradients) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def halved(module: nn.Module, given: Any, result: Tensor) -> Tensor:
    return result * 0.5


def of_linear(module: nn.Module, given: Any, result: Tensor) -> Tensor | None:
    return result * 0.5 if isinstance(module, nn.Linear) else None


def with_keywords(module: nn.Module, given: Any, keywords: dict[str, Any]) -> Any:
    return given, {**keywords, "hidden_states": keywords["hidden_states"] * 0.5}


def first_only(module: nn.Module, given: Any, keywords: dict[str, Any]) -> Any:
    mask = keywords["attention_mask"].clone()
    mask[:, 5:8] = 0
    return given, {**keywords, "attention_mask": mask}


def half_gradient(module: nn.Module, given: Any, result: Tensor) -> Tensor:
    result.register_hook(lambda cotangent: cotangent * 0.5)
    return result


register_for_all: Any = nn.modules.module.register_module_forward_hook
ADD: dict[str, Callable[[Any], Any]] = {
    "mlp": lambda m: m.model.layers[0].mlp.register_forward_hook(halved),
    "linear": lambda m: m.model.layers[1].mlp.down_proj.register_forward_hook(halved),
    "embedding": lambda m: m.model.embed_tokens.register_forward_hook(halved),
    "before": lambda m: m.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, given: (given[0] * 0.5,)
    ),
    "keywords": lambda m: m.model.layers[1].self_attn.register_forward_pre_hook(
        with_keywords, with_kwargs=True
    ),
    "root": lambda m: m.register_forward_pre_hook(first_only, with_kwargs=True),
    "every": lambda m: register_for_all(of_linear),
}


@pytest.mark.parametrize("kind", sampled(ADD, ("linear", "keywords", "root", "every")))
def test_a_hook_that_is_added_and_removed_later(kind):
    arguments = arguments_of()
    model = fxseek.compile(model_of(), 0.3, score="random")
    without = step(model, arguments)
    handle = ADD[kind](model)
    try:
        hooked = step(model, arguments)
    finally:
        handle.remove()
    assert not equal(hooked, without)
    assert equal(step(model, arguments), without)


def test_a_hook_in_the_place_of_another():
    arguments = arguments_of()
    model = fxseek.compile(model_of(), 0.3, score="random")
    mlp = model.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda module, given, result: result * 2.0)
    doubled = step(model, arguments)
    handle.remove()
    mlp.register_forward_hook(halved)
    assert not equal(step(model, arguments), doubled)


def test_a_hook_on_a_gradient():
    arguments = arguments_of()
    model = fxseek.compile(model_of(), 0.3, score="random")

    def of_last() -> Tensor:
        fxseek.resume(model, 0)
        model.zero_grad()
        model(**arguments).loss.backward()
        return model.model.layers[1].mlp.down_proj.weight.grad.clone()

    before = of_last()
    model.model.layers[1].mlp.register_forward_hook(half_gradient)
    torch.testing.assert_close(of_last(), before / 2, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_hook_on_a_backward_is_an_error(every, before):
    arguments = arguments_of()
    model = fxseek.compile(model_of(), 0.3, score="random")
    without = step(model, arguments)
    owner: Any = nn.modules.module if every else model.model.layers[0].mlp
    name = f"register_{'module_' if every else ''}full_backward_{'pre_' if before else ''}hook"
    handle = getattr(owner, name)(lambda *_: None)
    try:
        with pytest.raises(CaptureError, match="has a hook on its backward") as caught:
            model(**arguments)
    finally:
        handle.remove()
    assert ("every module" if every else "'model.layers.0.mlp'") in str(caught.value)
    assert equal(step(model, arguments), without)


def test_a_hook_on_what_is_not_called_hides_no_error():
    model = model_of()
    model.unused = nn.Linear(2, 2)
    model.unused.register_full_backward_hook(lambda *_: None)
    fxseek.compile(model, 0.3)
    arguments = arguments_of()
    del arguments["labels"]
    with pytest.raises(GraphError, match="needs the gradient of the loss"):
        model(**arguments)


# ---- what hooks keep -----------------------------------------------------------------------------


def keeping(outputs: str) -> tuple[Any, list[Any]]:
    model, kept = model_of(), []
    model.model.layers[1].mlp.register_forward_hook(lambda m, given, x: kept.append(x))
    return fxseek.compile(model, 0.3, score="random", outputs=outputs), kept


def test_an_activation_that_is_not_computed(caplog):
    model, kept = keeping("loss")
    with caplog.at_level(logging.WARNING, logger="fxseek"):
        result = [model(**arguments_of()) for _ in range(2)][-1]
    assert [record.message for record in caplog.records if "keeps activations" in record.message]
    assert len([record for record in caplog.records if "keeps" in record.message]) == 1
    assert result.logits is None and len(kept) == 2
    uses: list[Callable[[Any], Any]] = [
        lambda x: x.shape, lambda x: x + 1, lambda x: 2 * x, lambda x: torch.stack([x, x]),
        lambda x: x.detach(), bool, len, lambda x: x[0], lambda x: x.mean(),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(InputError, match='outputs="full"'):
            use(kept[0])
    assert "does not compute" in repr(copy.deepcopy(pickle.loads(pickle.dumps(kept[0]))))


@pytest.mark.parametrize("outputs", ["selected", "full"])
def test_an_activation_that_is_computed(outputs, caplog):
    model, kept = keeping(outputs)
    arguments = arguments_of()
    with caplog.at_level(logging.WARNING, logger="fxseek"):
        model(**arguments)
    assert not caplog.records
    selected = fxseek.report(model).selected
    fxseek.uncompile(model)(**arguments)
    found, full = kept
    at = selected.clamp(min=0)[:, :, None].expand(-1, -1, full.shape[-1])
    wanted = full if outputs == "full" else full.gather(1, at)
    used = slice(None) if outputs == "full" else selected >= 0
    torch.testing.assert_close(found[used], wanted[used], rtol=1e-12, atol=1e-12)


def test_a_number_that_a_hook_keeps():
    model, kept = model_of(), []
    model.model.layers[0].mlp.register_forward_hook(
        lambda m, given, x: kept.append(x.detach().abs().mean())
    )
    fxseek.compile(model, 0.3, score="random")
    arguments = arguments_of()
    model(**arguments)
    fxseek.uncompile(model)(**arguments)
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-12, atol=1e-12)
