"""Where Dynamo (torch 2.11 to 2.14) has no way to be told: settings and patches, for a capture.

A patch is put back after the last capture under way. Where another release has no such class or
method, it is left out: what it settles is then what Dynamo itself makes of it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import warnings
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxseek.capture.alike import overrides
from fxseek.capture.stand_ins import StandIn, StandIns

__all__ = ["capture_settings", "quiet", "resting"]


@contextlib.contextmanager
def capture_settings(
    *, captures: int, first: bool = False, once: CodeType | None = None
) -> Iterator[None]:
    """Settings of the capture: no duck shaping, `warning_once` ignored, and `_settlements`.

    A module is captured for at most so many kinds of batches (`captures`). `optimize_ddp` would
    split the graph at the buckets of a DistributedDataParallel around the module. Duck shaping
    gives two dimensions of equal length one symbol, so a batch as large as the sequence would be
    taken for it. A module's hooks are guarded, so that one that is added or removed later counts;
    by default Dynamo takes it that nobody does. An integer of a module that changes from step to
    step, such as a counter, becomes an input of the graph; by default each value is captured anew.
    Modules that FSDP has sharded are guarded as others are, so that parameters may be frozen. The
    settings live in private config modules. transformers adds `warning_once` to `logging.Logger`;
    Dynamo breaks on Logger methods unless they are listed. Torch 2.11 then fails to write that
    setting to a log of its own, and says so at length. A parameter that a forward makes, as PEFT's
    DoRA does of a GPT-2 layer's transposed weight, is captured; by default Dynamo refuses it. In a
    `first` call, which captures, the garbage collector rests. `once`: the code of a function that
    is captured and never called again, so that its capture needs no guards.
    """
    from torch.fx.experimental import _config as fx_config

    functions: set[Any] = torch._dynamo.config.ignore_logging_functions
    warning_once: Any = getattr(logging.Logger, "warning_once", None)
    added = warning_once is not None and warning_once not in functions
    if added:
        functions.add(warning_once)
    metrics = logging.getLogger("torch._dynamo.metrics_context")
    told, metrics.disabled = metrics.disabled, True
    made: dict[str, Any] = {}
    if hasattr(torch._dynamo.config, "graph_break_on_nn_param_ctor"):
        made["graph_break_on_nn_param_ctor"] = False
    before, _CAPTURED.once = _CAPTURED.once, once
    try:
        with (
            torch._dynamo.config.patch(
                optimize_ddp=False,
                recompile_limit=captures,
                skip_nnmodule_hook_guards=False,
                allow_unspec_int_on_nn_module=True,
                skip_fsdp_guards=False,
                fake_tensor_cache_enabled=False,
                run_gc_after_compile=False,
                **made,
            ),
            fx_config.patch(use_duck_shape=False),  # pyright: ignore[reportAttributeAccessIssue]
            _SETTLED.on(_settlements),
            resting() if first else contextlib.nullcontext(),
        ):
            yield
    finally:
        _CAPTURED.once = before
        metrics.disabled = told
        if added:
            functions.discard(warning_once)


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """Let the garbage collector rest, if it is on.

    It finds next to nothing in the millions of objects of a capture, and takes a sixth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def quiet(batch: dict[str, Any]) -> Iterator[None]:
    """Dynamo looks at an input's .grad; torch warns about that of an alias of a trained input."""
    with warnings.catch_warnings():
        if any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(batch)):
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a")
        yield


_SETTLED = StandIns()


class _Captured(threading.local):
    once: CodeType | None = None


_CAPTURED = _Captured()


def _settlements() -> Iterator[StandIn]:
    """Let Dynamo settle what is known at capture and what it asks a graph for, or gives up on.

    - A single uniform draw compared with a number that no draw reaches, as in
      ``torch.rand(1) > p`` with ``p = 0``: a layer that is dropped by chance, where the chance is
      none. 0 counts as a number that no draw reaches (one in 2**24 does).
    - A method of a string that is an attribute of a constant: ``type(x).__module__.startswith``.
    - ``x.requires_grad = value`` where that is its value already.
    - Guards, where nothing will ask them (`capture_settings`): torch's own filter of guards builds
      all of them first, a fifth of what a capture takes.

    Dynamo has no setting for any of them. A method that a release lacks is left out: it may have
    been renamed, or the release settles this itself.
    """
    from torch._dynamo import guards, variables
    from torch._dynamo.variables import builtin, misc
    from torch._dynamo.variables.constant import ConstantVariable

    def comparison(ask: Any) -> Any:
        def as_python_constant(self: Any) -> Any:
            settled = _settled_comparison(self.proxy.node)
            return ask(self) if settled is None else settled

        return as_python_constant

    def text_method(ask: Any) -> Any:
        def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
            if self.is_python_constant() and isinstance(self.as_python_constant(), str):
                text = ConstantVariable.create(self.as_python_constant())
                return text.call_method(tx, name, args, kwargs)
            return ask(self, tx, name, args, kwargs)

        return call_method

    def assignment(ask: Any) -> Any:
        def set_attribute(self: Any, tx: Any, owner: Any, name: Any, value: Any) -> Any:
            if (
                isinstance(owner, variables.TensorVariable)
                and name.is_python_constant()
                and name.as_python_constant() == "requires_grad"
                and value.is_python_constant()
                and value.as_python_constant() is owner.requires_grad
            ):
                return value
            return ask(self, tx, owner, name, value)

        return set_attribute

    def guarding(build: Any) -> Any:
        def build_guards(self: Any, wanted: Any, *args: Any, **kwargs: Any) -> Any:
            once = _CAPTURED.once
            unasked = once is not None and any(x is once for x in args)
            return build(self, [] if unasked else wanted, *args, **kwargs)

        return build_guards

    known: list[StandIn] = [
        (variables.TensorVariable, "as_python_constant", comparison),
        (misc.GetAttrVariable, "call_method", text_method),
        # torch 2.13, and before
        (getattr(builtin, "SetAttrBuiltinVariable", None), "_call_setattr", assignment),
        (getattr(builtin, "BuiltinVariable", None), "call_setattr", assignment),
        (guards.CheckFunctionManager, "build_guards", guarding),
        *overrides(),
    ]
    for owner, name, make in known:
        if hasattr(owner, name):
            yield owner, name, make


_SWAPPED = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}


def _settled_comparison(node: fx.Node) -> bool | None:
    """What a comparison of a uniform draw with a number gives whatever is drawn, or None."""
    name = _name(node)
    if name not in _SWAPPED or len(node.args) != 2:
        return None
    draw, bound = node.args
    if getattr(bound, "target", None) is torch.rand:
        draw, bound, name = bound, draw, _SWAPPED[name]
    if not isinstance(draw, fx.Node) or draw.target is not torch.rand or "out" in draw.kwargs:
        return None
    if not all(_name(user) in _SWAPPED for user in draw.users):
        return None  # it may have been written to
    drawn = draw.meta.get("example_value")
    if isinstance(bound, fx.Node):  # a number that has changed since the last capture
        bound = bound.meta.get("example_value")
    if not isinstance(bound, (int, float, torch.SymFloat)) or isinstance(bound, bool):
        return None
    if drawn is None or drawn.numel() != 1:
        return None
    if bound <= 0:  # of a symbol, this is a guard
        return name in ("gt", "ge")
    if bound >= 1:
        return name in ("lt", "le")
    return None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
