"""Low-rank adapters are part of their weights in the stages that train nothing, and exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import capture
from models import batch, tiny_llama, without_casts
from sweeps import thinned
from torch import Tensor, fx, nn
from tuners import spread

import fxseek
from fxseek.capture.step import step_of
from fxseek.ops import adapters
from fxseek.ops.adapters import linear_merged
from fxseek.passes.adapters import merge_adapters
from fxseek.passes.ir import Piece, Swept
from fxseek.program import Program

TOKENS, IN, OUT, RANK = 23, 7, 5, 3

# ---- the function ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, IN - 1, IN, TOKENS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", [1, 2])
def test_merged_layer_is_the_layer_and_its_adapters(tokens: int, bias: bool, names: int):
    torch.manual_seed(0)
    x, weight = torch.randn(1, tokens, IN).double(), torch.randn(OUT, IN).double()
    shift = torch.randn(OUT).double() if bias else None
    adapters = tuple(
        (torch.randn(RANK, IN).double(), torch.randn(OUT, RANK).double(), 0.7 - i)
        for i in range(names)
    )
    before = weight.clone()
    expected = F.linear(x, weight, shift)
    for down, up, scale in adapters:
        expected = expected + scale * F.linear(F.linear(x, down), up)
    found = linear_merged(x, weight, shift, adapters)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(weight, before)


# ---- the pass ----------------------------------------------------------------------------------

Layers = dict[str, Tensor]


def lora(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]) + F.linear(F.linear(x, p["down"]), p["up"]) * 2.0


def scaled_in_front(x: Tensor, p: Layers) -> Tensor:
    return 0.5 * F.linear(F.linear(x, p["down"]), p["up"]) + F.linear(x, p["w"], p["b"])


def unscaled(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]).add(F.linear(F.linear(x, p["down"]), p["up"]))


def two_names(x: Tensor, p: Layers) -> Tensor:
    return lora(x, p) + F.linear(F.linear(x, p["down"] + 1), p["up"]) * 0.5


def biased_adapter(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]) + F.linear(F.linear(x, p["down"]), p["up"], p["b"])


def dropped_out(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]) + F.linear(F.linear(F.dropout(x, 0.5), p["down"]), p["up"])


def of_another(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]) + F.linear(F.linear(x.sin(), p["down"]), p["up"])


def nonlinear(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]) + F.linear(F.silu(F.linear(x, p["down"])), p["up"])


def read_twice(x: Tensor, p: Layers) -> Tensor:
    base = F.linear(x, p["w"])
    return base + F.linear(F.linear(x, p["down"]), p["up"]) * base.sum(-1, keepdim=True)


def base_read_too(x: Tensor, p: Layers) -> Tensor:
    base = F.linear(x, p["w"])
    return (base + F.linear(F.linear(x, p["down"]), p["up"])) * base


def by_a_tensor(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]) + F.linear(F.linear(x, p["down"]), p["up"]) * p["b"]


def broadcast(x: Tensor, p: Layers) -> Tensor:
    return F.linear(x, p["w"]) + F.linear(F.linear(x, p["down"]), p["up"][:1])


def alpha(x: Tensor, p: Layers) -> Tensor:
    return torch.add(F.linear(x, p["w"]), F.linear(F.linear(x, p["down"]), p["up"]), alpha=3)


def without_gradient(x: Tensor, p: Layers) -> Tensor:
    base = F.linear(x, p["w"])
    with torch.no_grad():
        added = F.linear(F.linear(x, p["down"]), p["up"])
    return base + added


def in_another_precision(x: Tensor, p: Layers) -> Tensor:
    base = F.linear(x, p["w"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        added = F.linear(F.linear(x, p["down"]), p["up"])
    return base + added


def twice_itself(x: Tensor, p: Layers) -> Tensor:
    base = F.linear(x, p["w"])
    return base + base


@pytest.mark.parametrize(
    ("function", "merged"),
    [
        (lora, 1),
        (scaled_in_front, 1),
        (unscaled, 1),
        (two_names, 2),
        *(
            (function, 0)
            for function in (
                biased_adapter, dropped_out, of_another, nonlinear, read_twice, base_read_too,
                by_a_tensor, broadcast, alpha, twice_itself, without_gradient,
                in_another_precision,
            )
        ),
    ],
)  # fmt: skip
def test_what_is_an_adapter(function: Callable[[Tensor, Layers], Tensor], merged: int):
    graph, found, expected = _run(function, torch.float64)
    names = [node for node in graph.nodes if node.target is linear_merged]
    assert sum(len(node.args[3]) for node in names) == merged  # type: ignore[arg-type]
    linear = sum("linear" in str(node.target) for node in graph.nodes)
    assert linear == (1 if merged else linear)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_adapters_apart(dtype: torch.dtype):
    graph, _, _ = _run(lora, dtype)
    assert not [node for node in graph.nodes if node.target is linear_merged]


def _run(
    function: Callable[[Tensor, Layers], Tensor], dtype: torch.dtype
) -> tuple[fx.Graph, Tensor, Tensor]:
    """The graph after the pass, and what it and the function give."""
    generator = torch.Generator().manual_seed(0)
    names = {"w": (OUT, IN), "down": (RANK, IN), "up": (OUT, RANK), "b": (OUT,)}
    tensors = [torch.randn(1, TOKENS, IN, generator=generator).to(dtype)]
    tensors += [torch.randn(s, generator=generator).to(dtype) for s in names.values()]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        return function(x, dict(zip(names, given, strict=True)))

    captured = capture(call, tensors, [(1,), *[()] * len(names)])
    merge_adapters(Piece(captured.graph, [], []))
    captured.graph.lint()
    torch.manual_seed(1)
    module = fx.GraphModule(captured.graph.owning_module or nn.Module(), captured.graph)
    (found,) = module(*captured.inputs)
    torch.manual_seed(1)
    return captured.graph, found, call(*tensors)


# ---- a model -----------------------------------------------------------------------------------


def model_with(**options: Any) -> nn.Module:
    import peft

    torch.manual_seed(0)
    base = without_casts(tiny_llama())
    config = peft.LoraConfig(
        **{"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    model = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    spread(model)
    return model.double().train()


def program_of(model: nn.Module) -> Program:
    """The program of the last step that was captured."""
    step = step_of(model)
    assert step is not None
    return step.recorder.steps[-1].program


def merged_in(model: nn.Module) -> tuple[int, int]:
    """How many adapters are merged in the prefill, and in the last block of the score stage."""
    program = program_of(model)
    gradient = program.score.gradient
    pieces = (program.prefill, None if gradient is None else gradient.block)
    counts = [
        0 if piece is None else sum(node.target is linear_merged for node in piece.graph.nodes)
        for piece in pieces
    ]
    return counts[0], counts[1]


@pytest.mark.parametrize(  # fewer tokens than the widths, and more
    ("score", "tokens"), thinned(["random", "context", "tokenseek"], [9, 31])
)
def test_gradients_and_scores_are_those_of_the_model(
    score: str, tokens: int, monkeypatch: pytest.MonkeyPatch
):
    inputs = batch(37, 2, tokens, padding="right", labels="some")
    reports = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr("fxseek.program.merge_adapters", lambda piece: piece)
        model = fxseek.compile(model_with(), 0.3, score=score)
        fxseek.check_gradients(model, **inputs, tolerance=1e-9)
        model(**inputs).loss.backward()
        reports.append(fxseek.report(model))
        counts = merged_in(model)
        assert (sum(counts) == 0) is apart
        # layer 0, and keys and values of the last one; its query where the context alone scores
        assert apart or counts[0] == {"random": 9, "context": 10, "tokenseek": 9}[score]
    assert torch.equal(reports[0].selected, reports[1].selected)
    torch.testing.assert_close(reports[0].scores, reports[1].scores, rtol=1e-10, atol=1e-10)


def test_what_runs_in_chunks_has_its_adapters_merged():
    model = fxseek.compile(model_with(), 0.3, score="random", prefill_chunk=16)
    fxseek.check_gradients(model, **batch(37, 2, 31), tolerance=1e-9)
    prefill = program_of(model).prefill
    swept = [part.piece.graph for part in prefill.parts.values() if isinstance(part, Swept)]
    assert merged_in(model) == (3, 0)  # q, k and v of layer 0, in front of the first chunks
    merged = [node for graph in swept for node in graph.nodes if node.target is linear_merged]
    assert len(merged) == 6  # the rest of layer 0, and keys and values of the last one


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_other_kinds_of_lora_stay_apart(options: dict[str, Any]):
    model = fxseek.compile(model_with(**options), 0.3)
    inputs = batch(37, 2, 31)
    model(**inputs).loss.backward()
    assert merged_in(model) == (0, 0)


def test_autocast_keeps_adapters_apart():
    model = fxseek.compile(model_with().float(), 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch(37, 2, 31)).loss.backward()
    assert merged_in(model) == (0, 0)


def test_adapters_of_two_names(monkeypatch: pytest.MonkeyPatch):
    import peft

    model = model_with()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", config)  # type: ignore[operator]
    model.base_model.set_adapter(["default", "second"])  # type: ignore[union-attr, operator]
    spread(model)
    fxseek.compile(model.double(), 0.3, score="random")
    fxseek.check_gradients(model, **batch(37, 2, 31), tolerance=1e-9)
    prefill = program_of(model).prefill
    counts = [len(n.args[3]) for n in prefill.graph.nodes if n.target is linear_merged]  # type: ignore[arg-type]
    assert sorted(counts) == [1, 1, 1, 1, 1, 1, 2, 2, 2]


def test_a_merge_is_no_larger_than_what_an_adapter_makes(monkeypatch: pytest.MonkeyPatch):
    made: list[torch.Size] = []
    addmm = torch.addmm

    def recorded(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(weight.shape)
        return addmm(weight, *args, **kwargs)

    monkeypatch.setattr(adapters.torch, "addmm", recorded)
    model = fxseek.compile(model_with(), 0.3, score="random")
    model(**batch(37, 1, 25)).loss.backward()
    assert made and all(shape[1] <= 25 for shape in made)  # not the 29 columns of down_proj
