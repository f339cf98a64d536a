"""Attention of consecutive queries: the causal flag in the place of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from models import TinyConfig, TinyDecoder, batch, tiny_llama, without_casts
from oracle import Body, Model, assert_exact, model_of
from torch import Tensor, nn

import fxseek
from fxseek.ops import attention
from fxseek.ops.attention import CausalRows, attend, attend_rows, kernel, shared_mask

KEYS = 11


def operands(queries: int, heads: int) -> list[Tensor]:
    shapes = (2, heads, queries, 8), (2, 2, KEYS, 8), (2, 2, KEYS, 6)
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch, masks: list[Any]) -> None:
    """The CPU as a device with a kernel that aligns the flag with the last key."""

    def attend_aligned(
        query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None
    ) -> Tensor:
        queries, keys = query.shape[-2], key.shape[-2]
        masks.append("flag")
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, scale=scale, enable_gqa=True
        )

    monkeypatch.setattr(attention, "_takes_flag", lambda *_: True)
    monkeypatch.setattr(attention, "attend_aligned", attend_aligned)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The mask of each attention that runs, "flag" for the causal flag."""
    seen: list[Any] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append("flag" if options.get("is_causal") else options.get("attn_mask"))
        return nn.functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(attention, "attend", attend)
    return seen


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("at", [range(4), range(3, 8), range(10, 11), range(KEYS)], ids=str)
def test_a_flag_for_consecutive_queries(
    at: range, share: bool, heads: int, aligned: None, masks: list[Any]
):
    query, key, value = operands(len(at), heads)
    kept = torch.tensor(at).expand(2, -1)
    given: dict[str, Any] = {"scale": 0.3, "enable_gqa": heads > 2}
    rows: Any = CausalRows(kept, at)
    if share:
        rows = shared_mask(rows, query, key, value, enable_gqa=heads > 2)
    found = attend_rows(query, key, value, kept, mask=rows, **given)
    assert masks == ["flag"]
    wanted = attend_rows(query, key, value, kept, is_causal=True, batch_dim=0, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(found)
    pairs = (torch.autograd.grad(x, (query, key, value), slope) for x in (found, wanted))
    torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", [None, range(3, 7)], ids=str)
def test_a_mask_where_no_kernel_takes_the_flag(at: range | None, masks: list[Any]):
    """Queries that are not consecutive, or values of another width."""
    query, key, value = operands(4, 6)
    kept = torch.tensor([[0, 2, 5, 6], [1, 2, 3, 10]] if at is None else [list(at)] * 2)
    rows = shared_mask(CausalRows(kept, at), query, key, value, enable_gqa=True)
    assert isinstance(rows, Tensor)
    found = attend_rows(query, key, value, kept, mask=rows, enable_gqa=True)
    wanted = attend_rows(query, key, value, kept, is_causal=True, batch_dim=0, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert "flag" not in map(str, masks)


def test_dropout_and_a_chosen_kernel_take_no_flag_on_the_cpu():
    query, key, _ = operands(4, 6)
    rows = CausalRows(torch.arange(3, 7)[None], range(3, 7))
    assert rows.is_flag(query, key, key, 0.0, True)
    assert not rows.is_flag(query, key, key, 0.1, True)
    assert isinstance(shared_mask(rows, query, key, key, dropout_p=0.1, enable_gqa=True), Tensor)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not rows.is_flag(query, key, key, 0.0, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not rows.is_flag(query, key, key, 0.0, True)


UNUSUAL: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "strided query": lambda q, k, v: (q.mT.contiguous().mT, k, v),
    "strided keys": lambda q, k, v: (q, k.mT.contiguous().mT, v),
    "strided values": lambda q, k, v: (q, k, v.mT.contiguous().mT),
    "keys of one row": lambda q, k, v: (q, k[:1], v[:1]),
    "a query of one head": lambda q, k, v: (q[:, :1], k, v),
    "keys of one head": lambda q, k, v: (q, k[:, :1], v),
    "another precision": lambda q, k, v: (q.float(), k.float(), v),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_operands_that_the_kernel_of_the_cpu_does_not_check(name: str):
    query, key, _ = operands(4, 2)
    query, key, value = UNUSUAL[name](query, key, key * 0.5)
    rows = CausalRows(torch.arange(3, 7)[None], range(3, 7))
    assert not rows.is_flag(query, key, value, 0.0, False)
    if name != "another precision":
        found = attend_rows(query, key, value, rows.kept, mask=rows)
        wanted = attend_rows(query, key, value, rows.kept, is_causal=True, batch_dim=0)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["interleaved", "stacked"])
def test_heads_that_are_interleaved(form: str):
    """Their width is not the innermost dimension, of which the CPU's operator knows nothing."""

    def body(m: Model, x: Tensor) -> Tensor:
        if form == "interleaved":
            q = k = v = x.unflatten(-1, (3, 2)).permute(0, 3, 1, 2)
        else:
            q, k, v = torch.cat((x, x * m.scale, x), -1).unflatten(-1, (2, 3, 3)).unbind(-1)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + found.transpose(1, 2).flatten(2) * m.scale

    assert_exact(model_of(body), ratio=1.0, learn_chunk=4)


def test_large_masks_are_made_on_chunks(monkeypatch: pytest.MonkeyPatch, masks: list[Any]):
    """Where no kernel takes the flag, as in float32 on a GPU."""
    monkeypatch.setattr("fxseek.ops.masks.CHUNK_BYTES", 4 * KEYS * 2 * 2)
    query, key, value = operands(6, 6)
    kept = torch.arange(3, 9).expand(2, -1)
    rows = CausalRows(kept, range(3, 9))
    assert shared_mask(rows, query, key, value, enable_gqa=True) is not rows
    found = attend_rows(query, key, value, kept, mask=rows, enable_gqa=True)
    assert {mask.shape[-2] for mask in masks} == {2}
    wanted = attend_rows(query, key, value, kept, is_causal=True, batch_dim=0, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def attends_to(keys: int) -> Body:
    """Two attentions under the flag, of which the second has so many keys more, or fewer."""

    def body(m: Model, x: Tensor) -> Tensor:
        y = x[:, None]
        x = x + F.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0] * m.scale
        y = x[:, None]
        z = y[:, :, :keys] if keys < 0 else torch.cat((y, y[:, :, :keys]), 2)
        return x + F.scaled_dot_product_attention(y, z, z, is_causal=True)[:, 0]

    return body


@pytest.mark.parametrize("keys", [-2, 3])
def test_other_numbers_of_keys(keys: int):
    for ratio in (0.4, 1.0):
        assert_exact(model_of(attends_to(keys)), ratio=ratio)


# ---- in a step -----------------------------------------------------------------------------------


def step(
    options: dict[str, Any] | None, inputs: dict[str, Tensor], made: Callable[[], nn.Module]
) -> dict[str, Tensor]:
    """The gradients of a step; of ordinary training without options."""
    torch.manual_seed(0)
    model = without_casts(made().double()).train()
    if options is not None:
        fxseek.compile(model, 1.0, **options)
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_every_position_needs_no_mask(
    chunk: int | None, masked: bool, recompute: str, aligned: None, masks: list[Any]
):
    inputs = batch(37, batch=2, tokens=23)
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    wanted = step(None, inputs, tiny_llama)
    found = step({"learn_chunk": chunk, "recompute": recompute}, inputs, tiny_llama)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert set(masks) == {"flag"}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_causal_flag_stays_one(
    chunk: int | None, batch_size: int, aligned: None, masks: list[Any]
):
    def made() -> nn.Module:
        return TinyDecoder(TinyConfig(attention="sdpa_causal"))

    inputs = batch(37, batch=batch_size, tokens=23, padding="none")
    wanted = step(None, inputs, made)
    masks.clear()
    found = step({"learn_chunk": chunk}, inputs, made)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert set(masks) == {"flag"}


def test_the_kernel_of_an_estimate_is_for_its_tensors_alone():
    """Another thread may train meanwhile."""

    def fails(*args: Any, **options: Any) -> Tensor:
        raise AssertionError

    query, key, value = operands(4, 2)
    wanted = attend(query, key, value)
    with kernel(fails, (), {}):
        assert torch.equal(attend(query, key, value), wanted)
        with pytest.raises(AssertionError):
            attend(*(x.to("meta") for x in (query, key, value)))


@pytest.mark.parametrize("kind", ["padded", "window"])
def test_other_masks_stay(kind: str, aligned: None, masks: list[Any]):
    made = FAMILIES["mistral"].make if kind == "window" else tiny_llama
    inputs = batch(37, batch=2, tokens=23, padding="left" if kind == "padded" else "none")
    wanted = step(None, inputs, made)
    found = step({"learn_chunk": 7}, inputs, made)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert masks
    assert not any(isinstance(mask, str) for mask in masks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv", ["device", "offload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, kv: str):
    """In float32 the gradients are ordinary training's; in bfloat16 as near as its own are."""

    def gradients(dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
        model = tiny_llama(**sizes).to("cuda", dtype).train()
        if options:
            fxseek.compile(model, 1.0, **options)
        inputs = {name: x.cuda() for name, x in batch(37, tokens=61).items()}
        model(**inputs).loss.backward()
        return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}

    recompute = "block" if kv == "offload" else "selective"
    found = gradients(dtype, learn_chunk=16, kv=kv, recompute=recompute)
    exact, plain = gradients(torch.float32), gradients(dtype)
    for name, wanted in exact.items():
        size = wanted.norm()
        own = float((plain[name] - wanted).norm() / size)
        assert float((found[name] - wanted).norm() / size) < max(2 * own, 1e-4), name
