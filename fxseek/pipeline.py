"""The passes in order, and the program that they make.

captured graph
  → inline          no checkpointed regions
  → functionalise   no writes
  → normalise       one spelling per operation; scaled losses as one; label shifts by padding
  → find_tokens     rows, columns, batch; a plan for each node that a rule understands
  → find_structure  loss, attentions, the last block
  → ditch           learn: the selected rows alone   ┐
  → plan_scores     score: what its rule reads       ├ → extract  prefill: what they read
  → assemble        prefill → score → select → gather → learn, one small GraphModule
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from fxseek import _torch
from fxseek.config import SeekConfig
from fxseek.errors import FxseekError, GraphError
from fxseek.head import ChunkedHead
from fxseek.lowering import Run, lower
from fxseek.masks import attend_all
from fxseek.passes.adapters import merge_adapters
from fxseek.passes.chunks import chunk_tokens
from fxseek.passes.ditch import StageGraph, StageInput, ditch
from fxseek.passes.extract import extract
from fxseek.passes.facts import (
    Facts,
    Rows,
    Sizes,
    descendants,
    example,
    find_sizes,
    is_tensor,
    needs_grad,
    primary,
    switches_mode,
    user_tensors,
    where,
)
from fxseek.passes.functionalise import functionalise
from fxseek.passes.head import Head, attach_head, find_head
from fxseek.passes.hoist import hoist_gathers, masks_of_attentions, share_masks
from fxseek.passes.inline import inline
from fxseek.passes.masks import use_mask_rows
from fxseek.passes.normalise import normalise
from fxseek.passes.offload import send_to_host, take_from_host
from fxseek.passes.rules import operation
from fxseek.passes.scale import scale_terms
from fxseek.passes.structure import Structure, find_structure
from fxseek.passes.tokens import find_tokens, made_from_rows
from fxseek.passes.unbatch import unbatch
from fxseek.passes.unshift import unshift
from fxseek.score_plan import plan_scores
from fxseek.stages import Gather, Learn, Prefill, Score, ScorePlan, Select


@dataclass
class Program:
    """A captured graph on its way through the passes, and what each of them found."""

    captured: fx.Graph
    config: SeekConfig
    graph: fx.Graph = field(default_factory=fx.Graph)
    sizes: Sizes | None = None
    facts: Facts | None = None
    structure: Structure | None = None
    head: Head | None = None
    chunked: ChunkedHead | None = None
    learn: StageGraph | None = None
    gathers: list[tuple[StageInput, tuple[Any, ...]]] = field(default_factory=list)
    masks: set[StageInput] = field(default_factory=set)
    first: fx.GraphModule | None = None
    """Writes to parameters that are run ahead of a step, without grad."""
    parameters: tuple[int, ...] = ()
    """Which inputs these write to."""
    written: tuple[int, ...] = ()
    """Which inputs are buffers that the step writes to; their new values are its last outputs."""
    returned: dict[int, int] = field(default_factory=dict)
    """Which outputs are such a buffer itself."""
    dropped: list[int] = field(default_factory=list)
    """Which of the captured outputs the step does not compute."""
    on_host: list[fx.Node] = field(default_factory=list)
    score: ScorePlan | None = None
    prefill: StageGraph | None = None
    module: fx.GraphModule | None = None


def trains(graph: fx.Graph) -> bool:
    """Whether the graph's outputs carry gradient; other graphs are left as they are."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return any(needs_grad(node) for node in output.all_input_nodes)


def build(
    captured: fx.Graph,
    config: SeekConfig,
    *,
    full_outputs: bool,
    token_inputs: Sequence[str] | None = None,
) -> Program:
    """Run all passes.

    `full_outputs`: token-shaped outputs keep their size (the torch.compile backend), whatever
    the configuration says. `token_inputs`: see `find_sizes`.

    Raises:
        GraphError: the graph cannot be rewritten; the message names the pass, the user's
            source line and the remedy.
    """
    program = Program(captured, config)
    done = "capture"
    for name, step in (
        ("functionalise", _functionalise),
        ("normalise", lambda p: _normalise(p, token_inputs)),
        ("find_tokens", _find_tokens),
        ("find_structure", _find_structure),
        ("ditch", lambda p: _ditch(p, full_outputs)),
        ("plan_scores", _plan_scores),
        ("prefill", _prefill),
        ("assemble", _assemble),
    ):
        try:
            step(program)
        except FxseekError:
            raise
        except Exception as error:
            raise GraphError(
                f"pass {name!r} (after {done!r}) failed: {type(error).__name__}: {error}. This is "
                "a defect of fxseek: please report it with the model's configuration."
            ) from error
        done = name
    return program


def _functionalise(program: Program) -> None:
    functional = functionalise(unbatch(inline(program.captured)))
    program.graph = functional.graph
    places = positions_of(program.graph)
    program.written = tuple(places[node] for node in functional.written)
    program.first = fx.GraphModule(nn.Module(), functional.first, class_name="First")
    program.parameters = tuple(places[node] for node in functional.parameters)
    program.returned = {i: places[node] for i, node in functional.returned.items()}
    program.graph.lint()


def _normalise(program: Program, token_inputs: Sequence[str] | None) -> None:
    program.graph = normalise(program.graph)
    program.sizes = find_sizes(program.graph, program.config.token_dim, token_inputs)
    program.graph = unshift(scale_terms(program.graph, program.sizes), program.sizes)
    program.graph.eliminate_dead_code(is_impure_node=_impure)
    program.graph.lint()


def _impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or switches_mode(node)


def _find_tokens(program: Program) -> None:
    assert program.sizes is not None
    program.facts = find_tokens(program.graph, program.sizes)


def _find_structure(program: Program) -> None:
    assert program.facts is not None
    own = program.config.loss is not None
    program.structure = find_structure(program.graph, program.facts, loss_first=own)
    _refuse_unselected(program.graph, program.facts, program.structure, program.config.token_dim)


def _ditch(program: Program, full_outputs: bool) -> None:
    facts, structure = program.facts, program.structure
    assert facts is not None and structure is not None
    kinds = "full" if full_outputs else program.config.outputs
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    wanted: list[tuple[str, fx.Node]] = []

    def want(node: fx.Node) -> Any:
        if is_tensor(node) and facts.token_sized(node) and facts.rows.get(node) is not None:
            if kinds == "loss":
                return None
            wanted.append(("rows" if kinds == "selected" else "full", node))
        else:
            wanted.append(("value", node))
        return _Slot(len(wanted) - 1)

    given: Any = output.args[0]
    count = len(given) - len(program.written)
    made: Any = map_arg(given[:count], want)
    for node in given[count:]:
        wanted.append(("full", node))
        made = (*made, _Slot(len(wanted) - 1))
    program.dropped = [i for i, node in enumerate(given) if node is not None and made[i] is None]
    carrying = {node for node in program.graph.nodes if needs_grad(node)}
    constants = made_from_rows(program.graph, facts)
    program.head = head = find_head(facts, structure)
    if head is not None:
        program.chunked = ChunkedHead(head, program.config)
    if head is not None and program.chunked is not None and _ends(head, wanted):
        entry = [("rows", head.entry)]
        stage = ditch(
            program.graph,
            facts,
            carrying=carrying,
            outputs=entry + wanted,
            given=[head.loss.node],
            constants=constants,
        )
        program.learn, program.gathers = hoist_gathers(stage)
        attach_head(program.learn, head, program.chunked)
    else:
        stage = ditch(program.graph, facts, carrying=carrying, outputs=wanted, constants=constants)
        program.learn, program.gathers = hoist_gathers(stage)
    results = list(program.learn.graph.output_node().args[0])  # type: ignore[arg-type]
    program.learn.graph.output_node().args = (_fill(made, results),)
    if program.config.backend == "eager":  # Dynamo takes tensors only
        program.masks = masks_of_attentions(program.learn)
        if program.config.recompute != "block":
            share_masks(program.learn)
    if program.config.kv == "offload":
        program.on_host = take_from_host(program.learn)


def _refuse_unselected(graph: fx.Graph, facts: Facts, structure: Structure, dim: int) -> None:
    """A step that would train every token must not say that it selects some."""
    trained = [node for node in graph.nodes if needs_grad(node) and facts.token_sized(node)]
    first = (primary(user_tensors(graph)) or user_tensors(graph))[0]
    name = _torch.source_name(first) or first.name
    shape = [_torch.size_hint(size) for size in example(first).shape]
    if trained and not any(isinstance(facts.rows.get(node), Rows) for node in trained):
        raise GraphError(
            f"nothing to select: tokens are in dimension {dim} of {name} {shape}, and no value "
            "with gradient has them in a dimension of their own beside the batch, so that every "
            "token would be trained. Pass token_dim= if tokens are in another dimension. Train a "
            "model that compares choices [batch, choices, tokens] without fxseek.compile."
        )
    ids = not example(first).is_floating_point() and example(first).dim() > dim + 1
    others = [
        node
        for node in facts.token_made
        if operation(node) in ("scaled_dot_product_attention", "softmax")
        and example(node).dim() == 4
    ]
    if ids and others and not structure.attentions:
        raise GraphError(
            f"dimension {dim} of {name} {shape} counts no tokens: an attention reads another one, "
            f"at {where(others[0])}. Pass token_dim= the dimension that counts tokens."
        )


def _ends(head: Head, wanted: list[tuple[str, fx.Node]]) -> bool:
    """Whether the loss is all that is wanted of what the head makes."""
    inside = descendants([head.entry]) - descendants([head.loss.node]) - {head.entry}
    queue = [node for _, node in wanted]
    seen = {head.loss.node}
    while queue:
        node = queue.pop()
        if node in inside:
            return False
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return True


class _Slot(int):
    """The place of an output among the learn stage's results, until they are known."""


def _fill(value: Any, results: list[Any]) -> Any:
    if isinstance(value, _Slot):
        return results[value]
    if isinstance(value, (list, tuple)):
        return tuple(_fill(item, results) for item in value)
    return value


def _plan_scores(program: Program) -> None:
    assert program.facts is not None and program.structure is not None
    program.score = plan_scores(
        program.graph, program.facts, program.structure, program.config, program.head
    )


def _prefill(program: Program) -> None:
    learn, score, sizes = program.learn, program.score, program.sizes
    assert learn is not None and score is not None and sizes is not None
    reads: dict[fx.Node, None] = {
        item.node: None
        for item in learn.inputs
        if item.kind in ("value", "gathered") and item.node is not None
    }
    made = set() if score.block is None else set(score.block.outputs)
    made |= set() if score.lead is None else set(score.lead.results)
    places = [place.position for place in score.required]
    positions = [place for place in places if isinstance(place, fx.Node)]
    for node in (
        score.target,
        *score.full,
        score.mask,
        score.ids,
        score.primary,
        score.hidden,
        *positions,
    ):
        if node is not None:
            reads[node] = None
    scored = [*score.context_reads]
    ending = None if score.exit is None or program.head is None else program.head.stage
    regions = [part.stage for part in (score.lead, score.tail) if part is not None]
    for stage in (score.block, score.head, ending, *regions):
        scored += [
            item.node
            for item in (() if stage is None else stage.inputs)
            if item.kind == "value" and item.node is not None
        ]
    reads.update((node, None) for node in scored if node not in made)
    outputs = [node for node in reads if node.op != "placeholder"]
    program.prefill = extract(program.graph, outputs)
    if program.config.prefill_chunk is not None:
        assert program.facts is not None
        chunk_tokens(program.prefill, program.graph, program.facts, program.config.prefill_chunk)
    use_mask_rows(program.prefill, sizes, whole=_read_whole(program))
    merge_adapters(program.prefill.graph)  # the score's block would keep the merged weights
    send_to_host(program.prefill, [node for node in program.on_host if node not in scored])


def _read_whole(program: Program) -> Iterator[fx.Node]:
    """Values that a later stage reads otherwise than as an attention's mask, or as its rows."""
    learn, score, structure = program.learn, program.score, program.structure
    assert learn is not None and score is not None and structure is not None
    ending = None if program.head is None else program.head.stage
    for stage in (learn, score.block, score.head, ending):
        for node, item in {} if stage is None else stage.placeholders().items():
            masks = all(user.target is attend_all for user in node.users)
            if item.kind == "value" and item.node is not None and not (node.users and masks):
                yield item.node
    if structure.attentions and operation(structure.attentions[-1]) == "softmax":
        yield from score.context_reads
    for item, place in program.gathers:
        rank = example(item.node).dim() if item.node is not None else 0
        if place not in ((0, rank - 2, 0, False, 1), (0, rank - 2, None, False, 1)):
            assert item.node is not None
            yield item.node


def _assemble(program: Program) -> None:
    learn, score, prefill = program.learn, program.score, program.prefill
    assert learn is not None and score is not None and prefill is not None
    bases = {item.node for item in learn.inputs if item.kind == "value" and item.node is not None}
    root = nn.Module()
    root.add_module("prefill", Prefill(prefill, bases, program.on_host))
    root.add_module("score", Score(score, program.config, program.chunked))
    root.add_module("select", Select(program.config))
    root.add_module("gather", Gather(program.gathers, program.masks))
    root.add_module("learn", Learn(learn, partial(_lower, program)))
    graph = fx.Graph()
    inputs = graph.placeholder("inputs")
    positions = graph.placeholder("positions")
    step = graph.placeholder("step")
    padding_mask = graph.placeholder("padding_mask")
    values = graph.call_module("prefill", (inputs, positions))
    values.name = "values"
    scores = graph.call_module("score", (inputs, positions, values, step, padding_mask))
    scores.name = "scores"
    selection = graph.call_module("select", (scores, step))
    selection.name = "selection"
    kept = graph.call_function(getattr, (selection, "kept"))
    kept.name = "kept"
    rows = graph.call_module("gather", (inputs, positions, values, kept))
    rows.name = "rows"
    outputs = graph.call_module("learn", (inputs, positions, values, rows, selection))
    outputs.name = "outputs"
    graph.output((outputs, selection, scores))
    graph.lint()
    program.module = fx.GraphModule(root, graph, class_name="SelectiveStep")


def _lower(program: Program, module: fx.GraphModule) -> Run:
    config, learn, structure = program.config, program.learn, program.structure
    assert learn is not None and structure is not None
    return lower(module, learn, config.backend, config.recompute, structure)


def positions_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """The place of each placeholder among the graph's inputs."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {node: index for index, node in enumerate(placeholders)}


__all__ = ["Program", "build", "positions_of", "trains"]
