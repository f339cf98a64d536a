"""Memory of a training step over time: which bytes live when, in which stage, and what they are.

A `Tracker` is a dispatch mode: it sees each tensor that an operation makes, follows its storage
by a weak reference, and writes down when it came and went. What the storage was for may be said
at any time, also after it has gone; `following` says it for the stages of a compiled step. Real
tensors (`fxseek.profile`) and meta ones (`fxseek.estimate`) are followed alike.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxseek import _torch
from fxseek.errors import InputError
from fxseek.plots import figure_for
from fxseek.run.assemble import Step
from fxseek.run.stages import Learn

__all__ = [
    "CATEGORIES",
    "StepMemory",
    "Tracker",
    "following",
    "formatted",
    "loss_of",
    "module_tensors",
    "saved_as_activations",
    "unit_of",
]

CATEGORIES: tuple[str, ...] = (
    "parameters",
    "gradients",
    "optimiser state",
    "K/V",
    "activations",
    "constants",
    "whole parameters",
    "transients",
)

_COPYING = {
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_copy.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.repeat.default,
    torch.ops.aten.index_select.default,
}
"""What makes keys and values of keys and values: rows replaced, heads repeated, a cast."""


@dataclass(slots=True, eq=False)
class _Block:
    """One storage: its bytes now, and its category, which may be corrected later."""

    category: str = "transients"
    nbytes: int = 0
    reference: Any = None


class Tracker(TorchDispatchMode):
    """Follows the storages of one device while it is active (`with tracker:`).

    `device`: its type, such as ``"cpu"``; tensors elsewhere are not counted. `rounding`: bytes
    that each storage is rounded up to, as the device's allocator does. Storages that exist before
    are counted once they are given to `hold`.
    """

    def __init__(self, device: str, rounding: int = 1) -> None:
        super().__init__()
        self.device = device
        self.rounding = rounding
        self.events: list[tuple[_Block, int]] = []
        self.stages: list[tuple[str, int]] = []
        self._live: dict[int, _Block] = {}
        self._keeps_kind = False

    # ---- what the caller says -----------------------------------------------------------

    def hold(self, tensors: Iterable[Any], category: str) -> None:
        """Count storages that exist already, and say what they are."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                block = self._seen(tensor)
                if block is not None:
                    block.category = category

    def label(self, tensors: Iterable[Any], category: str) -> None:
        """Say what followed storages are, where nothing was said before."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                block = self._live.get(_torch.storage_key(tensor))
                if block is not None and block.category == "transients":
                    block.category = category

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.stages.append((name, len(self.events)))

    def passing(self, nbytes: int) -> None:
        """Bytes that come and go within one operation."""
        block = _Block()
        self._resized(block, nbytes)
        self._resized(block, 0)

    @contextlib.contextmanager
    def kinds_kept(self) -> Iterator[None]:
        """Copies of keys and values count as keys and values meanwhile."""
        self._keeps_kind = True
        try:
            yield
        finally:
            self._keeps_kind = False

    # ---- what it sees --------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = self.run(func, args, kwargs or {})
        if isinstance(out, Tensor):
            block = self._seen(out)
            if self._keeps_kind and block is not None and func in _COPYING:
                self._inherit(block, args)
        else:
            for item in tree_leaves(out):
                if isinstance(item, Tensor):
                    self._seen(item)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation gives."""
        return func(*args, **kwargs)

    def _inherit(self, block: _Block, args: tuple[Any, ...]) -> None:
        source = self._live.get(_torch.storage_key(args[0])) if args else None
        if (
            source is not None
            and source.category == "K/V"
            and block.category == "transients"
            and block.nbytes >= source.nbytes
        ):
            block.category = "K/V"

    def _seen(self, tensor: Tensor) -> _Block | None:
        """The block of a tensor's storage, followed from now on; None on other devices."""
        if tensor.device.type != self.device or tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = _torch.storage_key(tensor)
        block = self._live.get(key)
        if block is None:
            block = _Block()
            block.reference = weakref.ref(storage, lambda _: self._gone(key))
            self._live[key] = block
        self._resized(block, -(-storage.nbytes() // self.rounding) * self.rounding)
        return block

    def _resized(self, block: _Block, nbytes: int) -> None:
        if nbytes != block.nbytes:
            self.events.append((block, nbytes - block.nbytes))
            block.nbytes = nbytes

    def _gone(self, key: int) -> None:
        block = self._live.pop(key, None)
        if block is not None:
            self._resized(block, 0)

    def stop(self) -> None:
        """Follow nothing any more: what is released from now on is no part of the step."""
        self._live.clear()

    def result(self) -> dict[str, Any]:
        """The fields of a `StepMemory`."""
        self.stop()
        return {
            "changes": tuple((block.category, change) for block, change in self.events),
            "stages": tuple(self.stages),
        }


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step, by category (`CATEGORIES`) and stage.

    `changes`: each storage that came (bytes above 0) or went (below), in order, with its
    category. `stages`: name of each stage and the number of changes before it.
    """

    changes: tuple[tuple[str, int], ...] = field(repr=False)
    stages: tuple[tuple[str, int], ...] = field(repr=False)

    @cached_property
    def _totals(self) -> list[int]:
        """All bytes before the changes and after each."""
        return list(accumulate((change for _, change in self.changes), initial=0))

    @cached_property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return max(self._totals)

    @property
    def peak_stage(self) -> str:
        """The stage in which that was."""
        when = max(0, self._totals.index(self.peak_bytes) - 1)
        return next((name for name, start in reversed(self.stages) if start <= when), "before")

    @cached_property
    def at_peak(self) -> dict[str, int]:
        """Bytes of each category at the peak; they add up to `peak_bytes`."""
        found = dict.fromkeys(CATEGORIES, 0)
        for category, change in self.changes[: self._totals.index(self.peak_bytes)]:
            found[category] += change
        return found

    @cached_property
    def largest(self) -> dict[str, int]:
        """The most bytes that each category had, each at its own time."""
        return {name: max([0, *values]) for name, values in self.over_time().items()}

    @cached_property
    def stage_peaks(self) -> dict[str, int]:
        """The most bytes that were alive at once in each stage."""
        found = {name: 0 for name, _ in self.stages}
        for (name, start), (_, end) in pairwise([*self.stages, ("", len(self.changes))]):
            found[name] = max(found[name], *self._totals[start : end + 1])
        return found

    def over_time(self) -> dict[str, list[int]]:
        """Bytes of each category after each change; all lists are as long as `changes`."""
        return {
            name: list(accumulate(change * (category == name) for category, change in self.changes))
            for name in CATEGORIES
        }

    def _table(self) -> list[str]:
        lines = [f"  {'':22}{'at the peak':>12}{'at most':>12}"]
        for name in CATEGORIES:
            if self.largest[name]:
                here, most = formatted(self.at_peak[name]), formatted(self.largest[name])
                lines.append(f"  {name:22}{here:>12}{most:>12}")
        return lines

    def plot(self, path: str | Path) -> Path:
        """Draw memory over the step, stacked by category, into a PNG or SVG file.

        Along the axis are allocations and releases, in order, not seconds. Returns the path.

        Raises:
            InputError: the path ends in something else, or matplotlib is not installed.
        """
        target = Path(path)
        Figure = figure_for(path)
        series = self.over_time()
        first = self.stages[0][1] if self.stages else 0  # what was there before is no event
        at = [index for index in _most_telling(series) if index >= first]
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        shown = [name for name in CATEGORIES if self.largest[name]]
        unit, scale = unit_of(self.peak_bytes)
        heights = [[series[name][i] / scale for i in at] for name in shown]
        axes.stackplot(at, *heights, labels=shown)
        for index, (name, start) in enumerate(self.stages):
            axes.axvline(start, color="black", linewidth=0.6, linestyle=":")
            axes.annotate(
                name, (start, 1.01 + 0.035 * (index % 3)), xycoords=("data", "axes fraction"),
                fontsize=7, ha="left", va="bottom",
            )  # fmt: skip
        axes.set_xlabel("allocations and releases, in order")
        axes.set_ylabel(unit)
        axes.margins(x=0)
        axes.set_title(
            f"peak {formatted(self.peak_bytes)} in {self.peak_stage}", fontsize=10, pad=34
        )
        figure.legend(loc="outside right upper", fontsize=8)
        figure.savefig(target)
        return target


_POINTS = 2000
"""Points of a plot: the highest of each part of the step."""


def _most_telling(series: dict[str, list[int]]) -> list[int]:
    totals = [sum(values) for values in zip(*series.values(), strict=True)]
    size = max(1, -(-len(totals) // _POINTS))
    parts = (range(start, min(start + size, len(totals))) for start in range(0, len(totals), size))
    return [max(part, key=totals.__getitem__) for part in parts]


def unit_of(count: int) -> tuple[str, int]:
    """The unit that a number of bytes is told in, and its size."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return unit, scale
    return "B", 1


def formatted(count: int) -> str:
    """Bytes for a person: ``"1.5 GiB"``."""
    unit, scale = unit_of(count)
    return f"{count / scale:.1f} {unit}"


def loss_of(outputs: Any) -> Tensor:
    """The scalar among a step's outputs that gradients are taken of.

    Raises:
        InputError: there is none.
    """
    for item in tree_leaves(outputs):
        if isinstance(item, Tensor) and item.dim() == 0 and item.requires_grad:
            return item
    raise InputError(
        "the model returns no scalar with a gradient: pass labels, or give fxseek.compile a loss="
    )


@contextlib.contextmanager
def following(step: Step, tracker: Tracker) -> Iterator[None]:
    """Let a run of a step tell the tracker its stages and what they hand on."""
    module, kept = step.module, step.program.whole
    constants = {item.node for item in step.program.gathered}
    inside = contextlib.ExitStack()

    def begin(name: str, stage: nn.Module, arguments: tuple[Any, ...]) -> None:
        tracker.stage(name)
        if isinstance(stage, Learn):
            env, selection = arguments
            tracker.label((x for n, x in env.values.items() if n in kept), "K/V")
            tracker.label((x for n, x in env.values.items() if n in constants), "constants")
            tracker.label([*env.rows.values(), *vars(selection).values()], "constants")
            inside.enter_context(tracker.kinds_kept())
            inside.enter_context(saved_as_activations(tracker))

    def end(stage: nn.Module, *_: Any) -> None:
        if isinstance(stage, Learn):
            inside.close()

    with inside, contextlib.ExitStack() as hooks:
        for name, stage in module.named_children():
            hooks.enter_context(stage.register_forward_pre_hook(partial(begin, name)))
            hooks.enter_context(stage.register_forward_hook(end, always_call=True))
        yield


def saved_as_activations(tracker: Tracker) -> contextlib.AbstractContextManager[Any]:
    """What autograd saves meanwhile counts as activations."""

    def pack(tensor: Tensor) -> Tensor:
        tracker.label([tensor], "activations")
        return tensor.detach()  # itself would keep an operation that saves its result alive

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed)


def module_tensors(model: nn.Module) -> Sequence[Tensor]:
    """Parameters and buffers, and the tensors that a quantised parameter carries with it."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in list(found):
        found.extend(_carried(parameter, 2))
    return found


def _carried(holder: object, depth: int) -> Iterator[Tensor]:
    for value in getattr(holder, "__dict__", {}).values():
        if isinstance(value, Tensor):
            yield value
        elif depth and not isinstance(value, nn.Module):
            yield from _carried(value, depth - 1)
