"""Pass 5, score: what the score stage runs for the configured rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxseek import _torch, scoring
from fxseek.config import SeekConfig
from fxseek.errors import GraphError
from fxseek.loss import selected_cross_entropy
from fxseek.passes.ditch import StageGraph, ditch
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
from fxseek.passes.rules import Call, operation
from fxseek.passes.structure import Structure
from fxseek.stages import ScorePlan, run_boxed

Context = Callable[[dict[fx.Node, Any], Tensor, int], Tensor]


def plan_scores(
    graph: fx.Graph, facts: Facts, structure: Structure, config: SeekConfig
) -> ScorePlan:
    """Decide what the score stage reads and runs.

    Raises:
        GraphError: the rule needs a loss, an attention or a last block, and the graph has none.
    """
    inputs = _inputs(graph, facts, config)
    plan: dict[str, Any] = {**inputs, **_target(facts, structure)}
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
    if structure.loss is None:
        raise GraphError(
            f"score={kind!r} needs the gradient of the loss, and the captured graph holds no "
            "cross-entropy over tokens: the loss is computed outside it, or by other "
            'operations. Pass labels to the model, or use score="context", "random" or a callable.'
        )
    if structure.block_input is None:
        raise GraphError(
            f"score={kind!r} needs the input of the last block, and no value lies on every path "
            "from the tokens to the last attention (the model is no residual stream). Use "
            'score="context", "random" or a callable.'
        )
    plan.update(_gradient(graph, facts, structure, plan.get("context_reads", ())))
    return ScorePlan(**plan)


def _inputs(graph: fx.Graph, facts: Facts, config: SeekConfig) -> dict[str, Any]:
    inputs = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and is_tensor(node) and not _torch.is_module_state(node)
    ]
    sizes = facts.sizes
    named = {_torch.source_name(node): node for node in inputs}
    primary = next((named[name] for name in PRIMARY_INPUTS if name in named), None)
    if primary is None:
        primary = next(node for node in inputs if example(node).dim() > config.token_dim)
    mask = named.get("attention_mask")
    if mask is not None:
        shape = facts.shape(mask)
        two = len(shape) == 2 and shape[1] == sizes.tokens
        if not two or example(mask).is_floating_point():
            mask = None
    return {
        "ids": named.get("input_ids"),
        "mask": mask,
        "primary": primary,
        "batch_dim": None if sizes.batch is None else 0,
    }


def _target(facts: Facts, structure: Structure) -> dict[str, Any]:
    if structure.loss is None:
        return {}
    call = Call(structure.loss, facts)
    return {
        "target": call.arg(1, "target"),
        "ignore_index": call.arg(4, "ignore_index", -100),
        "sums": call.arg(6, "reduction", "mean") == "sum",
    }


def _gradient(
    graph: fx.Graph, facts: Facts, structure: Structure, reads: tuple[fx.Node, ...]
) -> dict[str, Any]:
    """The last block on all tokens, and the rest of the model on chunks of them."""
    start, end, loss = structure.block_input, structure.block_exit, structure.loss
    assert start is not None and loss is not None
    after = descendants([start])
    within = [node for node in reads if node in after]
    head = _head(graph, facts, end, loss) if end is not None else None
    last = loss if head is None else end
    assert last is not None
    outputs = [last, *within]
    cut = _constants_before(outputs, start, after)
    block = extract(graph, outputs, given=[start, *cut], grad_modes=True)
    logits = Call(loss, facts).arg(0, "input")
    width = 1
    for dim, size in enumerate(example(logits).shape):
        if not (
            facts.sizes.has_tokens(facts.shape(logits)[dim])
            or facts.shape(logits)[dim] == facts.sizes.batch
        ):
            width *= _torch.size_hint(size)
    rows = facts.rows.get(end) if end is not None else None
    return {
        "hidden": start,
        "block": block,
        "head": head,
        "exit_node": end,
        "exit_row": rows.row if isinstance(rows, Rows) else 1,
        "logit_bytes": width * max(4, example(logits).element_size()),
    }


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


def _head(graph: fx.Graph, facts: Facts, end: fx.Node, loss: fx.Node) -> StageGraph | None:
    """The graph from the block's exit to the loss on given rows; None if it is not per-token."""
    rows = facts.rows.get(end)
    if not isinstance(rows, Rows) or rows.packed or example(end).dim() != 3:
        return None
    between = (descendants([end]) & ancestors([loss])) - {end}
    floating = {node for node in between if node in facts.stream}
    if any(node not in facts.plans for node in floating):
        return None
    stage = ditch(graph, facts, carrying=floating, outputs=[("value", loss)], given=[end])
    for node in stage.graph.nodes:
        if node.target is selected_cross_entropy:
            node.kwargs = {**node.kwargs, "reduction": "mean"}
    stage.graph.lint()
    return stage


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

    def column_sums(values: dict[fx.Node, Any], valid: Tensor, chunk_bytes: int) -> Tensor:
        return scoring.attention_column_sums(
            values[query],
            values[key],
            mask=None if mask is None else values[mask],
            scale=values[scale] if isinstance(scale, fx.Node) else scale,
            is_causal=causal,
            query_valid=valid,
            chunk_bytes=chunk_bytes,
        )

    reads = (query, key, mask, scale)  # the scale is a node where Python floats are dynamic
    return column_sums, tuple(node for node in reads if isinstance(node, fx.Node))


def _context_of_softmax(
    graph: fx.Graph, facts: Facts, attention: fx.Node
) -> tuple[Context, tuple[fx.Node, ...]]:
    """Rows of an eager attention map, chunk by chunk: the nodes of tokens × tokens replayed."""
    shape = facts.shape(attention)
    rows = facts.rows[attention]
    if not isinstance(rows, Rows) or not (
        len(shape) == 4 or (len(shape) == 3 and facts.sizes.batch is None)
    ):
        raise GraphError(
            f"the last attention map has the shape {tuple(map(str, shape))}; the context score "
            'reads [batch, heads, tokens, tokens]. Use score="random" or a callable.'
        )
    square = {
        node
        for node in ancestors([attention])
        if node in facts.stream
        and sum(
            facts.sizes.has_tokens(s)
            for t in tensors_of(example(node))
            for s in facts.sizes.shape(t)
        )
        > 1
    }
    stage = ditch(graph, facts, carrying=square, outputs=[("rows", attention)])
    module = stage.module("AttentionRows")
    heads = 1
    for size in example(attention).shape[-3:-2]:
        heads *= _torch.size_hint(size)
    item = example(attention).element_size()

    def column_sums(values: dict[fx.Node, Any], valid: Tensor, chunk_bytes: int) -> Tensor:
        batch, tokens = valid.shape
        chunk = max(1, min(tokens, chunk_bytes // max(1, batch * heads * tokens * item * 2)))
        total: Tensor | None = None
        with torch.no_grad():
            for start in range(0, tokens, chunk):
                kept = torch.arange(start, min(start + chunk, tokens), device=valid.device)
                kept = kept.expand(batch, -1)
                arguments = [
                    kept if i.kind == "kept" else values[i.node]  # type: ignore[index]
                    for i in stage.inputs
                ]
                (probabilities,) = run_boxed(module, arguments)
                if probabilities.dim() == 3:
                    probabilities = probabilities.unsqueeze(0)
                part = scoring.accumulate_columns(probabilities, valid.gather(1, kept))
                total = part if total is None else total + part
        assert total is not None
        return total

    reads = tuple(i.node for i in stage.inputs if i.node is not None)
    return column_sums, reads
