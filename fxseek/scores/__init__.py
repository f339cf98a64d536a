"""Scores of tokens. A file of this folder that registers a `Scorer` adds one.

No other file changes for a score that is made of what is measured already (`base.py` has what a
`Scorer` says of itself). What measures something new is found in the graph by
`passes/score.py`, described in `passes/score_plan.py`, and run by `fxseek/run/score.py`.
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

__all__ = ["NORMALISATIONS", "SCORERS", "ScoreInputs", "Scorer", "scorer_of"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def scorer_of(config: SeekConfig) -> Scorer:
    """The score that a configuration asks for; where nothing is ranked, none is measured."""
    if not config.is_scored:
        return Every(config)
    kind = config.score
    return SCORERS[kind](config) if isinstance(kind, str) else Own(config, kind)
