"""What the score stage reads and runs, as `fxseek.passes.score` plans it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fxseek.ops.rows import Rows
from fxseek.passes.head import Head
from fxseek.passes.ir import Piece, Swept
from fxseek.passes.structure import Place

__all__ = [
    "AttentionMap",
    "EndsInHead",
    "EndsInLoss",
    "EndsInMap",
    "FusedMap",
    "GradientPlan",
    "ScorePlan",
    "SpelledMap",
    "Stream",
    "Targets",
    "TokenInputs",
]


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of the captured graph that say how many tokens there are, and which.

    `ids`, `mask`, `positions`: None where there is none; `own_ids`: those of the tokens that are
    counted, which `ids` are not where they are an encoder's; `primary`: one that counts the tokens;
    `batch_dim`: its batch dimension, None where the batch is 1; `virtual`: tokens that the model
    puts in front of those it is given (prompt tuning); `required`: places in a row that it reads
    one by one.
    """

    ids: fx.Node | None
    mask: fx.Node | None
    positions: fx.Node | None
    primary: fx.Node
    batch_dim: int | None
    virtual: int
    required: tuple[Place, ...]
    own_ids: fx.Node | None


@dataclass(frozen=True)
class Targets:
    """The labels of a token loss.

    `full`: targets (None where these are probabilities, which every position has), class weights
    and scale of all positions, as `fxseek.ops.loss.mass_of` takes them; `sums`: the captured
    loss is a sum over tokens, which the caller divides, and not their mean.
    """

    full: tuple[fx.Node | None, ...]
    ignore_index: int
    sums: bool

    @property
    def target(self) -> fx.Node | None:
        """The targets of all positions."""
        return self.full[0]


@dataclass(frozen=True)
class Stream:
    """The input of the last block, and where its tokens are (None where that is not clear)."""

    node: fx.Node
    rows: Rows | None


@dataclass(frozen=True)
class FusedMap:
    """The map of a `scaled_dot_product_attention`: its column sums are computed from its operands.

    `square`: the mask is a boolean one of tokens × tokens.
    """

    query: fx.Node
    key: fx.Node
    mask: fx.Node | None
    scale: fx.Node | float | None
    is_causal: bool
    square: bool

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The captured values that it reads."""
        reads = (self.query, self.key, self.mask, self.scale)
        return tuple(node for node in reads if isinstance(node, fx.Node))


@dataclass(frozen=True)
class SpelledMap:
    """The map of an attention that is spelled out: `piece` makes rows of it.

    `entry_bytes`: bytes of one entry over all heads.
    """

    piece: Piece
    entry_bytes: int

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The captured values that it reads."""
        return tuple(self.piece.reads())


AttentionMap = FusedMap | SpelledMap


@dataclass(frozen=True)
class EndsInLoss:
    """The block goes on to the loss, on all tokens at once."""

    loss: fx.Node


@dataclass(frozen=True)
class EndsInHead:
    """The block ends at `cuts`, which `tail` takes to the head, on chunks of labelled tokens.

    Without a tail there is one cut, the head's entry.
    """

    head: Head
    cuts: tuple[fx.Node, ...]
    tail: Swept | None


@dataclass(frozen=True)
class EndsInMap:
    """The block ends at the operands of an attention that is spelled out.

    `piece` takes them to the loss's parts, on chunks of tokens. `logit_bytes`: of one token of one
    row; `map_bytes`: of one entry of the map over all heads.
    """

    piece: Piece
    cuts: tuple[fx.Node, ...]
    logit_bytes: int
    map_bytes: int


@dataclass(frozen=True)
class GradientPlan:
    """How the gradient of the loss at the input of the last block is computed.

    `lead`: what is per-token in front of the block's attention, on chunks of tokens, or None;
    `block`: from there (or from the block's input) to where `end` begins, on all tokens.
    """

    start: Stream
    lead: Swept | None
    block: Piece
    end: EndsInLoss | EndsInHead | EndsInMap

    def pieces(self) -> list[Piece]:
        """All pieces that it runs."""
        pieces = [self.block]
        if self.lead is not None:
            pieces.append(self.lead.piece)
        match self.end:
            case EndsInHead(head, _, tail):
                pieces += [head.stage] if tail is None else [head.stage, tail.piece]
            case EndsInMap(piece):
                pieces.append(piece)
        return pieces


@dataclass(frozen=True)
class ScorePlan:
    """What the score stage reads and runs; None where the score needs no such thing."""

    tokens: TokenInputs
    targets: Targets | None
    hidden: Stream | None
    context: AttentionMap | None
    gradient: GradientPlan | None
    of_loss: bool = True
    """The gradient is that of a loss, and not of rewards whose loss is the caller's."""

    def kept(self) -> list[fx.Node]:
        """Values that the stage reads for itself, and lets others have."""
        targets = () if self.targets is None else self.targets.full
        places = [place.position for place in self.tokens.required]
        streams = [self.hidden, None if self.gradient is None else self.gradient.start]
        nodes = (
            *targets,
            *(self.tokens.mask, self.tokens.ids, self.tokens.primary),
            *(None if stream is None else stream.node for stream in streams),
            *places,
        )
        return [node for node in nodes if isinstance(node, fx.Node)]

    def scored(self) -> list[fx.Node]:
        """Values of all tokens that its pieces read."""
        return self._read(Piece.prefilled)

    def reads(self) -> list[fx.Node]:
        """All captured values that it reads, inputs of the graph among them."""
        return self.kept() + self._read(Piece.reads)

    def _read(self, by: Callable[[Piece], list[fx.Node]]) -> list[fx.Node]:
        reads = [] if self.context is None else list(self.context.reads)
        pieces = [] if self.gradient is None else self.gradient.pieces()
        return reads + [node for piece in pieces for node in by(piece)]

    def made(self) -> set[fx.Node]:
        """Those of them that another of its pieces makes."""
        if self.gradient is None:
            return set()
        lead = self.gradient.lead
        return {*self.gradient.block.outputs, *(() if lead is None else lead.piece.outputs)}
