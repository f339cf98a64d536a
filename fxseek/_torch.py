"""The one place where fxseek touches torch that has no public spelling.

Each function says which private name it uses and why no public one serves. Nothing here
imports the rest of fxseek, so that `fxseek.passes` may use it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.attention import SDPBackend

# What Dynamo raises; its errors are public nowhere.
CaptureFailure = TorchDynamoException
CapturedTooOften = FailOnRecompileLimitHit

_RESUMED = "torch_dynamo_resume_in_"  # how Dynamo names the rest of a function behind a break


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
    return {x: int(hints[x]) for x in size.node.expr.free_symbols if x in hints}


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
    """Dynamo's full source expression of a placeholder, or None.

    It is noted when it is asked for first: Dynamo forgets it at the end of a capture.
    """
    noted = "fxseek: source"
    if noted not in node.meta:
        name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", None)
        node.meta[noted] = name() if callable(name) else name
    return node.meta[noted]


def is_module_state(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of a module."""
    path = source_path(node) or ""
    return (
        "_parameters[" in path
        or "_buffers[" in path
        or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
    )


def is_buffer(node: fx.Node) -> bool:
    """Whether a placeholder is a buffer of a module."""
    given = given_tensor(node)
    return "_buffers[" in (source_path(node) or "") and not isinstance(given, torch.nn.Parameter)


def given_tensor(node: fx.Node) -> torch.Tensor | None:
    """The very tensor that a placeholder was captured with; None for a fake one.

    Memory that two inputs share shows in the tensors themselves, and Dynamo keeps these in
    ``meta["grapharg"].example`` only.
    """
    value = getattr(node.meta.get("grapharg"), "example", None)
    return value if isinstance(value, torch.Tensor) and not is_fake(value) else None


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for two (fake) tensors exactly when one is a view of the other's memory.

    Fake storages have no data pointer; `_cdata` is the storage's identity.
    """
    return tensor.untyped_storage()._cdata


def version(tensor: torch.Tensor) -> int:
    """How often the tensor's memory was written to (`Tensor._version`); views share the count.

    Autograd compares these counts for what it saves itself, and has no public name for them.
    """
    return tensor._version


def versions(values: Iterable[Any]) -> tuple[int, ...]:
    """The `version` of each of the tensors among the values."""
    return tuple(version(x) for x in values if isinstance(x, torch.Tensor) and not x.is_inference())


def widest(device: torch.device) -> torch.dtype:
    """The floating-point type to add up in: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of torch.compile's (`FakeTensor` is public nowhere)."""
    return isinstance(tensor, FakeTensor)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor is neither fake nor on the meta device."""
    return not (tensor.is_meta or is_fake(tensor))


def faked(inputs: Sequence[Any]) -> tuple[AbstractContextManager[Any], tuple[Any, ...]]:
    """A mode that computes shapes without values, and the inputs as tensors of it.

    Parameters of modules are taken as they are. Numbers on the CPU keep their value: a graph that
    Dynamo has captured for several values of a float takes it as a tensor, and asks for its item.
    """
    mode = fake_mode()

    def fake(x: torch.Tensor) -> torch.Tensor:
        number = x.dim() == 0 and x.device.type == "cpu"
        return mode.fake_tensor_converter.from_real_tensor(mode, x, make_constant=number)

    fakes = [fake(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    return mode, tuple(fakes)


def nn_functions() -> Any:
    """The module of the built-in functions behind `torch.nn.functional`.

    A graph may call either; `torch._C` has no stub for this one.
    """
    return vars(torch._C)["_nn"]


def qualified_name(target: Any) -> str | None:
    """``"namespace::name"`` of an operation in `torch.ops`, and None of anything else.

    The classes of operations, and the name of one without its overload, have no public spelling.
    """
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"{target.namespace}::{target.name()}"
    return None


def mutable_operation(target: Any) -> str | None:
    """The name of an operation in `torch.ops` that writes to its arguments; None of any other.

    Only its `_schema` tells.
    """
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None and schema.is_mutable else None


def fake_mode() -> FakeTensorMode:
    """torch.compile's mode (public nowhere): shapes, strides and storages without memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def symbolic_sizes() -> AbstractContextManager[None]:
    """All operations take symbolic sizes, as for Dynamo's examples (public nowhere)."""
    return enable_python_dispatcher()


def sdpa_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **options: Any,
) -> SDPBackend:
    """Which kernel `scaled_dot_product_attention` takes for tensors like these on the CPU.

    It asks `_fused_sdp_choice`, as no public function does, with real tensors of few tokens: for
    fake ones the answer is always the plain kernel, and the number of tokens does not matter.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    def short(x: torch.Tensor) -> torch.Tensor:
        tokens = 4 if x.shape[-2] == query.shape[-2] else 8
        real = torch.zeros(*x.shape[:-2], tokens, x.shape[-1], dtype=x.dtype)
        return real.requires_grad_(x.requires_grad)

    with _disable_current_modes(), torch._C.DisableTorchFunction():
        copies = [short(x) for x in (query, key, value)]
        if attn_mask is not None:
            rows, columns = copies[0].shape[-2], copies[1].shape[-2]
            shape = [
                size if size == 1 else few
                for size, few in zip(attn_mask.shape[-2:], (rows, columns), strict=True)
            ]
            options["attn_mask"] = torch.zeros(*attn_mask.shape[:-2], *shape, dtype=attn_mask.dtype)
        return SDPBackend(torch.ops.aten._fused_sdp_choice(*copies, **options))


def is_item(operation: Any) -> bool:
    """Whether a dispatched operation reads a number out of a tensor (`Tensor.item`, `bool`)."""
    return operation is torch.ops.aten._local_scalar_dense.default


def outer_saved_tensor_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The saved-tensor hooks that are in force, as (pack, unpack).

    Only the innermost pair runs, so a meter has to pass tensors on to the pair that it hides
    (`save_on_cpu`, another meter); torch has no public way to ask for it.
    """
    autograd: Any = vars(torch._C)["_autograd"]
    return autograd._top_saved_tensors_default_hooks(False)


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """`torch._dynamo.maybe_mark_dynamic`: dynamic, but specialising is no error of Dynamo's.

    The public `mark_dynamic` raises a constraint violation that names symbols, not the
    model's source; a length that was specialised is reported by fxseek after the capture.
    """
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def global_hooks() -> tuple[Any, ...]:
    """The hooks that run for every module, which no guard of Dynamo's watches, and their options.

    Those that `torch.nn.modules.module.register_module_forward_hook` and its kin add to tables
    that are public nowhere.
    """
    tables = vars(torch.nn.modules.module)
    return tuple((name, *tables[name].items()) for name in _HOOK_TABLES if tables.get(name))


_HOOK_TABLES = (
    "_global_forward_pre_hooks", "_global_forward_hooks", "_global_forward_hooks_with_kwargs",
    "_global_forward_hooks_always_called", "_global_backward_pre_hooks", "_global_backward_hooks",
)  # fmt: skip


def backward_hooked(model: torch.nn.Module) -> Iterator[str]:
    """Names of the modules with hooks on their backward, for which `nn.Module` has no accessor."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            yield name


def accumulation_hooked(tensor: torch.Tensor) -> bool:
    """Whether `register_post_accumulate_grad_hook`, which has no accessor, has added a hook."""
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


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


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` has been there (`OptimizedModule` is private)."""
    wrapped = isinstance(model, torch._dynamo.eval_frame.OptimizedModule)
    return wrapped or compiled_call(model) is not None


def eager_call(model: torch.nn.Module) -> Callable[..., Any]:
    """The module's ordinary call: forward with its hooks."""
    return model._call_impl


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread; no public call tells."""
    return torch._C._current_graph_task_id() != -1


def keeps_graph() -> bool:
    """Whether the running backward was given ``retain_graph=True``; no public call tells."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


def saving_inputs_only() -> AbstractContextManager[Any]:
    """AOTAutograd's partitioner saves a graph's inputs alone while this context compiles it.

    The memory budget is a documented setting of torch.compile that lives in a private module.
    """
    from torch._functorch import config

    return config.patch(activation_memory_budget=0.0)


def continues(graph: fx.Graph) -> bool:
    """Whether Dynamo captured the graph behind a break, in the middle of a function.

    Nothing but the name of the function that Dynamo resumes in, in the nodes' traces, tells.
    """
    return any(f"in {_RESUMED}" in (node.stack_trace or "") for node in graph.nodes)


def splits_for_ddp() -> bool:
    """Whether the graph is a part of one that Dynamo splits at a DistributedDataParallel's buckets.

    The wrapper that is running, which Dynamo asks for too, is public nowhere.
    """
    from torch.nn.parallel import DistributedDataParallel

    optimising = torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
    return optimising and DistributedDataParallel._get_active_ddp_module() is not None


def takes_cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
) -> bool:
    """Whether `scaled_dot_product_attention` takes cuDNN's kernel for such tensors on CUDA.

    `can_use_cudnn_attention` tells whether it could, and not whether torch prefers it.
    """
    grouped = query.shape[1] != key.shape[1]
    chosen = torch.ops.aten._fused_sdp_choice(
        query, key, value, is_causal=is_causal, enable_gqa=grouped
    )
    return chosen == SDPBackend.CUDNN_ATTENTION.value


def failed_capture(error: BaseException) -> bool:
    """Whether an exception ended a capture or a compilation, and not a step that was running.

    Most that Dynamo lets through are its own or carry the `real_stack` of the code that it read.
    Others come from deep inside torch; then its `convert_frame` is among the frames.
    """
    if isinstance(error, TorchDynamoException) or getattr(error, "real_stack", None) is not None:
        return True
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__") for frame, _ in frames)
    return "torch._dynamo.convert_frame" in modules


def may_have_raised(error: Exception) -> bool:
    """Whether a capture may have ended because the code that it read raises an exception.

    Dynamo says so only of exceptions that it knows. It is not so where a backend fails, nor where
    the graph would depend on the values of a tensor.
    """
    if not isinstance(error, TorchDynamoException) or isinstance(error, BackendCompilerFailed):
        return False
    return "data-dependent" not in str(error).lower()


def translated(error: Exception, model: str) -> Exception | None:
    """An exception of a capture as one of fxseek's, with the reason and the user's line.

    Dynamo wraps what a backend raises in `BackendCompilerFailed`. For what a running step raises
    (the model's own) None.
    """
    from fxseek.errors import CaptureError, FxseekError, GraphError

    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        inner = getattr(cause, "inner_exception", None)
        if isinstance(inner, FxseekError):
            vars(cause).pop("inner_exception", None)  # each would hold the other
            return inner
        if isinstance(cause, FxseekError):
            return cause
        cause = cause.__cause__
    if not failed_capture(error):
        return None
    if isinstance(error, BackendCompilerFailed):
        inner = error.inner_exception
        return GraphError(
            f"the graph of {model} was captured, and no step could be made of it: "
            f"{type(inner).__name__}: {inner}\nThis is a defect of fxseek: please report it. "
            "fxseek.uncompile(model) gives the model its ordinary step back."
        )
    stack = getattr(error, "real_stack", None)
    line = f" at {stack[-1].filename}:{stack[-1].lineno}: {stack[-1].line}" if stack else ""
    reason = str(error).strip()
    if not isinstance(error, TorchDynamoException):
        reason = f"{type(error).__name__}: {reason}"
    told = ""
    if "branching" in reason and "rand(" in reason:
        told = (
            "The branch is drawn at random in each step, as in a layer that is dropped by "
            "chance; the graph of a step has no such branch: set that dropout to 0, or call "
            "eval() on the module. "
        )
    elif stack and "expert" in stack[-1].line:
        told = (
            "Which experts run depends on the tokens: model.set_experts_implementation("
            "'grouped_mm'), or 'batched_mm', runs all that are chosen as one operation. "
        )
    elif isinstance(error, GuardOnDataDependentSymNode):
        told = (
            "Sizes depend on the values of a tensor there. Compute that part before the call and "
            "pass what it gives: of a vision tower, the embeddings with the images in them, as "
            "inputs_embeds= in the place of input_ids, and position_ids= if they follow from the "
            "images. "
        )
    return CaptureError(
        f"Dynamo could not capture {model} as one graph{line}\n{reason}\n{told}"
        "fxseek needs the whole forward as one graph. Remove the construct at that line "
        "(data-dependent Python control flow, printing, calls into untraceable libraries), "
        "or keep that part out of the compiled module."
    )
