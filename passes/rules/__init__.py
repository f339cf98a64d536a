"""Rules by family; importing this package fills the registry.

To add one, write a function from a `Call` to a `Plan` under ``@rule(...)`` in the file of its
family, with samples that prove its law (docs/adding-a-rule.md); a pointwise operation is a name in
a list of `pointwise.py`. `registry.py` has `Call`, `Plan`, and the spellings of names.
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
