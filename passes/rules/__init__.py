"""Rules by family; importing this package fills the registry."""

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
