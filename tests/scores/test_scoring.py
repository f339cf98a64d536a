"""Scores against their definitions, written out on whole maps in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TinyConfig, TinyDecoder, batch
from reports import Words
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxseek
from fxseek.errors import ScoreError
from fxseek.reports.tokens import tokens_of
from fxseek.scores import SCORERS, ScoreInputs, Scorer, measures
from fxseek.scores.base import Stream, scorer, step_generator
from fxseek.scores.measures import accumulate_columns, attention_column_sums, gradient_magnitude
from fxseek.scores.own import check_scores
from fxseek.scores.random import random_scores
from fxseek.scores.tokenseek import combine, mass
from fxseek.selecting import select_sample
from fxseek.spans import drawn_scores, spans_of

BATCH, KV_HEADS, GROUPS, TOKENS, WIDTH = 2, 3, 2, 11, 5
HEADS = KV_HEADS * GROUPS


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The whole attention map, by the definition; rows without any key are zero."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits = logits + mask
    logits = logits.masked_fill(~allowed, -math.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def column_sums(attention: Tensor, query_valid: Tensor | None = None) -> Tensor:
    if query_valid is not None:
        attention = attention * query_valid[:, None, :, None]
    return attention.sum(2).mean(1)


# attention_column_sums


def test_two_tokens_by_hand():
    # Row 0 sees itself; row 1 sees both alike: the columns get 1 + 1/2 and 1/2.
    sums = attention_column_sums(torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3), is_causal=True)
    assert sums.tolist() == [[1.5, 0.5]]


def masks(kind: str, batch: int, heads: int, tokens: int, keys: int, seed: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = {"plane": (tokens, keys), "one": (1, 1, tokens, keys), "keys": (batch, 1, 1, keys)}
    name, _, form = kind.partition("-")
    generator = torch.Generator().manual_seed(seed)
    size = {**shape, "batch": (batch, 1, tokens, keys), "heads": (batch, heads, tokens, keys)}[form]
    allowed = torch.rand(size, generator=generator) < 0.6
    if name == "bool":
        return allowed
    bias = torch.randn(size, generator=generator, dtype=torch.float64)
    return bias.masked_fill(~allowed, -math.inf) if name == "additive" else bias


MASK_KINDS = ["none"] + [
    f"{name}-{form}"
    for name in ("bool", "additive", "bias")
    for form in ("plane", "one", "keys", "batch", "heads")
]


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 2000, 6000, 64 << 20])
def test_column_sums_equal_the_whole_map(kind: str, is_causal: bool, chunk_bytes: int):
    query, key = randn(BATCH, HEADS, TOKENS, WIDTH), randn(BATCH, KV_HEADS, TOKENS, WIDTH, seed=1)
    mask = masks(kind, BATCH, HEADS, TOKENS, TOKENS, seed=2)
    valid = torch.arange(TOKENS) >= torch.tensor([[0], [4]])
    for query_valid in (None, valid):
        got = attention_column_sums(
            query,
            key,
            mask=mask,
            is_causal=is_causal,
            query_valid=query_valid,
            chunk_bytes=chunk_bytes,
        )
        expected = column_sums(probabilities(query, key, mask, is_causal=is_causal), query_valid)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 3, 3, 13, 13, 7)]),
    kind=st.sampled_from(MASK_KINDS),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.5, -2.0, 0.0]),
    chunk_bytes=st.integers(1, 20_000),
    seed=st.integers(0, 1000),
)
def test_column_sums_at_any_size(
    sizes: tuple[int, ...],
    kind: str,
    is_causal: bool,
    scale: float | None,
    chunk_bytes: int,
    seed: int,
):
    batch, kv_heads, groups, tokens, keys, width = sizes
    query = randn(batch, kv_heads * groups, tokens, width, seed=seed)
    key = randn(batch, kv_heads, keys, width, seed=seed + 1)
    mask = masks(kind, batch, kv_heads * groups, tokens, keys, seed)
    got = attention_column_sums(
        query, key, mask=mask, scale=scale, is_causal=is_causal, chunk_bytes=chunk_bytes
    )
    expected = column_sums(probabilities(query, key, mask, scale, is_causal))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_more_rows_than_one_chunk_takes():
    tokens = 2 * measures._MOST_ROWS + 3
    query, key = randn(1, 2, tokens, WIDTH), randn(1, 1, tokens, WIDTH, seed=1)
    got = attention_column_sums(query, key, is_causal=True)
    expected = column_sums(probabilities(query, key, is_causal=True))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_map_is_the_one_torch_attends_with():
    query, key = randn(BATCH, HEADS, TOKENS, WIDTH), randn(BATCH, KV_HEADS, TOKENS, WIDTH, seed=1)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    # attended values of one-hot V are the rows of the map
    one_hot = torch.eye(TOKENS, dtype=torch.float64).expand(BATCH, KV_HEADS, -1, -1)
    for attn_mask, is_causal in ((None, True), (mask, False), (None, False)):
        rows = torch.nn.functional.scaled_dot_product_attention(
            query, key, one_hot, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=True
        )
        got = attention_column_sums(query, key, mask=attn_mask, is_causal=is_causal)
        torch.testing.assert_close(got, column_sums(rows), rtol=1e-12, atol=1e-12)


def test_the_valid_queries_share_out_one_each():
    query, key = randn(BATCH, HEADS, TOKENS, WIDTH), randn(BATCH, KV_HEADS, TOKENS, WIDTH, seed=1)
    valid = torch.arange(TOKENS) < torch.tensor([[TOKENS], [4]])
    sums = attention_column_sums(query, key, is_causal=True, query_valid=valid)
    torch.testing.assert_close(sums.sum(-1), torch.tensor([TOKENS, 4.0]).double())
    assert sums[1, 4:].eq(0).all()


@pytest.mark.parametrize("kind", ["bool", "infinite", "lowest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fully_masked_rows_give_nothing(kind: str, dtype: torch.dtype):
    query, key = randn(1, 2, 4, WIDTH, dtype=dtype), randn(1, 1, 4, WIDTH, seed=1, dtype=dtype)
    allowed = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    low = -math.inf if kind == "infinite" else torch.finfo(dtype).min
    additive = torch.zeros(4, 4, dtype=dtype).masked_fill(~allowed, low)
    got = attention_column_sums(query, key, mask=allowed if kind == "bool" else additive)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == wide
    expected = column_sums(probabilities(query.double(), key.double(), allowed))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert got[0, :2].eq(0).all()


def test_invalid_queries_may_hold_nan():
    query, key = randn(1, 2, 4, WIDTH), randn(1, 1, 4, WIDTH, seed=1)
    valid = torch.tensor([[False, True, True, True]])
    clean = attention_column_sums(query, key, is_causal=True, query_valid=valid)
    query[:, :, 0] = math.nan
    dirty = attention_column_sums(query, key, is_causal=True, query_valid=valid)
    assert torch.equal(clean, dirty)


def test_autocast_does_not_lower_the_precision():
    query = randn(1, 2, 7, WIDTH, dtype=torch.float32)
    key = randn(1, 1, 7, WIDTH, seed=1, dtype=torch.float32)
    plain = attention_column_sums(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_column_sums(query, key), plain)


def test_half_precision_is_accumulated_in_float32():
    tokens = 600
    query = randn(1, 2, tokens, WIDTH, dtype=torch.bfloat16)
    key = randn(1, 2, tokens, WIDTH, seed=1, dtype=torch.bfloat16)
    got = attention_column_sums(query, key, is_causal=True)
    expected = column_sums(probabilities(query.double(), key.double(), is_causal=True))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_column_sums_leave_their_arguments_and_carry_no_grad():
    query = randn(1, 2, 4, WIDTH).requires_grad_()
    key, mask = randn(1, 1, 4, WIDTH, seed=1), randn(4, 4, seed=2)
    before = [x.detach().clone() for x in (query, key, mask)]
    assert not attention_column_sums(query, key, mask=mask).requires_grad
    assert all(torch.equal(x, y) for x, y in zip((query, key, mask), before, strict=True))


def test_key_heads_must_divide_query_heads():
    with pytest.raises(ValueError, match="2 key heads don't divide 3 query heads"):
        attention_column_sums(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4))


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that any operation returns, and how much is alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest_bytes = max(self.largest_bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_is_larger_than_a_chunk(batch: int, masked: bool):
    tokens, chunk_bytes = 512, 300_000
    query = randn(batch, 4, tokens, 8, dtype=torch.float32)
    key = randn(batch, 2, tokens, 8, seed=1, dtype=torch.float32)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if masked else None
    copies_bytes = query.untyped_storage().nbytes()
    with LargestTensor() as seen:
        attention_column_sums(query, key, mask=mask, is_causal=True, chunk_bytes=chunk_bytes)
    assert seen.largest_bytes <= max(chunk_bytes, copies_bytes)
    # the whole map is far beyond that, so the bound says something
    assert batch * 4 * tokens * tokens * 4 > 5 * max(chunk_bytes, copies_bytes)


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 5),
    groups=st.integers(1, 5),
    tokens=st.integers(1, 200),
    keys=st.integers(1, 200),
    entries=st.integers(0, 100_000),
)
def test_chunks_cover_everything_once_and_keep_the_bound(
    batch: int, kv_heads: int, groups: int, tokens: int, keys: int, entries: int
):
    seen = torch.zeros(batch, kv_heads, tokens, dtype=torch.long)
    for b, h, rows in measures._chunks(batch, kv_heads, groups, tokens, keys, entries, seen):
        part = seen[b, h, rows]
        assert part.numel() > 0
        one_row = part.numel() == 1
        assert one_row or part.numel() * groups * keys <= entries
        part += 1
    assert seen.eq(1).all()


# accumulate_columns


def test_chunks_of_probabilities_add_up():
    query, key = randn(BATCH, HEADS, TOKENS, WIDTH), randn(BATCH, HEADS, TOKENS, WIDTH, seed=1)
    attention = probabilities(query, key, is_causal=True)
    valid = torch.arange(TOKENS) >= torch.tensor([[0], [4]])
    total = sum(
        accumulate_columns(attention[:, :, rows], valid[:, rows])
        for rows in (slice(0, 3), slice(3, 10), slice(10, 11))
    )
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, column_sums(attention, valid))
    every = torch.ones_like(valid)
    torch.testing.assert_close(accumulate_columns(attention, every), column_sums(attention))


def test_probabilities_of_invalid_rows_may_be_nan():
    attention = torch.full((1, 2, 2, 3), math.nan, dtype=torch.bfloat16)
    attention[:, :, 1] = torch.tensor([0.25, 0.25, 0.5])
    sums = accumulate_columns(attention, torch.tensor([[False, True]]))
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[0.25, 0.25, 0.5]]


# gradient_magnitude


def test_gradient_norms_by_hand():
    gradient = torch.tensor([[[3.0, -4.0], [0.0, 0.0]]])
    assert gradient_magnitude(gradient).tolist() == [[7.0, 0.0]]
    assert gradient_magnitude(gradient, "l2").tolist() == [[5.0, 0.0]]
    assert gradient_magnitude(gradient, "sum").tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("norm", ["l1", "l2", "sum"])
def test_all_streams_of_a_token_count(norm: str):
    """A model with hyper-connections has several: [batch, tokens, streams, width]."""
    gradient = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    found = gradient_magnitude(gradient, norm)
    assert torch.equal(found, gradient_magnitude(gradient.reshape(2, 5, 21), norm))


@pytest.mark.parametrize("norm", ["l1", "l2", "sum"])
def test_gradient_norms_of_half_precision_do_not_overflow(norm: str):
    gradient = torch.full((1, 1, 4096), 60.0, dtype=torch.float16)
    got = gradient_magnitude(gradient, norm)
    assert got.dtype == torch.float32
    assert got.item() == {"l1": 245760.0, "l2": 3840.0, "sum": 245760.0}[norm]


# combine

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_combined_scores_by_hand():
    context, gradient = torch.tensor([[1.0, math.e, 1.0]]), torch.tensor([[2.0, 4.0, 3.0]])
    got = combine(context, gradient, ALL, alpha=2.0, beta=10.0)
    torch.testing.assert_close(got, torch.tensor([[0.0, 12.0, 5.0]]))


def test_ranks_and_deviations_by_hand():
    context = torch.tensor([[1.0, 4.0, 2.0, 2.0, 99.0]])
    gradient = torch.tensor([[5.0, 5.0, 0.0, 9.0, -7.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    ranks = combine(context, gradient, valid, 2.0, 1.0, "rank")
    expected = [[2 * 0 + 1 / 3, 2 * 1 + 1 / 3, 2 / 3 + 0, 2 / 3 + 1, -math.inf]]
    torch.testing.assert_close(ranks, torch.tensor(expected))
    found = combine(context, gradient, valid, 2.0, 1.0, "zscore")[0, :4]
    logs = context[0, :4].log()
    standard = (logs - logs.mean()) / logs.std(correction=0)
    of_gradient = (gradient[0, :4] - gradient[0, :4].mean()) / gradient[0, :4].std(correction=0)
    torch.testing.assert_close(found, 2 * standard + of_gradient)


@pytest.mark.parametrize("normalise", ["minmax", "rank", "zscore"])
def test_scores_that_are_no_numbers_are_an_error_on_every_scale(normalise: str):
    torch._dynamo.reset()
    model = TinyDecoder(TinyConfig())
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    fxseek.compile(model.train(), 0.3, normalise=normalise)
    with pytest.raises(ScoreError, match="not finite"):
        model(**batch(37, tokens=11))


@pytest.mark.parametrize("normalise", ["rank", "zscore"])
def test_neither_score_s_scale_counts(normalise: str):
    valid = torch.arange(30) < torch.tensor([[30], [17]])
    context, gradient = randn(2, 30).exp(), randn(2, 30, seed=1).square()
    found = combine(context, gradient, valid, 1.0, 1.0, normalise)
    again = combine(context**3 * 7, gradient * 1e-9, valid, 1.0, 1.0, normalise)
    torch.testing.assert_close(found, again)
    flat = combine(torch.full_like(context, 0.3), gradient, valid, 5.0, 1.0, normalise)
    torch.testing.assert_close(flat, combine(context, gradient, valid, 0.0, 1.0, normalise))
    assert torch.isfinite(flat[valid]).all()


def test_padding_does_not_score():
    valid = torch.tensor([[True, True, False]])
    context = torch.tensor([[1.0, 1.0, math.nan]])
    gradient = torch.tensor([[1.0, 2.0, 1000.0]])
    assert combine(context, gradient, valid).tolist() == [[0.0, 1.0, -math.inf]]
    gradient[0, 2] = math.nan
    assert combine(context, gradient, valid).tolist() == [[0.0, 1.0, -math.inf]]


def test_constant_gradients_and_empty_rows_give_no_nan():
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    got = combine(torch.ones(3, 2), torch.full((3, 2), 5.0), valid)
    assert got.tolist() == [[0.0, 0.0], [0.0, -math.inf], [-math.inf, -math.inf]]


def test_no_attention_at_all_is_very_little_attention():
    got = combine(torch.tensor([[0.0, 1.0, 2.0]]), None, ALL)
    assert got[0, 0].item() == pytest.approx(math.log(torch.finfo(torch.float32).tiny))
    assert got[0, 0] < got[0, 1] < got[0, 2]
    # an alpha of 0 must not meet an infinite logarithm
    got = combine(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 2.0]]), ALL, alpha=0.0)
    assert got.tolist() == [[0.0, 0.5, 1.0]]


def test_one_part_alone_needs_no_factor():
    part = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.equal(combine(part, None, ALL, alpha=0.0), part.log())
    assert combine(None, part, ALL, beta=0.0).tolist() == [[0.0, 1.0, 0.5]]


@settings(deadline=None)
@given(factor=st.floats(0.1, 10.0), seed=st.integers(0, 1000))
def test_only_the_ratio_of_alpha_and_beta_orders_the_tokens(factor: float, seed: int):
    context, gradient = randn(2, 13, seed=seed).exp(), randn(2, 13, seed=seed + 1).abs()
    valid = torch.ones(2, 13, dtype=torch.bool)
    plain = combine(context, gradient, valid)
    # neither does the scale of either part
    scaled = combine(3 * context, 0.01 * gradient, valid, alpha=factor, beta=factor)
    assert torch.equal(plain.argsort(-1), scaled.argsort(-1))


# mass


def test_mass_of_built_in_scores():
    valid = torch.tensor([[True, True, False]])
    context, gradient = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[-1.0, 4.0, 9.0]])
    scores = combine(context, gradient, valid)
    assert mass(context, None, scores, valid).tolist() == [[1.0, 2.0, 0.0]]
    assert mass(None, gradient, scores, valid).tolist() == [[0.0, 4.0, 0.0]]
    got = mass(context, gradient, scores, valid)
    torch.testing.assert_close(got, torch.tensor([[1 / (2 * math.e), 1.0, 0.0]]))


def test_mass_does_not_overflow_and_padding_rows_have_none():
    valid = torch.tensor([[True, True], [False, False]])
    part = torch.ones(2, 2)
    got = mass(part, part, torch.tensor([[1e30, -1e30], [math.nan, 0.0]]), valid)
    assert got.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_mass_of_own_scores_is_the_scores():
    scores = torch.tensor([[0.5, -math.inf, -3.0]])
    valid = torch.tensor([[True, True, False]])
    assert mass(None, None, scores, valid).tolist() == [[0.5, 0.0, 0.0]]


def test_negative_own_scores_have_no_mass():
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.5, -1.0]])
    with pytest.raises(ScoreError) as error:
        mass(None, None, scores, torch.ones(2, 3, dtype=torch.bool))
    message = str(error.value)
    assert "2 of 6" in message
    assert "-2.5 at row 1, token 1" in message
    assert "scores.exp()" in message
    assert "select='topk'" in message


# random scores


def test_random_scores_follow_from_seed_and_step():
    state = torch.get_rng_state()
    first = random_scores((3, 7), seed=1, step=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(random_scores((3, 7), seed=1, step=2), first)
    assert first.dtype == torch.float32
    assert first.ge(0).all()
    assert first.lt(1).all()
    for seed, step in ((2, 1), (1, 3), (1 + 2**32, 2)):
        assert not torch.equal(random_scores((3, 7), seed=seed, step=step), first)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 16])
def test_a_gradient_in_float16_does_not_vanish(attention: str, chunk_bytes: int | None):
    """That of a mean over many labels is divided by their number last."""

    def scored(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = TinyDecoder(TinyConfig(attention=attention)).to(dtype).train()
        with torch.no_grad():
            model.head.weight *= 1e-2
        fxseek.compile(model, 0.3, score="gradient", chunk_bytes=chunk_bytes)
        model(**batch(37, batch=6, tokens=600, padding="none"))
        gradient = fxseek.report(model).gradient
        assert gradient is not None
        return gradient

    wanted = scored(torch.float32)
    apart = (scored(torch.float16) - wanted).abs() / wanted  # a last token has no label
    assert apart[:, :-1].median() < 0.02


def test_draws_are_the_same_by_any_default():
    """Of torch's device, which a generator of the CPU does not fit, and dtype."""
    valid = torch.ones(2, 40, dtype=torch.bool)
    spans = torch.arange(40).div(5, rounding_mode="floor").expand(2, -1).clone()
    size = torch.full((2, 1), 5)

    def draws() -> list[Tensor]:
        generators = [step_generator(0, 1, stream) for stream in Stream]
        sample = select_sample(
            spans.float(), 9, valid=valid, supervised=None, generator=generators[0]
        )
        return [
            random_scores((2, 40), step=1),
            sample.kept,
            sample.weights,
            spans_of(size, valid=valid, labelled=None, begins=None, required=None,
                     generator=generators[1]),
            drawn_scores(spans.float(), spans, [valid], generators[2]),
            combine(spans.float(), -spans.float(), valid, normalise="rank"),
        ]  # fmt: skip

    wanted = draws()
    with torch.device("meta"):
        found = draws()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found += draws()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, 2 * wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_streams_of_a_step_are_unrelated():
    draws = [torch.rand(5, generator=step_generator(0, 0, stream)) for stream in Stream]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(Stream)
    assert torch.equal(torch.rand(5, generator=step_generator(0, 0, Stream.SAMPLE)), draws[0])


def test_a_sample_does_not_draw_what_its_scores_have_drawn(monkeypatch: pytest.MonkeyPatch):
    """Else the weights, which take the draws to be independent of the scores, would be biased."""
    seeds: list[int] = []

    def score(given: ScoreInputs) -> Tensor:
        seeds.append(given.generator.initial_seed())
        return torch.rand(given.valid.shape, generator=given.generator)

    def sample(*args: Any, generator: torch.Generator, **options: Any) -> Any:
        seeds.append(generator.initial_seed())
        return select_sample(*args, generator=generator, **options)

    monkeypatch.setattr(fxseek.selecting, "select_sample", sample)
    model = fxseek.compile(TinyDecoder(TinyConfig()).train(), 0.25, score=score, select="sample")
    model(**batch(37, tokens=16, padding="none"))["loss"].backward()
    assert len(set(seeds)) == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree_and_nothing_waits():
    query, key = randn(BATCH, HEADS, TOKENS, WIDTH), randn(BATCH, KV_HEADS, TOKENS, WIDTH, seed=1)
    there = query.cuda(), key.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attention_column_sums(*there, is_causal=True)
        drawn = random_scores((3, 7), seed=1, step=2, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), attention_column_sums(query, key, is_causal=True))
    assert torch.equal(drawn.cpu(), random_scores((3, 7), seed=1, step=2))


# check_scores


def test_good_scores_pass():
    scores = torch.tensor([[1.0, -math.inf]], dtype=torch.bfloat16, requires_grad=True)
    every = torch.ones(1, 2, dtype=torch.bool)
    got = check_scores(scores, every)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert got.tolist() == [[1.0, -math.inf]]
    assert check_scores(torch.tensor([[1, 2]]), every).tolist() == [[1.0, 2.0]]
    assert check_scores(torch.tensor([[True, False]]), every).tolist() == [[1.0, 0.0]]
    assert check_scores(torch.zeros(1, 2).double(), every).dtype == torch.float64
    times = [1_700_000_000, 1_700_000_001]  # one and the same in float32
    assert check_scores(torch.tensor([times]), every).tolist() == [times]


def test_padding_may_hold_nan():
    scores = torch.tensor([[1.0, math.nan]])
    valid = torch.tensor([[True, False]])
    assert check_scores(scores, valid).tolist() == [[1.0, -math.inf]]


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0, 2.0], ["returned list", "[2, 3]", "torch.Tensor"]),
        (None, ["returned NoneType", "torch.Tensor"]),
        (torch.zeros(2, 3, dtype=torch.complex64), ["complex64", "scores.abs()"]),
        (torch.zeros(2, 3, 5), ["[2, 3, 5]", "[2, 3]", ".sum(-1)"]),
        (torch.zeros(3, 2), ["[3, 2]", "[2, 3]", ".mT"]),
        (torch.zeros(3), ["[3]", "[2, 3]", ".expand(batch, -1)"]),
        (torch.zeros(2, 2), ["[2, 2]", "[2, 3]", "shifted already"]),
        (torch.zeros(2, 7), ["[2, 7]", "[2, 3]", "one score per token"]),
        (torch.tensor([[0.0] * 3, [0.0, math.nan, math.inf]]), ["1 of 6", "row 1, token 1"]),
        (torch.tensor([[0.0] * 3, [0.0, 0.0, math.inf]]), ["1 are +inf", "row 1, token 2"]),
    ],
)
def test_bad_scores_are_explained(scores: object, words: list[str]):
    with pytest.raises(ScoreError) as error:
        check_scores(scores, torch.ones(2, 3, dtype=torch.bool))
    for word in words:
        assert word in str(error.value)


def test_score_inputs_are_a_record():
    inputs = ScoreInputs(
        input_ids=None,
        valid=torch.ones(1, 2, dtype=torch.bool),
        supervised=None,
        targets=None,
        hidden=None,
        step=3,
        generator=step_generator(0, 3, Stream.OWN_SCORE),
    )
    assert inputs.step == 3
    with pytest.raises(AttributeError):
        inputs.step = 4  # pyright: ignore[reportAttributeAccessIssue]


# ---- scorers -------------------------------------------------------------------------------------


def test_a_score_of_ones_own_file():
    """A registered scorer is built in: by name, with its parts in the report."""

    class Last(Scorer):
        parts = ("context",)

        def scores(self, given: ScoreInputs, parts: Any) -> Tensor:
            places = torch.arange(given.valid.shape[1], dtype=torch.float32)
            return places.expand(given.valid.shape).masked_fill(~given.valid, -math.inf)

        def mass(self, scores: Tensor, parts: Any, valid: Tensor) -> Tensor:
            return valid.float()

    scorer("last")(Last)
    try:
        model = fxseek.compile(TinyDecoder(TinyConfig()).train(), 0.25, score="last")
        model(**batch(37, tokens=16, padding="none"))["loss"].backward()
        report = fxseek.report(model)
        assert report.selected.tolist() == [[12, 13, 14, 15]] * len(report.selected)
        assert set(report.parts) == {"context"}
        assert report.context is report.parts["context"]
        shown = tokens_of(report, Words([f" w{i}" for i in range(37)])).scales
        assert [scale.name for scale in shown] == ["context", "combined"]
    finally:
        del SCORERS["last"]


def test_a_part_that_nothing_measures():
    class Wants(Scorer):
        parts = ("entropy",)
        scores = mass = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"Wants wants .*entropy"):
        scorer("wants")(Wants)
    assert "wants" not in SCORERS
