"""Products: linear maps of features, and products of two values that both have tokens.

Proof of the law: out[…, t, …] = Σ_c a[…, t, c] · b[c, …] reads only row t of the left operand.
The right operand is read whole, so where it has tokens it is wanted at full size; that is how
keys and values enter attention. A contraction over the token row is never per-token.
"""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxseek.passes.entries import Entries
from fxseek.passes.facts import Placed, Rows, is_tensor
from fxseek.passes.rules.registry import Call, Full, Plan, RowsOf, Sample, rule


def last_is_row(call: Call, node: fx.Node, rows: Placed) -> bool:
    """Whether the features that a product contracts are the tokens, or the batch."""
    return len(call.shape(node)) - 1 in rows.dims


@rule(
    "linear",
    family="per-token",
    reason="the weight is shared by all tokens and only features are contracted",
    samples=(
        Sample(F.linear, ("b t 5", "3 5")),
        Sample(F.linear, ("b t 5", "3 5", "3")),
        Sample(lambda x, w: F.linear(x.reshape(-1, 5), w), ("b t 5", "3 5")),
        Sample(F.linear, ("b 2 t 5", "3 5")),
    ),
)
def linear(call: Call) -> Plan | None:
    """``x @ weight.T + bias``."""
    x, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    rows = call.placed(x)
    if rows is None or last_is_row(call, x, rows) or not call.sizes.valid(rows, call.out):
        return None
    args = (call.own(x, rows), Full(weight))
    return Plan(rows, call.target, args, {} if bias is None else {"bias": Full(bias)})


@rule(
    "matmul",
    "bmm",
    "mm",
    "mv",
    family="per-token",
    reason="row t of the left operand alone makes row t of the result; the right one is read whole",
    samples=(
        Sample(torch.matmul, ("b t 5", "5 3")),
        Sample(lambda x, w: x.reshape(-1, 5).mm(w), ("b t 5", "5 3")),
        Sample(lambda x, w: x @ w, ("b 2 t 5", "5 3")),
        Sample(torch.matmul, ("b 2 t 5", "b 2 5 3")),
        Sample(torch.bmm, ("b t 5", "b 5 3")),
        Sample(lambda x, w: x.reshape(-1, 5).mv(w), ("b t 5", "5")),
        Sample(lambda x, w: x.transpose(0, 1) @ w, ("b t 5", "5 3")),
        Sample(lambda x, y: x.unsqueeze(2) @ y.unsqueeze(3), ("b t 5", "b t 5")),
    ),
)
def matmul(call: Call) -> Plan | None:
    """Matrix products, batched or not."""
    left, right = call.arg(0, "input"), call.arg(1, "mat2", call.arg(1, "other"))
    if not is_tensor(left) or not is_tensor(right):
        return None
    return _product(call, left, right)


@rule(
    "addmm",
    "baddbmm",
    family="per-token",
    reason="as a matrix product, plus a broadcast addend",
    samples=(
        Sample(lambda x, w, b: torch.addmm(b, x.reshape(-1, 5), w), ("b t 5", "5 3", "3")),
        Sample(lambda x, w, c: torch.baddbmm(c, x, w), ("b t 5", "b 5 3", "b t 3")),
        Sample(
            lambda x, w, c: torch.baddbmm(c, x, w, beta=0.5, alpha=2.0),
            ("b t 5", "b 5 3", "1 1 3"),
        ),
    ),
)
def addmm(call: Call) -> Plan | None:
    """``beta · addend + alpha · left @ right``."""
    addend = call.arg(0, "input")
    left = call.arg(1, "batch1", call.arg(1, "mat1"))
    right = call.arg(2, "batch2", call.arg(2, "mat2"))
    if not (is_tensor(addend) and is_tensor(left) and is_tensor(right)):
        return None
    rest = {k: v for k, v in call.node.kwargs.items() if k in ("beta", "alpha")}
    plan = _product(call, left, right, **rest)
    if plan is None or not isinstance(plan.rows, (Rows, Entries)):
        return None
    want = call.aligned(addend, plan.rows, len(call.out))
    if want is None:
        return None
    return Plan(plan.rows, call.target, (want, *plan.args), plan.kwargs)


def _product(call: Call, left: fx.Node, right: fx.Node, **options: Any) -> Plan | None:
    a, b = call.shape(left), call.shape(right)
    rank = len(call.out)
    if len(a) < 2 or len(b) < 1 or rank < max(len(a), len(b)) - (len(b) == 1):
        return None
    rows = call.placed(left)
    if len(b) == 1:  # a matrix times a vector: the last dimension goes
        if rows is None or last_is_row(call, left, rows) or not call.sizes.valid(rows, call.out):
            return None
        return Plan(rows, call.target, (call.own(left, rows), Full(right)), options)
    if rows is None:
        rows = _row_of_left(call, left)
        if rows is None:
            return None
    if last_is_row(call, left, rows):
        return None  # contracted
    out = rows.shift(rank - len(a))
    if not call.sizes.valid(out, call.out):
        return None
    if rows.row == len(a) - 2:  # the row dimension of the matrix: the right operand is whole
        return Plan(out, call.target, (call.own(left, rows), Full(right)), options)
    # The tokens are a batch dimension of the product: both operands are read token by token.
    want = call.aligned(right, out, rank)
    if want is None:
        return None
    if out.batch == rank - 2 and isinstance(want, RowsOf):
        return None  # the right operand has features where the left one has the batch
    return Plan(out, call.target, (RowsOf(left, out, rank), want), options)


def _row_of_left(call: Call, left: fx.Node) -> Rows | None:
    """The row of a left operand with two token dimensions, by its place in the product."""
    if left in call.facts.stream:
        return None
    shape = call.shape(left)
    row = len(shape) - 2
    if shape[row] != call.sizes.tokens:
        return None
    if call.sizes.batch is None:
        return Rows(row)
    batch = [i for i, size in enumerate(shape) if size == call.sizes.batch]
    return Rows(row, batch[0]) if len(batch) == 1 else None


@rule(
    "einsum",
    family="per-token",
    reason="the letter of the token row appears in the result; operands without it are read whole",
    samples=(
        Sample(lambda x, w: torch.einsum("btc,cd->btd", x, w), ("b t 5", "5 3")),
        Sample(lambda x, w: torch.einsum("bthc,hcd->bhtd", x, w), ("b t 2 5", "2 5 3")),
        Sample(lambda x, y: torch.einsum("btc,btc->bt", x, y), ("b t 5", "b t 5")),
        Sample(lambda x, w: torch.einsum("...rk,rkc->...rc", x, w), ("b t 2 5", "2 5 3")),
        Sample(lambda x, y: torch.einsum("...c,...c->...", x, y), ("b 2 t 5", "b 1 t 5")),
        Sample(lambda x, y: torch.einsum("...c, bc -> ...", x, y), ("b t 5", "3 5")),
    ),
)
def einsum(call: Call) -> Plan | None:
    """Formulas with an explicit result; an ellipsis stands for as many letters as are missing."""
    formula, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    nodes: list[Any] = [node for node in operands if is_tensor(node)]
    if not isinstance(formula, str) or len(nodes) != len(operands):
        return None
    letters = _letters(formula, [len(call.shape(node)) for node in nodes])
    if letters is None:
        return None
    terms, output = letters
    readings: set[tuple[str, str | None]] = set()
    for term, node in zip(terms, nodes, strict=True):
        rows = call.rows(node) if node in call.facts.stream else None
        if rows is None:
            continue
        if rows.packed:
            return None
        batch = None if rows.batch is None else term[rows.batch]
        readings.add((term[rows.row], batch))
    readings = {reading for reading in readings if reading[0] in output}
    if len(readings) != 1:
        return None
    letter, batch = readings.pop()
    if batch is not None and batch not in output:
        return None
    after = Rows(output.index(letter), None if batch is None else output.index(batch))
    if not call.sizes.valid(after, call.out):
        return None
    wants: list[RowsOf | Full] = []
    for term, node in zip(terms, nodes, strict=True):
        if letter not in term:
            wants.append(Full(node))
        elif batch is not None and batch not in term:
            return None
        else:
            place = Rows(term.index(letter), None if batch is None else term.index(batch))
            if term.count(letter) > 1 or not call.sizes.valid(place, call.shape(node)):
                return None
            wants.append(RowsOf(node, place, len(term)))
    return Plan(after, torch.einsum, (formula, *wants))


def _letters(formula: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """The operands' and the result's dimensions by letter, an ellipsis written out."""
    inputs, arrow, output = formula.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(ranks):
        return None
    free = [letter for letter in string.ascii_letters if letter not in formula]
    hidden = [
        rank - len(term) + 3 if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    most = max(hidden)  # broadcasting lines up the last of them
    if min(hidden) < 0 or most > len(free) or (most and "..." not in output):
        return None
    spelled = [
        term.replace("...", "".join(free[most - count : most]))
        for term, count in zip(terms, hidden, strict=True)
    ]
    if any(len(term) != rank for term, rank in zip(spelled, ranks, strict=True)):
        return None
    return spelled, output.replace("...", "".join(free[:most]))
