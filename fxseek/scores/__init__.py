"""Scores of tokens.

To add a score, put a file into this folder with a `Scorer` under ``@scorer(name)``, and name it in
the docstring of `SeekConfig`; `Scorer` (`base.py`) says what it declares. A new measurement needs a
function in `measures.py`, a plan (`passes/score_plan.py`, made by `passes/score.py`), what runs it
(`fxseek/run/score.py`), and its name in `MEASURED` (`base.py`).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from fxseek.scores.base import SCORERS, Every, ScoreInputs, Scorer
from fxseek.scores.own import Own
from fxseek.scores.tokenseek import NORMALISATIONS

if TYPE_CHECKING:
    from fxseek.config import SeekConfig

__all__ = ["NORMALISATIONS", "SCORERS", "ScoreInputs", "Scorer", "draws_tokens", "scorer_of"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def scorer_of(config: SeekConfig) -> Scorer:
    """The score that a configuration asks for; where nothing is ranked, none is measured."""
    if not config.is_scored:
        return Every(config)
    kind = config.score
    return SCORERS[kind](config) if isinstance(kind, str) else Own(config, kind)


def draws_tokens(config: SeekConfig) -> bool:
    """Whether two steps on one batch select other tokens, at the same weights and ratio."""
    return config.is_scored and (
        config.select == "sample" or config.draws_spans or scorer_of(config).draws
    )
