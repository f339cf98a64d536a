"""The general path and everything else in one model: bodies that people write.

Each is compared with masked full backprop operation by operation (`oracle`): attention of many
spellings, mixtures of experts, scans, convolutions, transforms, autograd functions, custom
operations, checkpointed regions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import TOKENS, VOCAB, WIDTH, Model, assert_exact, inputs_of, model_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect.compare import compare
from fxseek.passes.facts import where

Body = Callable[[Model, Tensor], Tensor]

# Dynamo makes an instance of an autograd function, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# ---- attention -----------------------------------------------------------------------------------


def merged_heads(m: Model, x: Tensor) -> Tensor:
    """Heads merged with the batch, as in older models."""
    b, t, _ = x.shape
    q = (x * m.scale).view(b, t, 2, 3).transpose(1, 2).reshape(b * 2, t, 3)
    scores = torch.bmm(q, q.transpose(1, 2)).softmax(-1)
    return torch.bmm(scores, q).view(b, 2, t, 3).transpose(1, 2).reshape(b, t, 6)


def alibi(m: Model, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q = (x * m.scale).view(b, t, 2, 3).transpose(1, 2).reshape(b * 2, t, 3)
    bias = (torch.arange(t)[None, None] * 0.1).expand(b * 2, 1, t).to(x.dtype)
    scores = torch.baddbmm(bias, q, q.transpose(1, 2), beta=1.0, alpha=0.5).view(b, 2, t, t)
    scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -1e30).softmax(-1)
    mixed = torch.bmm(scores.view(b * 2, t, t), q).view(b, 2, t, 3)
    return mixed.permute(0, 2, 1, 3).reshape(b, t, 6)


def tokens_first_heads(m: Model, x: Tensor) -> Tensor:
    """As torch.nn.functional.multi_head_attention_forward lays values out."""
    y = x.transpose(0, 1)
    t, b, c = y.shape
    q = (y * m.scale).reshape(t, b * 2, 3).transpose(0, 1)
    mixed = torch.bmm(torch.bmm(q, q.mT).softmax(-1), q).transpose(0, 1).reshape(t * b, c)
    return F.linear(mixed, m.first.weight).view(t, b, c).transpose(0, 1)


def relative_bias(m: Model, x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    apart = (at[:, None] - at[None]).abs().clamp(max=VOCAB - 1)
    return ((x @ x.mT) + m.embed(apart)[..., 0]).softmax(-1) @ x


def sinks(m: Model, x: Tensor) -> Tensor:
    """A column more than there are keys, dropped after the softmax."""
    scores = x @ (x * m.scale).mT
    sink = m.scale[:1].expand(x.shape[0], x.shape[1], 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)
    return weights[..., : x.shape[1]] @ x


def linear_attention(m: Model, x: Tensor) -> Tensor:
    q, k = (x * m.scale).softmax(-1), (x + m.scale).exp()
    states = torch.einsum("btc,btd->btcd", k, x).cumsum(1)
    norm = torch.einsum("btc,btc->bt", q, k.cumsum(1))
    return torch.einsum("btc,btcd->btd", q, states) / norm[..., None]


def cosine(m: Model, x: Tensor) -> Tensor:
    return F.cosine_similarity(x[:, :, None], x[:, None], -1).softmax(-1) @ x * m.scale


def distances(m: Model, x: Tensor) -> Tensor:
    return (-torch.cdist(x, x * m.scale + 1)).softmax(-1) @ x


def queries_of_parameters(m: Model, x: Tensor) -> Tensor:
    """A fixed number of learned queries read the tokens, and the tokens read them."""
    states = (m.first.weight @ x.mT).softmax(-1) @ x
    return (x @ states.mT).softmax(-1) @ states


def two_streams(m: Model, x: Tensor) -> Tensor:
    """One attention over tokens, one over features."""
    over_tokens = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
    over_features = F.scaled_dot_product_attention(x.mT, x.mT, (x * m.scale).mT).mT
    return over_tokens + over_features


# ---- experts, choices, orders --------------------------------------------------------------------


def dense_experts(m: Model, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    gates, chosen = (flat @ m.first.weight[:, :3]).softmax(-1).topk(2, -1)
    out = torch.zeros_like(flat)
    for index, layer in enumerate(m.layers):
        gate = (gates * (chosen == index)).sum(-1, keepdim=True)
        out = out + layer(flat) * gate
    return out.view(x.shape)


def dispatched_experts(m: Model, x: Tensor) -> Tensor:
    """Each expert sees the tokens that chose it: lengths that only the data tells."""
    flat = x.reshape(-1, WIDTH)
    gates, chosen = (flat @ m.first.weight[:, :3]).softmax(-1).topk(2, -1)
    out = torch.zeros_like(flat)
    for index, layer in enumerate(m.layers):
        token, slot = torch.where(chosen == index)
        out.index_add_(0, token, layer(flat[token]) * gates[token, slot, None])
    return out.view(x.shape)


def some_tokens(m: Model, x: Tensor) -> Tensor:
    """A layer over the tokens with the best scores, put back in their places."""
    scores = (x * m.scale).sum(-1)
    best = scores.topk(4, 1)[1]
    index = best[..., None].expand(-1, -1, WIDTH)
    y = m.first(x.gather(1, index)).tanh() * scores.gather(1, best).sigmoid()[..., None]
    return x.scatter(1, index, y)


def sorted_tokens(m: Model, x: Tensor) -> Tensor:
    order = x.detach().sum(-1).argsort(1)
    back = order.argsort(1)
    y = x.gather(1, order[..., None].expand_as(x)).cumsum(1)
    return y.gather(1, back[..., None].expand_as(x)) * m.scale


def segments(m: Model, x: Tensor) -> Tensor:
    index = torch.arange(x.shape[1]) // 2
    pooled = torch.zeros(x.shape[0], 6, WIDTH, dtype=x.dtype).index_add(1, index, x * m.scale)
    return pooled[:, index] + x


def pooled_where(m: Model, x: Tensor) -> Tensor:
    return torch.where(x[..., :1] > 0, x * m.scale, x.mean(1, keepdim=True))


def extremes(m: Model, x: Tensor) -> Tensor:
    best, _ = (x * m.scale).max(1, keepdim=True)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    spread, mean = torch.std_mean(x, -1, keepdim=True)
    return x * best + (low - high) * mean / (spread + 0.1)


# ---- transforms and scans ------------------------------------------------------------------------


def complex_rotation(m: Model, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex((x * m.scale).view(*x.shape[:2], 3, 2).contiguous())
    angle = torch.arange(x.shape[1]).double()[:, None] * torch.ones(3)
    turn = torch.polar(torch.ones(x.shape[1], 3, dtype=torch.float64), angle)
    return torch.view_as_real(pairs * turn[None]).flatten(2)


def fourier_mixing(m: Model, x: Tensor) -> Tensor:
    return torch.fft.fft(torch.fft.fft(x * m.scale, dim=-1), dim=1).real


def fourier_features(m: Model, x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x * m.scale, dim=-1) * m.scale[:4], n=WIDTH, dim=-1)


def lower_triangle(m: Model, x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() @ (x * m.scale)


def scans(m: Model, x: Tensor) -> Tensor:
    parts = [part.cumsum(1) for part in (x * m.scale).split([3, 3], -1)]
    return torch.logcumsumexp(torch.cat(parts, -1), 1)


def norms_over_tokens(m: Model, x: Tensor) -> Tensor:
    y = F.layer_norm(x.mT, x.shape[1:2]).mT * m.scale
    return F.group_norm(y.reshape(-1, WIDTH), 2).view(x.shape)


def windows(m: Model, x: Tensor) -> Tensor:
    parts = F.unfold(x[:, None], (3, WIDTH), padding=(1, 0)).mT.unflatten(-1, (3, WIDTH))
    return (parts * m.scale).sum(2)


def twice_as_long(m: Model, x: Tensor) -> Tensor:
    return F.interpolate((x * m.scale).mT, scale_factor=2).mT[:, ::2]


def without_some_gradient(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = (x * m.scale).sigmoid().cumsum(1)
    return x * gate + x.detach().roll(1, 1)


# ---- operations that no rule can know ------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return slope * weight * 2, (slope * x).sum((0, 1))


class Scanned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope.flip(1).cumsum(1).flip(1) * 1.5


def own_function(m: Model, x: Tensor) -> Tensor:
    # the mode that marks results does not see those of autograd functions; it does those of sums
    return Scanned.apply(Doubled.apply(x, m.scale) + 1) + 1  # type: ignore[operator]


@torch.library.custom_op("fxseek_tests::rolled_and_summed", mutates_args=())
def rolled_and_summed(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.roll(1, 1) * 2, x.sum(1)


@rolled_and_summed.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2])


rolled_and_summed.register_autograd(
    lambda ctx, rolled, summed: (rolled * 2).roll(-1, 1) + summed[:, None]
)


def custom_operation(m: Model, x: Tensor) -> Tensor:
    rolled, summed = rolled_and_summed(x * m.scale)
    return rolled * summed[:, None]


def checkpointed(m: Model, x: Tensor) -> Tensor:
    def region(y: Tensor) -> Tensor:
        q, k = m.last(y), m.first(y)
        return (q @ k.mT).softmax(-1) @ (y * m.scale)

    return checkpoint(region, x, use_reentrant=False)  # type: ignore[return-value]


def function_in_a_checkpoint(m: Model, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return Scanned.apply(y * m.scale)  # type: ignore[return-value]

    def outer(y: Tensor) -> Tensor:
        return checkpoint(inner, m.last(y), use_reentrant=False) + y  # type: ignore[operator]

    return checkpoint(outer, x, use_reentrant=False)  # type: ignore[return-value]


BODIES: list[Body] = [
    merged_heads,
    alibi,
    tokens_first_heads,
    relative_bias,
    sinks,
    linear_attention,
    cosine,
    distances,
    queries_of_parameters,
    two_streams,
    some_tokens,
    sorted_tokens,
    segments,
    pooled_where,
    extremes,
    complex_rotation,
    fourier_mixing,
    fourier_features,
    lower_triangle,
    scans,
    norms_over_tokens,
    windows,
    twice_as_long,
    without_some_gradient,
    own_function,
    custom_operation,
    checkpointed,
    function_in_a_checkpoint,
]
PACKED_OTHERWISE = (tokens_first_heads,)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_body(body):
    assert_exact(model_of(body), packed=body not in PACKED_OTHERWISE)


@pytest.mark.parametrize("body", [dense_experts, dispatched_experts], ids=lambda b: b.__name__)
def test_experts(body):
    layers = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
    assert_exact(model_of(body, *layers))


LAYERS: dict[str, tuple[nn.Module, Body]] = {
    "Conv1d": (nn.Conv1d(6, 6, 3, padding=1), lambda m, x: m.layers[0](x.mT).mT),
    "Conv2d": (nn.Conv2d(1, 1, 3, padding=1), lambda m, x: m.layers[0](x[:, None])[:, 0]),
    "Bilinear": (nn.Bilinear(6, 6, 6), lambda m, x: m.layers[0](x, x * m.scale)),
    "MultiheadAttention": (
        nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda m, x: m.layers[0](x, x, x, need_weights=False)[0],
    ),
    "MultiheadAttention with weights": (
        nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda m, x: m.layers[0](x, x, x)[0],
    ),
    "MultiheadAttention, tokens first": (
        nn.MultiheadAttention(WIDTH, 2),
        lambda m, x: m.layers[0](*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
    ),
    "TransformerEncoderLayer": (
        nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True),
        lambda m, x: m.layers[0](x),
    ),
    "TransformerEncoderLayer, norm first": (
        nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True, norm_first=True),
        lambda m, x: m.layers[0](x),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer, body = LAYERS[name]
    assert_exact(model_of(body, layer), packed=False)


@pytest.mark.parametrize("body", [merged_heads, segments, own_function], ids=lambda b: b.__name__)
def test_a_batch_of_one(body):
    assert_exact(model_of(body), batch=1)


def bias_of_lags(m: Model, x: Tensor) -> Tensor:
    """Learned slopes, as ALiBi's: the bias of a key is that of its place, for all queries."""
    bias = m.scale[:, None, None] * torch.arange(x.shape[1])
    q = x[:, None] * m.scale[:, None, None]
    return ((q @ q.mT + bias).softmax(-1) @ q).sum(1)


def keys_of_places(m: Model, x: Tensor) -> Tensor:
    places = m.layers[0](torch.arange(x.shape[1]))
    return (x @ places.T).softmax(-1) @ x


def keys_of_a_batch_of_places(m: Model, x: Tensor) -> Tensor:
    places = m.layers[0](torch.arange(x.shape[1])[None])
    return (x @ places.mT).softmax(-1) @ x


def places_are_added(m: Model, x: Tensor) -> Tensor:
    x = x + m.layers[0](torch.arange(x.shape[1])[None])
    return (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize(
    "body",
    [bias_of_lags, keys_of_places, keys_of_a_batch_of_places, places_are_added],
    ids=lambda b: b.__name__,
)
def test_a_batch_of_one_shares_what_a_larger_batch_would(body):
    """The gradient of a row's loss is that of the same row twice."""
    torch.manual_seed(1)
    places = nn.Embedding(TOKENS, WIDTH)
    gradients = []
    for rows in (1, 2):
        torch._dynamo.reset()
        model = fxseek.compile(model_of(body, copy.deepcopy(places)), "labelled")
        model(**{name: x.repeat(rows, 1) for name, x in inputs_of(1).items()})["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    found = compare(*gradients)
    assert found.error <= 1e-9, f"gradient of {found.name} is off by {found.error:.2e}"
    torch._dynamo.reset()
    assert_exact(model_of(body, places), batch=1)


def test_what_took_the_general_path_is_named():
    model = model_of(own_function)
    assert_exact(model)
    step = step_of(model)
    assert step is not None
    facts = step.recorder.steps[0].program.facts
    assert facts is not None
    named = [where(node) for node in facts.general]
    assert named
    assert all("Scanned.apply(Doubled.apply(x, m.scale) + 1)" in line for line in named)


def test_a_transform_that_hides_a_dimension_is_refused():
    def body(m: Model, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: (row * m.scale).cumsum(0))(x)

    model = fxseek.compile(model_of(body), 0.4, score="random")
    with pytest.raises(fxseek.GraphError, match=r"torch\.func.*test_general\.py.*vmap"):
        model(**inputs_of())
