"""Pass 5, score: what the score stage runs for the configured rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxseek import _torch, scoring
from fxseek.boxed import Boxed
from fxseek.chunks import RowsRegion
from fxseek.config import SeekConfig
from fxseek.errors import GraphError
from fxseek.masks import MaskRows
from fxseek.passes.ditch import StageGraph, StageInput, ditch, without_grad
from fxseek.passes.extract import extract
from fxseek.passes.facts import (
    PRIMARY_INPUTS,
    Facts,
    Rows,
    ancestors,
    descendants,
    example,
    is_tensor,
    tensors_of,
)
from fxseek.passes.head import Head, logit_bytes, to_parts
from fxseek.passes.masks import use_mask_rows
from fxseek.passes.rules import Call, operation
from fxseek.passes.rules.loss import TokenLoss
from fxseek.passes.structure import Structure
from fxseek.passes.tokens import per_token
from fxseek.stages import ScorePlan

Context = Callable[[dict[fx.Node, Any], Tensor, int], Tensor]


def plan_scores(
    graph: fx.Graph, facts: Facts, structure: Structure, config: SeekConfig, head: Head | None
) -> ScorePlan:
    """Decide what the score stage reads and runs.

    Raises:
        GraphError: the rule needs a loss, an attention or a last block, and the graph has none.
    """
    inputs = _inputs(graph, facts, config)
    plan: dict[str, Any] = {
        **inputs,
        **_target(structure),
        "required": structure.pooled,
        "hidden_rows": _rows_of(facts, structure.block_input),
        "virtual": facts.sizes.virtual,
    }
    kind = config.score
    if callable(kind):
        plan["hidden"] = structure.block_input
        return ScorePlan(**plan)
    if kind == "random":
        return ScorePlan(**plan)
    if not structure.attentions:
        raise GraphError(
            f"score={kind!r} reads the model's last attention, and the captured graph has none "
            "that fxseek knows (scaled_dot_product_attention, or a softmax of tokens × tokens). "
            'Use score="random" or a callable.'
        )
    if kind in ("context", "tokenseek"):
        plan["context"], plan["context_reads"] = _context(graph, facts, structure.attentions[-1])
        if kind == "context":
            return ScorePlan(**plan)
    if structure.objective is None:
        raise GraphError(
            f"score={kind!r} needs the gradient of the loss, and the captured graph returns no "
            "scalar with gradient (or several): the loss is computed outside it. "
            'Pass labels to the model, or use score="context", "random" or a callable.'
        )
    if structure.block_input is None:
        raise GraphError(
            f"score={kind!r} needs the input of the last block, and no value lies on every path "
            "from the tokens to the last attention (the model is no residual stream). Use "
            'score="context", "random" or a callable.'
        )
    reads = plan.get("context_reads", ())
    plan.update(_gradient(graph, facts, structure, reads, head, config.prefill_chunk))
    return ScorePlan(**plan)


def _rows_of(facts: Facts, node: fx.Node | None) -> Rows | None:
    rows = None if node is None else facts.rows.get(node)
    return rows if isinstance(rows, Rows) else None


def _inputs(graph: fx.Graph, facts: Facts, config: SeekConfig) -> dict[str, Any]:
    inputs = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and is_tensor(node) and not _torch.is_module_state(node)
    ]
    sizes = facts.sizes
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
    return {
        "ids": named.get("input_ids"),  # of an encoder, where there are two
        "mask": mask,
        "primary": primary,
        "batch_dim": None if sizes.batch is None else 0,
    }


def _target(structure: Structure) -> dict[str, Any]:
    loss = None if structure.loss is None else TokenLoss.of(structure.loss)
    if loss is None:
        return {}
    target, *rest = loss.full
    return {
        "target": None if loss.probabilities else target,  # which every position has
        "ignore_index": loss.ignore_index,
        "full": (None if loss.probabilities else target, *rest),
        "sums": structure.loss is structure.objective and loss.reduction == "sum",
    }


def _gradient(
    graph: fx.Graph,
    facts: Facts,
    structure: Structure,
    reads: tuple[fx.Node, ...],
    ending: Head | None,
    size: int | None,
) -> dict[str, Any]:
    """The last block on all tokens, and the rest of the model on chunks of them.

    The two meet at `cuts`: the block's exit, or, where attention is spelled out as matmul,
    softmax, matmul, its operands, so that the map of tokens × tokens is made in chunks too. With
    chunks of `size` tokens, what is per-token in the block before and after its attention is run
    on such chunks, and in backward once more: what remains is the attention.
    """
    start, loss = structure.block_input, structure.objective
    assert start is not None and loss is not None
    after = descendants([start])
    spelled_out = operation(structure.attentions[-1]) == "softmax"
    head = exit = lead = tail = None
    cuts: list[fx.Node] = []
    found = TokenLoss.of(loss) if loss is structure.loss else None
    if found is not None and spelled_out:
        head = None if found.probabilities else _head(facts, structure, loss)
    elif ending is not None and not _goes_past(ending):
        exit = ending.entry
        cuts = [exit]
        regions = None if size is None else _around_attention(facts, start, exit, reads, size)
        if regions is not None:
            lead, tail = regions
            cuts = list(tail.entries)
    if head is not None:
        cuts = [
            item.node
            for item in head.inputs
            if item.kind == "value"
            and item.node in after
            and example(item.node).is_floating_point()
        ]
    given = [start] if lead is None else [start, *lead.results]
    made = [node for node in cuts if node is not start] if cuts else [loss]
    made += [node for node in reads if node in after and node not in (*made, *given)]
    constants = _constants_before(made, start, after)
    block = extract(graph, made, given=[*given, *constants], grad_modes=True)
    use_mask_rows(block, facts.sizes)
    last = structure.attentions[-1]
    return {
        "hidden": start,
        "lead": lead,
        "block": block,
        "exit": exit,
        "tail": tail,
        "head": head,
        "cuts": tuple(cuts),
        "logit_bytes": 0 if head is None or found is None else logit_bytes(found.logits),
        "map_bytes": _map_bytes(last) if spelled_out else 0,
    }


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
    return any(item.kind == "value" and item.node in flowing for item in head.stage.inputs)


def _around_attention(
    facts: Facts, start: fx.Node, exit: fx.Node, reads: tuple[fx.Node, ...], size: int
) -> tuple[RowsRegion, RowsRegion] | None:
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
) -> RowsRegion | None:
    """The operations of `carrying` from `given` to `results`, or None where rows are not enough."""
    rows = {node: facts.rows.get(node) for node in (*given, *results)}
    known = {node: x for node, x in rows.items() if isinstance(x, Rows) and not x.packed}
    if not results or len(known) < len(rows):
        return None
    outputs = [("rows", node) for node in results]
    stage = ditch(given[0].graph, facts, carrying=carrying, outputs=outputs, given=given)
    after = descendants(given[:1])
    if stage.general or any(
        item.kind not in ("input", "value", "rows", "kept")
        or (item.kind == "value" and item.node in after)
        for item in stage.inputs
    ):
        return None
    used = [node for node in given if StageInput("rows", node) in stage.inputs]
    return RowsRegion(stage, used, known, size) if used else None


def _map_bytes(attention: fx.Node) -> int:
    """Bytes of one entry of an attention map, over all its heads."""
    value = example(attention)
    heads = _torch.size_hint(value.shape[-3]) if value.dim() > 2 else 1
    return heads * value.element_size()


def _constants_before(outputs: list[fx.Node], start: fx.Node, after: set[fx.Node]) -> list[fx.Node]:
    """Values that do not come from the block's input: taken from the prefill, not made again."""
    found: dict[fx.Node, None] = {}
    for node in ancestors(outputs) & after:
        if node is start:
            continue
        for operand in node.all_input_nodes:
            tensors = list(tensors_of(example(operand)))
            if operand not in after and operand.op != "placeholder" and tensors:
                found[operand] = None
    return list(found)


def _head(facts: Facts, structure: Structure, loss: fx.Node) -> StageGraph | None:
    """From a spelled-out attention to the loss's parts on given rows; None if not per-token."""
    between = descendants(_square(facts, structure.attentions[-1])) & ancestors([loss])
    carrying = {node for node in between if node in facts.stream}
    if any(node not in facts.plans for node in carrying):
        return None
    stage = ditch(loss.graph, facts, carrying=carrying, outputs=[("value", loss)])
    to_parts(stage)
    return stage


def _square(facts: Facts, attention: fx.Node) -> set[fx.Node]:
    """An attention map and the values of tokens × tokens that it is made from, of its own layer."""
    found: set[fx.Node] = set()
    queue = [attention]
    while queue:
        node = queue.pop()
        if node not in found and node in facts.stream and facts.square(node):
            found.add(node)
            queue.extend(node.all_input_nodes)
    return found


def _context(
    graph: fx.Graph, facts: Facts, attention: fx.Node
) -> tuple[Context, tuple[fx.Node, ...]]:
    """How the last attention's column sums are had, and what they read."""
    if operation(attention) == "scaled_dot_product_attention":
        return _context_of_sdpa(facts, attention)
    return _context_of_softmax(graph, facts, attention)


def _context_of_sdpa(facts: Facts, attention: fx.Node) -> tuple[Context, tuple[fx.Node, ...]]:
    call = Call(attention, facts)
    query, key = call.arg(0, "query"), call.arg(1, "key")
    mask, causal = call.arg(3, "attn_mask"), call.arg(5, "is_causal", False)
    scale = call.arg(6, "scale")
    if example(query).dim() != 4:
        raise GraphError(
            f"the last attention's query has {example(query).dim()} dimensions; the context score "
            'reads [batch, heads, tokens, width]. Use score="random" or a callable.'
        )

    square = mask is not None and example(mask).dtype == torch.bool and facts.square(mask)

    def column_sums(values: dict[fx.Node, Any], valid: Tensor, chunk_bytes: int) -> Tensor:
        allowed = None if mask is None else values[mask]
        if square and isinstance(allowed, Tensor):
            allowed = MaskRows.of(allowed)
        flagged = isinstance(allowed, MaskRows) and allowed.causal(valid.shape[1], valid.device)
        sums = scoring.attention_column_sums(
            values[query],
            values[key],
            mask=None if flagged else allowed,
            scale=values[scale] if isinstance(scale, fx.Node) else scale,
            is_causal=causal or flagged,
            query_valid=valid,
            chunk_bytes=chunk_bytes,
        )
        return sums[:, -valid.shape[1] :]  # keys of a prefix come first

    reads = (query, key, mask, scale)  # the scale is a node where Python floats are dynamic
    return column_sums, tuple(node for node in reads if isinstance(node, fx.Node))


def _context_of_softmax(
    graph: fx.Graph, facts: Facts, attention: fx.Node
) -> tuple[Context, tuple[fx.Node, ...]]:
    """Rows of an eager attention map, chunk by chunk: the nodes of tokens × tokens replayed."""
    shape = facts.shape(attention)
    rows = facts.rows[attention]
    if not isinstance(rows, Rows) or not (
        len(shape) == 4 or (len(shape) == 3 and (facts.sizes.batch is None or rows.heads > 1))
    ):
        raise GraphError(
            f"the last attention map has the shape {tuple(map(str, shape))}; the context score "
            'reads [batch, heads, tokens, tokens]. Use score="random" or a callable.'
        )
    stage = ditch(graph, facts, carrying=_square(facts, attention), outputs=[("rows", attention)])
    attend = Boxed(stage.module("AttentionRows"))
    entry = _map_bytes(attention)

    def column_sums(values: dict[fx.Node, Any], valid: Tensor, chunk_bytes: int) -> Tensor:
        batch, tokens = valid.shape
        chunk = max(1, min(tokens, chunk_bytes // max(1, 2 * batch * tokens * entry)))
        total: Tensor | None = None
        with torch.no_grad():
            for start in _torch.few(range(0, tokens, chunk), valid):
                kept = torch.arange(start, min(start + chunk, tokens), device=valid.device)
                kept = kept.expand(batch, -1)
                arguments = [
                    {"kept": kept, "filled": None}[i.kind] if i.node is None else values[i.node]
                    for i in stage.inputs
                ]
                (probabilities,) = attend(arguments)
                if probabilities.dim() == 3:
                    probabilities = probabilities.unflatten(0, (batch, -1))
                part = scoring.accumulate_columns(probabilities, valid.gather(1, kept))
                total = part if total is None else total + part
        assert total is not None
        return total[:, -valid.shape[1] :]  # keys of a prefix come first

    reads = tuple(i.node for i in stage.inputs if i.node is not None)
    return column_sums, reads
