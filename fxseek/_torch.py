"""The one place where fxseek touches torch that has no public spelling.

Each function says which private name it uses and why no public one serves. Nothing here
imports the rest of fxseek, so that `fxseek.passes` may use it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor


def size_expression(size: int | torch.SymInt) -> sympy.Expr:
    """The sympy expression of one dimension (a plain int gives a sympy Integer).

    `SymInt.node.expr` is what every in-tree pass reads; there is no public accessor.
    """
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


def size_hint(size: int | torch.SymInt) -> int:
    """The length that the example input had (`SymNode.hint`; int() would add a guard)."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint)
    return int(size)


def symbol_hints(size: torch.SymInt) -> dict[sympy.Symbol, int]:
    """Example lengths of the symbols in `size`, from its shape environment."""
    env = size.node.shape_env
    hints = getattr(env, "backed_var_to_val", None) or env.var_to_val
    found: dict[sympy.Symbol, int] = {}
    for symbol in size.node.expr.free_symbols:
        if symbol in hints:
            found[symbol] = int(hints[symbol])
    return found


_LAST_KEY = re.compile(r"""\[(?:'([^']*)'|"([^"]*)"|(\d+))\]$""")


def source_name(node: fx.Node) -> str | None:
    """The argument a Dynamo placeholder came from, e.g. ``"labels"`` for ``L['kwargs']['labels']``.

    Dynamo records it in ``meta["grapharg"].source`` only. Parameters and buffers answer None.
    """
    path = source_path(node)
    if path is None or is_module_state(node):
        return None
    match = _LAST_KEY.search(path)
    if match is None:
        return None
    return next(group for group in match.groups() if group is not None)


def source_path(node: fx.Node) -> str | None:
    """Dynamo's full source expression of a placeholder, or None."""
    graph_argument = node.meta.get("grapharg")
    source = getattr(graph_argument, "source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def is_module_state(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of a module."""
    path = source_path(node) or ""
    return (
        "_parameters[" in path
        or "_buffers[" in path
        or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
    )


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for two (fake) tensors exactly when one is a view of the other's memory.

    Fake storages have no data pointer; `_cdata` is the storage's identity.
    """
    return tensor.untyped_storage()._cdata


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no values (`FakeTensor` is public nowhere)."""
    return isinstance(tensor, FakeTensor)


def outer_saved_tensor_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The saved-tensor hooks that are in force, as (pack, unpack).

    Only the innermost pair runs, so a meter has to pass tensors on to the pair that it hides
    (`save_on_cpu`, another meter); torch has no public way to ask for it.
    """
    autograd: Any = vars(torch._C)["_autograd"]
    return autograd._top_saved_tensors_default_hooks(False)


@contextlib.contextmanager
def capture_settings(*, first: bool = False) -> Iterator[None]:
    """Settings of the capture: no duck shaping, and `warning_once` ignored.

    Duck shaping gives two dimensions of equal length one symbol, so a batch as large as the
    sequence would be taken for it. `use_duck_shape` lives in a private config module.
    transformers adds `warning_once` to `logging.Logger`; Dynamo breaks on Logger methods
    unless they are listed. In a `first` call, which captures, the garbage collector rests: it
    finds next to nothing in Dynamo's millions of objects and takes a sixth of the time.
    """
    from torch.fx.experimental import _config as fx_config

    functions: set[Any] = torch._dynamo.config.ignore_logging_functions
    warning_once: Any = getattr(logging.Logger, "warning_once", None)
    added = warning_once is not None and warning_once not in functions
    if added:
        functions.add(warning_once)
    resting = first and gc.isenabled()
    if resting:
        gc.disable()
    try:
        with fx_config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
            yield
    finally:
        if resting:
            gc.enable()
        if added:
            functions.discard(warning_once)


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """`torch._dynamo.maybe_mark_dynamic`: dynamic, but specialising is no error of Dynamo's.

    The public `mark_dynamic` raises a constraint violation that names symbols, not the
    model's source; a length that was specialised is reported by fxseek after the capture.
    """
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_call(model: torch.nn.Module) -> Callable[..., Any] | None:
    """What `nn.Module.__call__` runs in place of `_call_impl` (filled by `Module.compile`)."""
    return model._compiled_call_impl


def set_compiled_call(model: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Fill or empty the slot of `Module.compile`.

    The slot keeps forward and its signature as they are and is dropped by `__getstate__`,
    so copies and pickles never call into this model. `Module.compile` itself can only put
    `torch.compile` there, without a way to choose the original for eval.
    """
    if call is None:
        # the class attribute None shows again, and __dict__ is what it was
        model.__dict__.pop("_compiled_call_impl", None)
    else:
        model._compiled_call_impl = call


def eager_call(model: torch.nn.Module) -> Callable[..., Any]:
    """The module's ordinary call: forward with its hooks."""
    return model._call_impl


def translated(error: Exception, model: str) -> Exception:
    """An exception of Dynamo as one of fxseek's, with the reason and the user's line.

    Dynamo wraps what a backend raises in `BackendCompilerFailed`; other errors (the model's own)
    are returned as they are.
    """
    from torch._dynamo.exc import TorchDynamoException

    from fxseek.errors import CaptureError, FxseekError

    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "inner_exception", None)
        if isinstance(inner, FxseekError):
            return inner
        if isinstance(cause, FxseekError):
            return cause
        cause = cause.__cause__
    if isinstance(error, TorchDynamoException):
        stack = getattr(error, "real_stack", None)
        line = ""
        if stack:
            frame = stack[-1]
            line = f" at {frame.filename}:{frame.lineno}: {frame.line}"
        reason = str(error).strip()
        return CaptureError(
            f"Dynamo could not capture {model} as one graph{line}\n{reason}\n"
            "fxseek needs the whole forward as one graph. Remove the construct at that line "
            "(data-dependent Python control flow, printing, calls into untraceable libraries), "
            "or keep that part out of the compiled module."
        )
    return error
