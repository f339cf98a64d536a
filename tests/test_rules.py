"""The rule law: a call that a rule takes for per-token commutes with selecting tokens.

Generated from the registry: for every rule and sample, perturbing one token moves no other row of
the result, and select-then-apply equals apply-then-select, in values and gradients. The opposite
law: calls that mix tokens get no plan, and the general path is exact for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import (
    Captured,
    assert_equal_gradients,
    capture,
    dims_of,
    dynamic_dims,
    evaluate,
    example,
    elements_of,
    gradients,
    is_tensor,
    node_mask,
    replay,
    selections,
    spelled,
    take,
)
from torch import Tensor, fx

from fxseek.passes.facts import Rows
from fxseek.passes.rules import RULES, Call, Rule, Sample, find_rule, operation

# Captured where every size is the same, then fed sizes that differ: only symbols tell them apart.
SIZES = {1: [(1, 11)], 5: [(5, 5), (3, 11)]}
APART = {1: (1, 11), 3: (3, 11)}


def rules() -> list[Rule]:
    """One record of each rule (a rule is registered under each of its names)."""
    return list({rule.function: rule for rule in RULES.values()}.values())


CASES = [
    pytest.param(rule, sample, batch, id=f"{rule.function.__name__}-{index}-{batch}")
    for rule in rules()
    for index, sample in enumerate(rule.samples)
    for batch in SIZES
]


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

    if specs[0].startswith("int:"):

        def call(input_ids: Tensor, *others: Tensor) -> Any:
            return function(input_ids, *others)

    else:

        def call(inputs_embeds: Tensor, *others: Tensor) -> Any:
            return function(inputs_embeds, *others)

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
    assert isinstance(rows, Rows), f"{node.format_node()}: no tokens in the result"
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
    captured: Captured, node: fx.Node, rows: Rows, inputs: list[Tensor], full: Tensor
) -> None:
    """Another value of one token of the first input moves that token's row alone."""
    first = inputs[0]
    size, token_dim = first.shape[0], example_rows(captured)
    tokens = first.shape[token_dim]
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


def example_rows(captured: Captured) -> int:
    """The token dimension of the first tensor input."""
    sizes = captured.facts.sizes
    for node in captured.graph.nodes:
        if node.op == "placeholder" and str(node.target) in ("L_inputs_embeds_", "L_input_ids_"):
            return sizes.shape(example(node)).index(sizes.tokens)
    raise AssertionError("no token input")


@pytest.mark.parametrize(("rule", "sample", "batch"), CASES)
def test_law(rule: Rule, sample: Sample, batch: int):
    captured = captured_call(sample.function, sample.shapes, *SIZES[batch][0])
    nodes = [
        node
        for node in captured.graph.nodes
        if (found := find_rule(node)) is not None and found.function is rule.function
    ]
    assert nodes, f"the sample calls no operation of its rule {rule.function.__name__}"
    for node in nodes:
        if operation(node) == "getitem" and not is_tensor(node.args[0]):
            continue
        assert planned(captured, node), (
            f"{node.format_node()} takes the general path: "
            f"{captured.facts.general.get(node, 'not in the stream')}"
        )
        pieces = [node] if is_tensor(node) else list(node.users)
        for piece in pieces:
            assert_law(captured, piece, sample.shapes, batch)


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
    "flatten()": lambda x: x.flatten(),
    "flatten(1)": lambda x: x.flatten(1),
    "reshape(b, -1)": lambda x: x.reshape(x.shape[0], -1),
    "view(b, 5, t)": lambda x: x.view(x.shape[0], 5, x.shape[1]),
    "transposed, reshape(b, t, 5)": lambda x: x.transpose(1, 2).reshape(x.shape),
    "reshape(-1, 1)": lambda x: x.reshape(-1, 1),
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
    "repeat(1, 2, 1)": lambda x: x.repeat(1, 2, 1),
    "repeat_interleave(2, 1)": lambda x: x.repeat_interleave(2, 1),
    "repeat_interleave(2)": lambda x: x.repeat_interleave(2),
    "tile((2, 1))": lambda x: x.tile((2, 1)),
    # products that contract the tokens
    "x.T @ x": lambda x: x.transpose(1, 2) @ x,
    "bmm(x.T, x)": lambda x: torch.bmm(x.transpose(1, 2), x),
    "baddbmm(x.T, x)": lambda x: torch.baddbmm(x.new_zeros(1, 5, 5), x.transpose(1, 2), x),
    "ones(t) @ x": lambda x: x.new_ones(x.shape[1]) @ x,
    "x.T @ ones(t)": lambda x: x.transpose(1, 2) @ x.new_ones(x.shape[1]),
    "linear over tokens": lambda x: F.linear(x.transpose(1, 2), x.new_ones(2, x.shape[1])),
    "einsum(btc,btd->bcd)": lambda x: torch.einsum("btc,btd->bcd", x, x),
    "einsum(btc->bc)": lambda x: torch.einsum("btc->bc", x),
    "addbmm": lambda x: torch.addbmm(
        x.new_zeros(x.shape[1], 5), x, x.new_ones(x.shape[0], 5, 5)
    ),
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
    "tokens first, layer_norm": lambda x: F.layer_norm(
        x.transpose(0, 1), (x.shape[0], 5)
    ),
}


def assert_exact(
    captured: Captured, node: fx.Node, batch: int, *, packed: bool = True
) -> None:
    """Replayed on selected tokens: the node's value, and gradients with every result masked."""
    size, tokens = APART[batch]
    inputs = [x for x in captured.inputs if isinstance(x, Tensor)]
    values = evaluate(captured.graph, captured.inputs)
    for kept in selections(size, tokens):
        (found,) = replay(captured, [("full", node)], values, kept)
        mask = node_mask(kept, tokens, packed=packed)
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
    failed = []
    for name, node in zip(group, captured.results, strict=True):
        try:
            assert_exact(captured, node, batch, packed="token-major" not in name)
        except (AssertionError, RuntimeError, IndexError) as error:
            failed.append(f"{name}: {type(error).__name__} {str(error)[:300]}")
    assert not failed, "\n".join(["the general path is wrong:", *failed])
