"""The Dynamo backend: a captured graph in, the compiled step out."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxseek import _torch
from fxseek.capture.progress import say
from fxseek.capture.sharded import Shards, collectives_of
from fxseek.capture.uncomputed import Uncomputed
from fxseek.config import SeekConfig
from fxseek.errors import ConfigError, GraphError, InputError
from fxseek.passes.facts import example, tensors_of
from fxseek.program import Writes, build, trains
from fxseek.reports.step import StepReport
from fxseek.run.assemble import Ran, Step, assemble
from fxseek.run.parts import ONE_PART
from fxseek.run.saved import functions_of
from fxseek.scores import draws_tokens

log = logging.getLogger("fxseek")

__all__ = [
    "CallInfo",
    "Made",
    "Recorder",
    "fxseek_backend",
    "latest_is_released",
    "latest_kept",
    "latest_recorder",
    "make_backend",
]


Made = Callable[[SeekConfig], Step]
"""What makes the step of a captured graph."""


class CallInfo(NamedTuple):
    """What a step knows of the call that it serves, besides its inputs.

    `padding_mask`: Bool[batch or 1, tokens], False at padding; `labelled`: there are labels, or a
    loss that fxseek was given.
    """

    padding_mask: Tensor | None = None
    labelled: bool = True


@dataclass
class Recorder:
    """What the compiled steps of one model share: the step counter and the last report.

    `timed`: measure the stages. A device is waited for at the end of each, so steps get slower.
    """

    step: int = 0
    timed: bool = False
    progress: float | None = None
    """The share of training that is done, where somebody tells."""
    last: StepReport | None = None
    call: CallInfo = field(default_factory=CallInfo)
    """The call at hand, if there is one."""
    uncomputed: list[Uncomputed] = field(default_factory=list)
    """What the last step returned in the place of activations."""
    steps: list[Step] = field(default_factory=list)
    latest: Step | None = None
    """The one that ran last."""
    compile_seconds: float = 0.0

    @contextmanager
    def serving(self, call: CallInfo) -> Iterator[None]:
        """Captures and steps in this context serve `call`."""
        self.call = call
        try:
            yield
        finally:
            self.call = CallInfo()


KERNEL = (
    "sdpa_kernel in the model has no effect in a training step: put it around the call of the "
    "model and loss.backward()"
)


class _Latest(threading.local):
    recorder: weakref.ref[Recorder] | None = None


_LATEST = _Latest()


def latest_recorder() -> Recorder | None:
    """The recorder of the last step that ran in this thread through the plain backend."""
    return None if _LATEST.recorder is None else _LATEST.recorder()


@contextmanager
def latest_kept() -> Iterator[None]:
    """Steps in this context are not the last one of this thread afterwards."""
    before = _LATEST.recorder
    try:
        yield
    finally:
        _LATEST.recorder = before


def latest_is_released() -> bool:
    """Whether such a step has run, and nobody holds its compiled function any more."""
    return _LATEST.recorder is not None and _LATEST.recorder() is None


def make_backend(
    config: SeekConfig,
    recorder: Recorder,
    *,
    full_outputs: bool,
    token_inputs: Sequence[str] | None = None,
    run: Callable[[Step, Made], Callable[..., Any]] | None = None,
    shards: Shards | None = None,
) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A backend for `torch.compile` that compiles training graphs and leaves others alone.

    `token_inputs` are the arguments that count tokens; by default all that are long enough.
    `run` makes the compiled function of a step; by default the step itself. It is given what makes
    the step again, for another configuration. `shards`: those of the model, where it is sharded.
    """

    def made(graph: fx.Graph, labelled: bool, config: SeekConfig) -> Step:
        config = config.on(_device_of(graph))
        program = build(
            graph, config, full_outputs=full_outputs, labelled=labelled, token_inputs=token_inputs
        )
        return assemble(program)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if not trains(gm.graph):
            return gm.forward
        start = time.perf_counter()
        for node in gm.graph.find_nodes(op="placeholder"):
            _torch.source_path(node)  # which is noted, for when the step is made again
        if shards is not None and run is None:
            shards.mark(gm.graph)
        make = partial(made, gm.graph, recorder.call.labelled)
        step = make(config)
        program, structure = step.program, step.program.structure
        for note in [] if full_outputs and not structure.losses else structure.notes():
            log.warning("fxseek: %s", note)
        if program.parts and isinstance(program.parts, str):
            log.warning("fxseek: %s", ONE_PART.format(reason=program.parts))
        if any(getattr(x.target, "__name__", "") == "_sdpa_kernel" for x in gm.graph.nodes):
            log.warning("fxseek: %s", KERNEL)
        recorder.steps.append(step)
        recorder.compile_seconds += time.perf_counter() - start
        if run is None:
            return _compiled(step, recorder, shards)
        return run(step, make)

    return backend


def _device_of(graph: fx.Graph) -> str:
    """The type of the device of a step's inputs, those on the CPU aside where there are others."""
    given = tensors_of([example(node) for node in graph.find_nodes(op="placeholder")])
    kinds = {x.device.type for x in given}
    return next(iter(sorted(kinds - {"cpu"})), "cpu")


def _compiled(step: Step, recorder: Recorder, shards: Shards | None) -> Callable[..., Any]:
    config, writes, dropped = step.program.config, step.program.writes, step.program.dropped
    varies = config.parsed_ratio.follows_training
    plan = None if shards is None else collectives_of(step.program)
    drawn = draws_tokens(config) or varies

    def run(*inputs: Any) -> Any:
        index = recorder.step
        if drawn and _torch.in_backward():
            raise InputError(
                "the compiled step runs again in backward, as gradient checkpointing around the "
                "model makes it, and would draw other tokens than before. Call the model outside "
                'of torch.utils.checkpoint; recompute="block" of fxseek.compile keeps less.'
            )
        ratio = config.ratio_at(index, recorder.progress)
        if shards is not None and plan is not None:
            shards.agree(plan)
        timings: dict[str, float] | None = {} if recorder.timed else None
        if writes.parameters:
            with torch.no_grad():
                writes.first(*[inputs[at] for at in writes.parameters])
        given = list(inputs) if shards is None else shards.given(inputs)
        for at in writes.written:  # what autograd saves of them must not change
            given[at] = inputs[at].clone()
        with nullcontext() if timings is None else stage_seconds(step.module, timings):
            ran = step.run(given, index, recorder.call.padding_mask, ratio)
        outputs = _write(ran.outputs, inputs, writes) if writes.written else ran.outputs
        recorder.step += 1
        recorder.latest = step
        recorder.uncomputed = [Uncomputed() for _ in dropped]
        if dropped:
            outputs = list(outputs)
            for at, stand_in in zip(dropped, recorder.uncomputed, strict=True):
                outputs[at] = stand_in
        recorder.last = _report(ran, config, index, ratio, timings)
        _LATEST.recorder = weakref.ref(recorder)
        return outputs

    return run


@torch.no_grad()
def _write(outputs: Sequence[Any], inputs: Sequence[Any], writes: Writes) -> list[Any]:
    """Write the last outputs to the buffers that they are for; the others."""
    count = len(outputs) - len(writes.written)
    for at, value in zip(writes.written, outputs[count:], strict=True):
        inputs[at].copy_(value)
    return [
        inputs[writes.returned[i]] if i in writes.returned else value
        for i, value in enumerate(outputs[:count])
    ]


@contextmanager
def stage_seconds(module: fx.GraphModule, timings: dict[str, float]) -> Iterator[None]:
    """Seconds of each stage of a step, by hooks on the stages' modules."""
    accelerator = torch.accelerator.is_available()

    def now() -> float:
        if accelerator:
            torch.accelerator.synchronize()
        return time.perf_counter()

    def begin(name: str, *_: Any) -> None:
        timings[name] = -now()

    def end(name: str, *_: Any) -> None:
        timings[name] += now()

    hooks = []
    for name, stage in module.named_children():
        hooks.append(stage.register_forward_pre_hook(partial(begin, name)))
        hooks.append(stage.register_forward_hook(partial(end, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _report(
    ran: Ran,
    config: SeekConfig,
    step: int,
    ratio: float | None,
    timings: dict[str, float] | None,
) -> StepReport:
    scores = ran.scores
    return StepReport(
        selected=ran.selection.selected,
        weights=ran.selection.weights,
        valid=scores.valid,
        scores=scores.scores,
        parts=scores.parts,
        full_loss=scores.full_loss,
        saved_bytes=ran.saved_bytes,
        tokens=scores.valid.shape[1],
        step=step,
        ratio=ratio,
        spans=ran.selection.spans,
        timings=timings,
        input_ids=scores.input_ids,
        labels=scores.labels,
        supervised=scores.supervised,
        score=_score_name(config),
    )


def _score_name(config: SeekConfig) -> str | None:
    """What tokens are ranked by; None where all are kept, or all that have a label."""
    if not config.is_scored:
        return None
    score = config.score
    return score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)


def fxseek_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxseek", dynamic=True, options={"ratio": 0.1, ...})``.

    `options` are the fields of `fxseek.SeekConfig`. Token-shaped outputs keep their full size:
    the values of the model, with gradients at the selected tokens only. Graphs without
    gradient (under ``torch.no_grad``) run as they are. The step is reported by
    ``fxseek.report()`` without a model. The options ``memory_budget_bytes``, ``loss`` and
    ``outputs`` are `fxseek.compile`'s alone.

    Raises:
        ConfigError: an option is unknown or out of range, or `fxseek.compile`'s alone.
        GraphError: the graph has no token dimension that is dynamic, or the score needs a loss
            or an attention that it does not have; or DistributedDataParallel splits the model.
        InputError: in a step, if Dynamo has broken the model into several graphs, each of which
            would select other tokens.
    """
    config = SeekConfig.make(**(options or {}))
    for name, served in (
        ("memory_budget_bytes", (None,)),
        ("loss", (None,)),
        ("outputs", ("loss", "full")),
    ):
        if (given := getattr(config, name)) not in served:
            raise ConfigError(
                f"{name}={given!r} is an option of fxseek.compile(model, ...), and not of "
                f'torch.compile(backend="fxseek"), where outputs are always full: leave it out'
            )
    if not trains(gm.graph):
        return torch.compiler.disable(gm.forward)
    if _torch.splits_for_ddp():
        raise GraphError(
            "DistributedDataParallel lets Dynamo split the model at its buckets, and each part "
            "would select tokens of its own. Set torch._dynamo.config.optimize_ddp = False, or use "
            "fxseek.compile(model) in the place of torch.compile"
        )
    say("fxseek: rewriting a captured graph of %s operations ...", len(gm.graph.nodes))
    # The step holds its recorder, which lives as long as the compiled function.
    recorder = Recorder()
    step = make_backend(config, recorder, full_outputs=True)(gm, example_inputs)
    say("fxseek: rewritten in %.1f s", recorder.compile_seconds)
    return torch.compiler.disable(_part(step, continues=_torch.continues(gm.graph)))


_MADE = "fxseek: made by a compiled step"


def _part(step: Callable[..., Any], continues: bool) -> Callable[..., Any]:
    """The step of a graph that may be one of several, into which Dynamo has broken a function.

    One that `continues` behind a break refuses what the step before the break has made.
    """

    def run(*inputs: Any) -> Any:
        if continues and any(_MADE in _metadata(node) for node in functions_of(inputs)):
            raise InputError(
                "the model was captured in several graphs, and each would select tokens of its "
                "own. torch.compile(..., fullgraph=True) shows the line that breaks the graph"
            )
        outputs = step(*inputs)
        for x in tensors_of(outputs):
            if x.grad_fn is not None:
                _metadata(x.grad_fn)[_MADE] = True
        return outputs

    return run


def _metadata(node: Any) -> dict[str, Any]:
    return node.metadata  # torch's stub has a method in the place of the dictionary
