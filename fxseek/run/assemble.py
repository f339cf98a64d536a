"""A program as something that runs: prefill → score → select → gather → learn."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fxseek.program import Passes, Program, places_of
from fxseek.run.env import Env
from fxseek.run.head import ChunkedHead
from fxseek.run.lowering import lower
from fxseek.run.parts import LearnInParts
from fxseek.run.score import Score, Scores
from fxseek.run.stages import Gather, Learn, Prefill, Select
from fxseek.selecting import Selection

__all__ = ["Ran", "Step", "assemble"]


class Ran(NamedTuple):
    """What a step gives: the captured outputs, and what it selected, scored and saved."""

    outputs: tuple[Any, ...]
    selection: Selection
    scores: Scores
    saved_bytes: int


@dataclass(frozen=True)
class Step:
    """A program, and the module of its stages."""

    program: Program
    module: fx.GraphModule

    @cached_property
    def places(self) -> Mapping[fx.Node, int]:
        """The place of each input of the captured graph."""
        return places_of(self.program.graph)

    def env(self, arguments: Sequence[Any]) -> Env:
        """The values of a step with these inputs of the captured graph."""
        return Env(arguments, self.places)

    def run(
        self,
        arguments: Sequence[Any],
        index: int,
        padding_mask: Tensor | None,
        ratio: float | None,
    ) -> Ran:
        """One step, the `index`-th.

        `padding_mask`: Bool[batch or 1, tokens], False at padding; `ratio`: the share of a row's
        tokens to keep, None where the rows decide.
        """
        return Ran(*self.module(self.env(arguments), index, padding_mask, ratio))


def assemble(program: Program) -> Step:
    """Make the small graph module that runs the stages of a program.

    Raises:
        GraphError: a stage cannot be made.
    """
    return Passes("build")(_assemble, program)


def _assemble(program: Program) -> Step:
    config, parts = program.config, program.parts
    once = not isinstance(parts, str)  # backward is for the parts alone
    head = None if program.head is None else ChunkedHead(program.head, config, once=once)
    modules = {} if head is None else {"head": head}
    run = lower(program.learn, program.schedule, config, **modules)
    if isinstance(parts, str):
        learn = Learn(program.learn, run)
    else:
        body = lower(parts.body, parts.schedule, config)
        learn = LearnInParts(parts, config, body, program.learn, run)
    root = nn.Module()
    root.add_module("prefill", Prefill(program.prefill, program.whole, program.on_host))
    root.add_module("score", Score(program.score, config, head))
    root.add_module("select", Select(config))
    root.add_module("gather", Gather(program.gathered, program.masks))
    root.add_module("learn", learn)
    graph = fx.Graph()
    given = ("env", "index", "padding_mask", "ratio")
    env, index, padding_mask, ratio = map(graph.placeholder, given)

    def named(node: fx.Node, name: str) -> fx.Node:
        node.name = name
        return node

    named(graph.call_module("prefill", (env,)), "values")
    scores = named(graph.call_module("score", (env, index, padding_mask)), "scores")
    selection = named(graph.call_module("select", (scores, index, ratio)), "selection")
    named(graph.call_module("gather", (env, selection)), "rows")
    learned = named(graph.call_module("learn", (env, selection)), "learned")
    outputs = named(graph.call_function(operator.getitem, (learned, 0)), "outputs")
    saved = named(graph.call_function(operator.getitem, (learned, 1)), "saved_bytes")
    graph.output((outputs, selection, scores, saved))
    graph.lint()
    return Step(program, fx.GraphModule(root, graph, class_name="SelectiveStep"))
