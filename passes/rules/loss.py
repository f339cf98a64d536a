"""Cross-entropy over tokens: the mean over the selected labelled positions.

The full loss is a mean (or sum) of one term per token; only the terms of kept positions are
computed, with the weights of the selection. See `fxseek.ops.loss.selected_cross_entropy`. A sum of
terms that constants scale is one operation by then (`passes.scale`), under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch.nn.functional as F
from torch import fx

from fxseek.ops.loss import selected_cross_entropy
from fxseek.passes.facts import is_tensor
from fxseek.passes.ir import Selected
from fxseek.passes.rules.registry import (
    Call,
    Full,
    Length,
    Plan,
    Sample,
    argument,
    fake,
    rule,
)


@dataclass(frozen=True)
class TokenLoss:
    """A cross-entropy as it is called.

    `reduction`: ``"mean"``, ``"sum"`` or ``"none"``; `scale`: what each term is multiplied by.
    """

    node: fx.Node
    logits: fx.Node
    target: fx.Node
    class_weights: fx.Node | None
    scale: fx.Node | None
    reduction: str
    ignore_index: int
    label_smoothing: float

    @classmethod
    def of(cls, node: fx.Node) -> TokenLoss | None:
        """The loss of a node that calls `F.cross_entropy` or `scaled_cross_entropy`."""
        logits, target = argument(node, 0, "input"), argument(node, 1, "target")
        if not is_tensor(logits) or not is_tensor(target):
            return None
        if argument(node, 3, "size_average") is not None or argument(node, 5, "reduce") is not None:
            return None
        scale, ignored = argument(node, 8, "scale"), argument(node, 4, "ignore_index", -100)
        if not isinstance(ignored, int):  # it changes from step to step
            return None
        return cls(
            node,
            logits,
            target,
            argument(node, 2, "weight"),
            scale,
            argument(node, 6, "reduction", "mean" if scale is None else "sum"),
            ignored,
            argument(node, 7, "label_smoothing", 0.0),
        )

    @property
    def probabilities(self) -> bool:
        """Whether targets are probabilities of the classes, and no class indices."""
        return fake(self.target).is_floating_point()

    @property
    def plain(self) -> bool:
        """Whether each labelled term counts as 1 in the mean, and its options are constants."""
        if isinstance(self.label_smoothing, fx.Node):
            return False
        return self.class_weights is None and self.scale is None and not self.probabilities

    @property
    def full(self) -> tuple[fx.Node | None, ...]:
        """What `mass_of` takes, where targets are class indices."""
        return self.target, self.class_weights, self.scale


@rule(
    "cross_entropy",
    family="loss",
    reason="a sum of one term per token, each of that token's logits and target",
    samples=(
        Sample(
            lambda x, y: F.cross_entropy(x.reshape(-1, 5), y.reshape(-1), reduction="none"),
            ("b t 5", "int:b t"),
        ),
        Sample(
            lambda x, y: F.cross_entropy(x.transpose(1, 2), y, reduction="none"),
            ("b t 5", "int:b t"),
        ),
        Sample(
            lambda x, y, w: F.cross_entropy(x.mT, y, w.detach(), reduction="none"),
            ("b t 5", "int:b t", "5"),
        ),
        Sample(
            lambda x, y: F.cross_entropy(
                x.reshape(-1, 5), y.reshape(-1, 5), reduction="none", label_smoothing=0.1
            ),
            ("b t 5", "b t 5"),
        ),
    ),
)
def cross_entropy(call: Call) -> Plan | None:
    """``F.cross_entropy`` of class indices or probabilities; reductions mean, sum and none."""
    loss = TokenLoss.of(call.node)
    rows = None if loss is None else call.rows(loss.logits)
    if loss is None or rows is None:
        return None
    shape = call.shape(loss.logits)
    class_dim = 0 if len(shape) == 1 else 1
    if class_dim in rows.dims:
        return None
    term_rows = rows.without([class_dim])
    target_rows = rows if loss.probabilities else term_rows
    if not call.sizes.valid(target_rows, call.shape(loss.target)):
        return None
    if term_rows.batch not in (None, 0):
        return None
    options = {"ignore_index": loss.ignore_index, "label_smoothing": loss.label_smoothing}
    classes = None if loss.class_weights is None else Full(loss.class_weights)
    logits, target = call.own(loss.logits, rows), call.own(loss.target, target_rows)
    if loss.reduction == "none":
        options["reduction"] = "none"
        return Plan(term_rows, F.cross_entropy, (logits, target, classes), options)
    positions = [size for dim, size in enumerate(shape) if dim != class_dim]
    sizes = (call.sizes.tokens, call.sizes.packed, call.sizes.batch or 1)
    if any(size not in sizes for size in positions):
        return None  # several terms per token: the weights would not line up
    count = sympy.Mul(*positions)
    every = Length(count) if loss.probabilities else Full(loss.target)
    scale = full_scale = None
    if loss.scale is not None:
        scale, full_scale = call.own(loss.scale, term_rows), Full(loss.scale)
    return Plan(
        None,
        selected_cross_entropy,
        (logits, target, Selected("weights"), classes, scale, every, full_scale),
        {**options, "reduction": loss.reduction},
    )
