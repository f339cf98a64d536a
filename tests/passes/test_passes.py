"""Each pass on a small graph, with the graph that it makes spelled out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from graphs import Captured, capture, carrying_nodes
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fxseek.ops.masks import MaskMaker
from fxseek.passes.ditch import ditch
from fxseek.passes.entries import Entries, moved_rows
from fxseek.passes.extract import extract
from fxseek.passes.facts import KEPT, Rows, Sizes
from fxseek.passes.functionalise import functionalise
from fxseek.passes.groups import join_groups
from fxseek.passes.hoist import hoist_gathers
from fxseek.passes.inline import inline
from fxseek.passes.ir import Gathered, Piece
from fxseek.passes.joins import join_writes
from fxseek.passes.masks import use_mask_rows
from fxseek.passes.normalise import normalise
from fxseek.passes.structure import find_structure
from fxseek.passes.unshift import unshift

BATCH, TOKENS, WIDTH = 3, 7, 10


def text(graph: fx.Graph) -> str:
    """A graph, a line for each operation; inputs by the names of the arguments."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []

    def short(name: str) -> str:
        name = name.removeprefix("l_").replace("__", "_").rstrip("_")
        return name.replace("scaled_dot_product_attention", "sdpa")

    def spell(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, Rows):
            return f"Rows{tuple(value[: 4 if value.packed or value.heads > 1 else 2])}"
        if isinstance(value, (tuple, list)):
            inside = ", ".join(spell(item) for item in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if isinstance(value, slice):
            return ":".join("" if x is None else spell(x) for x in (value.start, value.stop))
        return "..." if value is ... else str(value)

    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = short(node.name)
            if isinstance(node.meta.get("example_value"), torch.SymInt):
                names[node] = "size"
            continue
        arguments = [spell(x) for x in node.args]
        arguments += [f"{key}={spell(value)}" for key, value in node.kwargs.items()]
        names[node] = short(node.name)
        if node.op == "output":
            lines.append(f"return {spell(node.args[0])}")
            continue
        called = short(node.target if isinstance(node.target, str) else node.target.__name__)
        lines.append(f"{names[node]} = {called}({', '.join(arguments)})")
    return "\n".join(lines)


def same(graph: fx.Graph, wanted: str) -> None:
    wanted = wanted.replace("DEFAULTS", _DEFAULTS)
    assert text(graph) == textwrap.dedent(wanted).strip()


_DEFAULTS = "dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, batch_dim=0"


def drop_dead_code(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64, requires_grad=True)


def captured(function: Callable[..., Any], *tensors: Tensor, token_dim: int = 1) -> Captured:
    """Capture with dynamic tokens and a dynamic batch in tensors that have them."""
    dims = []
    for tensor in tensors:
        sizes = list(tensor.shape)
        dims.append([i for i, size in enumerate(sizes) if size in (BATCH, TOKENS)])
    return capture(function, tensors, dims, token_dim)


def hidden() -> Tensor:
    return ones(BATCH, TOKENS, WIDTH)


def weight() -> Tensor:
    return ones(WIDTH, WIDTH)


def ditched(made: Captured, wanted: str = "rows") -> Piece:
    """The learn stage of a graph with one result."""
    (result,) = made.results
    carrying = carrying_nodes(made.graph)
    return ditch(made.graph, made.facts, carrying=carrying, outputs=[(wanted, result)])


def by_name(made: Captured, name: str) -> fx.Node:
    return next(node for node in made.graph.nodes if node.name == name)


# ---- pass by pass --------------------------------------------------------------------------------


def test_inline():
    def body(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(lambda y: F.silu(F.linear(y, w)), x, use_reentrant=False) * 2  # type: ignore[operator]

    made = captured(body, hidden(), weight())
    same(
        inline(made.raw),
        """
        linear = linear(x, w)
        silu = silu(linear)
        mul = mul(silu, 2)
        return (mul)
        """,
    )


def test_functionalise():
    def body(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        y += 1
        y[:, 0] = 0
        F.relu(y, inplace=True)
        return y * x

    same(
        functionalise(captured(body, hidden(), weight()).raw).graph,
        """
        y = linear(x, w)
        add = add(y, 1)
        set_item = set_item(add, (:, 0), 0)
        relu = relu(set_item, False)
        mul = mul(relu, x)
        return (mul)
        """,
    )


def test_normalise_spellings():
    def body(x: Tensor, w: Tensor) -> Tensor:
        y = torch.add(x.float(), 1).double()
        y = y.matmul(w).view(x.size(0), -1, WIDTH)
        return F.softmax(y, dim=-1, _stacklevel=3).mean(axis=-1, keepdims=True)  # pyright: ignore

    made = captured(body, hidden(), weight())
    same(
        normalise(functionalise(made.raw).graph),
        """
        float_1 = to(x, torch.float32)
        add = add(float_1, 1)
        y = to(add, torch.float64)
        matmul = matmul(y, w)
        y_1 = view(matmul, size, -1, 10)
        softmax = softmax(y_1, -1)
        mean = mean(softmax, dim=-1, keepdim=True)
        return (mean)
        """,
    )


def test_normalise_takes_keys_before_they_are_repeated():
    def body(q: Tensor, k: Tensor) -> Tensor:
        batch, heads, tokens, width = k.shape
        repeated = k[:, :, None].expand(batch, heads, 2, tokens, width)
        repeated = repeated.reshape(batch, heads * 2, tokens, width)
        return F.scaled_dot_product_attention(q, repeated, repeated)

    made = captured(body, ones(BATCH, 4, TOKENS, 5), ones(BATCH, 2, TOKENS, 5), token_dim=2)
    graph = normalise(functionalise(made.raw).graph)
    drop_dead_code(graph)
    same(
        graph,
        """
        sdpa = sdpa(q, k, k, enable_gqa=True)
        return (sdpa)
        """,
    )


def test_join_writes():
    def body(x: Tensor, y: Tensor) -> Tensor:
        joined = x.new_empty(*x.shape[:-1], 13)
        joined[..., 3:].copy_(x)
        joined[:, :, :3] = y[..., :3]
        partly = torch.zeros_like(x)
        partly[..., 2:].copy_(x[..., 2:])
        return joined.sum(-1) + partly.sum(-1)

    graph = join_writes(captured(body, hidden(), hidden()).graph)
    drop_dead_code(graph)
    lines = text(graph).splitlines()
    assert "cat = cat((getitem_4, x), 2)" in lines
    assert [line for line in lines if "set_item(" in line and "partly" in line]
    assert not [line for line in lines if "new_empty" in line]


def test_join_groups():
    def body(x: Tensor, w: Tensor) -> Tensor:
        x = x.reshape(-1, WIDTH)
        chosen = x[:, :3].topk(2, -1)[1]
        counts = torch.zeros(x.shape[0], 3).scatter(1, chosen, 1).long().sum(0).tolist()
        pieces = x[chosen.flatten().argsort() // 2].split(counts)
        return torch.cat([F.linear(piece, w[i]) for i, piece in enumerate(pieces)]) * 2

    graph = join_groups(captured(body, hidden(), ones(3, 4, WIDTH)).graph)
    drop_dead_code(graph)
    assert text(graph).splitlines()[-4:] == [
        "count_keys = count_keys(chosen, 3)",
        "grouped_linear = grouped_linear(getitem_8, w, count_keys)",
        "mul = mul(grouped_linear, 2)",
        "return (mul)",
    ]


def test_unshift():
    def body(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, w)[..., :-1, :].reshape(-1, WIDTH)
        return F.cross_entropy(logits, labels[..., 1:].reshape(-1))

    made = captured(body, hidden(), weight(), torch.ones(BATCH, TOKENS, dtype=torch.int64))
    graph = unshift(made.graph, made.facts.sizes)
    drop_dead_code(graph)
    same(
        graph,
        """
        linear = linear(x, w)
        reshape = reshape(linear, (-1, 10))
        next_labels = next_labels(labels, -100)
        reshape_2 = reshape(next_labels, (-1))
        cross_entropy = cross_entropy(reshape, reshape_2)
        return (cross_entropy)
        """,
    )


def scan_and_attend(x: Tensor, w: Tensor) -> Tensor:
    h = F.linear(x, w)
    k = torch.cumsum(h, 1)
    return F.scaled_dot_product_attention(h, k, x) * 2


def test_ditch():
    stage = ditched(captured(scan_and_attend, hidden(), weight()))
    same(
        stage.graph,
        """
        x_rows = gather_rows(x, kept, Rows(1, 0))
        h = linear(x_rows, w)
        h_all = scatter_rows(h_full, h, kept, Rows(1, 0), filled)
        k = cumsum(h_all, 1)
        k_rows = gather_rows(k, kept, Rows(1, 0))
        k_all = scatter_rows(k_full, k_rows, kept, Rows(1, 0), filled)
        sdpa = attend_rows(h, k_all, x, kept, DEFAULTS)
        mul = mul(sdpa, 2)
        return (mul)
        """,
    )
    assert [node.name for node in stage.general] == ["k"]


def test_ditch_gives_full_outputs():
    def body(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    stage = ditched(captured(body, hidden(), weight()), "full")
    same(
        stage.graph,
        """
        x_rows = gather_rows(x, kept, Rows(1, 0))
        linear = linear(x_rows, w)
        linear_all = scatter_rows(linear_full, linear, kept, Rows(1, 0), filled)
        return (linear_all)
        """,
    )


def test_hoist():
    def body(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        h = F.linear(x, w)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=mask)

    mask = torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)
    made = captured(body, hidden(), weight(), mask)
    stage = hoist_gathers(ditched(made))
    same(
        stage.graph,
        """
        x_rows = gather_rows(x, kept, Rows(1, 0))
        h = linear(x_rows, w)
        h_all = scatter_rows(h_full, h, kept, Rows(1, 0), filled)
        sdpa = attend_rows(h, h_all, h_all, kept, DEFAULTS, mask=mask_rows_1)
        return (sdpa)
        """,
    )
    gathered = [item for item in stage.inputs if isinstance(item, Gathered)]
    assert [(x.node.name, x.unsqueezed, x.rows) for x in gathered] == [("l_mask_", 0, Rows(1, 0))]


def test_extract():
    made = captured(scan_and_attend, hidden(), weight())
    keys, start = by_name(made, "k"), by_name(made, "h")
    same(
        extract(made.graph, [keys]).graph,
        """
        h = linear(x, w)
        k = cumsum(h, 1)
        return (k)
        """,
    )
    same(
        extract(made.graph, [keys], given=[start]).graph,
        """
        k = cumsum(h_full, 1)
        return (k)
        """,
    )


def test_masks_by_rows():
    def body(x: Tensor, padding: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        mask = (at[None, :] <= at[:, None]) & padding[:, None, None, :]
        h = x.unsqueeze(1)
        y = F.scaled_dot_product_attention(h, h, h, attn_mask=mask)
        return F.scaled_dot_product_attention(y, y, y, mask, scale=0.5)

    made = captured(body, hidden(), torch.ones(BATCH, TOKENS, dtype=torch.bool))
    stage = extract(made.graph, made.results)
    use_mask_rows(stage, made.facts.sizes)
    same(
        stage.graph,
        """
        at = arange(size)
        getitem_3 = getitem(at, (None, :))
        getitem_4 = getitem(at, (:, None))
        getitem_5 = getitem(padding, (:, None, None, :))
        mask_rows_0 = mask_rows_0(getitem_3, getitem_4, getitem_5)
        h = unsqueeze(x, 1)
        y = attend_all(query=h, key=h, value=h, attn_mask=mask_rows_0)
        sdpa_1 = attend_all(query=y, key=y, value=y, attn_mask=mask_rows_0, scale=0.5)
        return (sdpa_1)
        """,
    )
    maker = stage.parts["mask_rows_0"]
    assert isinstance(maker, MaskMaker) and isinstance(maker.make, fx.GraphModule)
    same(
        maker.make.graph,
        """
        queries_of = queries_of(getitem_4, kept)
        le = le(getitem_3, queries_of)
        and = and(le, getitem_5)
        return and
        """,
    )


def test_a_mask_that_is_given_whole():
    def body(x: Tensor, mask: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=mask)

    made = captured(body, hidden(), torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool))
    stage = extract(made.graph, made.results)
    use_mask_rows(stage, made.facts.sizes)
    same(
        stage.graph,
        """
        mask_rows_0 = mask_rows_0(mask)
        h = unsqueeze(x, 1)
        sdpa = attend_all(query=h, key=h, value=h, attn_mask=mask_rows_0)
        return (sdpa)
        """,
    )


@pytest.mark.parametrize("kind", ["float", "columns"])
def test_masks_by_rows_leave_other_masks_alone(kind):
    def body(x: Tensor, mask: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=mask)

    mask = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.float64)
    if kind == "columns":
        mask = torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool)
    made = captured(body, hidden(), mask)
    stage = extract(made.graph, made.results)
    before = text(stage.graph)
    use_mask_rows(stage, made.facts.sizes)
    assert text(stage.graph) == before


# ---- structure -----------------------------------------------------------------------------------


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def pre_norm(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    for _ in range(2):
        x = x + attend(normed(x))
        x = x + F.gelu(F.linear(normed(x), w))
    return F.cross_entropy(normed(x).reshape(-1, WIDTH), labels.reshape(-1))


def post_norm(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    for _ in range(2):
        x = normed(x + attend(x))
        x = normed(x + F.gelu(F.linear(x, w)))
    return F.cross_entropy(x.reshape(-1, WIDTH), labels.reshape(-1))


def parallel(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    for _ in range(2):
        y = normed(x)
        x = x + attend(y) + F.gelu(F.linear(y, w))
    return F.cross_entropy(normed(x).reshape(-1, WIDTH), labels.reshape(-1))


@pytest.mark.parametrize(
    ("model", "start", "end"),
    [(pre_norm, "x_1", "x_2"), (post_norm, "x_1", "add_2"), (parallel, "x", "x_1")],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_structure(model, start, end):
    labels = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    made = captured(lambda x, w, y: model(x * 2, w, y), hidden(), weight(), labels)
    found = find_structure(made.graph, made.facts)
    assert found.loss is not None and found.loss.name == "cross_entropy"
    assert [node.name for node in found.attentions] == [
        "scaled_dot_product_attention",
        "scaled_dot_product_attention_1",
    ]
    assert found.block_input is not None and found.block_exit is not None
    assert (found.block_input.name, found.block_exit.name) == (start, end)


# ---- sizes ---------------------------------------------------------------------------------------

B, T = sympy.symbols("b t", integer=True, positive=True)
SIZES = Sizes(T, B, {}, {})
ONE_ROW = Sizes(T, None, {}, {})
five = sympy.Integer(5)


def shape(*sizes: Any) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.expand(sympy.sympify(size)) for size in sizes)


@pytest.mark.parametrize(
    ("sizes", "given", "wanted"),
    [
        (SIZES, shape(B, T, 5), Rows(1, 0)),
        (SIZES, shape(T, B, 5), Rows(0, 1)),
        (SIZES, shape(B * T, 5), Rows(0, packed=True)),
        (SIZES, shape(B, T, T), None),
        (SIZES, shape(T, 5), None),
        (SIZES, shape(B, T + 4, 5), None),
        (SIZES, shape(B, B, T), None),
        (ONE_ROW, shape(1, T, 5), Rows(1)),
        (ONE_ROW, shape(T, 5), Rows(0)),
        (ONE_ROW, shape(2 * T, 5), None),
        (ONE_ROW, shape(5, 5), None),
    ],
)
def test_rows_that_sizes_allow(sizes, given, wanted):
    assert sizes.rows(given) == wanted


@pytest.mark.parametrize(
    ("rows", "before", "after", "wanted"),
    [
        (Rows(1, 0), shape(B, T, 10), shape(B, T, 2, 5), Rows(1, 0)),
        (Rows(1, 0), shape(B, T, 10), shape(B * T, 10), Rows(0, packed=True)),
        (Rows(0, packed=True), shape(B * T, 10), shape(B, T, 10), Rows(1, 0)),
        (Rows(0, packed=True), shape(B * T, 10), shape(T, B, 10), None),
        (Rows(1, 0), shape(B, T, 10), shape(B, 10, T), None),
        (Rows(1, 0), shape(B, T, 10), shape(B, T * 10), Entries(Rows(1, 0), 10)),
        (Rows(1, 0), shape(B, T, 10), shape(B * T * 2, 5), Entries(Rows(0, packed=True), 2)),
        (Rows(2, 1), shape(4, B, T), shape(4 * B * T, 1), Entries(Rows(0, packed=True), 1, 4)),
        (
            Entries(Rows(0, packed=True), 6),
            shape(B * T * 6),
            shape(B * T, 3, 2),
            Rows(0, packed=True),
        ),
        (Entries(Rows(0, packed=True), 6), shape(B * T * 6), shape(B, T, 2, 3), Rows(1, 0)),
        (Entries(Rows(0, packed=True), 6), shape(B * T * 6), shape(6, B * T), None),
        (
            Entries(Rows(0, packed=True), 1, 4),
            shape(4 * B * T, 5),
            shape(4, B * T, 5),
            Rows(1, packed=True),
        ),
        (Entries(Rows(0, packed=True), 1, 4), shape(4 * B * T, 5), shape(B * T, 4, 5), None),
        (Rows(2, 0), shape(B, 4, T, 5), shape(B * 4, T, 5), Rows(1, 0, heads=4)),
        (Rows(1, 0, heads=4), shape(B * 4, T, 5), shape(B, 4, T, 5), Rows(2, 0)),
        (Rows(1, 0, heads=4), shape(B * 4, T, 5), shape(B, 2, 2, T, 5), Rows(3, 0)),
        (Rows(1, 0, heads=4), shape(B * 4, T, 5), shape(4, B, T, 5), None),
        (Rows(1, 0, heads=4), shape(B * 4, T, 5), shape(B * 4 * T, 5), None),
        (Rows(2, 1), shape(4, B, T, 5), shape(B * 4, T, 5), None),
        (Rows(1, 0), shape(B, T, 10), shape(1, B, T, 1, 10), Rows(2, 1)),
    ],
)
def test_where_a_reshape_takes_the_rows(rows, before, after, wanted):
    assert moved_rows(SIZES, rows, before, after) == wanted


def test_compact_shapes():
    assert SIZES.compact(shape(B, T, 5), Rows(1, 0)) == shape(B, KEPT, 5)
    assert SIZES.compact(shape(B * T, 5), Rows(0, packed=True)) == shape(KEPT * B, 5)
    assert SIZES.compact(shape(T, 5), None) == shape(T, 5)
