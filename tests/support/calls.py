"""Random chains of calls: what a program may do to token dimensions, with labelled dimensions.

Each dimension of a value has a label: ``"b"``, ``"t"``, a number, a tuple of labels for merged
dimensions, or ``"?"`` for one that is no longer any of these. They say which elements of a result
belong to a token, independently of the passes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from graphs import elements_of
from torch import Tensor

from fxseek.passes.entries import Entries
from fxseek.passes.facts import Rows

Label = Any
Sizes = dict[str, int]


@dataclass(frozen=True)
class Step:
    """One call: how it reads, what it does to operands and sizes, and the labels of its result."""

    text: str
    operands: tuple[int, ...]
    run: Callable[[Sequence[Tensor], Sizes], Tensor]
    labels: tuple[Label, ...]


def size_of(label: Label, sizes: Sizes) -> int:
    """The length of a labelled dimension (not of ``"?"``)."""
    if isinstance(label, tuple):
        total = 1
        for part in label:
            total = total * size_of(part, sizes)
        return total
    return sizes[label] if isinstance(label, str) else label


def parts_of(label: Label) -> tuple[Label, ...]:
    """What a dimension was merged from."""
    return label if isinstance(label, tuple) else (label,)


def has_tokens(label: Label) -> bool:
    """Whether the dimension grows with the tokens."""
    return label == "?" or "t" in parts_of(label)


def rows_of(labels: Sequence[Label], batch: int) -> Rows | Entries | None:
    """Where a value's tokens, or their entries, are; None where it has none, or several."""
    with_tokens = [i for i, label in enumerate(labels) if has_tokens(label)]
    if len(with_tokens) != 1 or labels[with_tokens[0]] == "?":
        return None
    row = with_tokens[0]
    merged = [part for part in parts_of(labels[row]) if part != 1]
    if merged.count("t") != 1:
        return None
    at = merged.index("t")
    front, inner = merged[:at], merged[at + 1 :]
    if packed := front[-1:] == ["b"]:
        front = front[:-1]
    if "b" in (*front, *inner) or (packed and "b" in labels):
        return None
    if packed or batch == 1:
        rows = Rows(row, packed=packed)
    elif list(labels).count("b") == 1:
        rows = Rows(row, list(labels).index("b"))
    else:
        return None
    found = Entries(rows, math.prod(inner), math.prod(front))
    return found if found.inner * found.outer > 1 else rows


def broadcast(a: Sequence[Label], b: Sequence[Label]) -> tuple[Label, ...] | None:
    """Labels of a broadcast result, or None where they do not fit."""
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    found: list[Label] = []
    for x, y in zip(left, right, strict=True):
        if "?" in (x, y) or (x != y and 1 not in (x, y)):
            return None
        found.append(y if x == 1 else x)
    return tuple(found)


class Chains:
    """Draws chains of calls from a source of randomness."""

    def __init__(self, draw: random.Random, batch: int) -> None:
        self.draw = draw
        self.one = 1 if batch == 1 else "b"
        start: tuple[Label, ...] = (self.one, "t", 5)
        self.labels: list[tuple[Label, ...]] = [start, start, (5, 7), ("t", 5)]
        # reads the token input, and lets the capture find that all lengths are equal
        first = Step("sum of all", (0, 1, 3), lambda v, _: v[0] + v[1] * v[2], start)
        self.steps: list[Step] = [first]
        self.labels.append(start)

    def add(self, count: int) -> None:
        """Draw `count` more calls."""
        kinds = [
            self.unary, self.binary, self.along, self.reduce, self.flip, self.transpose,
            self.permute, self.unsqueeze, self.flatten, self.unflatten, self.scramble, self.slice,
            self.select, self.cat, self.stack, self.matmul, self.linear, self.expand, self.norm,
            self.repeat, self.roll, self.einsum, self.where, self.chunk,
        ]  # fmt: skip
        target = len(self.steps) + count
        while len(self.steps) < target:
            made = self.draw.choice(kinds)()
            if made is None or len(made.labels) > 5 or self.large(made.labels):
                continue
            if [part for label in made.labels for part in parts_of(label)].count("b") > 1:
                continue  # which of two batch dimensions is the batch, labels do not tell
            self.steps.append(made)
            self.labels.append(made.labels)

    def large(self, labels: Sequence[Label]) -> bool:
        total = 1
        for label in labels:
            total *= 11 if label == "?" else size_of(label, {"b": 3, "t": 11})
        return total > 40_000

    def any(self) -> int:
        # later values more often, so that chains get long
        return max(self.draw.randrange(len(self.labels)) for _ in range(2))

    def dim(self, labels: Sequence[Label]) -> tuple[int, int]:
        """A dimension, and one of its two spellings."""
        dim = self.draw.randrange(len(labels))
        return dim, dim - len(labels) if self.draw.random() < 0.5 else dim

    def any_dim(self) -> tuple[int, tuple[Label, ...], int] | None:
        """A value, its labels and one of its dimensions; None where it has none."""
        at = self.any()
        labels = self.labels[at]
        return (at, labels, self.dim(labels)[1]) if labels else None

    # ---- the calls -----------------------------------------------------------------------

    def unary(self) -> Step:
        at = self.any()
        name = self.draw.choice(["tanh", "sigmoid", "sin"])
        return Step(name, (at,), lambda v, _: getattr(torch, name)(v[0]), self.labels[at])

    def binary(self) -> Step | None:
        a, b = self.any(), self.any()
        labels = broadcast(self.labels[a], self.labels[b])
        if labels is None:
            return None
        name = self.draw.choice(["add", "mul", "sub", "maximum"])
        return Step(name, (a, b), lambda v, _: getattr(torch, name)(v[0], v[1]), labels)

    def along(self) -> Step | None:
        found = self.any_dim()
        if found is None:
            return None
        at, labels, dim = found
        name = self.draw.choice(["softmax", "cumsum", "log_softmax", "normalize"])
        space = F if name == "normalize" else torch
        return Step(
            f"{name} {dim}", (at,), lambda v, _: getattr(space, name)(v[0], dim=dim), labels
        )

    def norm(self) -> Step | None:
        at = self.any()
        labels = self.labels[at]
        count = self.draw.randint(1, 2)
        if len(labels) < count:
            return None
        return Step(
            f"layer_norm {count}",
            (at,),
            lambda v, _: F.layer_norm(v[0], v[0].shape[-count:]),
            labels,
        )

    def reduce(self) -> Step | None:
        at = self.any()
        labels = self.labels[at]
        if len(labels) < 2:
            return None
        dims = self.draw.sample(range(len(labels)), self.draw.randint(1, 2))
        keep = self.draw.random() < 0.5
        name = self.draw.choice(["sum", "mean", "amax"])
        after = tuple(
            1 if i in dims else label for i, label in enumerate(labels) if keep or i not in dims
        )
        spelled: Any = tuple(dims) if len(dims) > 1 or self.draw.random() < 0.5 else dims[0]
        return Step(
            f"{name} {spelled} {keep}",
            (at,),
            lambda v, _: getattr(v[0], name)(spelled, keep),
            after,
        )

    def flip(self) -> Step | None:
        at = self.any()
        labels = self.labels[at]
        if not labels:
            return None
        dims = self.draw.sample(range(len(labels)), self.draw.randint(1, min(2, len(labels))))
        if self.draw.random() < 0.5:
            return Step(f"flip {dims}", (at,), lambda v, _: v[0].flip(*dims), labels)
        return Step(f"flip ({dims})", (at,), lambda v, _: torch.flip(v[0], dims), labels)

    def transpose(self) -> Step | None:
        at = self.any()
        labels = list(self.labels[at])
        if len(labels) < 2:
            return None
        (a, i), (b, j) = self.dim(labels), self.dim(labels)
        labels[a], labels[b] = labels[b], labels[a]
        return Step(f"transpose {i} {j}", (at,), lambda v, _: v[0].transpose(i, j), tuple(labels))

    def permute(self) -> Step:
        at = self.any()
        labels = self.labels[at]
        order = self.draw.sample(range(len(labels)), len(labels))
        return Step(
            f"permute {order}",
            (at,),
            lambda v, _: v[0].permute(*order) if order else v[0].permute(()),
            tuple(labels[i] for i in order),
        )

    def unsqueeze(self) -> Step:
        at = self.any()
        labels = list(self.labels[at])
        dim = self.draw.randint(0, len(labels))
        labels.insert(dim, 1)
        return Step(f"unsqueeze {dim}", (at,), lambda v, _: v[0].unsqueeze(dim), tuple(labels))

    def flatten(self) -> Step | None:
        at = self.any()
        labels = self.labels[at]
        if len(labels) < 2:
            return None
        first = self.draw.randrange(len(labels) - 1)
        last = self.draw.randint(first + 1, len(labels) - 1)
        inner = labels[first : last + 1]
        merged: Label = tuple(part for label in inner for part in parts_of(label) if part != 1)
        if "?" in merged:
            merged = "?"
        elif len(merged) < 2:
            merged = merged[0] if merged else 1
        after = (*labels[:first], merged, *labels[last + 1 :])
        return Step(f"flatten {first} {last}", (at,), lambda v, _: v[0].flatten(first, last), after)

    def unflatten(self) -> Step | None:
        at = self.any()
        labels = self.labels[at]
        merged = [i for i, label in enumerate(labels) if isinstance(label, tuple)]
        if not merged:
            return None
        dim = self.draw.choice(merged)
        parts = list(labels[dim])
        if self.draw.random() < 0.3:
            self.draw.shuffle(parts)
        after = (*labels[:dim], *parts, *labels[dim + 1 :])
        return Step(
            f"unflatten {dim} {parts}",
            (at,),
            lambda v, sizes: v[0].reshape(
                *v[0].shape[:dim], *(size_of(p, sizes) for p in parts), *v[0].shape[dim + 1 :]
            ),
            after,
        )

    def scramble(self) -> Step | None:
        """A reshape to the same sizes in another order."""
        at = self.any()
        labels = self.labels[at]
        if "?" in labels or self.draw.random() < 0.5:
            return None
        order = self.draw.sample(range(len(labels)), len(labels))
        after = tuple(labels[i] for i in order)
        return Step(
            f"reshape {after}",
            (at,),
            lambda v, sizes: v[0].reshape([size_of(label, sizes) for label in after]),
            tuple("?" if isinstance(label, tuple) else label for label in after),
        )

    def slice(self) -> Step | None:
        at = self.any()
        labels = list(self.labels[at])
        wide = [i for i, label in enumerate(labels) if label not in (1, "?", "b")]
        if not wide:
            return None
        dim = self.draw.choice(wide)
        number = isinstance(labels[dim], int)
        kind = self.draw.choice(["whole", "tail", "step"])
        piece = {"whole": slice(0, None), "tail": slice(1, None), "step": slice(None, None, 2)}
        index = (*(slice(None) for _ in range(dim)), piece[kind])
        if kind == "step" and isinstance(labels[dim], tuple) and 2 in parts_of(labels[dim]):
            return None  # of two entries of each token one is left: these count as tokens again
        if kind != "whole":
            length = labels[dim]
            labels[dim] = (length - 1 if kind == "tail" else -(-length // 2)) if number else "?"
        return Step(f"{kind} slice of {dim}", (at,), lambda v, _: v[0][index], tuple(labels))

    def select(self) -> Step | None:
        at = self.any()
        labels = self.labels[at]
        if len(labels) < 2:
            return None
        dim, spelled = self.dim(labels)
        after = (*labels[:dim], *labels[dim + 1 :])
        if self.draw.random() < 0.5:
            return Step(f"select {spelled}", (at,), lambda v, _: v[0].select(spelled, 0), after)
        index = (Ellipsis, 0, *(slice(None) for _ in range(len(labels) - dim - 1)))
        return Step(f"index {dim}", (at,), lambda v, _: v[0][index], after)

    def cat(self) -> Step | None:
        a, b = self.any(), self.any()
        labels = list(self.labels[a])
        if not labels or self.labels[b] != tuple(labels) or "?" in labels:
            return None
        dim, spelled = self.dim(labels)
        labels[dim] = 2 * labels[dim] if isinstance(labels[dim], int) else "?"
        return Step(
            f"cat {spelled}", (a, b), lambda v, _: torch.cat((v[0], v[1]), spelled), tuple(labels)
        )

    def stack(self) -> Step | None:
        a, b = self.any(), self.any()
        labels = list(self.labels[a])
        if self.labels[b] != tuple(labels) or "?" in labels:
            return None
        dim = self.draw.randint(0, len(labels))
        labels.insert(dim, 2)
        return Step(
            f"stack {dim}", (a, b), lambda v, _: torch.stack((v[0], v[1]), dim), tuple(labels)
        )

    def matmul(self) -> Step | None:
        a, b = self.any(), self.any()
        left, right = self.labels[a], self.labels[b]
        if not left or not right or "?" in (left[-1], right[-1]):
            return None
        inner = right[max(len(right) - 2, 0)]
        if left[-1] != inner:
            return None
        outer = broadcast(left[:-2], right[:-2])
        if outer is None:
            return None
        after = outer + (left[-2:-1] if len(left) > 1 else ()) + right[-1:] * (len(right) > 1)
        return Step("matmul", (a, b), lambda v, _: torch.matmul(v[0], v[1]), after)

    def linear(self) -> Step | None:
        at = self.any()
        labels = self.labels[at]
        if not labels or labels[-1] != 5:
            return None
        return Step("linear", (at, 2), lambda v, _: F.linear(v[0], v[1].T), (*labels[:-1], 7))

    def expand(self) -> Step | None:
        at = self.any()
        labels = list(self.labels[at])
        ones = [i for i, label in enumerate(labels) if label == 1]
        if not ones:
            return None
        dim = self.draw.choice(ones)
        label = self.draw.choice(["t", 2, self.one])
        labels[dim] = label
        return Step(
            f"expand {dim} {label}",
            (at,),
            lambda v, sizes: v[0].expand(
                *v[0].shape[:dim], size_of(label, sizes), *v[0].shape[dim + 1 :]
            ),
            tuple(labels),
        )

    def repeat(self) -> Step | None:
        at = self.any()
        labels = list(self.labels[at])
        if not labels or "?" in labels:
            return None
        dim = self.draw.randrange(len(labels))
        times = [2 if i == dim else 1 for i in range(len(labels))]
        each, parts = self.draw.random() >= 0.5, parts_of(labels[dim])
        if isinstance(labels[dim], int):
            labels[dim] = 2 * labels[dim]
        else:
            labels[dim] = (*parts, 2) if each else (2, *parts)
        if not each:
            return Step(f"repeat {times}", (at,), lambda v, _: v[0].repeat(*times), tuple(labels))
        return Step(
            f"repeat_interleave {dim}",
            (at,),
            lambda v, _: v[0].repeat_interleave(2, dim=dim),
            tuple(labels),
        )

    def roll(self) -> Step | None:
        found = self.any_dim()
        if found is None:
            return None
        at, labels, dim = found
        return Step(f"roll {dim}", (at,), lambda v, _: v[0].roll(1, dim), labels)

    def where(self) -> Step | None:
        a, b = self.any(), self.any()
        labels = broadcast(self.labels[a], self.labels[b])
        if labels is None:
            return None
        return Step("where", (a, b), lambda v, _: torch.where(v[1] > 0.1, v[0], v[1]), labels)

    def chunk(self) -> Step | None:
        at = self.any()
        labels = list(self.labels[at])
        wide = [i for i, label in enumerate(labels) if isinstance(label, int) and label > 1]
        if not wide:
            return None
        dim = self.draw.choice(wide)
        labels[dim] = -(-labels[dim] // 2)
        return Step(f"chunk {dim}", (at,), lambda v, _: v[0].chunk(2, dim)[0], tuple(labels))

    def einsum(self) -> Step | None:
        """A formula in which equal labels share a letter, and some letters are summed over."""
        a, b = self.any(), self.any()
        letters: dict[tuple[Label, int], str] = {}
        terms = []
        for at in (a, b):
            term = ""
            for place, label in enumerate(self.labels[at]):
                if label == "?":
                    return None
                times = list(self.labels[at][:place]).count(label)
                # a second dimension of that label is another letter now and then in both operands
                key = (label if label != 1 else ("one", at, place), times)
                term += letters.setdefault(key, "abcdefghijklmnop"[len(letters)])
            terms.append(term)
        kept = [key for key in letters if self.draw.random() < 0.7]
        self.draw.shuffle(kept)
        formula = f"{','.join(terms)}->{''.join(letters[key] for key in kept)}"
        after = tuple(key[0] if not isinstance(key[0], tuple) or key[0][0] != "one" else 1
                      for key in kept)  # fmt: skip
        return Step(formula, (a, b), lambda v, _: torch.einsum(formula, v[0], v[1]), after)

    # ---- running ---------------------------------------------------------------------------

    def run(
        self,
        inputs: Sequence[Tensor],
        kept: Tensor | None = None,
        entries: Mapping[int, Entries] | None = None,
    ) -> list[Tensor]:
        """Every step's value; with `kept`, gradient passes selected tokens' results alone.

        `entries`: the steps whose results are taken for entries of tokens, and where these are:
        others that have entries pass gradient whole.
        """
        entries = entries or {}
        batch, tokens = inputs[0].shape[:2]
        sizes = {"b": batch, "t": tokens}
        values = list(inputs)
        marked = None
        if kept is not None:
            marked = torch.zeros(batch, tokens).bool().scatter_(1, kept, True)
        for index, step in enumerate(self.steps):
            value = step.run([values[i] for i in step.operands], sizes)
            if marked is not None:
                rows = rows_of(step.labels, batch)
                rows = rows if isinstance(rows, Rows) else entries.get(index)
                if rows is not None:
                    passes = elements_of(marked, value.shape, rows)
                    value = torch.where(passes, value, value.detach())
            values.append(value)
        return values[len(inputs) :]

    def story(self, index: int) -> str:
        """The chain that leads to a step, one call a line."""
        start = len(self.labels) - len(self.steps)
        wanted, queue = set(), [index]
        while queue:
            at = queue.pop()
            if at not in wanted:
                wanted.add(at)
                queue += [i - start for i in self.steps[at].operands if i >= start]
        return "\n".join(
            f"  v{i + start} = {self.steps[i].text} of "
            f"{', '.join(f'v{j}' for j in self.steps[i].operands)}  {self.steps[i].labels}"
            for i in sorted(wanted)
        )


__all__ = ["Chains", "has_tokens", "rows_of"]
