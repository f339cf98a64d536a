"""Random programs of per-token, mixing and unknown operations, against masks after every step.

The reference runs the same program eagerly with ``where(S, x, x.detach())`` after each result, by
the definition of masked full backprop: it knows neither graphs nor rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxseek
from fxseek.inspect.compare import compare

WIDTH, VOCAB = 6, 17
Mark = Callable[[Tensor], Tensor]


@torch.library.custom_op("fxseek_tests::blend", mutates_args=())
def blend(x: Tensor, weight: Tensor) -> Tensor:
    """An operation that no rule knows: each token takes from the one before it."""
    return x + weight * x.roll(1, 1)


@blend.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    back = slope + (slope * weight).roll(-1, 1)
    return back, (slope * x.roll(1, 1)).sum_to_size(weight.shape)


blend.register_autograd(_backward, setup_context=_save)


class Step(nn.Module):
    """One operation; `run(x, mark)` marks each result that has tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.4)
        self.more = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.4)
        self.bias = nn.Parameter(torch.randn(WIDTH) * 0.3)
        self.kernel = nn.Parameter(torch.randn(WIDTH, 1, 3) * 0.4)

    def forward(self, x: Tensor, mark: Mark) -> Tensor:
        return mark(OPERATIONS[self.name](self, x, mark))


def attention(s: Step, x: Tensor, mark: Mark) -> Tensor:
    q, k, v = (mark(F.linear(x, w)) for w in (s.weight, *s.more))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]


def heads(s: Step, x: Tensor, mark: Mark) -> Tensor:
    q, k, v = (mark(F.linear(x, w)).unflatten(-1, (2, 3)) for w in (s.weight, *s.more))
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def transposed_heads(s: Step, x: Tensor, mark: Mark) -> Tensor:
    """Keys first: the rows of the map are keys, the softmax runs over them."""
    q, k, v = (mark(F.linear(x, w)) for w in (s.weight, *s.more))
    return ((k @ q.mT).softmax(1).mT @ v).contiguous()


def convolution(s: Step, x: Tensor, mark: Mark) -> Tensor:
    padded = F.pad(x.mT, (2, 0))
    return F.conv1d(padded, s.kernel, groups=WIDTH).mT


def in_place(s: Step, x: Tensor, mark: Mark) -> Tensor:
    y = F.linear(x, s.weight)
    y += s.bias
    y.mul_(0.5)
    return F.relu(y, inplace=True)


def set_features(s: Step, x: Tensor, mark: Mark) -> Tensor:
    y = x * s.bias
    y[:, :, 1:3] = x[:, :, 2:4]
    return y


def without_grad(s: Step, x: Tensor, mark: Mark) -> Tensor:
    with torch.no_grad():
        gate = F.linear(x, s.weight).sigmoid()
        more = gate.split(3, -1)[0]
    return x * gate + F.linear(x, s.weight) * more[..., :1]


def hooked(s: Step, x: Tensor, mark: Mark) -> Tensor:
    y = F.linear(x, s.weight)
    if y.requires_grad:
        y.register_hook(lambda slope: slope * 1.5)
    return y


OPERATIONS: dict[str, Callable[[Step, Tensor, Mark], Tensor]] = {
    "linear": lambda s, x, mark: F.linear(x, s.weight, s.bias),
    "gated": lambda s, x, mark: F.silu(F.linear(x, s.weight)) * (x @ s.more[0]),
    "norm": lambda s, x, mark: F.layer_norm(x, (WIDTH,), s.bias),
    "packed": lambda s, x, mark: torch.addmm(s.bias, x.reshape(-1, WIDTH), s.weight).view_as(x),
    "swap": lambda s, x, mark: torch.cat(x.chunk(2, -1)[::-1], -1) * s.bias,
    "einsum": lambda s, x, mark: torch.einsum("btc,cd->btd", x, s.weight),
    "softmax": lambda s, x, mark: (x * s.bias).softmax(-1),
    "no grad": without_grad,
    "hooked": hooked,
    "detached": lambda s, x, mark: x.detach() * s.bias + x,
    "attention": attention,
    "heads": heads,
    "keys first": transposed_heads,
    "convolution": convolution,
    "in place": in_place,
    "features set": set_features,
    "cumsum": lambda s, x, mark: mark(x * s.bias).cumsum(1),
    "flip": lambda s, x, mark: x.flip(1) * s.bias,
    "roll": lambda s, x, mark: torch.roll(x, 1, 1) + x * s.bias,
    "mean": lambda s, x, mark: x + x.mean(1, keepdim=True) * s.bias,
    "over tokens": lambda s, x, mark: mark(x * s.bias).softmax(1),
    "first token": lambda s, x, mark: x * x[:, :1] + s.bias,
    "shift": lambda s, x, mark: torch.cat((x[:, :1], x[:, :-1]), 1) * s.bias,
    "linear attention": lambda s, x, mark: x @ (mark(x @ s.weight).mT @ mark(x @ s.more[0])) * 0.1,
    "unknown": lambda s, x, mark: blend(x, s.bias),
    "batch of matrices": lambda s, x, mark: torch.bmm(x, s.more[:1].expand(x.shape[0], -1, -1)),
    "position by position": lambda s, x, mark: (x.transpose(0, 1) @ s.weight).transpose(0, 1),
}


class Program(nn.Module):
    def __init__(self, names: list[str], *, shift: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.steps = nn.ModuleList(Step(name) for name in names)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.shift = shift

    def logits(self, input_ids: Tensor, mark: Mark) -> Tensor:
        x = mark(self.embed(input_ids))
        for step in self.steps:
            x = mark(x + step(x, mark))
        return mark(self.head(x))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(input_ids, lambda x: x)
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if self.shift else labels
        return {"loss": F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))}


def reference(program: Program, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    report = fxseek.report(program)
    chosen = torch.zeros_like(ids, dtype=torch.bool).scatter(1, report.selected, True)
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    weights.scatter_(1, report.selected, report.weights.double())

    def mark(x: Tensor) -> Tensor:
        shape = (*chosen.shape, *[1] * (x.dim() - 2))
        return torch.where(chosen.view(shape), x, x.detach())

    logits = program.logits(ids, mark)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if program.shift else labels
    losses = F.cross_entropy(logits.mT, targets, reduction="none") * weights
    kept = (chosen & (targets != -100)).sum().clamp(min=1)
    named = [(name, p) for name, p in program.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(
        losses.sum() / kept, [p for _, p in named], allow_unused=True, materialize_grads=True
    )
    return {name: gradient for (name, _), gradient in zip(named, found, strict=True)}


def assert_exact(
    names: list[str],
    *,
    rows: int,
    tokens: int,
    ratio: float,
    select: str,
    shift: bool,
    seed: int,
    frozen: int = 0,
    **options: Any,
) -> None:
    """`frozen`: so many steps, and the embedding, have no trained weights."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    program = Program(names, shift=shift).double().train()
    for part in [program.embed, *program.steps][: frozen and frozen + 1]:
        part.requires_grad_(False)
    ids = torch.randint(0, VOCAB, (rows, tokens))
    labels = ids.masked_fill(torch.rand(rows, tokens) < 0.3, -100)
    fxseek.compile(program, ratio, score="random", select=select, seed=seed, **options)
    program(input_ids=ids, labels=labels)["loss"].backward()
    gradients = {name: p.grad for name, p in program.named_parameters() if p.requires_grad}
    found = compare(gradients, reference(program, ids, labels))
    assert found.error <= 1e-9, f"gradient of {found.name} is off by {found.error:.2e}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation(name):
    assert_exact(
        [name, "linear"], rows=2, tokens=11, ratio=0.4, select="sample", shift=True, seed=3
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_on_frozen_weights(name):
    """The embedding and the operation have no gradient; what follows is trained."""
    assert_exact(
        [name, "attention", name], rows=2, tokens=11, ratio=0.4, select="topk", shift=True, seed=3,
        frozen=1,
    )  # fmt: skip


def test_hooks_before_an_attention():
    """The prefill has no gradient to hook."""
    assert_exact(
        ["hooked", "attention", "hooked", "heads"], rows=2, tokens=11, ratio=0.4, select="topk",
        shift=True, seed=3,
    )  # fmt: skip


PROGRAMS = st.lists(st.sampled_from(list(OPERATIONS)), min_size=1, max_size=5)


def random_program(data: st.DataObject) -> None:
    assert_exact(
        data.draw(PROGRAMS, label="operations"),
        rows=data.draw(st.sampled_from((1, 2, 3, 6)), label="rows"),
        tokens=data.draw(st.sampled_from((3, 6, 7, 13)), label="tokens"),
        ratio=data.draw(st.sampled_from((0.01, 0.3, 0.5, 1.0)), label="ratio"),
        select=data.draw(st.sampled_from(("topk", "sample")), label="select"),
        shift=data.draw(st.booleans(), label="shift"),
        seed=data.draw(st.integers(0, 99), label="seed"),
        frozen=data.draw(st.integers(0, 3), label="frozen"),
        recompute=data.draw(st.sampled_from(("none", "selective", "block")), label="recompute"),
        prefill_chunk=data.draw(st.sampled_from((None, 1, 4)), label="prefill_chunk"),
        chunk_bytes=data.draw(st.sampled_from((1 << 26, 1 << 9)), label="chunk_bytes"),
    )


UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)


@settings(max_examples=3, phases=UNSHRUNK, deadline=None)
@given(st.data())
def test_random_programs(data):
    random_program(data)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@settings(max_examples=300, phases=UNSHRUNK, deadline=None)
@given(st.data())
def test_random_programs_at_length(data):
    random_program(data)
