"""What passes hand on: pieces of the captured graph, whose inputs say what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx

from fxseek import _torch
from fxseek.ops.rows import Rows

__all__ = [
    "Argument",
    "Gathered",
    "Given",
    "Input",
    "Joined",
    "Parameter",
    "Piece",
    "Prefilled",
    "Selected",
    "Swept",
    "copy_origin",
    "input_of",
    "origin",
    "placeholder_of",
]


@dataclass(frozen=True)
class Argument:
    """An input of the captured graph that comes with the batch."""

    node: fx.Node


@dataclass(frozen=True)
class Parameter:
    """An input of the captured graph that the model owns: a parameter or a buffer."""

    node: fx.Node


@dataclass(frozen=True)
class Prefilled:
    """A value of all tokens, without gradient: the prefill makes it."""

    node: fx.Node


@dataclass(frozen=True)
class Given:
    """A value that the caller passes in: rows of some tokens, or a value without tokens."""

    node: fx.Node


@dataclass(frozen=True)
class Gathered:
    """The selected rows of a constant, with leading dimensions added to it first."""

    node: fx.Node
    unsqueezed: int
    rows: Rows


@dataclass(frozen=True)
class Joined:
    """A value of all tokens that parts share; each makes its own rows of it with gradient."""

    node: fx.Node
    rows: Rows


@dataclass(frozen=True)
class Selected:
    """A part of the selection."""

    part: Literal["kept", "weights", "filled", "consecutive"]


Input = Argument | Parameter | Prefilled | Given | Gathered | Joined | Selected


def input_of(node: fx.Node) -> Argument | Parameter | Prefilled:
    """What a stage takes for a captured node: an input of the graph, or what the prefill makes."""
    if node.op != "placeholder":
        return Prefilled(node)
    return Parameter(node) if _torch.is_module_state(node) else Argument(node)


def origin(node: fx.Node) -> fx.Node | None:
    """The captured node that a node of a piece was made for; None where a pass has added it."""
    return node.meta.get("origin")


def copy_origin(made: fx.Node, captured: fx.Node) -> fx.Node:
    """Note on a node of a piece what it was made for, and where that stands in the source."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in captured.meta:
            made.meta[key] = captured.meta[key]
    made.meta["origin"] = captured
    return made


def placeholder_of(graph: fx.Graph, item: Input) -> fx.Node:
    """A placeholder for an input, where the graph inserts."""
    if isinstance(item, Selected):
        return graph.placeholder(item.part)
    name = item.node.name
    whole = isinstance(item, (Prefilled, Joined))
    made = graph.placeholder(f"{name}_full" if whole else name)
    return copy_origin(made, item.node)


@dataclass
class Piece:
    """A part of the captured graph that runs by itself.

    `inputs` are what its placeholders stand for, in order; `outputs` the captured nodes of its
    results.
    """

    graph: fx.Graph
    inputs: list[Input]
    outputs: list[fx.Node]
    general: list[fx.Node] = field(default_factory=list)
    """Captured nodes that it runs on all tokens, since no rule understands them."""
    compact: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Where the selected rows of captured values are in the graph."""
    parts: dict[str, Any] = field(default_factory=dict)
    """What the graph calls by name: modules, or what `fxseek.run` makes modules of."""

    def placeholders(self) -> dict[fx.Node, Input]:
        """What each placeholder stands for, in order."""
        nodes = (node for node in self.graph.nodes if node.op == "placeholder")
        return dict(zip(nodes, self.inputs, strict=True))

    def reads(self) -> list[fx.Node]:
        """The captured nodes that its inputs stand for, in order."""
        return [item.node for item in self.inputs if not isinstance(item, Selected)]

    def given(self) -> list[fx.Node]:
        """The captured nodes of the values that the caller passes in."""
        return [item.node for item in self.inputs if isinstance(item, Given)]

    def runs_on_rows(self) -> bool:
        """Whether it can be swept: nothing falls back, and of a selection it reads the positions.

        Nor does it read rows that are gathered ahead.
        """
        known = (Argument, Parameter, Prefilled, Given)
        return not self.general and all(
            isinstance(item, known) or item == Selected("kept") for item in self.inputs
        )

    def prefilled(self) -> list[fx.Node]:
        """The captured nodes whose values of all tokens it reads, itself or by gathers."""
        full = (Prefilled, Gathered, Joined)
        return [item.node for item in self.inputs if isinstance(item, full)]

    def edited(self, items: Mapping[fx.Node, Input]) -> Piece:
        """The piece after a pass has worked on its graph; what nothing reads is no input any more.

        `items`: what each placeholder stands for, those that the pass has added too.
        """
        for node in self.graph.find_nodes(op="placeholder"):
            if not node.users:
                self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        return replace(
            self,
            inputs=[items[node] for node in self.graph.find_nodes(op="placeholder")],
            compact={node: rows for node, rows in self.compact.items() if rows in alive},
        )


@dataclass(frozen=True)
class Swept:
    """A piece to be run on at most `size` tokens of each row at a time.

    `rows`: where the tokens of its `Given` inputs and of its outputs are. Each output's tokens
    follow from the same tokens of the inputs alone.
    """

    piece: Piece
    rows: dict[fx.Node, Rows]
    size: int
