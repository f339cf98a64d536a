"""The passes in order, and the program that they make. passes/README.md has each one's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from torch import fx, nn

from fxseek.config import SeekConfig
from fxseek.errors import FxseekError, GraphError
from fxseek.passes.adapters import merge_adapters
from fxseek.passes.causality import find_mixing
from fxseek.passes.chunks import chunk_tokens
from fxseek.passes.ditch import ditch, refuse_lost_gradient
from fxseek.passes.draws import of_other_values
from fxseek.passes.extract import extract
from fxseek.passes.factors import split_factors
from fxseek.passes.facts import Facts, needs_grad, switches_mode
from fxseek.passes.functionalise import Functional, functionalise
from fxseek.passes.groups import join_groups
from fxseek.passes.head import Head, attach_head, find_head
from fxseek.passes.hoist import hoist_gathers, mask_by_flags, masks_of_attentions, share_masks
from fxseek.passes.inline import inline
from fxseek.passes.ir import Gathered, Joined, Piece, Prefilled
from fxseek.passes.joins import join_writes
from fxseek.passes.latents import expand_latents
from fxseek.passes.masks import read_whole, use_mask_rows
from fxseek.passes.normalise import normalise
from fxseek.passes.offload import send_to_host, take_from_host
from fxseek.passes.outputs import Outputs, ends_in, find_outputs, refuse_unselected, returns
from fxseek.passes.outside import find_outside, refuse_unweighted, reuse_values
from fxseek.passes.parts import Exit, Parts, draws, find_exit, find_obstacle, join_values
from fxseek.passes.scale import scale_terms
from fxseek.passes.schedule import Schedule, schedule
from fxseek.passes.score import plan_scores
from fxseek.passes.score_plan import ScorePlan
from fxseek.passes.sizes import find_sizes
from fxseek.passes.structure import Structure, find_structure
from fxseek.passes.tokens import find_tokens, made_from_rows, settle_values
from fxseek.passes.unbatch import unbatch
from fxseek.passes.unshard import place_by_blocks, sharding_of, unshard
from fxseek.passes.unshift import unshift

__all__ = ["Passes", "Program", "Writes", "build", "places_of", "trains"]


@dataclass(frozen=True)
class Writes:
    """What a step writes to, by the places of the graph's inputs.

    `first`: writes to `parameters`, run ahead of a step without grad; `written`: buffers, whose new
    values are the last outputs; `returned`: outputs that are such a buffer itself.
    """

    first: fx.GraphModule
    parameters: tuple[int, ...]
    written: tuple[int, ...]
    returned: dict[int, int]


@dataclass(frozen=True)
class Program:
    """What the passes make of a captured graph.

    `graph`: the captured graph, functional and normalised; `facts`, `structure`: what is known of
    it; `prefill`, `score`, `learn`: what these stages run; `parts`: the body, which backward runs
    in parts, so that `learn` is only the end of the model; else why there is none, empty where none
    is asked for; `head`: what follows the last attention, None where it is not per-token; `masks`:
    gathered constants that attentions alone read; `on_host`: values that wait in host memory;
    `dropped`: which of the captured outputs a step does not compute; `writes`: what it writes to.
    """

    graph: fx.Graph
    config: SeekConfig
    facts: Facts
    structure: Structure
    prefill: Piece
    score: ScorePlan
    learn: Piece
    parts: Parts | str
    schedule: Schedule
    head: Head | None
    masks: frozenset[Gathered]
    on_host: tuple[fx.Node, ...]
    dropped: tuple[int, ...]
    writes: Writes

    @property
    def gathered(self) -> list[Gathered]:
        """The rows of constants that the learn stage reads."""
        return [item for item in self.learn.inputs if isinstance(item, Gathered)]

    @property
    def learned(self) -> list[Piece]:
        """What is run with gradient, in the order of the model."""
        return [self.parts.body, self.learn] if isinstance(self.parts, Parts) else [self.learn]

    @property
    def whole(self) -> set[fx.Node]:
        """Values of all tokens that stay whole until backward has read them: keys and values."""
        return {
            item.node
            for piece in self.learned
            for item in piece.inputs
            if isinstance(item, (Prefilled, Joined))
        }


def build(
    captured: fx.Graph,
    config: SeekConfig,
    *,
    full_outputs: bool,
    labelled: bool = True,
    token_inputs: Sequence[str] | None = None,
) -> Program:
    """Run all passes.

    `full_outputs`: token-shaped outputs keep their size (the torch.compile backend), whatever
    the configuration says. `labelled`: the call has labels. `token_inputs`: see `find_sizes`.

    Raises:
        GraphError: the graph cannot be rewritten; the message names the pass, the user's
            source line and the remedy.
    """
    then = Passes()
    eager = config.backend == "eager"
    expands = eager and config.recompute != "none"

    graph = then(inline, captured)
    graph = then(unbatch, graph)
    functional = then(functionalise, graph)
    writes = then(find_writes, functional)
    then(refuse_written_shards, functional)
    graph = then(normalise, functional.graph)
    graph = then(join_writes, graph)
    graph = then(join_groups, graph)
    graph = then(split_factors, graph)
    sizes = then(find_sizes, graph, config.token_dim, token_inputs)
    graph = then(scale_terms, graph, sizes)
    graph = then(unshift, graph, sizes)
    graph = then(without_dead_code, graph)
    graph, outside = then(find_outside, graph, sizes, config.most_chunk_bytes)

    facts = then(find_tokens, graph, sizes)
    structure = then(
        find_structure, graph, facts, loss_first=config.loss is not None,
        loss=outside and outside.loss, labelled=labelled,
    )  # fmt: skip
    then(refuse_unweighted, facts, outside)
    then(refuse_unselected, graph, facts, structure, config.token_dim)
    whole = full_outputs or (config.outputs == "loss" and not structure.has_loss)
    kind = "full" if whole else config.outputs
    outputs = then(find_outputs, graph, facts, kind, len(writes.written))

    carrying = {node for node in graph.nodes if needs_grad(node)}
    then(settle_values, graph, facts, of_other_values(graph, facts, carrying) - carrying)
    head = then(find_head, facts, structure)
    constants = then(made_from_rows, graph, facts)
    on_host: list[fx.Node] = []
    masks: frozenset[Gathered] = frozenset()
    ending = head if head is not None and ends_in(head, outputs) else None
    cut = then(find_exit, head, ending, outside)
    parts: Parts | str = ""
    if config.learn_chunk is not None:
        parts = in_parts(then, graph, facts, structure, cut, outputs, carrying, constants, config)
    wanted = [*outputs.wanted] if ending is None else [("rows", ending.entry), *outputs.wanted]
    given = [] if ending is None else [ending.loss.node]
    if isinstance(parts, Parts):
        given.append(parts.exit)
    learn = then(
        ditch, graph, facts, carrying=carrying, outputs=wanted, given=given, constants=constants
    )
    learn = then(hoist_gathers, learn)
    if expands:
        learn = then(expand_latents, learn, graph, facts)
    then(refuse_lost_gradient, learn)
    drawn = draws(learn) or (isinstance(parts, Parts) and parts.draws)
    if outside is not None and outside.read is not None and kind == "full" and not drawn:
        learn = then(reuse_values, learn, facts, outside)
    if ending is not None:
        learn = then(attach_head, learn, ending)
    learn = then(returns, learn, outputs)
    if eager:  # Dynamo takes tensors only
        learn, masks = masked_once(then, learn, config)
    if config.kv == "offload":
        learn, on_host = then(take_from_host, learn)
        body = parts.body.inputs if isinstance(parts, Parts) else []  # in the order of their use
        on_host += [item.node for item in body if isinstance(item, Joined)]
    plan = then(schedule, learn, structure, config)

    score = then(plan_scores, graph, facts, structure, config, head)
    if score.gradient is not None:
        then(use_mask_rows, score.gradient.block, sizes)

    prefill = then(extract, graph, prefilled(learn, parts, score))
    learned = [(learn, plan)]
    if isinstance(parts, Parts):
        learned.append((parts.body, parts.schedule))
    if config.prefill_chunk is not None:
        prefill = then(chunk_tokens, prefill, graph, facts, config.prefill_chunk)
    whole_values = read_whole([piece for piece, _ in learned], score, head)
    prefill = then(use_mask_rows, prefill, sizes, whole=whole_values)
    prefill = then(merge_adapters, prefill)  # the score's block would keep the merged weights
    scored = set(score.scored())
    prefill = then(send_to_host, prefill, [node for node in on_host if node not in scored])
    if any(map(sharding_of, graph.nodes)):
        prefill = then(unshard, prefill, place_by_blocks(prefill, structure))
        for piece, how in learned:
            assert how.segments is not None  # the caller has chosen recompute="block"
            then(unshard, piece, how.segments)

    return Program(
        graph, config, facts, structure, prefill, score, learn, parts, plan, head,
        masks, tuple(on_host), outputs.dropped, writes,
    )  # fmt: skip


def in_parts(
    then: Passes,
    graph: fx.Graph,
    facts: Facts,
    structure: Structure,
    cut: Exit | None,
    outputs: Outputs,
    carrying: set[fx.Node],
    constants: set[fx.Node],
    config: SeekConfig,
) -> Parts | str:
    """What is learned in parts, up to the exit; or the reason why nothing is."""
    obstacle = then(find_obstacle, cut, outputs, facts, carrying, config)
    if cut is None or obstacle:
        return obstacle
    exits = [("rows", cut.entry)]
    body = then(ditch, graph, facts, carrying=carrying, outputs=exits, constants=constants)
    body = then(hoist_gathers, body)
    if config.recompute != "none":
        body = then(expand_latents, body, graph, facts)
    then(refuse_lost_gradient, body)
    mixing = then(find_mixing, body, facts)
    if isinstance(mixing, str):
        return mixing
    body, masks = masked_once(then, body, config)
    body = then(join_values, body, mixing)
    plan = then(schedule, body, structure, config)
    return Parts(body, plan, cut.entry, cut.rows, mixing, masks, draws(body))


def masked_once(
    then: Passes, learn: Piece, config: SeekConfig
) -> tuple[Piece, frozenset[Gathered]]:
    """A piece whose attentions share their masks, and the rows that they alone read."""
    masks = then(masks_of_attentions, learn)
    learn = then(mask_by_flags, learn)
    if config.recompute != "block":
        learn = then(share_masks, learn)
    return learn, masks


_P = ParamSpec("_P")
_T = TypeVar("_T")


class Passes:
    """Runs passes; an error names the one that failed, and the one before it."""

    def __init__(self, last: str = "capture") -> None:
        self.last = last

    def __call__(self, run: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What a pass returns.

        Raises:
            GraphError: it failed.
        """
        name = run.__name__.strip("_")
        try:
            result = run(*args, **kwargs)
            if isinstance(result, fx.Graph):  # a piece gets the modules that it calls only later
                result.lint()
        except FxseekError:
            raise
        except Exception as error:
            raise GraphError(
                f"pass {name!r} (after {self.last!r}) failed: {type(error).__name__}: {error}. "
                "This is a defect of fxseek: please report it with the model's configuration."
            ) from error
        self.last = name
        return result


def trains(graph: fx.Graph) -> bool:
    """Whether the graph's outputs carry gradient; other graphs are left as they are."""
    return any(needs_grad(node) for node in graph.output_node().all_input_nodes)


def places_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """The place of each placeholder among the graph's inputs."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {node: index for index, node in enumerate(placeholders)}


def without_dead_code(graph: fx.Graph) -> fx.Graph:
    """The graph without what nothing reads."""
    graph.eliminate_dead_code(
        is_impure_node=lambda node: node.op in ("placeholder", "output") or switches_mode(node)
    )
    return graph


def find_writes(functional: Functional) -> Writes:
    """What a step writes to, by place: later passes keep the placeholders' order."""
    places = places_of(functional.graph)
    return Writes(
        fx.GraphModule(nn.Module(), functional.first, class_name="First"),
        tuple(places[node] for node in functional.parameters),
        tuple(places[node] for node in functional.written),
        {i: places[node] for i, node in functional.returned.items()},
    )


def refuse_written_shards(functional: Functional) -> None:
    """A step writes to whole parameters, and has none of a sharded one."""
    for node in functional.parameters:
        sharding = sharding_of(node)
        if sharding is not None:
            raise GraphError(
                f"the model writes to its parameter {sharding.name!r} in its forward, as an "
                "embedding with max_norm does, and FSDP2 has sharded it: leave that out, or keep "
                "the parameter whole by fully_shard(..., ignored_params={...})"
            )


def prefilled(learn: Piece, parts: Parts | str, score: ScorePlan) -> list[fx.Node]:
    """The values that the prefill makes: what later stages read and do not make themselves."""
    made = score.made()
    scored = [node for node in score.scored() if node not in made]
    body = [] if isinstance(parts, str) else parts.body.prefilled()
    if isinstance(parts, Parts) and not parts.draws:
        body.append(parts.exit)
    reads = dict.fromkeys([*learn.prefilled(), *body, *score.kept(), *scored])
    return [node for node in reads if node.op != "placeholder"]
