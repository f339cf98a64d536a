"""`fxseek.gradient_quality`: how near the gradient of a share of the tokens is to that of all."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxseek import _torch
from fxseek.capture.sharded import refuse_shards
from fxseek.capture.step import SeekStep, step_of
from fxseek.config import SeekConfig
from fxseek.errors import InputError
from fxseek.inspect.state import as_before, state_of
from fxseek.plots import figure_for
from fxseek.ratios import Fixed
from fxseek.run.saved import SavedBytes
from fxseek.scores import scorer_of

__all__ = ["Choice", "GradientQuality", "gradient_quality"]

log = logging.getLogger("fxseek")

_PARTS = 512
_PIECE = 2**20


@dataclass(frozen=True)
class Choice:
    """One way to select, against the gradient of all tokens, over all batches.

    `cosine`: of one draw with the full gradient; `expected_cosine`: of the expected gradient, from
    few draws a rough estimate, as `bias` is. `bias`: the norm of the expected gradient less the
    full one, and `noise`: the standard deviation of a draw around the expected gradient, both as
    shares of the full gradient's norm; where nothing is drawn there is no noise. What the noise of
    the draws drowns is NaN. `seconds`: of a step, forward and backward, the median; `saved_bytes`:
    what autograd keeps for the backward; `peak_bytes`: the allocator's, None on a CPU.
    """

    ratio: float | str
    span: int
    cosine: float
    expected_cosine: float
    bias: float
    noise: float
    seconds: float
    saved_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class GradientQuality:
    """What `gradient_quality` found; print it, or `plot` it.

    `between_batches`: the mean cosine between the full gradients of two batches that follow each
    other, the yardstick: a step on one batch is as far from the other's. None with one batch.
    `ordinary`: the full gradient as a choice, in parts where `in_parts`. `choices`: what was
    measured of each way to select, on so many `batches` with so many `draws` of each.
    """

    choices: tuple[Choice, ...]
    ordinary: Choice
    between_batches: float | None
    batches: int
    draws: int
    in_parts: bool

    def __str__(self) -> str:
        """A table for a person."""
        head = ("ratio", "span", "cosine", "expected", "bias", "noise", "s/step", "saved")
        rows = [head, *(_cells(choice) for choice in (self.ordinary, *self.choices))]
        widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        title = "fxseek: gradients of selected tokens against all"
        lines.insert(0, f"{title}, {batches}, {self.draws} draws each")
        if self.between_batches is not None:
            lines.append(f"cosine between two batches: {self.between_batches:.3f}")
        if any(math.isnan(choice.bias) for choice in self.choices):
            lines.append("?: drowned in the noise of the draws; more draws or batches will tell")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the cosines by ratio, one line for each span, into a PNG or SVG file.

        Raises:
            InputError: no choice has a number as ratio, the path ends in something else, or
                matplotlib is not installed.
        """
        Figure = figure_for(path)
        numbers = [choice for choice in self.choices if isinstance(choice.ratio, float)]
        if not numbers:
            raise InputError("no choice has a number as ratio: there is nothing to draw along it")
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, name, title in zip(
            panels, ("cosine", "expected_cosine"), ("one draw", "expected gradient"), strict=True
        ):
            for span in sorted({choice.span for choice in numbers}):
                line = sorted(
                    (choice for choice in numbers if choice.span == span),
                    key=lambda choice: float(choice.ratio),
                )
                label = "single tokens" if span == 1 else f"spans of {span}"
                ratios = [choice.ratio for choice in line]
                panel.plot(ratios, [getattr(x, name) for x in line], marker="o", label=label)
            if self.between_batches is not None:
                panel.axhline(self.between_batches, color="grey", ls=":", label="another batch")
            panel.set(title=title, xlabel="ratio", ylim=(None, 1.0))
        panels[0].set_ylabel("cosine with the full gradient")
        panels[0].legend(frameon=False)
        figure.savefig(path)


def _cells(choice: Choice) -> tuple[str, ...]:
    numbers = (choice.cosine, choice.expected_cosine, choice.bias, choice.noise)
    return (
        str(choice.ratio),
        str(choice.span),
        *("?" if math.isnan(number) else f"{number:.3f}" for number in numbers),
        f"{choice.seconds:.3g}",
        f"{choice.saved_bytes / 2**20:.1f} MiB",
    )


def gradient_quality(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    ratios: Sequence[float | str] = (0.1, 0.25, 0.5),
    spans: Sequence[int] = (1, 8),
    draws: int = 4,
    progress: bool = True,
    **options: Any,
) -> GradientQuality:
    """Measure what a share of the tokens teaches, on a few batches of one's own.

    For each ratio and span, the gradients of a few steps are compared with that of all tokens, at
    the same weights. A gradient that is biased points elsewhere on average, which more steps do not
    mend; one that is noisy needs more or larger batches. No weight is changed; gradients, buffers,
    random state, the mode and the count of steps are put back. The steps run in training mode, so
    that the noise of dropout is a part of what is measured: set its p to 0 to leave it out.

    The gradient of all tokens is that of ordinary backprop. Where the device lacks the memory for
    it, or where the configuration has a ``learn_chunk``, it is that of ``ratio=1.0`` in parts,
    which is the same. Host memory holds one set of gradients for each batch, and four more.

    Args:
        model: a module, or one that `fxseek.compile` has compiled, whose configuration is then the
            base of all that is tried.
        batches: arguments of training steps, each a mapping; a few are enough.
        ratios: as ``SeekConfig.ratio``, but for those that follow training.
        spans: as ``SeekConfig.span``; a ratio that scores no tokens is tried once.
        draws: steps for each batch and choice, where anything is drawn; at least 2, to tell bias
            from noise.
        progress: show a progress bar.
        options: other fields of `SeekConfig`: score, select, ...

    Raises:
        InputError: there is no batch, no loss with a gradient, an argument is out of range, or the
            model is sharded.
        ConfigError, CaptureError, GraphError: as `fxseek.compile` and a training step would.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(batches, Mapping):
        raise InputError("batches is one batch: put it in a list")
    batches = [dict(batch) for batch in batches]
    if not batches:
        raise InputError("batches is empty: give at least one batch of training data")
    for name, several in (("ratios", ratios), ("spans", spans)):
        if isinstance(several, str) or not isinstance(several, Iterable):
            raise InputError(f"{name}={several!r} must be a list, such as [{several!r}]")
        if name[:-1] in options:
            raise InputError(f"{name[:-1]}= is not for this function: say what to try by {name}=")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise InputError(f"draws={draws!r} must be an integer of at least 2")
    refuse_shards(model, "gradient_quality")
    step = step_of(model)
    base = SeekConfig.make(SeekConfig() if step is None else step.given, **options)
    choices = _choices(base, ratios, spans)
    counts = [draws if _draws(config) else 1 for config in choices]
    steps = len(batches) * (1 + sum(counts)) + 1 + len(choices)  # and one that is not timed
    from tqdm.auto import tqdm  # of transformers

    progress_bar = tqdm(total=steps, desc="gradient quality", unit="step", disable=not progress)
    with progress_bar as bar, _measured(model, bar) as measure:
        fulls, ordinary, in_parts = _full(base, measure, batches)
        found = [
            _choice(config, measure, batches, fulls, count)
            for config, count in zip(choices, counts, strict=True)
        ]
    following = list(itertools.pairwise(fulls))
    between = statistics.mean(_cosine(a, b) for a, b in following) if following else None
    return GradientQuality(tuple(found), ordinary, between, len(batches), draws, in_parts)


def _choices(
    base: SeekConfig, ratios: Sequence[float | str], spans: Sequence[int]
) -> list[SeekConfig]:
    """The configurations to try, checked before anything runs; those of one span together."""
    found: list[SeekConfig] = []
    for span in spans:
        for ratio in ratios:
            config = dataclasses.replace(base, ratio=ratio, span=span, memory_budget_bytes=None)
            if config.parsed_ratio.follows_training:
                raise InputError(
                    f"ratios has {ratio!r}, which follows training: try the shares that it "
                    "goes through, such as 0.1 and 0.5"
                )
            if not config.is_scored:
                config = dataclasses.replace(config, span=1)
            if config not in found:
                found.append(config)
    if not found:
        raise InputError("ratios and spans must each have at least one value to try")
    return found


def _draws(config: SeekConfig) -> bool:
    """Whether two steps on one batch differ."""
    return config.is_scored and (
        config.select == "sample" or config.draws_spans or scorer_of(config).draws
    )


class _Taken(NamedTuple):
    """The gradient of a step as one vector, and what the step took."""

    gradient: Tensor
    seconds: float
    saved_bytes: int
    peak_bytes: int | None


class _Measure:
    """Runs steps of one model in one way after the other."""

    def __init__(self, model: nn.Module, restore: Callable[[], None], bar: Any) -> None:
        self.model = model
        self.restore = restore
        self.bar = bar
        self.step: SeekStep | None = None
        self.share = 1.0

    def by(self, config: SeekConfig | None, batch: dict[str, Any]) -> None:
        """From now on steps are run by a configuration, or are the model's own; runs a first one.

        Fixed ratios share a capture: the ratio is a function that returns the share at hand.
        """
        if config is not None and config.is_scored and isinstance(config.parsed_ratio, Fixed):
            self.share = config.parsed_ratio.share
            config = dataclasses.replace(config, ratio=self._share)
        if config is None:
            self.step = None
        elif self.step is None or self.step.config != config:
            self.step = SeekStep(self.model, config)
        _torch.set_compiled_call(self.model, self.step)
        self.take(batch)

    def _share(self, step: int) -> float:
        return self.share

    def take(self, batch: dict[str, Any]) -> _Taken:
        """Run a step."""
        model, accelerated = self.model, torch.accelerator.is_available()
        for parameter in model.parameters():
            parameter.grad = None
        if accelerated:
            torch.accelerator.synchronize()
            torch.accelerator.reset_peak_memory_stats()
        held = [*model.parameters(), *model.buffers(), *batch.values()]
        saved = SavedBytes(exclude=held) if self.step is None else nullcontext()
        start = time.perf_counter()
        with saved:
            loss = _loss(model(**batch))
            nbytes = saved.total if isinstance(saved, SavedBytes) else 0
        loss.backward()
        if accelerated:
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.accelerator.max_memory_allocated() if accelerated else None
        if self.step is not None and self.step.recorder.last is not None:
            nbytes = self.step.recorder.last.saved_bytes
        gradient = [_flat(p) for p in model.parameters() if p.requires_grad]
        self.restore()
        self.bar.update()
        return _Taken(torch.cat(gradient), seconds, nbytes, peak)


def _flat(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient as a vector in host memory, zeros where it has none."""
    dtype = torch.promote_types(torch.float32, parameter.dtype)
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=dtype)
    return parameter.grad.detach().flatten().to("cpu", dtype)


@contextmanager
def _measured(model: nn.Module, bar: Any) -> Iterator[_Measure]:
    """A model to measure; its call, mode, gradients and state are put back."""
    training = {module: module.training for module in model.modules()}
    before = _torch.compiled_call(model)
    if not model.training:
        model.train()
    restore = state_of(model)  # which has the mode too
    try:
        with torch.enable_grad(), as_before(model):
            yield _Measure(model, restore, bar)
    finally:
        restore()
        _torch.set_compiled_call(model, before)
        for module, mode in training.items():
            module.training = mode


def _full(
    base: SeekConfig, measure: _Measure, batches: list[dict[str, Any]]
) -> tuple[list[Tensor], Choice, bool]:
    """The gradient of all tokens of each batch, as a choice, and whether it was made in parts."""
    every = dataclasses.replace(base, ratio=1.0, span=1, memory_budget_bytes=None)
    in_parts = base.learn_chunk is not None
    plain = None if base.loss is None and not in_parts else every
    try:
        measure.by(plain, batches[0])
        taken = [measure.take(batch) for batch in batches]
    except torch.OutOfMemoryError:
        if in_parts:
            raise
        log.warning("fxseek: no memory for ordinary backprop: it is done in parts of %s", _PARTS)
        parts = dataclasses.replace(every, learn_chunk=_PARTS, recompute="block", backend="eager")
        return _full(parts, measure, batches)
    ordinary = _told(1.0, 1, taken, (1.0, 1.0, 0.0, 0.0))
    return [one.gradient for one in taken], ordinary, in_parts


def _choice(
    config: SeekConfig,
    measure: _Measure,
    batches: list[dict[str, Any]],
    fulls: list[Tensor],
    draws: int,
) -> Choice:
    """Steps by one configuration, against the full gradients."""
    measure.by(config, batches[0])
    taken, cosines = [], []
    inner = own = norm = variance = 0.0  # sums over the batches
    for batch, full in zip(batches, fulls, strict=True):
        total, squares = torch.zeros_like(full), 0.0
        for _ in range(draws):
            one = measure.take(batch)
            total += one.gradient
            squares += _dot(one.gradient, one.gradient)
            cosines.append(_cosine(one.gradient, full))
            taken.append(one._replace(gradient=full[:0]))
        mean = total / draws
        inner, norm = inner + _dot(mean, full), norm + _dot(full, full)
        spread = max(0.0, squares - draws * _dot(mean, mean)) / max(draws - 1, 1)
        # Of the squared norm of a mean, the variance over the number of draws is noise.
        variance, own = variance + spread, own + _dot(mean, mean) - spread / draws
    apart = own - 2 * inner + norm
    expected = _over(inner, math.sqrt(norm * max(own, 0.0)))
    if variance == 0:  # nothing but rounding
        expected, apart = min(1.0, expected), max(0.0, apart)
    if apart < 0 or not abs(expected) <= 1:
        expected = apart = math.nan
    figures = (
        statistics.mean(cosines),
        expected,
        math.sqrt(_over(apart, norm)),
        math.sqrt(_over(variance, norm)),
    )
    ratio = config.ratio
    assert not callable(ratio)
    return _told(ratio, config.span, taken, figures)


def _told(
    ratio: float | str,
    span: int,
    taken: Sequence[_Taken],
    figures: tuple[float, float, float, float],
) -> Choice:
    peaks = [one.peak_bytes for one in taken if one.peak_bytes is not None]
    return Choice(
        ratio,
        span,
        *figures,
        statistics.median(one.seconds for one in taken),
        max(one.saved_bytes for one in taken),
        max(peaks) if peaks else None,
    )


def _dot(a: Tensor, b: Tensor) -> float:
    """In pieces: float32 would lose digits over some hundred million entries."""
    pairs = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return math.fsum(float(torch.dot(x, y)) for x, y in pairs)


def _over(value: float, of: float) -> float:
    return value / of if of else math.nan


def _cosine(a: Tensor, b: Tensor) -> float:
    return _over(_dot(a, b), math.sqrt(_dot(a, a) * _dot(b, b)))


def _loss(outputs: Any) -> Tensor:
    loss = outputs
    if isinstance(outputs, (tuple, list)):
        loss = outputs[0]
    elif not isinstance(outputs, Tensor):
        loss = outputs.get("loss") if hasattr(outputs, "get") else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise InputError(
            "the model returned no loss with a gradient: give the batches labels, or compile the "
            "model with loss= first"
        )
    return loss
