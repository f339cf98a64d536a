"""The rule law: a call that a rule takes for per-token commutes with selecting tokens.

Generated from the registry: for every rule and sample, perturbing one token moves no other row of
the result, and select-then-apply equals apply-then-select, in values and gradients. The opposite
law: calls that mix tokens get no plan, and the general path is exact for them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import Chains, has_tokens, rows_of
from graphs import (
    Captured,
    NodeMask,
    assert_equal_gradients,
    capture,
    dims_of,
    dynamic_dims,
    elements_of,
    evaluate,
    gradients,
    is_tensor,
    replay,
    selections,
    spelled,
    take,
)
from torch import Tensor, fx

from fxseek.errors import GraphError
from fxseek.passes.entries import Entries
from fxseek.passes.facts import Rows, descendants
from fxseek.passes.rules import RULES, Call, Rule, find_rule, operation

# Captured where every size is the same, then fed sizes that differ: only symbols tell them apart.
SIZES = {1: [(1, 11)], 5: [(5, 5), (3, 11)]}
APART = {1: (1, 11), 3: (3, 11)}


def rules() -> list[Rule]:
    """One record of each rule (a rule is registered under each of its names)."""
    return list({rule.function: rule for rule in RULES.values()}.values())


def tensors_for(
    specs: tuple[str, ...], batch: int, tokens: int, *, all_grad: bool, seed: int = 0
) -> list[Tensor]:
    """Inputs of a sample: the first requires grad (or the first float), the others may."""
    generator = torch.Generator().manual_seed(seed)
    made = [spelled(spec, batch, tokens, generator) for spec in specs]
    if made[0].is_floating_point():
        made[0] = made[0].sigmoid()  # in the domain of roots and logarithms
    floats = [tensor for tensor in made if tensor.is_floating_point()]
    for tensor in floats if all_grad else floats[:1]:
        tensor.requires_grad_()
    return made


def captured_call(
    function: Callable[..., Any], specs: tuple[str, ...], batch: int, tokens: int
) -> Captured:
    """The graph of a call whose first argument has the name of a model's token input."""

    def of_ids(input_ids: Tensor, *others: Tensor) -> Any:
        return function(input_ids, *others)

    def of_embeddings(inputs_embeds: Tensor, *others: Tensor) -> Any:
        return function(inputs_embeds, *others)

    call = of_ids if specs[0].startswith("int:") else of_embeddings
    inputs = tensors_for(specs, batch, tokens, all_grad=batch > 1)
    return capture(call, inputs, dynamic_dims(specs, batch), dims_of(specs[0]).index("t"))


def planned(captured: Captured, node: fx.Node) -> bool:
    """Whether a rule takes the node; asks it directly where nothing needs the node's plan."""
    if node in captured.facts.plans:
        return True
    if node in captured.facts.stream or not is_tensor(node):
        return False
    found = find_rule(node)
    assert found is not None
    plan = found.function(Call(node, captured.facts))
    if plan is None:
        return False
    captured.facts.plans[node] = plan
    captured.facts.rows[node] = plan.rows
    return True


def assert_law(captured: Captured, node: fx.Node, specs: tuple[str, ...], batch: int) -> None:
    """Both halves of the law for one node, on every size and selection."""
    rows = captured.facts.rows[node]
    assert isinstance(rows, (Rows, Entries)), f"{node.format_node()}: no tokens in the result"
    for size, tokens in SIZES[batch]:
        inputs = tensors_for(specs, size, tokens, all_grad=batch > 1)
        captured.feed(*inputs)
        values = evaluate(captured.graph, captured.inputs)
        full = values[node]
        for kept in selections(size, tokens):
            (found,) = replay(captured, [("rows", node)], values, kept, also=[node])
            wanted = take(full, rows, kept)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)
            assert found.requires_grad == full.requires_grad
            if full.requires_grad:
                slope = torch.randn(wanted.shape, dtype=wanted.dtype)
                assert_equal_gradients(
                    gradients(found, inputs, slope), gradients(wanted, inputs, slope)
                )
        assert_moves_own_row(captured, node, rows, inputs, full)


def assert_moves_own_row(
    captured: Captured, node: fx.Node, rows: Rows | Entries, inputs: list[Tensor], full: Tensor
) -> None:
    """Another value of one token of the first input moves that token's row alone."""
    first = inputs[0]
    sizes = captured.facts.shape(token_input(captured))
    token_dim = sizes.index(captured.facts.sizes.tokens)
    size, tokens = first.shape[0], first.shape[token_dim]
    for index in {0, size - 1}:
        at = (index * 7 + 2) % tokens
        moved = first.detach().clone()
        token = moved.select(token_dim, at)[index]
        token.copy_(1 - token if token.dtype == torch.int64 else token * 1.7 + 0.3)
        captured.feed(moved.requires_grad_(first.requires_grad), *inputs[1:])
        after = evaluate(captured.graph, captured.inputs)[node]
        marked = torch.zeros(size, tokens).bool()
        marked[index, at] = True
        moves = (after != full) & ~(after.isnan() & full.isnan())
        own = elements_of(marked, full.shape, rows)
        assert not (moves & ~own).any(), f"{node.format_node()} mixes tokens"


def has_places(captured: Captured, node: fx.Node) -> bool:
    """Whether each token's places in a value are the same whichever others are there.

    What is in the order of a sort, or numbers it, is tested by what is made of it.
    """
    rows = captured.facts.rows[node]
    return isinstance(rows, Rows) or (isinstance(rows, Entries) and rows.order is None)


def token_input(captured: Captured) -> fx.Node:
    """The placeholder of the first tensor."""
    names = ("L_inputs_embeds_", "L_input_ids_")
    return next(node for node in captured.graph.nodes if str(node.target) in names)


@pytest.mark.parametrize("batch", SIZES, ids=["one", "many"])
@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.function.__name__)
def test_law(rule: Rule, batch: int):
    if rule.needs:
        pytest.importorskip(rule.needs)
    called: set[str | None] = set()
    for sample in rule.samples:
        captured = captured_call(sample.function, sample.shapes, *SIZES[batch][0])
        nodes = [
            node
            for node in captured.graph.nodes
            if (found := find_rule(node)) is not None and found.function is rule.function
        ]
        reached = descendants([token_input(captured)])
        for node in reached.intersection(nodes):
            if operation(node) == "getitem" and not is_tensor(node.args[0]):
                continue
            called.add(operation(node))
            assert planned(captured, node), (
                f"{node.format_node()} takes the general path: "
                f"{captured.facts.general.get(node, 'not in the stream')}"
            )
            pieces = [node] if is_tensor(node) else list(node.users)
            for piece in pieces:
                for value in [piece] if has_places(captured, piece) else captured.results:
                    assert_law(captured, value, sample.shapes, batch)
    names = {name for name, other in RULES.items() if other.function is rule.function}
    assert called == names, f"no sample calls {sorted(names - called)}"


# ---- calls that mix tokens ---------------------------------------------------------------------


MIXING: dict[str, Callable[..., Any]] = {
    # over the tokens
    "softmax(x, 1)": lambda x: torch.softmax(x, 1),
    "x.softmax(-2)": lambda x: x.softmax(-2),
    "F.softmax(x, dim=1)": lambda x: F.softmax(x, dim=1),
    "log_softmax(-2)": lambda x: F.log_softmax(x, -2),
    "mean(1)": lambda x: x.mean(1),
    "mean(-2, keepdim)": lambda x: x.mean(-2, keepdim=True),
    "mean((1, 2))": lambda x: x.mean((1, 2)),
    "mean()": lambda x: x.mean(),
    "sum(0)": lambda x: x.sum(0) if x.shape[0] > 1 else x.sum(1),
    "sum((0, 2))": lambda x: x.sum((0, 2)) if x.shape[0] > 1 else x.sum((1, 2)),
    "sum([1])": lambda x: torch.sum(x, dim=[1]),
    "mean(axis=1)": lambda x: torch.mean(x, axis=1),  # type: ignore[call-overload]
    "sum(axis=1, keepdims)": lambda x: x.sum(axis=1, keepdims=True),
    "amax(1)": lambda x: x.amax(1),
    "max(1)": lambda x: x.max(1)[0],
    "min(dim=-2)": lambda x: x.min(dim=-2).values,
    "var(1)": lambda x: x.var(1),
    "var()": lambda x: x.var(),
    "var(True)": lambda x: x.var(True),
    "std(-2, True)": lambda x: x.std(-2, True),
    "logsumexp(1)": lambda x: torch.logsumexp(x, 1),
    "prod(1)": lambda x: x.prod(1),
    "norm(dim=1)": lambda x: x.norm(dim=1),
    "cumsum(1)": lambda x: x.cumsum(1),
    "cumsum(dim=-2)": lambda x: torch.cumsum(x, dim=-2),
    "cumprod(1)": lambda x: x.cumprod(1),
    "logcumsumexp(1)": lambda x: x.logcumsumexp(1),
    "flip(1)": lambda x: x.flip(1),
    "flip(-2)": lambda x: x.flip(-2),
    "flip(2, 1)": lambda x: x.flip(2, 1),
    "flip(-1, -2)": lambda x: x.flip(-1, -2),
    "flip((2, 1))": lambda x: x.flip((2, 1)),
    "torch.flip(dims=[1])": lambda x: torch.flip(x, dims=[1]),
    "roll(1, 1)": lambda x: x.roll(1, 1),
    "roll(1)": lambda x: x.roll(1),
    "sort(1)": lambda x: x.sort(1)[0],
    "sort(dim=1)": lambda x: torch.sort(x, dim=1)[0],
    "sort(stable, dim=1)": lambda x: torch.sort(x, stable=True, dim=1)[0],
    "topk(2, 1)": lambda x: x.topk(2, 1)[0],
    "topk(2, dim=-2)": lambda x: torch.topk(x, 2, dim=-2)[0],
    "normalize()": lambda x: F.normalize(x),
    "normalize(dim=1)": lambda x: F.normalize(x, 2.0, 1),
    "diff(dim=1)": lambda x: x.diff(dim=1),
    "layer_norm over tokens": lambda x: F.layer_norm(x, x.shape[1:]),
    "rms_norm over tokens": lambda x: F.rms_norm(x, x.shape[1:]),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 1),
    "instance_norm": lambda x: F.instance_norm(x.transpose(1, 2)),
    "pooling": lambda x: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1),
    "pad": lambda x: F.pad(x, (0, 0, 1, 0)),
    "tril": lambda x: x.tril(),
    # shapes that lose the token dimension, or take another order
    "view(b, 5, t)": lambda x: x.view(x.shape[0], 5, x.shape[1]),
    "transposed, reshape(b, t, 5)": lambda x: x.transpose(1, 2).reshape(x.shape),
    # parts of the tokens
    "x[:, 1:]": lambda x: x[:, 1:],
    "x[:, :-1]": lambda x: x[:, :-1],
    "x[:, ::2]": lambda x: x[:, ::2],
    "x[:, 0]": lambda x: x[:, 0],
    "x[:, -1]": lambda x: x[:, -1],
    "x[..., 1:, :]": lambda x: x[..., 1:, :],
    "x[:, [1, 0]]": lambda x: x[:, [1, 0]],
    "x[:, reversed]": lambda x: x[:, torch.arange(x.shape[1]).flip(0)],
    "narrow(1, 1, 2)": lambda x: x.narrow(1, 1, 2),
    "narrow(dim=-2)": lambda x: torch.narrow(x, dim=-2, start=0, length=2),
    "select(1, 0)": lambda x: x.select(1, 0),
    "select(-2, 1)": lambda x: x.select(-2, 1),
    "index_select(1)": lambda x: x.index_select(1, torch.arange(x.shape[1]).flip(0)),
    "gather(1)": lambda x: x.gather(1, torch.zeros(x.shape, dtype=torch.long)),
    "tensor_split(2, 1)": lambda x: x.tensor_split(2, 1)[0],
    # several copies of the tokens
    "cat(1)": lambda x: torch.cat((x, x), 1),
    "cat(dim=-2)": lambda x: torch.cat([x, -x], dim=-2),
    "cat(axis=1)": lambda x: torch.cat((x, x), axis=1),  # type: ignore[call-overload]
    "hstack": lambda x: torch.hstack((x, x)),
    "repeat_interleave(2)": lambda x: x.repeat_interleave(2),
    # products that contract the tokens
    "x.T @ x": lambda x: x.transpose(1, 2) @ x,
    "bmm(x.T, x)": lambda x: torch.bmm(x.transpose(1, 2), x),
    "baddbmm(x.T, x)": lambda x: torch.baddbmm(x.new_zeros(1, 5, 5), x.transpose(1, 2), x),
    "ones(t) @ x": lambda x: x.new_ones(x.shape[1]) @ x,
    "x.T @ ones(t)": lambda x: x.transpose(1, 2) @ x.new_ones(x.shape[1]),
    "linear over tokens": lambda x: F.linear(x.transpose(1, 2), x.new_ones(2, x.shape[1])),
    "einsum(btc,btd->bcd)": lambda x: torch.einsum("btc,btd->bcd", x, x),
    "einsum(btc->bc)": lambda x: torch.einsum("btc->bc", x),
    "addbmm": lambda x: torch.addbmm(x.new_zeros(x.shape[1], 5), x, x.new_ones(x.shape[0], 5, 5)),
    "conv1d": lambda x: F.conv1d(x.transpose(1, 2), x.new_ones(5, 5, 3), padding=1),
    "sdpa over features": lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3),
    # lookups in a table made of the tokens
    "embedding in tokens": lambda x: F.embedding(
        torch.zeros(x.shape[:2], dtype=torch.long), x.reshape(-1, 5)
    ),
    "embedding scaled by frequency": lambda x: F.embedding(
        torch.zeros(x.shape[:2], dtype=torch.long),
        x.mean((0, 1))[:, None],
        scale_grad_by_freq=True,
    ),
    "cross_entropy over tokens": lambda x: F.cross_entropy(
        x, torch.zeros(x.shape[0], 5, dtype=torch.long), reduction="none"
    ),
}

MIXING_BATCH: dict[str, Callable[..., Any]] = {
    "softmax(0)": lambda x: torch.softmax(x, 0),
    "x[1:]": lambda x: x[1:],
    "x[0]": lambda x: x[0],
    "cat(0)": lambda x: torch.cat((x, x)),
    "mean(0)": lambda x: x.mean(0),
    "mean(0, keepdim)": lambda x: x.mean(0, keepdim=True),
    "flip(0, 2)": lambda x: x.flip(0, 2),
    "cumsum(0)": lambda x: x.cumsum(0),
    "repeat(2, 1, 1)": lambda x: x.repeat(2, 1, 1),
    "repeat_interleave(2, 0)": lambda x: x.repeat_interleave(2, 0),
    "vstack": lambda x: torch.vstack((x, x)),
    "narrow(0, 0, 2)": lambda x: x.narrow(0, 0, 2),
    "select(0, 1)": lambda x: x.select(0, 1),
    "view(t, b, 5)": lambda x: x.view(x.shape[1], x.shape[0], 5),
    "token-major rows": lambda x: x.transpose(0, 1).reshape(-1, 5),
    "token-major flatten": lambda x: x.transpose(0, 1).flatten(0, 1),
    "token-major, reshape(b, t, 5)": lambda x: x.transpose(0, 1).reshape(x.shape),
    "einsum(btc->tc)": lambda x: torch.einsum("btc->tc", x),
    "einsum(btc,btd->td)": lambda x: torch.einsum("btc,btd->td", x, x),
    "packed softmax(0)": lambda x: x.view(-1, 5).softmax(0),
    "packed cumsum(0)": lambda x: x.view(-1, 5).cumsum(0),
    "packed mean(0)": lambda x: x.view(-1, 5).mean(0),
    "packed flip(0, 1)": lambda x: x.view(-1, 5).flip(0, 1),
    "packed x.T @ x": lambda x: x.view(-1, 5).T @ x.view(-1, 5),
    "packed x[1:]": lambda x: x.view(-1, 5)[1:],
    "packed, view(t, b, 5)": lambda x: x.view(-1, 5).view(x.shape[1], x.shape[0], 5),
    "packed, causal attention": lambda x: F.scaled_dot_product_attention(
        *[x.reshape(1, -1, 5)] * 3, is_causal=True
    ),
    "packed layer_norm": lambda x: F.layer_norm(x.view(-1, 5), (x.shape[0] * x.shape[1], 5)),
    "tokens first, softmax(0)": lambda x: x.transpose(0, 1).softmax(0),
    "tokens first, mean(1)": lambda x: x.transpose(0, 1).mean(1),
    "tokens first, layer_norm": lambda x: F.layer_norm(x.transpose(0, 1), (x.shape[0], 5)),
}


def assert_exact(captured: Captured, node: fx.Node, batch: int, *, packed: bool = True) -> None:
    """Replayed on selected tokens: the node's value, and gradients with every result masked."""
    size, tokens = APART[batch]
    inputs = [x for x in captured.inputs if isinstance(x, Tensor)]
    values = evaluate(captured.graph, captured.inputs)
    for kept in selections(size, tokens):
        (found,) = replay(captured, [("full", node)], values, kept)
        mask = NodeMask(kept, tokens, packed=packed)
        masked = evaluate(captured.graph, captured.inputs, mask)[node]
        torch.testing.assert_close(found, masked, rtol=1e-9, atol=1e-9)
        slope = torch.randn(masked.shape, dtype=masked.dtype)
        assert_equal_gradients(gradients(found, inputs, slope), gradients(masked, inputs, slope))


@pytest.mark.parametrize(
    ("batch", "group"), [(1, MIXING), (3, MIXING), (3, MIXING_BATCH)], ids=["one", "many", "batch"]
)
def test_calls_that_mix_tokens_have_no_plan(batch, group):
    def calls(inputs: Tensor) -> tuple[Any, ...]:
        x = inputs.exp()
        return tuple(call(x) for call in group.values())

    captured = captured_call(calls, ("b t 5",), *APART[batch])
    wrong = [
        f"{name}: {node.format_node()}"
        for name, node in zip(group, captured.results, strict=True)
        if node in captured.facts.plans
    ]
    assert not wrong, "\n".join(["taken for per-token:", *wrong])
    assert_all_exact(captured, list(group), batch)


# ---- every spelling, and calls that are easily misread -------------------------------------------

OPERANDS = ("b t 5", "b t 5", "t 5", "5 7", "b t", "int:b t 5")

SPELLED: dict[str, tuple[Callable[..., Any], ...]] = {
    "add": (
        lambda x, y, p, w, m, i: x + y,
        lambda x, y, p, w, m, i: torch.add(x, y),
        lambda x, y, p, w, m, i: x.add(y),
        lambda x, y, p, w, m, i: torch.add(input=x, other=y),
        lambda x, y, p, w, m, i: torch.add(x, y, alpha=2),
        lambda x, y, p, w, m, i: x.__radd__(y),
        lambda x, y, p, w, m, i: 2 + x,
        lambda x, y, p, w, m, i: p + x,
    ),
    "sub": (
        lambda x, y, p, w, m, i: x - y,
        lambda x, y, p, w, m, i: 2 - x,
        lambda x, y, p, w, m, i: torch.subtract(x, y),
        lambda x, y, p, w, m, i: torch.sub(p, x),
        lambda x, y, p, w, m, i: x.subtract(p),
    ),
    "rsub": (lambda x, y, p, w, m, i: torch.rsub(x, 2), lambda x, y, p, w, m, i: torch.rsub(x, p)),
    "mul": (
        lambda x, y, p, w, m, i: x * y,
        lambda x, y, p, w, m, i: torch.mul(x, y),
        lambda x, y, p, w, m, i: x.multiply(p),
        lambda x, y, p, w, m, i: x * m.unsqueeze(-1),
        lambda x, y, p, w, m, i: x * x.shape[1],
        lambda x, y, p, w, m, i: x * torch.tensor(2.0),
    ),
    "div": (
        lambda x, y, p, w, m, i: y / x,
        lambda x, y, p, w, m, i: 1 / x,
        lambda x, y, p, w, m, i: torch.div(p, x),
        lambda x, y, p, w, m, i: x.true_divide(3),
        lambda x, y, p, w, m, i: x / x.size(1),
    ),
    "pow": (
        lambda x, y, p, w, m, i: x**2,
        lambda x, y, p, w, m, i: 2**x,
        lambda x, y, p, w, m, i: torch.pow(x, 3),
        lambda x, y, p, w, m, i: x.pow(y),
        lambda x, y, p, w, m, i: torch.pow(2, x),
    ),
    "neg": (
        lambda x, y, p, w, m, i: -x,
        lambda x, y, p, w, m, i: torch.negative(x),
        lambda x, y, p, w, m, i: x.neg(),
    ),
    "matmul": (
        lambda x, y, p, w, m, i: x @ w,
        lambda x, y, p, w, m, i: torch.matmul(x, w),
        lambda x, y, p, w, m, i: x.matmul(w),
        lambda x, y, p, w, m, i: torch.matmul(x, w[:, 0]),
        lambda x, y, p, w, m, i: torch.matmul(x, other=w),
    ),
    "linear": (
        lambda x, y, p, w, m, i: F.linear(x, w.T),
        lambda x, y, p, w, m, i: F.linear(input=x, weight=w.T, bias=w[0]),
        lambda x, y, p, w, m, i: F.linear(weight=w.T, input=x),
    ),
    "softmax": (
        lambda x, y, p, w, m, i: F.softmax(x, -1),
        lambda x, y, p, w, m, i: F.softmax(x, dim=2, dtype=torch.float64),
        lambda x, y, p, w, m, i: torch.softmax(x, 2),
        lambda x, y, p, w, m, i: torch.softmax(input=x, dim=-1),
        lambda x, y, p, w, m, i: x.softmax(dim=-1),
        lambda x, y, p, w, m, i: x.softmax(-1, torch.float64),
    ),
    "mean": (
        lambda x, y, p, w, m, i: x.mean(-1),
        lambda x, y, p, w, m, i: x.mean([2], keepdim=True),
        lambda x, y, p, w, m, i: torch.mean(x, (-1,), True),
        lambda x, y, p, w, m, i: torch.mean(input=x, dim=-1),
        lambda x, y, p, w, m, i: torch.mean(x, axis=-1),  # type: ignore[call-overload]
        lambda x, y, p, w, m, i: x.mean(axis=2, keepdims=True),
    ),
    "sum": (
        lambda x, y, p, w, m, i: x.sum(2),
        lambda x, y, p, w, m, i: torch.sum(x, dim=-1, keepdim=True),
        lambda x, y, p, w, m, i: x.unsqueeze(1).sum((1, -1)),
    ),
    "var": (
        lambda x, y, p, w, m, i: x.var(-1, keepdim=True),
        lambda x, y, p, w, m, i: torch.var(x, dim=2, correction=0),
    ),
    "cumsum": (
        lambda x, y, p, w, m, i: x.cumsum(-1),
        lambda x, y, p, w, m, i: torch.cumsum(x, dim=2),
    ),
    "flip": (
        lambda x, y, p, w, m, i: x.flip(-1),
        lambda x, y, p, w, m, i: torch.flip(x, [2]),
        lambda x, y, p, w, m, i: x.flip(dims=(2,)),
        lambda x, y, p, w, m, i: x.unsqueeze(2).flip(2, 3),
    ),
    "cat": (
        lambda x, y, p, w, m, i: torch.cat((x, y), -1),
        lambda x, y, p, w, m, i: torch.cat([x, y], dim=2),
        lambda x, y, p, w, m, i: torch.concat((x, y), axis=-1),  # type: ignore[call-overload]
        lambda x, y, p, w, m, i: torch.cat(tensors=(x, y), dim=-1),
        lambda x, y, p, w, m, i: torch.concatenate((x, x, y), dim=-1),
    ),
    "stack": (
        lambda x, y, p, w, m, i: torch.stack((x, y)),
        lambda x, y, p, w, m, i: torch.stack((x, y), 1),
        lambda x, y, p, w, m, i: torch.stack([x, y], dim=-1),
        lambda x, y, p, w, m, i: torch.stack([x, y], -2),
    ),
    "where": (
        lambda x, y, p, w, m, i: torch.where(y > 0, x, 0.5),
        lambda x, y, p, w, m, i: x.where(y > 0, p),
        lambda x, y, p, w, m, i: torch.where(condition=m[..., None] > 0, input=x, other=y),
    ),
    "masked_fill": (
        lambda x, y, p, w, m, i: x.masked_fill(m[..., None] > 0, 0.5),
        lambda x, y, p, w, m, i: torch.masked_fill(x, p > 0, 0.5),
    ),
    "clamp": (
        lambda x, y, p, w, m, i: x.clamp(0.2, 0.7),
        lambda x, y, p, w, m, i: torch.clip(x, min=p),
        lambda x, y, p, w, m, i: x.clip(max=0.5),
    ),
    "transpose": (
        lambda x, y, p, w, m, i: x.transpose(1, 2),
        lambda x, y, p, w, m, i: torch.swapaxes(x, -1, 1),
        lambda x, y, p, w, m, i: x.swapdims(0, 1),
    ),
    "permute": (
        lambda x, y, p, w, m, i: x.permute(2, 0, 1),
        lambda x, y, p, w, m, i: x.permute((1, 0, 2)),
        lambda x, y, p, w, m, i: torch.permute(x, dims=(0, -1, 1)),
    ),
    "movedim": (
        lambda x, y, p, w, m, i: x.movedim(1, 0),
        lambda x, y, p, w, m, i: torch.moveaxis(x, (0, 1), (1, 2)),
    ),
    "reshape": (
        lambda x, y, p, w, m, i: x.view(*x.shape[:2], 5, 1),
        lambda x, y, p, w, m, i: x.reshape((x.shape[0], -1, 5, 1)),
        lambda x, y, p, w, m, i: torch.reshape(x, (-1, 5)),
        lambda x, y, p, w, m, i: x.view(-1, x.shape[-1]),
        lambda x, y, p, w, m, i: x.unsqueeze(0).reshape_as(y),
        lambda x, y, p, w, m, i: x.view(1, -1, 5),
        lambda x, y, p, w, m, i: x.view(1, -1, 5).view(x.shape[0], 1, -1, 5),
    ),
    "expand": (
        lambda x, y, p, w, m, i: x.unsqueeze(0).expand(2, -1, -1, -1),
        lambda x, y, p, w, m, i: x[:, :, :1].expand(x.shape),
    ),
    "broadcast_to": (
        lambda x, y, p, w, m, i: torch.broadcast_to(x[:, :, None], (*x.shape[:2], 2, 5)),
        lambda x, y, p, w, m, i: x.broadcast_to((2, *x.shape)),
    ),
    "expand_as": (lambda x, y, p, w, m, i: x[:, :, :1].expand_as(y),),
    "repeat": (
        lambda x, y, p, w, m, i: x.repeat(1, 1, 2),
        lambda x, y, p, w, m, i: x.repeat((2, 1, 1, 2)),
    ),
    "getitem": (
        lambda x, y, p, w, m, i: x[..., 1:3],
        lambda x, y, p, w, m, i: x[:, : x.shape[1], 0],
        lambda x, y, p, w, m, i: x[:, :, None, -2:],
        lambda x, y, p, w, m, i: x[None, ..., 1],
    ),
    "gather": (
        lambda x, y, p, w, m, i: x.gather(-1, i),
        lambda x, y, p, w, m, i: torch.gather(x, dim=2, index=i[..., :2]),
        lambda x, y, p, w, m, i: torch.gather(input=x, dim=2, index=i),
    ),
    "layer_norm": (
        lambda x, y, p, w, m, i: F.layer_norm(x, (5,)),
        lambda x, y, p, w, m, i: F.layer_norm(input=x, normalized_shape=[5], bias=w[:, 0]),
        lambda x, y, p, w, m, i: torch.layer_norm(x, [5], w[:, 0]),
    ),
    "clone": (
        lambda x, y, p, w, m, i: x.clone(),
        lambda x, y, p, w, m, i: torch.clone(input=x),
        lambda x, y, p, w, m, i: x.clone(memory_format=torch.contiguous_format),
    ),
    "to": (
        lambda x, y, p, w, m, i: x.to(torch.float32),
        lambda x, y, p, w, m, i: x.float(),
        lambda x, y, p, w, m, i: x.type(torch.float32),
        lambda x, y, p, w, m, i: x.float().type_as(y),
        lambda x, y, p, w, m, i: x.to(device="cpu", dtype=torch.float32),
        lambda x, y, p, w, m, i: x.float().to(y.dtype, copy=True),
    ),
    "einsum": (
        lambda x, y, p, w, m, i: torch.einsum("btc,cd->btd", x, w),
        lambda x, y, p, w, m, i: torch.einsum("btc,cd->dtb", [x, w]),
        lambda x, y, p, w, m, i: torch.einsum("b t c, b t c -> b c t", x, y),
    ),
}


@pytest.mark.parametrize("batch", [1, 3])
def test_every_spelling_has_the_same_plan(batch):
    calls = [(name, call) for name, spellings in SPELLED.items() for call in spellings]

    def all_calls(x: Tensor, *others: Tensor) -> tuple[Any, ...]:
        return tuple(call(x.exp(), *others) for _, call in calls)

    assert_planned_and_exact(all_calls, [name for name, _ in calls], batch)


ODD: dict[str, Callable[..., Any]] = {
    # one value over tokens, broadcast to all of them
    "minus the mean": lambda x, y, p, w, m, i: x - x.mean(1, keepdim=True),
    "over the norm": lambda x, y, p, w, m, i: x / x.norm(dim=1, keepdim=True),
    "added to the first": lambda x, y, p, w, m, i: x + x[:, :1],
    "the last, expanded": lambda x, y, p, w, m, i: x[:, -1:].expand_as(x) * y,
    "the first and itself": lambda x, y, p, w, m, i: torch.cat((x[:, :1].expand_as(x), x), -1),
    # tokens × tokens
    "outer product": lambda x, y, p, w, m, i: x[:, :, None] * y[:, None],
    "outer sum": lambda x, y, p, w, m, i: (x.unsqueeze(1) + y.unsqueeze(2)).sum(2),
    "outer sum, other way": lambda x, y, p, w, m, i: (x.unsqueeze(1) + y.unsqueeze(2)).sum(1),
    "attention": lambda x, y, p, w, m, i: (x @ y.mT).softmax(-1) @ x,
    "attention over rows": lambda x, y, p, w, m, i: (x @ y.mT).softmax(-2) @ x,
    "attention, transposed": lambda x, y, p, w, m, i: (x @ y.mT).softmax(-1).mT @ x,
    "attention of keys": lambda x, y, p, w, m, i: (y @ x.mT).softmax(-2).mT @ x,
    "columns summed": lambda x, y, p, w, m, i: (x @ y.mT).tanh().sum(1),
    "rows summed": lambda x, y, p, w, m, i: (x @ y.mT).tanh().sum(2),
    "einsum attention": lambda x, y, p, w, m, i: torch.einsum(
        "bts,bsc->btc", torch.einsum("btc,bsc->bts", x, y).softmax(-1), x
    ),
    "attention by multiplication": lambda x, y, p, w, m, i: (
        (x[:, :, None] * y[:, None]).sum(-1).softmax(-1)[..., None] * x[:, None]
    ).sum(2),
    "diagonal": lambda x, y, p, w, m, i: (x @ y.mT).diagonal(dim1=1, dim2=2),
    "lower triangle @ x": lambda x, y, p, w, m, i: x.new_ones(x.shape[1], x.shape[1]).tril() @ x,
    "relative bias": lambda x, y, p, w, m, i: (
        ((x @ y.mT) + (p @ p.mT).unsqueeze(0)).softmax(-1) @ x
    ),
    "square of the map": lambda x, y, p, w, m, i: ((x @ y.mT) @ (x @ y.mT)).tanh() @ x,
    # tokens first
    "first: linear": lambda x, y, p, w, m, i: F.linear(x.transpose(0, 1), w.T),
    "first: softmax": lambda x, y, p, w, m, i: x.transpose(0, 1).softmax(-1),
    "first: positions": lambda x, y, p, w, m, i: x.transpose(0, 1) + p[:, None],
    "first: row of the batch": lambda x, y, p, w, m, i: x.transpose(0, 1) * y.mean(1),
    "first: mean": lambda x, y, p, w, m, i: x.transpose(0, 1).mean(2),
    "first: cat": lambda x, y, p, w, m, i: torch.cat((x.transpose(0, 1), y.transpose(0, 1)), -1),
    "first: view": lambda x, y, p, w, m, i: x.transpose(0, 1).unflatten(2, (5, 1)),
    "first: weights per position": lambda x, y, p, w, m, i: (
        x.transpose(0, 1) @ p[:, :, None].expand(-1, -1, 4)
    ),
    "first: shared weights": lambda x, y, p, w, m, i: x.transpose(0, 1) @ w,
    "first: attention per position": lambda x, y, p, w, m, i: F.scaled_dot_product_attention(
        *[x.transpose(0, 1)] * 3
    ),
    "first: product per position": lambda x, y, p, w, m, i: (
        x.transpose(0, 1) @ y.transpose(0, 1).mT
    ),
    "features first": lambda x, y, p, w, m, i: x.permute(2, 1, 0) * p.T[:, :, None],
    "features first, softmax": lambda x, y, p, w, m, i: x.permute(2, 1, 0).softmax(0),
    "features first, bmm": lambda x, y, p, w, m, i: x.permute(2, 1, 0) @ y.permute(2, 0, 1),
    "weights per position": lambda x, y, p, w, m, i: x[:, :, None] @ p[:, :, None],
    "product per token": lambda x, y, p, w, m, i: x[:, :, None] @ y[..., None],
    "product of heads": lambda x, y, p, w, m, i: x[:, None] @ y[:, None].mT @ x[:, None],
    # packed
    "packed: linear": lambda x, y, p, w, m, i: F.linear(x.view(-1, 5), w.T),
    "packed: scaled": lambda x, y, p, w, m, i: x.view(-1, 5) * m.view(-1, 1),
    "packed: there and back": lambda x, y, p, w, m, i: (x.view(-1, 5) @ w).view(*x.shape[:2], 7),
    "packed: sort": lambda x, y, p, w, m, i: x.view(-1, 5).sort(-1)[0],
    "packed: sort of tokens": lambda x, y, p, w, m, i: x.view(-1, 5).sort(0)[0],
    "packed: flipped": lambda x, y, p, w, m, i: x.view(-1, 5).flip(0).view(x.shape) * y,
    "packed: attention": lambda x, y, p, w, m, i: F.scaled_dot_product_attention(
        *[x.reshape(1, -1, 5)] * 3
    ),
    "packed: heads first": lambda x, y, p, w, m, i: (
        x.view(-1, 5).T.reshape(5, *x.shape[:2]).permute(1, 2, 0)
    ),
    "token-major: linear": lambda x, y, p, w, m, i: (
        (x.transpose(0, 1).reshape(-1, 5) @ w).view(x.shape[1], x.shape[0], 7).transpose(0, 1)
    ),
    "token-major: scaled": lambda x, y, p, w, m, i: (
        (x.transpose(0, 1).reshape(-1, 5) * m.T.reshape(-1, 1)).tanh() @ w
    ).view(x.shape[1], x.shape[0], 7),
    "token-major: constants": lambda x, y, p, w, m, i: (
        (w[:, 0] * m.detach().T.reshape(-1, 1)).tanh().view(x.shape[1], x.shape[0], 5)
        + x.transpose(0, 1)
    ),
    "token-major: lookup": lambda x, y, p, w, m, i: (
        F.embedding(i[..., 0].T.reshape(-1), w).tanh().view(x.shape[1], x.shape[0], 7)
        + x[..., :1].transpose(0, 1)
    ),
    # shuffled
    "shifted": lambda x, y, p, w, m, i: torch.cat((x[:, -1:], x[:, :-1]), 1) * y,
    "padded": lambda x, y, p, w, m, i: F.pad(x, (0, 0, 1, 0))[:, :-1] * y,
    "rolled": lambda x, y, p, w, m, i: x.roll(1, 1) * y,
    "reversed": lambda x, y, p, w, m, i: x[:, torch.arange(x.shape[1]).flip(0)] * y,
    "scrambled": lambda x, y, p, w, m, i: x.mT.reshape(x.shape) * y,
    "strided": lambda x, y, p, w, m, i: x.cumsum(1)[:, : x.shape[1]].exp(),
    "windows": lambda x, y, p, w, m, i: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1) * y,
    "max over tokens": lambda x, y, p, w, m, i: x * x.max(1, keepdim=True)[0],
    "chosen by index": lambda x, y, p, w, m, i: x.gather(1, i.clamp(max=1)) * y,
    "added by index": lambda x, y, p, w, m, i: x.scatter_add(1, i, y),
    # entries of tokens, in an order or not
    "entries: flatten": lambda x, y, p, w, m, i: (x.flatten() * y.flatten()).view(x.shape),
    "entries: flatten, scan": lambda x, y, p, w, m, i: x.flatten(1).cumsum(1).view(x.shape),
    "entries: of features": lambda x, y, p, w, m, i: (
        x.flatten(1).view(x.shape[0], -1, 1) * w[0]
    ).view(*x.shape, 7),
    "entries: copies": lambda x, y, p, w, m, i: x.repeat(1, 2, 1).view(x.shape[0], 2, -1, 5),
    "entries: two orders": lambda x, y, p, w, m, i: (
        x.repeat_interleave(2, 1) * y.exp().repeat(1, 2, 1)
    ).view(*x.shape[:2], 2, 5),
    "entries: repeated, mixed": lambda x, y, p, w, m, i: (
        x.repeat_interleave(2, 1).softmax(1).view(*x.shape[:2], 2, 5)
    ),
    "entries: one row": lambda x, y, p, w, m, i: (x.tile((2, 1)) + p.tile((2, 1))).view(
        x.shape[0], 2, -1, 5
    ),
    "experts": lambda x, y, p, w, m, i: _experts(x, w, lambda entry, **_: entry.exp()),
    "experts: in the order's place": lambda x, y, p, w, m, i: _experts(
        x, w, lambda entry, perm, **_: entry * (perm + 1.0)[:, None]
    ),
    "experts: a share of all": lambda x, y, p, w, m, i: _experts(
        x, w, lambda entry, counts, keys, **_: entry * (counts / counts.sum())[keys, None]
    ),
    "experts: capacity": lambda x, y, p, w, m, i: _experts(x, w, _up_to_capacity),
    "experts: neighbours": lambda x, y, p, w, m, i: _experts(
        x, w, lambda entry, **_: entry.cumsum(0)
    ),
    "experts: tokens chosen by experts": lambda x, y, p, w, m, i: _chosen_by_experts(x, w),
    "scan and lookup": lambda x, y, p, w, m, i: F.linear(x.cumsum(1), w.T).cumsum(1).softmax(-1),
    # nothing to select from
    "weights alone": lambda x, y, p, w, m, i: (w @ w.T).sum() * x,
    "positions alone": lambda x, y, p, w, m, i: p.cumsum(0).softmax(-1) * x,
    "unused tokens": lambda x, y, p, w, m, i: p.tanh() @ w,
}


def _experts(x: Tensor, w: Tensor, expert: Callable[..., Tensor]) -> Tensor:
    """Two choices of each token in the order of the choices, and back."""
    rows = x.reshape(-1, x.shape[-1])
    gates, chosen = (rows @ w).topk(2, -1)
    keys, perm = chosen.reshape(-1).sort()
    counts = torch.histc(keys.double(), bins=7, min=0, max=6)
    entries = expert(rows[perm // 2], perm=perm, keys=keys, counts=counts)
    entries = (entries * gates.reshape(-1)[perm, None])[perm.argsort()]
    return entries.view(-1, 2, entries.shape[-1]).sum(1).view(x.shape)


def _up_to_capacity(entry: Tensor, *, keys: Tensor, counts: Tensor, **_: Tensor) -> Tensor:
    """Entries that come late in their group are dropped: that depends on all tokens."""
    start = counts.cumsum(0) - counts
    place = torch.arange(entry.shape[0]) - start[keys]
    return entry.exp() * (place < 4)[:, None]


def _chosen_by_experts(x: Tensor, w: Tensor) -> Tensor:
    """Each expert takes the tokens that suit it best."""
    rows = x.reshape(-1, x.shape[-1])
    gates, taken = (rows @ w).topk(3, 0)
    entries = rows[taken.reshape(-1)].exp() * gates.reshape(-1, 1)
    return torch.zeros_like(rows).index_add(0, taken.reshape(-1), entries).view(x.shape)


@pytest.mark.parametrize("batch", [1, 3])
def test_calls_that_are_easily_misread_are_exact(batch):
    def all_calls(x: Tensor, *others: Tensor) -> tuple[Any, ...]:
        return tuple(call(x.exp(), *others) for call in ODD.values())

    captured = captured_call(all_calls, OPERANDS, *APART[batch])
    assert_all_exact(captured, list(ODD), batch)


def assert_planned_and_exact(function: Callable[..., Any], names: list[str], batch: int) -> None:
    captured = captured_call(function, OPERANDS, *APART[batch])
    found = list(zip(names, captured.results, strict=True))
    wrong = [
        f"{name}: {node.format_node()} ({captured.facts.general.get(node)})"
        for name, node in found
        if node not in captured.facts.plans
    ]
    assert not wrong, "\n".join(["not taken for per-token:", *wrong])
    other = [f"{name}: {node.format_node()}" for name, node in found if operation(node) != name]
    assert not other, "\n".join(["spelled as another operation:", *other])
    assert_all_exact(captured, names, batch)


def assert_all_exact(captured: Captured, names: list[str], batch: int) -> None:
    failed = []
    for name, node in zip(names, captured.results, strict=True):
        try:
            assert_exact(captured, node, batch, packed="token-major" not in name)
        except (AssertionError, RuntimeError, IndexError, GraphError, TypeError) as error:
            failed.append(f"{name}: {type(error).__name__} {str(error)[:400]}")
    assert not failed, "\n".join(["not exact:", *failed])


# ---- random chains of calls ----------------------------------------------------------------------


def assert_chains_exact(seed: int, batch: int, steps: int = 40) -> None:
    """Every value of a random chain: as computed, with gradient through selected tokens alone."""
    chains = Chains(random.Random(seed), batch)
    chains.add(steps)
    size, tokens = APART[batch]
    specs = ("b t 5", "b t 5", "5 7", "t 5")

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(chains.run(inputs))

    try:
        captured = captured_call(call, specs, size, tokens)
    except GraphError as error:  # Dynamo compared a length with a number
        if "was captured as the constant" not in str(error):
            raise
        return
    if any(not polynomial(captured, node) for node in captured.results):
        return  # Dynamo could not simplify the sizes of a reshape
    leaves = [x for x in captured.inputs if isinstance(x, Tensor)]
    inputs = tensors_for(specs, size, tokens, all_grad=batch > 1)
    values = evaluate(captured.graph, captured.inputs)
    kept = selections(size, tokens)[1]
    known = [captured.facts.rows.get(node) for node in captured.results]
    entries = {i: rows for i, rows in enumerate(known) if isinstance(rows, Entries)}
    for i, rows in entries.items():
        labels = chains.steps[i].labels
        if "?" not in labels and sum(map(has_tokens, labels)) == 1:
            assert rows == rows_of(labels, batch), chains.story(i)
    wanted = chains.run(inputs, kept, entries)
    failed = []
    for index, (node, want) in enumerate(zip(captured.results, wanted, strict=True)):
        labels = chains.steps[index].labels
        if sum(has_tokens(label) for label in labels) > 1 or not want.requires_grad:
            continue
        try:
            (found,) = replay(captured, [("full", node)], values, kept)
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
            slope = torch.randn(want.shape, dtype=want.dtype)
            by_value = {id(leaf): i for i, leaf in enumerate(leaves)}
            assert len(by_value) == len(leaves)
            order = [_same_input(x, leaves) for x in inputs if x.requires_grad]
            assert_equal_gradients(
                [gradients(found, [x], slope)[0] if x is not None else None for x in order],
                gradients(want, inputs, slope),
            )
        except Exception as error:
            failed.append(f"{type(error).__name__} {str(error)[:300]}\n{chains.story(index)}")
            break
    assert not failed, "\n".join(failed)


def polynomial(captured: Captured, node: fx.Node) -> bool:
    """Whether all sizes are sums and products of lengths."""
    sizes = captured.facts.shape(node)
    return all(size.is_polynomial(*size.free_symbols) for size in sizes if size.free_symbols)


def _same_input(tensor: Tensor, leaves: list[Tensor]) -> Tensor | None:
    """The captured input of the same values (None where the graph does not read it)."""
    same = [x for x in leaves if x.shape == tensor.shape and torch.equal(x, tensor)]
    return same[0] if same else None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_random_chains(seed, batch):
    assert_chains_exact(seed, batch)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(100, 300))
def test_random_chains_at_length(seed, batch):
    assert_chains_exact(seed, batch)
