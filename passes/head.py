"""Head: what follows the last attention leaves the learn stage as a module of its own.

Before::

    h = add(x, o)                       # after the last attention, [batch, kept, width]
    logits = linear(norm(mlp(h)), w)    # [batch, kept, vocabulary]
    loss = selected_cross_entropy(logits, target_rows, weights, target)

After::

    h = add(x, o)
    loss = head(h, kept, weights, target, w, ...)      # on chunks of tokens

The head is per-token down to the loss, which is a sum over tokens: chunks of it add up, and the
logits of one chunk are alive at a time. The score stage runs the same module on all labelled
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxseek import _torch
from fxseek.ops.loss import cross_entropy_parts, selected_cross_entropy
from fxseek.passes.ditch import ditch
from fxseek.passes.draws import acts_on_gradient, draws_values
from fxseek.passes.facts import Facts, Rows, ancestors, descendants, example
from fxseek.passes.ir import Given, Input, Piece, Selected, input_of, placeholder_of
from fxseek.passes.rules import argument
from fxseek.passes.rules.loss import TokenLoss
from fxseek.passes.structure import Structure


@dataclass(frozen=True)
class Head:
    """The end of a model: `stage` maps rows of `entry` to (weighted sum of losses, labels).

    `logits`: the same inputs to the logits and their targets; `rows`: where the tokens of `entry`
    are; `loss`: as it was captured; `full`: what `fxseek.ops.loss.mass_of` takes, None where a part
    is None; `logit_bytes`: bytes of one token's logits.
    """

    stage: Piece
    logits: Piece
    entry: fx.Node
    rows: Rows
    loss: TokenLoss
    full: tuple[Input | None, ...]
    logit_bytes: int


def find_head(facts: Facts, structure: Structure) -> Head | None:
    """The head of a model whose loss is per-token after its last attention; None of others."""
    entry, loss = structure.block_exit, structure.loss
    rows = None if entry is None else facts.rows.get(entry)
    if entry is None or loss is None or loss is not structure.objective:
        return None
    found = TokenLoss.of(loss)
    if not isinstance(rows, Rows) or found is None or found.probabilities:
        return None
    between = (descendants([entry]) & ancestors([loss])) - {entry}
    if any(node in facts.stream and node not in facts.plans for node in between):
        return None
    carrying = _trained_before(loss, entry, facts)
    if any(map(acts_on_gradient, carrying)):
        return None  # chunks have gradients of their own, which don't add up
    outside = carrying - between
    if any(facts.token_sized(node) for node in outside):
        return None  # a part of the stream goes past the entry
    stage = ditch(loss.graph, facts, carrying=carrying, outputs=[("value", loss)], given=[entry])
    if any(isinstance(item, Given) and item.node is not entry for item in stage.inputs):
        return None
    if Selected("filled") in stage.inputs or any(map(draws_values, outside)):
        return None  # tokens are read that may be in another chunk; or other values are drawn there
    stage = to_parts(stage)
    return Head(
        stage,
        _to_logits(stage),
        entry,
        rows,
        found,
        tuple(None if node is None else input_of(node) for node in found.full),
        logit_bytes(found.logits),
    )


def to_parts(stage: Piece) -> Piece:
    """Let a stage that ends in the loss return `cross_entropy_parts` instead."""
    made = next(node for node in stage.graph.nodes if node.target is selected_cross_entropy)
    options = {name: value for name, value in made.kwargs.items() if name != "reduction"}
    made.target, made.args, made.kwargs = cross_entropy_parts, made.args[:5], options
    stage.graph.output_node().args = (made,)
    given = stage.placeholders()
    stage.graph.lint()
    return stage.edited(given)


def _to_logits(stage: Piece) -> Piece:
    """A head without its loss: the logits and their targets."""
    graph = fx.Graph(owning_module=stage.graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(stage.graph, copies)
    (made,) = stage.graph.output_node().args
    assert isinstance(made, fx.Node)
    graph.output(tuple(copies[x] for x in made.args[:2] if isinstance(x, fx.Node)))
    graph.erase_node(copies[made])
    graph.lint()
    return Piece(graph, stage.inputs, [])


def _trained_before(loss: fx.Node, entry: fx.Node, facts: Facts) -> set[fx.Node]:
    """What the loss is made of on the way from the entry, and from trained weights."""
    scale = argument(loss, 8, "scale")
    operands = [node for node in loss.all_input_nodes if node is not scale]

    def between(node: fx.Node) -> bool:
        return node is not entry and node.op != "placeholder" and node in facts.stream

    return {loss} | ancestors(operands, between)


def logit_bytes(logits: fx.Node) -> int:
    """Bytes of one token's logits."""
    value = example(logits)
    classes = value.shape[1 if value.dim() > 1 else 0]
    return _torch.size_hint(classes) * max(4, value.element_size())


def attach_head(learn: Piece, head: Head) -> Piece:
    """Let a learn stage that takes the loss and returns the head's entry first call the head."""
    graph = learn.graph
    place = {item: node for node, item in learn.placeholders().items()}
    start = next(iter(graph.nodes))
    output = graph.output_node()
    entry, *results = output.args[0]  # type: ignore[misc]
    output.args = (tuple(results),)
    loss = place.pop(Given(head.loss.node))

    def read(item: Input) -> Any:
        if item == Given(head.entry):
            return entry
        if item not in place:
            with graph.inserting_before(start):
                place[item] = placeholder_of(graph, item)
        return place[item]

    full = head.full if head.loss.reduction == "sum" else ()
    given = (*head.stage.inputs, *full)
    arguments = [None if item is None else read(item) for item in given]
    first = min(loss.users, key=list(graph.nodes).index)
    with graph.inserting_before(first):
        made = graph.create_node("call_module", "head", tuple(arguments))
    loss.replace_all_uses_with(made)
    graph.erase_node(loss)
    learn.parts["head"] = head
    return learn.edited({node: item for item, node in place.items()})


__all__ = ["Head", "attach_head", "find_head", "logit_bytes", "to_parts"]
