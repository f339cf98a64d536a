"""The rules of operations; importing this package fills the registry.

To add a rule, write a function from a `Call` to a `Plan`, or to None where the call is not per
token, under ``@rule(...)`` in the file of its kind or in one of its own, with samples on which its
law is tested (docs/adding-a-rule.md). A pointwise operation is only a name in `_UNARY` or `_BINARY`
of `pointwise.py`, and a case in `_unary_calls` or `_binary_calls` where its sample needs other
operands. `registry.py` has `Call`, `Plan`, and the spellings of names.
"""

import importlib
import pkgutil

from fxseek.passes.rules.registry import (
    RULES,
    Call,
    Full,
    Kept,
    Length,
    Plan,
    RowsOf,
    Rule,
    argument,
    called,
    find_rule,
    operation,
    wants_of,
)

__all__ = [
    "RULES",
    "Call",
    "Full",
    "Kept",
    "Length",
    "Plan",
    "RowsOf",
    "Rule",
    "argument",
    "called",
    "find_rule",
    "operation",
    "wants_of",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
