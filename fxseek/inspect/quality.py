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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxseek import _torch
from fxseek.capture.sharded import refuse_shards
from fxseek.capture.step import SeekStep, step_of
from fxseek.capture.switches import Switches
from fxseek.config import SeekConfig
from fxseek.errors import InputError, lacks_memory
from fxseek.inspect.budget import within_budget
from fxseek.inspect.qualities import Choice, GradientQuality
from fxseek.inspect.state import accelerator_of, as_before, state_of
from fxseek.ratios import Fixed
from fxseek.run.saved import SavedBytes
from fxseek.scores import draws_tokens

__all__ = ["gradient_quality"]

log = logging.getLogger("fxseek")

_PARTS = 512
_PIECE = 2**20
_ALIKE = 1e-6
"""Two steps on a batch whose squared distance is no larger, as a share, differ by rounding."""


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
    random state, the mode and the count of steps are put back. The steps run in training mode. Of a
    model with dropout the gradient of all tokens is drawn as often as the others, and its own noise
    is told (``ordinary.noise``): set p to 0 to leave it out.

    The gradient of all tokens is that of ordinary backprop, without gradient checkpointing, which
    is switched off meanwhile; with ``loss=``, that of ``ratio=1.0``, which is the same. Where the
    device lacks the memory for it, or the configuration has a ``learn_chunk``, it is made in parts.
    Host memory holds one set of gradients for each batch, and four more.

    Args:
        model: a module, or one that `fxseek.compile` has compiled, whose configuration is then the
            base of all that is tried.
        batches: arguments of training steps, each a mapping; a few are enough.
        ratios: as ``SeekConfig.ratio``, but for those that follow training.
        spans: as ``SeekConfig.span``; a ratio that scores no tokens is tried once.
        draws: steps for each batch and choice, where anything is drawn (by the selection, or by
            dropout); at least 2, to tell bias from noise.
        progress: show a progress bar.
        options: other fields of `SeekConfig`: score, select, ...

    Raises:
        InputError: there is no batch, no loss with a gradient, or the gradient of all tokens has no
            direction; an argument is out of range; the model is sharded, has a compiled model in
            it, or changes weights in its backward.
        ConfigError, CaptureError, GraphError: as `fxseek.compile` and a training step would.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _refuse_compiled_parts(model)
    batches = _batches(batches)
    for name, several in (("ratios", ratios), ("spans", spans)):
        if isinstance(several, str) or not isinstance(several, Iterable):
            raise InputError(f"{name}={several!r} must be a list, such as [{several!r}]")
        if name[:-1] in options:
            raise InputError(f"{name[:-1]}= is not for this function: say what to try by {name}=")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise InputError(f"draws={draws!r} must be an integer of at least 2")
    refuse_shards(model, "gradient_quality")
    ratios, spans = list(ratios), list(spans)
    step = step_of(model)
    base = SeekConfig.make(SeekConfig() if step is None else step.given, **options)
    choices = _choices(base, ratios, spans)
    from tqdm.auto import tqdm  # of transformers

    progress_bar = tqdm(desc="gradient quality", unit="step", disable=not progress)
    with progress_bar as bar, _measured(model, bar) as measure:
        fulls, ordinary, in_parts = _full(base, measure, batches, draws)
        drawn = fulls[0].steps > 1  # by dropout
        counts = [draws if drawn or draws_tokens(config) else 1 for config in choices]
        bar.total = bar.n + sum(len(batches) * count + 1 for count in counts)  # one is not timed
        bar.refresh()
        found = [
            _choice(config, measure, batches, fulls, count)
            for config, count in zip(choices, counts, strict=True)
        ]
    following = list(itertools.pairwise(fulls))
    between = statistics.mean(a.cosine(b) for a, b in following) if following else None
    return GradientQuality(tuple(found), ordinary, between, len(batches), draws, in_parts)


def _refuse_compiled_parts(model: nn.Module) -> None:
    """Nothing within the model may select tokens where all are to be learned."""
    for name, module in model.named_modules():
        if name and step_of(module) is not None:
            raise InputError(
                f"{name!r} in the model is compiled by fxseek: call fxseek.uncompile on it, and "
                "compile the whole model if its configuration is to be the base"
            )


def _batches(given: Any) -> list[dict[str, Any]]:
    """The batches, cut off from the graphs that their tensors may be part of."""
    if isinstance(given, Mapping):
        raise InputError("batches is one batch: put it in a list")
    try:
        listed = [*given]
    except TypeError as error:
        raise InputError(f"batches is a {type(given).__name__}: give a list of batches") from error
    found: list[dict[str, Any]] = []
    for at, batch in enumerate(listed):
        if not isinstance(batch, Mapping) or not batch:
            shown = "empty" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise InputError(
                f"batches[{at}] is {shown}: each is a mapping of the model's arguments, such as "
                '{"input_ids": ..., "labels": ...}'
            )
        apart = tree_map_only(Tensor, Tensor.detach, dict(batch))
        found.append({str(name): value for name, value in apart.items()})
    if not found:
        raise InputError("batches is empty: give at least one batch of training data")
    return found


def _choices(
    base: SeekConfig, ratios: Sequence[float | str], spans: Sequence[int]
) -> list[SeekConfig]:
    """The configurations to try, checked before anything runs; those of one span together."""
    found: list[SeekConfig] = []
    for span in spans:
        for ratio in ratios:
            config = dataclasses.replace(base, ratio=ratio, span=span)
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


class _Taken(NamedTuple):
    """The gradient of a step as one vector, and what the step took."""

    gradient: Tensor
    seconds: float
    saved_bytes: int
    peak_bytes: int | None
    longest_span: int
    captured: bool


class _Mean(NamedTuple):
    """The mean gradient of several steps on one batch, and the variance of a step around it."""

    gradient: Tensor
    variance: float
    steps: int

    @property
    def left(self) -> float:
        """How much of the mean's squared norm is noise."""
        return self.variance / self.steps

    @property
    def squared(self) -> float:
        """The squared norm of the expected gradient."""
        return _dot(self.gradient, self.gradient) - self.left

    def cosine(self, other: _Mean) -> float:
        """Of the expected gradients."""
        norms = _root(self.squared) * _root(other.squared)
        return _over(_dot(self.gradient, other.gradient), norms)


class _Measure:
    """Runs steps of one model in one way after the other."""

    def __init__(self, model: nn.Module, restore: Callable[[], None], bar: Any) -> None:
        self.model = model
        self.restore = restore
        self.bar = bar
        self.step: SeekStep | None = None
        self.share = 1.0
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.accelerator = accelerator_of(device)

    def by(self, config: SeekConfig | None, batch: dict[str, Any]) -> _Taken:
        """From now on steps are run by a configuration, or are the model's own; runs a first one.

        Fixed ratios share a capture: the ratio is a function that returns the share at hand. A
        memory budget is fitted to each.
        """
        ratio = None if config is None or config.budget is not None else config.parsed_ratio
        if config is not None and config.is_scored and isinstance(ratio, Fixed):
            self.share = ratio.share
            config = dataclasses.replace(config, ratio=self._share)
        if config is None:
            self.step = None
        elif self.step is None or self.step.given != config:
            self.step = SeekStep(self.model, config, fit=within_budget)
        _torch.set_compiled_call(self.model, self.step)
        return self.take(batch)

    def _share(self, step: int) -> float:
        return self.share

    def take(self, batch: dict[str, Any]) -> _Taken:
        """Run a step."""
        model, accelerator = self.model, self.accelerator
        for parameter in model.parameters():
            parameter.grad = None
        if accelerator is not None:
            torch.accelerator.synchronize(accelerator)
            torch.accelerator.reset_peak_memory_stats(accelerator)
        held = [*model.parameters(), *model.buffers(), *batch.values()]
        saved = SavedBytes(exclude=held) if self.step is None else nullcontext()
        captures = None if self.step is None else self.step.captures.count
        start = time.perf_counter()
        try:
            with saved:
                loss = _loss(model(**batch))
                nbytes = saved.total if isinstance(saved, SavedBytes) else 0
            loss.backward()
            if accelerator is not None:
                torch.accelerator.synchronize(accelerator)
            seconds = time.perf_counter() - start
        finally:
            self.restore()
        peak = None if accelerator is None else torch.accelerator.max_memory_allocated(accelerator)
        longest, report = 1, None if self.step is None else self.step.recorder.last
        captured = self.step is not None and self.step.captures.count != captures
        if report is not None:
            nbytes = report.saved_bytes
            if report.spans is not None:
                longest = _longest(report.spans, report.by_position()[0])
        gradient = [_flat(p) for p in model.parameters() if p.requires_grad]
        self.bar.update()
        return _Taken(torch.cat(gradient), seconds, nbytes, peak, longest, captured)

    def mean(
        self, at: int, batch: dict[str, Any], steps: int, *, full: _Mean | None = None
    ) -> tuple[_Mean, list[_Taken], list[float]]:
        """Of some steps, what each took (without its gradient), and its cosine with `full`."""
        total, squares, taken, cosines = None, 0.0, [], []
        for _ in range(steps):
            one = self.take(batch)
            if one.captured:  # whose time is not a step's
                self.bar.total = (self.bar.total or self.bar.n) + 1
                one = self.take(batch)
            squared = _dot(one.gradient, one.gradient)
            if not math.isfinite(squared) or (full is None and not squared):
                what = "zero everywhere" if squared == 0 else "not finite"
                raise InputError(
                    f"the gradient of a step on batches[{at}] is {what}, and has no direction: "
                    "look for rows without labels, and for NaN in the weights and the loss"
                )
            squares += squared
            if full is not None:
                inner = _dot(one.gradient, full.gradient)
                cosines.append(_over(inner, _root(squared * full.squared)) if squared else 0.0)
            total = one.gradient if total is None else total.add_(one.gradient)
            taken.append(one._replace(gradient=one.gradient.new_empty(0)))
        assert total is not None
        total /= steps
        variance = max(0.0, squares - steps * _dot(total, total)) / max(steps - 1, 1)
        return _Mean(total, variance, steps), taken, cosines


def _longest(spans: Tensor, selected: Tensor) -> int:
    """Tokens of the longest span that has a selected token."""
    rows = zip(spans.cpu(), selected.cpu(), strict=True)
    chosen = [row[torch.isin(row, row[kept])] for row, kept in rows]
    counts = [row.unique(return_counts=True)[1] for row in chosen if len(row)]
    return max((int(count.max()) for count in counts), default=1)


def _flat(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient as a vector in host memory, zeros where it has none."""
    dtype = torch.promote_types(torch.float32, parameter.dtype)
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=dtype)
    return parameter.grad.detach().to_dense().flatten().to("cpu", dtype)


@contextmanager
def _measured(model: nn.Module, bar: Any) -> Iterator[_Measure]:
    """A model to measure; its call, mode, gradients and state are put back."""
    training = {module: module.training for module in model.modules()}
    before, switches = _torch.compiled_call(model), Switches()
    switches.off([*model.named_modules()])
    if not model.training:
        model.train()
    restore = state_of(model)  # which has the mode and the switches too
    try:
        with torch.enable_grad(), as_before(model):
            yield _Measure(model, restore, bar)
    finally:
        restore()
        switches.restore()
        _torch.set_compiled_call(model, before)
        for module, mode in training.items():
            module.training = mode


def _full(
    base: SeekConfig, measure: _Measure, batches: list[dict[str, Any]], draws: int
) -> tuple[list[_Mean], Choice, bool]:
    """The gradient of all tokens of each batch, as a choice, and whether it was made in parts."""
    every = dataclasses.replace(base, ratio=1.0, span=1, memory_budget_bytes=None)
    in_parts = base.learn_chunk is not None
    plain = None if base.loss is None and not in_parts else every
    try:
        return *_fulls(plain, measure, batches, draws), in_parts
    except RuntimeError as error:
        if in_parts or not lacks_memory(error):
            raise
    # Out of the handler: what it has caught holds the activations of the step that failed.
    log.warning("fxseek: no memory for ordinary backprop: it is done in parts of %s", _PARTS)
    parts = dataclasses.replace(every, learn_chunk=_PARTS, recompute="block", backend="eager")
    return *_fulls(parts, measure, batches, draws), True


def _fulls(
    config: SeekConfig | None, measure: _Measure, batches: list[dict[str, Any]], draws: int
) -> tuple[list[_Mean], Choice]:
    """The gradients of all tokens, of one step or, where the model draws, of several."""
    first = measure.by(config, batches[0]).gradient
    apart = first - measure.take(batches[0]).gradient
    steps = draws if _dot(apart, apart) > _ALIKE * _dot(first, first) else 1
    del first, apart
    found, taken = [], []
    for at, batch in enumerate(batches):
        mean, some, _ = measure.mean(at, batch, steps)
        found.append(mean)
        taken += some
    norm, variance = sum(one.squared for one in found), sum(one.variance for one in found)
    cosine = min(_root(_over(norm, norm + variance)), 1.0)  # in this order NaN stays
    figures = (cosine, 1.0, 0.0, _root(_over(variance, norm)))
    return found, _told(1.0, 1, taken, figures)


def _choice(
    config: SeekConfig,
    measure: _Measure,
    batches: list[dict[str, Any]],
    fulls: list[_Mean],
    draws: int,
) -> Choice:
    """Steps by one configuration, against the full gradients."""
    measure.by(config, batches[0])
    taken, cosines = [], []
    inner = own = norm = variance = left = 0.0  # sums over the batches
    for at, (batch, full) in enumerate(zip(batches, fulls, strict=True)):
        mean, some, each = measure.mean(at, batch, draws, full=full)
        taken += some
        cosines += each
        inner += _dot(mean.gradient, full.gradient)
        own, norm, variance = own + mean.squared, norm + full.squared, variance + mean.variance
        left += mean.left + full.left
    apart = own - 2 * inner + norm
    expected = _over(inner, _root(norm) * _root(own))
    if left == 0:  # nothing but rounding
        expected, apart = (min(expected, 1.0) if own else 0.0), max(apart, 0.0)
    # The standard error of a squared distance, where noise has few directions: elsewhere it is less
    elif apart < left / math.sqrt(len(batches)) or not abs(expected) <= 1:
        expected = apart = math.nan
    bias, noise = _root(_over(apart, norm)), _root(_over(variance, norm))
    figures = (statistics.mean(cosines), expected, bias, noise)
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
        max(one.longest_span for one in taken),
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


def _root(value: float) -> float:
    """NaN of what is negative: a squared norm that noise has drowned."""
    return math.sqrt(value) if value >= 0 else math.nan


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
