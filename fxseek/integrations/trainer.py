"""`SeekCallback`: what fxseek did in each step, in the logs of a transformers Trainer.

Imported on first use, for transformers takes seconds and a loop of one's own needs none of it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from fxseek.api import resume
from fxseek.capture.step import SeekStep, step_of
from fxseek.errors import InputError
from fxseek.integrations.pages import TokenPages
from fxseek.reports.step import StepReport

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["SeekCallback"]

log = logging.getLogger("fxseek")


class SeekCallback(TrainerCallback, ExportableState):
    """Logs what fxseek selects and saves, beside a Trainer's own numbers.

    Keys, each a mean over the forwards since the last log: ``fxseek/selected`` (share of the
    tokens, padding aside), ``fxseek/ratio`` (where it follows training), ``fxseek/full_loss``
    (nats per labelled token, where scoring computes it), ``fxseek/saved_mib`` (kept by autograd
    for the backward) and ``fxseek/seconds/<stage>`` (with `timings`); and ``fxseek/peak_mib``, the
    largest memory so far, of the accelerator where there is one, else of the process.

    The number of forwards is part of a checkpoint, so that random scores, samples and a ratio that
    follows training are in a resumed run those of an uninterrupted one. A ratio such as
    ``"0.1->0.5"`` goes from one to the other over the Trainer's steps, unless ``ratio_steps`` says
    otherwise.

    ``Trainer(callbacks=[SeekCallback()])`` reaches the progress bar, the printed log and
    `state.log_history`. Reporters such as TensorBoard are called before a caller's callbacks:
    ``SeekCallback().attach(trainer)`` puts this one first, so that they receive its keys as well.

    Args:
        timings: measure the stages; a device is waited for at the end of each.
        html_every: steps of the optimiser after which the token page (`StepReport.to_html`) is
            written to ``<output_dir>/fxseek/tokens-<step>.html``, each time they have passed; None
            for never. Once attached, trackio and wandb get the page, TensorBoard a text. Of several
            processes the first writes what it selected.
        tokenizer: what made the ids; by default the Trainer's ``processing_class``.

    Raises:
        InputError: `html_every` is no number of steps; or when training starts, there is no
            tokenizer or no score to show, the model is not compiled, the Trainer would copy it to
            several GPUs, or has made a callback that was attached, or that writes pages, anew
            (``restore_callback_states_from_checkpoint``).
    """

    def __init__(
        self, timings: bool = True, html_every: int | None = None, tokenizer: Any = None
    ) -> None:
        self.timings = timings
        self.html_every = html_every
        self._pages = None if html_every is None else TokenPages(html_every, tokenizer)
        self._handler: Any = None
        self._attached = self._anew = False
        self._steps = 0
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._last: StepReport | None = None

    def attach(self, trainer: Any) -> SeekCallback:
        """Put this callback before a Trainer's reporters; returns it.

        Raises:
            InputError: `trainer` is no Trainer of transformers.
        """
        handler = getattr(trainer, "callback_handler", None)
        if not isinstance(handler, CallbackHandler):
            raise InputError(
                f"attach({type(trainer).__name__}): pass the Trainer whose training is to be logged"
            )
        self._handler = handler
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks[:] = [self, *others]
        self._attached = True
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        given = {"timings": self.timings, "html_every": self.html_every}
        attributes = {"_steps": self._steps, "_attached": self._attached, "_anew": True}
        return {"args": given, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the forward that a checkpoint ended with; ask for timings."""
        step = _step(kwargs["model"])
        if step is None:
            raise InputError(
                "SeekCallback: the Trainer's model is not compiled by fxseek, so every token would "
                "be trained on. Call fxseek.compile(trainer.model) before trainer.train(): a "
                "Trainer that is given peft_config wraps the model that it is given, and the "
                "wrapper is what has to be compiled."
            )
        if args.n_gpu > 1:  # transformers wraps the model by DataParallel then
            raise InputError(
                f"the Trainer would copy the model to {args.n_gpu} GPUs (DataParallel), and a copy "
                "cannot run a compiled step. Start one process for each GPU (torchrun, accelerate "
                "launch), or show the process one GPU alone (CUDA_VISIBLE_DEVICES=0)."
            )
        if self._anew:  # from a checkpoint's state
            made = "restore_callback_states_from_checkpoint=True lets the Trainer make SeekCallback"
            if self._attached or self._pages is not None:
                raise InputError(
                    f"{made} anew, without its tokenizer and its place before the reporters. Leave "
                    "it out: SeekCallback goes on with its count by itself."
                )
            log.warning("%s anew, as the checkpoint has it: the one given has no effect", made)
        if self._pages is not None:
            config = step.config
            self._pages.check(kwargs.get("processing_class"), config.score, config.is_scored)
        name = type(self).__name__
        if state.global_step:
            _go_on(step, state.stateful_callbacks.get(name))
        state.stateful_callbacks.setdefault(name, self.state())  # which the Trainer writes over
        step.recorder.timed = self.timings
        self._sums, self._counts = {}, {}  # of a run that was cut short
        self._steps, self._last = step.recorder.step, step.recorder.last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how much of training is done."""
        step = _step(kwargs["model"])
        if step is not None:
            step.recorder.progress = min(state.global_step / max(state.max_steps - 1, 1), 1.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for no more timings; how much of training is done is not known any more."""
        step = _step(kwargs["model"])
        if step is not None:
            step.recorder.timed = False
            step.recorder.progress = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in one micro-batch of an accumulated step."""
        self._collect(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the last micro-batch of a step; write its page where it is time."""
        self._collect(kwargs["model"])
        step = _step(kwargs["model"])
        if step is not None:
            step.recorder.progress = None  # of this step: the run may end in what follows
        pages, report = self._pages, self._last
        if pages is None or report is None or state.global_step % pages.every:
            return
        if state.is_world_process_zero:
            reporters = [] if self._handler is None else self._handler.callbacks
            pages.write(report, args, state, reporters)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the means to a log of training."""
        if logs is None or "loss" not in logs or not self._counts:
            return
        means = {
            f"fxseek/{key}": round(float(total) / self._counts[key], 6)
            for key, total in self._sums.items()
        }
        if (peak := _peak_bytes()) is not None:
            means["fxseek/peak_mib"] = round(peak / 2**20, 3)
        self._sums, self._counts = {}, {}
        logs.update(means)
        if state.log_history:
            state.log_history[-1].update(means)

    def _collect(self, model: Any) -> None:
        step = _step(model)
        report = None if step is None else step.recorder.last
        if step is None or report is None or report is self._last:
            return
        self._steps, self._last = step.recorder.step, report
        selected = report.by_position()[0] & report.valid  # all positions are, at ratio 1.0
        self._add("selected", selected.sum() / report.valid.sum())
        if step.config.parsed_ratio.follows_training:
            self._add("ratio", report.ratio)
        if report.full_loss is not None:
            self._add("full_loss", report.full_loss)
        self._add("saved_mib", report.saved_bytes / 2**20)
        for stage, seconds in (report.timings or {}).items():
            self._add(f"seconds/{stage}", seconds)

    def _add(self, key: str, value: Any) -> None:
        self._sums[key] = self._sums.get(key, 0.0) + value
        self._counts[key] = self._counts.get(key, 0) + 1


def _go_on(step: SeekStep, saved: Any) -> None:
    """Start at the forward that a checkpoint ended with, by a callback's saved state."""
    if isinstance(saved, list):  # of several callbacks, the newest last
        saved = saved[-1]
    if saved is not None:
        resume(step.model, saved["attributes"]["_steps"])
    elif not step.recorder.step:
        log.warning(
            "the checkpoint was saved without SeekCallback and does not say how many forwards came "
            "before it: random scores, samples and a ratio that follows forwards start anew. To go "
            "on with them, call fxseek.resume(model, forwards) before trainer.train()."
        )


def _step(model: Any) -> SeekStep | None:
    """The compiled step of a model that may have been wrapped since."""
    while (step := step_of(model)) is None:
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(model, torch.nn.Module):
            return None
    return step


def _peak_bytes() -> int | None:
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
