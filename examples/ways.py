"""The ways of training that the benchmark compares."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

import baselines
import common

# name: in tables. What a way does to an ordinary model is one of
#   checkpointing: gradient checkpointing of every layer, as transformers does it
#   compile: arguments of torch.compile
#   baseline: a class of baselines.py, and whether it selects tokens
#   fxseek: options of fxseek.compile; a ratio of its own takes the place of the benchmark's
WAYS: dict[str, dict[str, Any]] = {
    "ordinary": {"name": "ordinary"},
    "checkpointing": {"name": "gradient checkpointing", "checkpointing": True},
    "partitioner": {
        "name": "torch.compile, min-cut partitioner",
        "compile": {"backend": "aot_eager_decomp_partition", "dynamic": False},
    },
    "inductor": {
        "name": "torch.compile, inductor",
        "compile": {"backend": "inductor", "dynamic": False},
    },
    "checkpointing-chunked": {
        "name": "gradient checkpointing, chunked loss",
        "checkpointing": True,
        "baseline": baselines.ChunkedLoss,
        "selects": False,
    },
    "chunked": {"name": "chunked loss", "baseline": baselines.ChunkedLoss, "selects": False},
    "tokentune": {
        "name": "TokenTune as published",
        "baseline": baselines.TokenTune,
        "selects": True,
    },
    "published": {
        "name": "TokenSeek as published",
        "baseline": baselines.TokenSeek,
        "selects": True,
    },
    "random": {"name": "fxseek, random", "fxseek": {"score": "random"}},
    "random-lean": {
        "name": "fxseek, random, lean",
        "fxseek": {"score": "random", "recompute": "block"},
    },
    "context": {"name": "fxseek, context", "fxseek": {"score": "context"}},
    "context-lean": {
        "name": "fxseek, context, lean",
        "fxseek": {"score": "context", "recompute": "block"},
    },
    "tokenseek": {"name": "fxseek, tokenseek", "fxseek": {"score": "tokenseek"}},
    "tokenseek-lean": {
        "name": "fxseek, tokenseek, lean",
        "fxseek": {"score": "tokenseek", "recompute": "block"},
    },
}
SHARES, SIZES = (1.0, 0.5, 0.25), (128, 256, 512)
WAYS |= {
    f"parts-{share}-{size}": {
        "name": f"fxseek, ratio {share}, parts of {size}",
        "fxseek": {"score": "random", "ratio": share, "learn_chunk": size},
    }
    for share in SHARES
    for size in SIZES
}
PARTS = [way for way, does in WAYS.items() if "learn_chunk" in does.get("fxseek", {})]
AGAINST_PARTS = ["ordinary", "checkpointing", "checkpointing-chunked"]
OURS = [way for way, does in WAYS.items() if "fxseek" in does and way not in PARTS]
LEAN = [way for way in OURS if way.endswith("-lean")]


def captures(way: str) -> bool:
    """Whether the way's first step captures a graph."""
    return bool({"compile", "fxseek"} & WAYS[way].keys())


def lacking(way: str) -> str | None:
    """Why this fxseek can't train in the given way; None where it can."""
    from fxseek import SeekConfig

    known = {field.name for field in dataclasses.fields(SeekConfig)}
    unknown = [f"{name}=" for name in WAYS[way].get("fxseek", {}) if name not in known]
    return f"this fxseek has no {', '.join(unknown)}" if unknown else None


def prepared(way: str, model: nn.Module, ratio: float, backend: str) -> nn.Module:
    """A copy of the model that trains in the given way and shares the model's parameters."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    model = copy.deepcopy(model, shared)
    does = WAYS[way]
    if "checkpointing" in does:
        common.checkpoint(model)
    if "compile" in does:
        model.compile(**does["compile"])
    if "baseline" in does:
        return does["baseline"](model, ratio) if does["selects"] else does["baseline"](model)
    if "fxseek" in does:
        import fxseek

        fxseek.compile(model, **{"ratio": ratio, "backend": backend, **does["fxseek"]})
    return model
