"""Rules by family; importing this package fills the registry."""

from fxseek.passes.rules import attention, indexing, layout, loss, pointwise, products, reductions
from fxseek.passes.rules.registry import (
    RULES,
    Call,
    Full,
    Length,
    Plan,
    RowsOf,
    Rule,
    Sample,
    Stage,
    find_rule,
    operation,
    rule,
)

__all__ = [
    "RULES",
    "Call",
    "Full",
    "Length",
    "Plan",
    "RowsOf",
    "Rule",
    "Sample",
    "Stage",
    "attention",
    "find_rule",
    "indexing",
    "layout",
    "loss",
    "operation",
    "pointwise",
    "products",
    "reductions",
    "rule",
]
