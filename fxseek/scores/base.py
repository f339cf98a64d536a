"""What a score is: what it reads of a step, whether it draws, and what it reports."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fxseek.config import SeekConfig

__all__ = [
    "MEASURED",
    "SCORERS",
    "Every",
    "ScoreInputs",
    "Scorer",
    "Stream",
    "Uniform",
    "scorer",
    "step_generator",
]


@dataclass(frozen=True)
class ScoreInputs:
    """What a score is made of. A function of a caller's own returns one per token, best highest.

    Shapes: ``input_ids`` Long [batch, tokens] (None where the model was given embeddings);
    ``valid`` Bool [batch, tokens], False at padding; ``supervised`` Bool [batch, tokens], True
    where the prediction made at that position has a label; ``targets`` Long [batch, tokens], that
    label, already shifted (both None without labels); ``hidden`` [batch, tokens, width], the input
    of the last block in the model's dtype, without grad (None where none is found, or the scorer
    does not read it). ``step``: how many training steps were run before, counted per call of the
    model.
    ``generator`` lives on the CPU and is seeded from the run's seed and ``step``; nothing else
    draws from its stream.
    """

    input_ids: Tensor | None
    valid: Tensor
    supervised: Tensor | None
    targets: Tensor | None
    hidden: Tensor | None
    step: int
    generator: torch.Generator


class Scorer(ABC):
    """A score of tokens; a class under ``@scorer(name)``, in any file of this folder, is built in.

    `parts`: what is measured for it, ``"context"`` (attention received in the last layer) and
    ``"gradient"`` (of the loss, at the input of the last block); `fxseek.report` has them by these
    names. `reads_hidden`: it reads the input of the last block. `draws`: its scores change with the
    number of the step, so that a forward that is run again would select other tokens. `equal`: they
    are draws alone, by which every token is to be as likely as any other, in spans too.
    """

    parts: tuple[str, ...] = ()
    reads_hidden = False
    draws = False
    equal = False

    def __init__(self, config: SeekConfig) -> None:
        self.config = config

    @abstractmethod
    def scores(self, given: ScoreInputs, parts: Mapping[str, Tensor]) -> Tensor:
        """A score per token, best highest, ``-inf`` where a token is not valid.

        Shapes: each of `parts` and the result [batch, tokens].

        Raises:
            ScoreError: a score of a valid token is not finite. A built-in score checks that itself.
        """

    @abstractmethod
    def mass(self, scores: Tensor, parts: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """What ``select="sample"`` draws by, and what a ratio such as ``"mass:0.9"`` adds up.

        Nonnegative, never lower for a better score, and 0 where a token is not valid.

        Shapes: [batch, tokens].
        """


class Uniform(Scorer):
    """A score that prefers no token."""

    def mass(self, scores: Tensor, parts: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """The same for all tokens."""
        return valid.to(torch.float32)


class Every(Uniform):
    """The score where nothing is ranked: every token is kept, or every one that has a label."""

    def scores(self, given: ScoreInputs, parts: Mapping[str, Tensor]) -> Tensor:
        """Zeros."""
        zeros = torch.zeros(given.valid.shape, device=given.valid.device)
        return zeros.masked_fill(~given.valid, -torch.inf)


MEASURED = ("context", "gradient")
"""What may be measured for a score."""

SCORERS: dict[str, type[Scorer]] = {}
"""The built-in scores, by the name that ``score=`` takes."""

_S = TypeVar("_S", bound=type[Scorer])


def scorer(name: str) -> Callable[[_S], _S]:
    """Make a class the built-in score of this name."""

    def register(made: _S) -> _S:
        unknown = set(made.parts).difference(MEASURED)
        if unknown:
            raise ValueError(f"{made.__name__} wants {sorted(unknown)}, which nothing measures")
        SCORERS[name] = made
        return made

    return register


class Stream(IntEnum):
    """The unrelated draws of one step: each has a stream of its own."""

    SAMPLE = 0
    RANDOM_SCORE = 1
    SPANS = 2
    OWN_SCORE = 3


def step_generator(seed: int, step: int, stream: Stream) -> torch.Generator:
    """A CPU generator of its own for one step: the same for the same (seed, step, stream) always.

    A sample whose scores came from its own stream would be biased.
    """
    # Torch's CPU generator reads 32 bits of its seed: hashing keeps (0, 1) and (1, 0) apart.
    digest = hashlib.blake2b(f"{seed},{step},{stream}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
