"""What each stage may hold: bounds on memory, values let go of, nothing computed in vain."""

from __future__ import annotations

import gc
import re
import weakref
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TinyConfig, TinyDecoder, batch
from sweeps import thinned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxseek
from fxseek.capture.backend import Recorder
from fxseek.capture.step import step_of
from fxseek.ops.offload import HostTensor, link
from fxseek.run.env import Env
from fxseek.run.saved import Held, SavedBytes

VOCAB, TOKENS, HEADS = 211, 67, 3
LARGE = TinyConfig(vocab=VOCAB, heads=HEADS, kv_heads=1)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= (
                value.nbytes // 2
            ):
                self.made.add(tuple(value.shape))
        return result


def recorder_of(model: torch.nn.Module) -> Recorder:
    step = step_of(model)
    assert step is not None
    return step.recorder


def stages(model: torch.nn.Module) -> Any:
    return recorder_of(model).steps[0].module


def shapes_of(stage: Any, run: Any) -> set[tuple[int, ...]]:
    """The shapes that a stage makes while `run` runs a step."""
    forward, mode = stage.forward, Shapes()

    def recorded(*args: Any) -> Any:
        with mode:
            return forward(*args)

    stage.forward = recorded
    try:
        run()
    finally:
        stage.forward = forward
    return mode.made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("score", ["context", "gradient", "tokenseek"])
def test_scoring_never_makes_a_map_or_all_logits(score, attention):
    config = TinyConfig(vocab=VOCAB, heads=HEADS, kv_heads=1, attention=attention)
    model = fxseek.compile(TinyDecoder(config).train(), 0.1, score=score, chunk_bytes=1 << 13)
    inputs = batch(VOCAB, batch=1, tokens=TOKENS)
    model(**inputs).loss.backward()
    made = shapes_of(stages(model).score, lambda: model(**inputs).loss.backward())
    assert made
    logits = [shape for shape in made if VOCAB in shape and TOKENS in shape]
    assert not logits
    maps = [shape for shape in made if shape.count(TOKENS) > 1 and HEADS in shape]
    assert not maps
    if score == "context":
        assert not any(VOCAB in shape for shape in made)


def test_smaller_chunks_score_the_same():
    found = []
    for chunk_bytes in (1 << 12, 1 << 26):
        torch.manual_seed(0)
        model = TinyDecoder(LARGE).double().train()
        fxseek.compile(model, 0.1, chunk_bytes=chunk_bytes)
        model(**batch(VOCAB, tokens=TOKENS, padding="left", labels="some")).loss.backward()
        found.append(fxseek.report(model))
    torch.testing.assert_close(found[0].context, found[1].context)
    torch.testing.assert_close(found[0].gradient, found[1].gradient)
    torch.testing.assert_close(found[0].full_loss, found[1].full_loss)
    assert torch.equal(found[0].selected, found[1].selected)


@pytest.mark.parametrize("score", ["random", "context"])
def test_the_prefill_makes_no_logits(score):
    model = fxseek.compile(TinyDecoder(LARGE).train(), 0.1, score=score)
    inputs = batch(VOCAB, batch=1, tokens=TOKENS)
    model(**inputs)
    made = shapes_of(stages(model).prefill, lambda: model(**inputs))
    assert not any(VOCAB in shape and TOKENS in shape for shape in made)
    operations = stages(model).prefill.graph
    assert all(node.meta.get("origin") is None or node.users for node in operations.nodes)


def test_the_score_stage_leaves_no_parameter_gradient():
    model = TinyDecoder(LARGE).train()
    fxseek.compile(model, 0.1, score="tokenseek")
    model(**batch(VOCAB, tokens=TOKENS))  # no backward
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prefill_values_are_gone_after_the_step():
    model = fxseek.compile(TinyDecoder(LARGE).train(), 0.1, score="random")
    inputs = batch(VOCAB, tokens=TOKENS)
    model(**inputs)
    held: list[weakref.ref[Tensor]] = []
    prefill = stages(model).prefill
    forward = prefill.forward

    def remember(env: Env) -> None:
        forward(env)
        held.extend(weakref.ref(value) for value in env.values.values())

    prefill.forward = remember
    gc.disable()
    try:
        loss = model(**inputs).loss
        alive = [ref for ref in held if ref() is not None]
        assert held
        assert not alive
        del loss
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "options",
    [{"recompute": "selective"}, {"recompute": "block", "kv": "offload"},
     pytest.param({"recompute": "none"}, marks=pytest.mark.sweep),
     pytest.param({"recompute": "block"}, marks=pytest.mark.sweep)],
)  # fmt: skip
def test_nothing_of_a_step_waits_for_the_garbage_collector(options, monkeypatch):
    made: list[weakref.ref[Any]] = []
    for cls in (HostTensor, SavedBytes, Held):

        def init(self: Any, *args: Any, before: Any = cls.__init__, **kwargs: Any) -> None:
            made.append(weakref.ref(self))
            before(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)
    model = fxseek.compile(TinyDecoder(LARGE).train(), 0.1, **options)
    inputs = batch(VOCAB, tokens=TOKENS)
    model(**inputs)["loss"].backward()
    gc.collect()
    made.clear()
    gc.disable()
    try:
        model(**inputs)["loss"].backward()
        assert made
        assert not [ref() for ref in made if ref() is not None]
    finally:
        gc.enable()


def test_values_on_the_host_come_in_order():
    values = [HostTensor(torch.zeros(1)) for _ in range(6)]
    link(values)
    assert values[2].next(backward=False) == values[3:5]
    assert values[5].next(backward=False) == []
    assert values[4].next(backward=True) == [values[3], values[2]]
    values[3]._taken_in.add(False)
    assert values[2].next(backward=False) == [values[4]]
    assert values[4].next(backward=True) == [values[3], values[2]]
    del values[3]
    assert values[2].next(backward=False) == [values[3]]


class NoAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.embed(input_ids).flatten(0, 1), labels.flatten())}


def test_a_capture_that_fails_leaves_nothing():
    model = fxseek.compile(NoAttention().train(), 0.1, score="context")
    inputs = {name: torch.ones(2, 9, dtype=torch.long) for name in ("input_ids", "labels")}
    errors: list[weakref.ref[BaseException]] = []
    gc.collect()
    gc.disable()
    try:
        try:
            model(**inputs)
        except fxseek.FxseekError as error:
            errors.append(weakref.ref(error))
        assert errors
        assert errors[0]() is None
    finally:
        gc.enable()


def test_a_step_that_fails_leaves_nothing():
    """A caller who catches the error and tries a smaller batch has the memory back."""
    fails = [False]

    def score(given: fxseek.ScoreInputs) -> Tensor:
        if fails[0]:
            held.append(weakref.ref(given.valid))
            raise RuntimeError("out of memory")
        return given.valid.float()

    held: list[weakref.ref[Tensor]] = []
    model = fxseek.compile(TinyDecoder(LARGE).train(), 0.1, score=score)
    inputs = batch(VOCAB, tokens=TOKENS)
    model(**inputs)["loss"].backward()
    fails[0] = True
    gc.collect()
    gc.disable()
    try:
        with suppress(RuntimeError):
            model(**inputs)
        assert held
        assert held[0]() is None
    finally:
        gc.enable()
    fails[0] = False
    model(**inputs)["loss"].backward()


def test_the_program_reads_as_the_method():
    model = fxseek.compile(TinyDecoder(LARGE).train(), 0.1)
    model(**batch(VOCAB, tokens=TOKENS))
    code = [re.sub(r";.*", "", line).strip() for line in stages(model).code.strip().splitlines()]
    assert code == [
        "def forward(self, env, index, padding_mask, ratio):",
        "values = self.prefill(env)",
        "scores = self.score(env, index, padding_mask)",
        "selection = self.select(scores, index, ratio)",
        "rows = self.gather(env, selection)",
        "learned = self.learn(env, selection)",
        "outputs = learned[0]",
        "saved_bytes = learned[1]",
        "return (outputs, selection, scores, saved_bytes)",
    ]
    learn = str(stages(model).learn.graph)
    assert "fxseek.ops.rows.scatter_rows" in learn
    assert "fxseek.ops.attention.attend_rows" in learn


def test_outer_saved_tensor_hooks_still_run():
    model = fxseek.compile(TinyDecoder(LARGE).double().train(), 0.1)
    inputs = batch(VOCAB, tokens=TOKENS)
    check = fxseek.check_gradients(model, None, **inputs)
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.nbytes)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    assert seen
    assert check.error <= 1e-9


def test_selections_follow_the_seed():
    chosen = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model = fxseek.compile(TinyDecoder(LARGE).train(), 0.2, score="random", seed=seed)
        inputs = batch(VOCAB, tokens=TOKENS)
        torch.rand(7)  # the global generator plays no part
        model(**inputs)
        first = fxseek.report(model).selected
        model(**inputs)
        chosen.append((first, fxseek.report(model).selected))
    assert torch.equal(chosen[0][0], chosen[1][0])
    assert torch.equal(chosen[0][1], chosen[1][1])
    assert not torch.equal(chosen[0][0], chosen[0][1])
    assert not torch.equal(chosen[0][0], chosen[2][0])


@pytest.mark.parametrize("score", ["random", "gradient"])
def test_the_weighted_loss_is_the_full_loss_on_average(score):
    torch.manual_seed(0)
    model = TinyDecoder(TinyConfig()).double().train()
    inputs = batch(37, tokens=23, labels="completion")
    with torch.no_grad():
        full = model(**inputs).loss
    fxseek.compile(model, 0.15, score=score, select="sample")
    losses = torch.stack([model(**inputs).loss.detach() for _ in range(400)])
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - full) < 5 * error
    assert losses.std() > 0


@pytest.mark.parametrize(
    ("kv_heads", "attention", "norm"),
    thinned([1, 3], ["sdpa", "sdpa_causal", "sdpa_float", "eager"], ["rms", "post"]),
)
def test_scores_are_those_of_the_paper(attention, kv_heads, norm, monkeypatch):
    """I1 and I2 against the eager model: its last attention map, and ∂L/∂z by autograd."""
    torch.manual_seed(0)
    config = TinyConfig(vocab=VOCAB, heads=3, kv_heads=kv_heads, attention=attention, norm=norm)
    model = TinyDecoder(config).double().train()
    inputs = batch(VOCAB, tokens=23, padding="none", labels="some")
    inputs.pop("attention_mask", None)
    seen: list[Tensor] = []
    maps: list[Tensor] = []

    def see(module: Any, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    sdpa, softmax = F.scaled_dot_product_attention, F.softmax

    def mapped(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        identity = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:-1], -1)
        maps.append(sdpa(query, key, identity, **options).detach())
        return sdpa(query, key, value, **options)

    def kept(*args: Any, **options: Any) -> Tensor:
        maps.append(softmax(*args, **options).detach())
        return softmax(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", mapped)
        patched.setattr(F, "softmax", kept)
        hook = model.blocks[-1].register_forward_pre_hook(see)
        loss = model(**inputs).loss
        loss.backward()
        hook.remove()
    model.zero_grad()
    fxseek.compile(model, 0.2, score="tokenseek", chunk_bytes=1 << 12)
    model(**inputs)
    report = fxseek.report(model)
    assert seen[0].grad is not None
    assert report.full_loss is not None
    torch.testing.assert_close(report.full_loss, loss.detach())
    torch.testing.assert_close(report.gradient, seen[0].grad.abs().sum(-1))
    torch.testing.assert_close(report.context, maps[-1].mean(1).sum(1))
