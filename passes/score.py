"""Score: what the score stage reads and runs for the configured score."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from fxseek import _torch
from fxseek.config import SeekConfig
from fxseek.errors import GraphError
from fxseek.ops.rows import Rows
from fxseek.passes.ditch import ditch
from fxseek.passes.extract import extract
from fxseek.passes.facts import (
    PRIMARY_INPUTS,
    Facts,
    ancestors,
    descendants,
    example,
    tensors_of,
    user_tensors,
)
from fxseek.passes.head import Head, logit_bytes, to_parts
from fxseek.passes.ir import Piece, Prefilled, Swept
from fxseek.passes.modes import without_grad
from fxseek.passes.rules import Call, operation
from fxseek.passes.rules.loss import TokenLoss
from fxseek.passes.score_plan import (
    EndsInHead,
    EndsInLoss,
    EndsInMap,
    FusedMap,
    GradientPlan,
    ScorePlan,
    SpelledMap,
    Stream,
    Targets,
    TokenInputs,
)
from fxseek.passes.structure import Structure
from fxseek.passes.tokens import per_token
from fxseek.ratios import Labelled
from fxseek.scores import scorer_of


def plan_scores(
    graph: fx.Graph, facts: Facts, structure: Structure, config: SeekConfig, head: Head | None
) -> ScorePlan:
    """Decide what the score stage reads and runs.

    Raises:
        GraphError: it needs a loss over tokens, an attention or a last block, and the graph has
            none.
    """
    scorer, kind = scorer_of(config), config.score
    start = structure.block_input
    stream = None if start is None else Stream(start, _rows_of(facts, start))
    tokens = _token_inputs(graph, facts, structure, config)
    targets = _targets(structure)
    if isinstance(config.parsed_ratio, Labelled) and targets is None:
        raise GraphError(
            "ratio='labelled' keeps the positions that have a label, and the captured graph has no "
            "cross-entropy over tokens that fxseek knows. Pass a share of the tokens, such as "
            "ratio=0.1."
        )
    if config.select == "sample" and structure.left:
        raise GraphError(
            "select='sample' weighs each token's loss, and the loss is computed outside the "
            "captured graph, from values of all tokens. Pass labels to the model, or a loss= with "
            "a cross-entropy over tokens to fxseek.compile, or use select='topk'."
        )
    if config.select == "sample" and targets is None:
        raise GraphError(
            "select='sample' weighs each token's loss, and the captured graph has no cross-entropy "
            "over tokens that fxseek knows. Use select='topk'."
        )
    if config.supervised_only and targets is None:
        raise GraphError(
            "supervised_only=True selects among the positions that have a label, and the captured "
            "graph has no cross-entropy over tokens that fxseek knows. Leave it out."
        )
    plan = ScorePlan(tokens, targets, stream if scorer.reads_hidden else None, None, None)
    if not scorer.parts:
        return plan
    if not structure.attentions:
        raise GraphError(
            f"score={kind!r} reads the model's last attention, and the captured graph has none "
            "that fxseek knows (scaled_dot_product_attention, or a softmax of tokens × tokens). "
            'Use score="random" or a callable.'
        )
    if "context" in scorer.parts:
        last = structure.attentions[-1]
        fused = operation(last) == "scaled_dot_product_attention"
        context = _fused(facts, last) if fused else _spelled_out(graph, facts, last)
        plan = replace(plan, context=context)
    if "gradient" not in scorer.parts:
        return plan
    if structure.objective is None:
        raise GraphError(
            f"score={kind!r} needs the gradient of the loss, and the captured graph has none that "
            "is known: it returns no scalar with gradient, or several, or one without labels. "
            "Pass labels to the model, or compile with loss=lambda outputs, batch: outputs.loss "
            'if it computes its loss from other arguments, or use score="context", "random" or a '
            "callable."
        )
    if stream is None:
        raise GraphError(
            f"score={kind!r} needs the input of the last block, and no value lies on every path "
            "from the tokens to the last attention (the model is no residual stream). Use "
            'score="context", "random" or a callable.'
        )
    reads = () if plan.context is None else plan.context.reads
    gradient = _gradient(graph, facts, structure, stream, reads, head, config.prefill_chunk)
    return replace(plan, gradient=gradient, of_loss=structure.has_loss or bool(structure.losses))


def _rows_of(facts: Facts, node: fx.Node) -> Rows | None:
    rows = facts.rows.get(node)
    return rows if isinstance(rows, Rows) else None


def _token_inputs(
    graph: fx.Graph, facts: Facts, structure: Structure, config: SeekConfig
) -> TokenInputs:
    inputs, sizes = user_tensors(graph), facts.sizes
    named = {_torch.source_name(node): node for node in inputs}
    given = sizes.tokens - sizes.virtual
    counting = [
        node
        for node in inputs
        if example(node).dim() > config.token_dim and facts.shape(node)[config.token_dim] == given
    ]
    by_name = {_torch.source_name(node): node for node in counting}
    primary = next((by_name[name] for name in PRIMARY_INPUTS if name in by_name), counting[0])
    mask = by_name.get("decoder_attention_mask", by_name.get("attention_mask"))
    if mask is not None and example(mask).dim() not in (2, 4):
        mask = None
    return TokenInputs(
        ids=named.get("input_ids"),  # of an encoder, where there are two
        mask=mask,
        positions=named.get("position_ids"),
        primary=primary,
        batch_dim=None if sizes.batch is None else 0,
        virtual=sizes.virtual,
        required=structure.pooled,
        own_ids=by_name.get("decoder_input_ids", by_name.get("input_ids")),
    )


def _targets(structure: Structure) -> Targets | None:
    loss = None if structure.loss is None else TokenLoss.of(structure.loss)
    if loss is None:
        return None
    target, *rest = loss.full
    target = None if loss.probabilities else target  # which every position has
    sums = structure.loss is structure.objective and loss.reduction == "sum"
    return Targets((target, *rest), loss.ignore_index, sums)


def _gradient(
    graph: fx.Graph,
    facts: Facts,
    structure: Structure,
    stream: Stream,
    reads: tuple[fx.Node, ...],
    ending: Head | None,
    size: int | None,
) -> GradientPlan:
    """The last block on all tokens, and the rest of the model on chunks of them.

    The two meet at the block's exit, or, where attention is spelled out as matmul, softmax, matmul,
    at its operands, so that the map of tokens × tokens is made in chunks too. With chunks of `size`
    tokens, what is per-token in the block before and after its attention is run on such chunks, and
    in backward once more: what remains is the attention.
    """
    start, loss = stream.node, structure.objective
    assert loss is not None
    after = descendants([start])
    lead: Swept | None = None
    end: EndsInLoss | EndsInHead | EndsInMap = EndsInLoss(loss)
    cuts: tuple[fx.Node, ...] = (loss,)
    found = TokenLoss.of(loss) if loss is structure.loss else None
    attention = structure.attentions[-1]
    if found is not None and operation(attention) == "softmax":
        piece = None if found.probabilities else _head(facts, structure, loss)
        if piece is not None:
            cuts = tuple(
                item.node
                for item in piece.inputs
                if isinstance(item, Prefilled)
                and item.node in after
                and example(item.node).is_floating_point()
            )
            if cuts:
                end = EndsInMap(piece, cuts, logit_bytes(found.logits), _map_bytes(attention))
            else:
                cuts = (loss,)
    elif ending is not None and not _goes_past(ending):
        tail, cuts = None, (ending.entry,)
        if size is not None:
            regions = _around_attention(facts, start, ending.entry, reads, size)
            if regions is not None:
                lead, tail = regions
                cuts = tuple(tail.piece.given())
        end = EndsInHead(ending, cuts, tail)
    given = [start] if lead is None else [start, *lead.piece.outputs]
    made = [node for node in cuts if node is not start]
    made += [node for node in reads if node in after and node not in (*made, *given)]
    constants = _constants_before(made, start, after)
    block = extract(graph, made, given=[*given, *constants], grad_modes=True)
    return GradientPlan(stream, lead, block, end)


def _goes_past(head: Head) -> bool:
    """Whether a gradient reaches the head's entry by what the head takes for a constant.

    A mean over tokens has none, and no gradient in training where the weights before it are frozen.
    """
    graph = head.entry.graph
    constant = without_grad(graph)
    flowing = {head.entry}
    for node in graph.nodes:
        if flowing.isdisjoint(node.all_input_nodes) or node in constant:
            continue
        floating = any(x.is_floating_point() for x in tensors_of(example(node)))
        if floating and operation(node) != "detach":
            flowing.add(node)
    return any(node in flowing for node in head.stage.prefilled())


def _around_attention(
    facts: Facts, start: fx.Node, exit: fx.Node, reads: tuple[fx.Node, ...], size: int
) -> tuple[Swept, Swept] | None:
    """What is per-token from `start` to `exit`: in front of what mixes tokens, and after it.

    None where either is nothing, or reads what it cannot be given.
    """
    after = descendants([start])
    between = (after & ancestors([exit, *reads])) - {start}
    inside = [node for node in start.graph.nodes if node in between]
    mixing = {node for node in inside if not per_token(node, facts)}
    before = ancestors(mixing) & between
    first: set[fx.Node] = set()
    for node in inside:
        operands = set(node.all_input_nodes) & after
        if node in before and node not in mixing and operands <= {*first, start}:
            first.add(node)
    middle = before - first
    results = [n for n in inside if n in first and (n in reads or not middle.isdisjoint(n.users))]
    rest = between - before
    entries = [n for n in inside if n in middle and not rest.isdisjoint(n.users)]
    carrying = between - mixing
    lead = _region(facts, carrying, [start], results, size)
    tail = _region(facts, carrying, [start, *entries], [exit], size)
    return None if lead is None or tail is None else (lead, tail)


def _region(
    facts: Facts, carrying: set[fx.Node], given: list[fx.Node], results: list[fx.Node], size: int
) -> Swept | None:
    """The operations of `carrying` from `given` to `results`, or None where rows are not enough."""
    rows = {node: facts.rows.get(node) for node in (*given, *results)}
    known = {node: x for node, x in rows.items() if isinstance(x, Rows) and not x.packed}
    if not results or len(known) < len(rows):
        return None
    outputs = [("rows", node) for node in results]
    stage = ditch(given[0].graph, facts, carrying=carrying, outputs=outputs, given=given)
    after = descendants(given[:1])
    if not stage.runs_on_rows() or not after.isdisjoint(stage.prefilled()):
        return None
    return Swept(stage, known, size) if stage.given() else None


def _map_bytes(attention: fx.Node) -> int:
    """Bytes of one entry of an attention map, over all its heads."""
    value = example(attention)
    heads = _torch.size_hint(value.shape[-3]) if value.dim() > 2 else 1
    return heads * value.element_size()


def _constants_before(outputs: list[fx.Node], start: fx.Node, after: set[fx.Node]) -> list[fx.Node]:
    """Values that do not come from the block's input: taken from the prefill, not made again."""
    read = {x for node in (ancestors(outputs) & after) - {start} for x in node.all_input_nodes}
    return [
        node
        for node in read - after
        if node.op != "placeholder" and list(tensors_of(example(node)))
    ]


def _head(facts: Facts, structure: Structure, loss: fx.Node) -> Piece | None:
    """From a spelled-out attention to the loss's parts on given rows; None if not per-token."""
    between = descendants(_square(facts, structure.attentions[-1])) & ancestors([loss])
    carrying = {node for node in between if node in facts.stream}
    if any(node not in facts.plans for node in carrying):
        return None
    stage = ditch(loss.graph, facts, carrying=carrying, outputs=[("value", loss)])
    return to_parts(stage)


def _square(facts: Facts, attention: fx.Node) -> set[fx.Node]:
    """An attention map and the values of tokens × tokens that it is made from, of its own layer."""
    return ancestors([attention], lambda node: node in facts.stream and facts.square(node))


def _fused(facts: Facts, attention: fx.Node) -> FusedMap:
    """What the column sums of a fused attention are computed from."""
    call = Call(attention, facts)
    query, key, mask = call.arg(0, "query"), call.arg(1, "key"), call.arg(3, "attn_mask")
    if example(query).dim() != 4:
        raise GraphError(
            f"the last attention's query has {example(query).dim()} dimensions; the context score "
            'reads [batch, heads, tokens, width]. Use score="random" or a callable.'
        )
    return FusedMap(
        query,
        key,
        mask,
        scale=call.arg(6, "scale"),  # a node where Python floats are dynamic
        is_causal=call.arg(5, "is_causal", False),
        square=mask is not None and example(mask).dtype == torch.bool and facts.square(mask),
    )


def _spelled_out(graph: fx.Graph, facts: Facts, attention: fx.Node) -> SpelledMap:
    """Rows of a map: the nodes of tokens × tokens replayed."""
    shape = facts.shape(attention)
    rows = facts.rows[attention]
    if not isinstance(rows, Rows) or not (
        len(shape) == 4 or (len(shape) == 3 and (facts.sizes.batch is None or rows.heads > 1))
    ):
        raise GraphError(
            f"the last attention map has the shape {tuple(map(str, shape))}; the context score "
            'reads [batch, heads, tokens, tokens]. Use score="random" or a callable.'
        )
    piece = ditch(graph, facts, carrying=_square(facts, attention), outputs=[("rows", attention)])
    return SpelledMap(piece, _map_bytes(attention))


__all__ = ["plan_scores"]
