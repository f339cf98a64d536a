"""Functions of numbers under `torch.vmap`, as attention masks are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import DENSE
from models import batch, double_throughout
from oracle import Model, assert_exact, inputs_of, model_of
from sweeps import thinned
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

import fxseek


def masked(m: Model, x: Tensor, allowed: Any) -> Tensor:
    """Attention under a mask that `allowed(row, query, key)` decides."""
    rows, tokens = (torch.arange(size, device=x.device) for size in x.shape[:2])
    mask = torch.vmap(
        torch.vmap(torch.vmap(allowed, in_dims=(None, None, 0)), in_dims=(None, 0, None)),
        in_dims=(0, None, None),
    )(rows, tokens, tokens)
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask[:, None])[:, 0]


def window(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 4 + row % 2)


def none_of_a_kind(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask has no key in it: dimensions that no operation made."""
    return (query >= 0).logical_or(query.new_ones((), dtype=torch.bool))


MASKS = {
    "causal": lambda row, query, key: key <= query,
    "window": window,
    "either": lambda row, query, key: (key <= query) | (query < 3),
    "neither": lambda row, query, key: ~(key > query) ^ (key == 20),
    "none of a kind": none_of_a_kind,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("score", ["random", "tokenseek"])
def test_a_mask_by_numbers(name, score):
    assert_exact(model_of(lambda m, x: x + masked(m, x, MASKS[name])), score=score)


def test_a_function_of_one_level_with_gradient():
    """A number for each token: its weight in a sum, say."""

    def body(m: Model, x: Tensor) -> Tensor:
        ages = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        decay = torch.vmap(lambda age: (0.9**age).sin() + m.scale[0])(ages)
        return x * decay[:, None]

    assert_exact(model_of(body))


def test_a_function_of_rows():
    def body(m: Model, x: Tensor) -> Tensor:
        return x + torch.vmap(lambda row, other: (row * m.scale).sin() + other)(x, x.cos())

    assert_exact(model_of(body))


def test_a_scan_over_tokens():
    """By a function of two states, mapped over the pairs of each level of a tree."""

    def combined(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def body(m: Model, x: Tensor) -> Tensor:
        pairs = (x.sigmoid(), x * m.scale)
        states = associative_scan(combined, pairs, dim=1, combine_mode="generic")
        return x + states[1]

    assert_exact(model_of(body))


@pytest.mark.parametrize(
    "function",
    [
        lambda row: (row * 2).cumsum(0),
        lambda row: row * torch.ones(2, 1, 1),
        lambda row: row.sum(),
    ],
)
def test_what_hides_a_dimension_is_refused(function):
    model = model_of(lambda m, x: x + torch.vmap(function)(x).sum())
    with pytest.raises(fxseek.GraphError, match=r"vmap.*test_unbatch\.py.*whole tensors"):
        fxseek.compile(model, 0.4, score="random")(**inputs_of())


def test_a_gradient_inside_is_refused():
    def body(m: Model, x: Tensor) -> Tensor:
        return x * torch.func.grad(lambda y: (y**2).sum())(x)

    with pytest.raises(fxseek.FxseekError):
        fxseek.compile(model_of(body), 0.4, score="random")(**inputs_of())


# ---- as transformers writes masks of images ------------------------------------------------------


def sees(attention: str) -> Any:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(**DENSE, head_dim=8, sliding_window=8, layer_types=kinds)
    vision = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=28, num_hidden_layers=1, num_attention_heads=2,
        image_size=12, patch_size=4,
    )  # fmt: skip
    options: dict[str, Any] = {"image_token_id": 90, "attn_implementation": attention}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=9, **options
    )
    return transformers.Gemma3ForConditionalGeneration(config).double().train()


@pytest.mark.parametrize(("image", "attention"), thinned([False, True], ["sdpa", "eager"]))
def test_token_types(attention, image):
    """All zeros, as a text has them; and the tokens of an image, which see each other."""
    given = batch(80, 2, 23, padding="right")
    types = torch.zeros_like(given["input_ids"])
    types[:, 4:8] = int(image)
    given["token_type_ids"] = types
    with double_throughout():
        wanted = sees(attention)(**given, use_cache=False).logits
        model = fxseek.compile(sees(attention), 0.3, outputs="full")
        assert torch.allclose(model(**given).logits, wanted, rtol=0, atol=1e-9)
        fxseek.check_gradients(model, 1e-9, **given)
        fxseek.check_gradients(model, 1e-9, **{name: x[:, :19] for name, x in given.items()})
