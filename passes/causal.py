"""Pass 7, causal: attentions over all tokens lose a mask that says no more than "causal".

Before::

    o = sdpa(q, k, v, attn_mask=mask)      # mask [batch, 1, tokens, tokens], as models build it

After::

    causal = is_causal_mask(mask)          # once per mask and step, on its values
    o = attend_all(q, k, v, attn_mask=mask, causal=causal)

A captured graph always holds the mask: whether there is padding or packing is not known before
the batch is. Fused kernels skip half of the work under the causal flag and none under a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxseek.passes.ditch import StageGraph
from fxseek.passes.facts import Sizes, example
from fxseek.passes.rules import operation
from fxseek.rows import attend_all, is_causal_mask

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


def use_causal_flag(stage: StageGraph, sizes: Sizes) -> None:
    """Let the attentions of a stage that runs on all tokens test their masks (in place)."""
    flags: dict[fx.Node, fx.Node] = {}
    for node in list(stage.graph.nodes):
        if operation(node) != "scaled_dot_product_attention":
            continue
        given: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
        mask = given.get("attn_mask")
        if not isinstance(mask, fx.Node) or example(mask).dtype != torch.bool:
            continue
        if sizes.shape(example(mask))[-2:] != (sizes.tokens, sizes.tokens):
            continue
        if mask not in flags:
            with stage.graph.inserting_before(node):
                flags[mask] = stage.graph.call_function(is_causal_mask, (mask,))
        node.target, node.args = attend_all, ()
        node.kwargs = {**given, "causal": flags[mask]}
    stage.graph.lint()


__all__ = ["use_causal_flag"]
