"""`fxseek.check_gradients`: a compiled model against masked full backprop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxseek.capture.sharded import refuse_unreduced
from fxseek.capture.step import SeekStep, compiled_step
from fxseek.capture.trl import traceable_log_probs
from fxseek.errors import GradientMismatch, InputError
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import Reference, masked_backprop
from fxseek.inspect.state import as_before, state_of
from fxseek.passes.facts import Facts, Rows, example, module_path, needs_grad, tensors_of, where
from fxseek.passes.rules import Full, Plan, RowsOf, called, operation, wants_of
from fxseek.program import Program
from fxseek.reports.step import StepReport

__all__ = ["GradientCheck", "check_gradients"]

_TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 1e-1,
    torch.float16: 3e-2,
}


_HAS_LOSS = (
    "loss= is for a call that leaves the loss to its caller, without labels or with "
    "fused_lm_head=True; this one has the model's own, or that of fxseek.compile: leave loss= out"
)


@dataclass(frozen=True)
class GradientCheck:
    """How far the gradients are from masked full backprop.

    `error`: the largest difference of any entry, relative to the largest entry of that
    parameter's reference gradient; `parameter`: where; `tolerance`: what was allowed.
    """

    error: float
    parameter: str
    tolerance: float


def check_gradients(
    model: nn.Module,
    /,
    tolerance: float | None = None,
    loss: Any = None,  # a Callable; a batch that is a dict[str, Tensor] is no mistake
    **batch: Any,
) -> GradientCheck:
    """Compare one step's gradients with masked full backprop of the same selection.

    The model's gradients, random state and step count are put back. The reference runs the
    uncompiled model with module hooks and shares no code with the passes. Of a model that FSDP2 has
    sharded, gradients are averages over the processes, and all processes must call this.

    Args:
        model: a model compiled by `fxseek.compile`, in training mode.
        tolerance: largest relative error; by default by the lowest precision that the model
            computes in (float64 1e-9, float32 1e-4, float16 3e-2, bfloat16 1e-1).
        loss: ``loss(outputs, batch)``, for a call that leaves the loss to its caller: one without
            labels, or with TRL's ``fused_lm_head=True``, where the default is the mean negative
            log-likelihood.
        batch: the arguments of a training step.

    Raises:
        GradientMismatch: the error is above the tolerance.
        InputError: the model is not compiled, or is in eval mode; has hooks that may change weights
            in a backward; the batch cannot be trained on; the call returns no loss, and ``loss`` is
            not given; it is given and the model computes its own; dropout is on (prefill and learn
            draw separately, so that exactness is stated with dropout off); or the error is above
            the tolerance and the reference can't tell, since keys or values of all tokens are made
            from a parameter by a plain function, whose result no module's hook sees.
        CaptureError, GraphError: as the training step would.
    """
    step = compiled_step(model)
    refuse_unreduced(model)
    if not model.training:
        raise InputError("check_gradients needs training mode: call model.train() first")
    noisy = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training
    ]
    if noisy:
        raise InputError(
            f"dropout is on in {noisy[0]!r} (and {len(noisy) - 1} more): gradients are exact with "
            "dropout off. Set its p to 0 for the check (and leave the model in training mode)."
        )
    fused = bool(batch.get("fused_lm_head"))
    if fused:
        loss = loss or _likelihood
    elif loss is not None and (step.config.loss is not None or step.calls.has_labels(batch)):
        raise InputError(_HAS_LOSS)
    with _put_back(model, step) as restore:
        output = model(**batch)
        last, latest = step.recorder.last, step.recorder.latest
        assert last is not None and latest is not None
        program = latest.program
        if loss is not None and not fused and program.structure.losses:
            raise InputError(_HAS_LOSS)
        (loss or _own_loss)(output, batch).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for parameter in model.parameters():
            parameter.grad = None
        restore()
        if loss is None:
            reference = _reference(model, step, program, last, batch)
        else:
            reference = _of_outside(model, program, last, batch, loss, fused=fused)
    allowed = _tolerance(program) if tolerance is None else tolerance
    worst = compare(found, reference.gradients)
    if not worst.error <= allowed:
        _refuse_hidden_rows(program)
        raise GradientMismatch(
            f"the gradient of {worst.name!r} differs from masked full backprop by "
            f"{worst.error:.3g} relative (allowed {allowed:.3g}). If the model draws random "
            "numbers in forward, switch that off for the check; otherwise this is a defect of "
            "fxseek: please report it with fxseek.explain(model, **batch)."
        )
    return GradientCheck(worst.error, worst.name, allowed)


def _reference(
    model: nn.Module, step: SeekStep, program: Program, last: StepReport, batch: dict[str, Any]
) -> Reference:
    """Masked full backprop of what the step selected."""
    structure, virtual = program.structure, program.facts.sizes.virtual
    tokens = None if step.counted.place is None else last.tokens
    loss = step.config.loss
    restricted = bool(structure.losses)
    if loss is None and restricted and not structure.unrestricted:
        # the model's own, written by hand
        with suppress(InputError):
            return masked_backprop(
                model, batch, last.selected, weights=last.weights, virtual=virtual
            )
    # Something else is a part of the loss, or a caller's own: its cross-entropies over the selected
    # positions, wherever they are computed.
    with _SelectedCrossEntropy(last) if restricted else nullcontext():
        return masked_backprop(
            model, batch, last.selected, loss=loss or _own_loss, virtual=virtual, tokens=tokens
        )


def _likelihood(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    return -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)


_PER_TOKEN = ("log_probs", "entropy")
"""What of TRL's output has gradient, each [batch, tokens] or, shifted, a token fewer."""


def _of_outside(
    model: nn.Module,
    program: Program,
    last: StepReport,
    batch: dict[str, Any],
    loss: Callable[[Any, Mapping[str, Any]], Tensor],
    *,
    fused: bool,
) -> Reference:
    """Masked full backprop of a loss outside; log-probabilities have their positions' weights."""

    def weighed(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        mask = outputs.label_mask
        chosen, weights = (x[:, : mask.shape[1]] for x in last.by_position())
        kept = mask & chosen
        weights = weights.double() * kept * mask.sum() / kept.sum().clamp(min=1)
        for name in _PER_TOKEN:
            x = getattr(outputs, name)
            if x is not None and x.requires_grad:  # also for what TRL made of it, its mean loss
                x.register_hook(lambda gradient: gradient * weights.to(gradient.dtype))
        return loss(outputs, batch)

    virtual = program.facts.sizes.virtual
    with traceable_log_probs():  # of the model's precision, where TRL's are of float32
        return masked_backprop(
            model, batch, last.selected, loss=weighed if fused else loss, virtual=virtual
        )


def _own_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a call returns: alone, first of a tuple, or named.

    Raises:
        InputError: it returns none.
    """
    if isinstance(outputs, (tuple, list)):
        loss = outputs[0] if outputs else None
    elif isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    else:
        loss = outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(
            f"the call with {', '.join(batch)} returned no loss, alone, first of a tuple, or as "
            "`loss`. Pass labels, or loss= to check_gradients if the call leaves the loss to its "
            "caller, or compile with the one that it returns elsewhere, such as "
            "fxseek.compile(model, ..., loss=lambda outputs, batch: outputs[1])."
        )
    return loss


class _Terms(NamedTuple):
    """Losses of all positions, and what each counts for in their mean (the class weight).

    `counted`: each counts as 1, and the selection's weights are made for that.
    """

    losses: Tensor
    masses: Tensor
    counted: bool = True


_SCALING = ("Mul", "Div", "Neg", "ToCopy", "MaskedFill", "Where")
_MOVING = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone")


class _SelectedCrossEntropy(TorchFunctionMode):
    """Replaces a token cross-entropy by its weighted mean over selected labelled positions.

    And a sum (or a mean) of such terms, each scaled by a constant, by that of the selected ones.
    """

    def __init__(self, report: StepReport) -> None:
        super().__init__()
        self.report = report
        self.terms: list[_Terms] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            bound = inspect.signature(F.cross_entropy).bind(*args, **kwargs)
            bound.apply_defaults()
            terms = self._terms(bound.arguments)
            reduction = bound.arguments["reduction"]
            if terms is None:
                return func(*args, **kwargs)
            if reduction != "none":
                return self._selected(terms, torch.ones_like(terms.losses), reduction)
            self.terms.append(terms)
            return terms.losses.clone()  # which may be written to
        if func is torch.where and len(args) == 3 and self._detaches_terms(*args[1:]):
            return args[1]  # the hook of a module that returns them
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("sum", "mean") and isinstance(result, Tensor):
            terms = self._scaled(result) if result.dim() == 0 else None
            if terms is not None and args[0].numel() == terms.losses.numel():
                (scale,) = torch.autograd.grad(result, terms.losses, retain_graph=True)
                return self._selected(terms, scale, "sum")
        return result

    def _terms(self, call: dict[str, Any]) -> _Terms | None:
        """The terms of a call of `F.cross_entropy`; None where they are not one for each token."""
        target, report = call["target"], self.report
        if call["size_average"] is not None or call["reduce"] is not None:
            return None
        probabilities = target.is_floating_point()
        classes = call["input"].shape[0 if call["input"].dim() == 1 else 1]
        rows, count = report.selected.shape[0], target.numel() // (classes if probabilities else 1)
        if count not in (rows * report.tokens, rows * (report.tokens - 1)):
            return None
        losses = F.cross_entropy(**{**call, "reduction": "none"})
        if probabilities:
            return _Terms(losses, torch.ones_like(losses))
        labelled = target != call["ignore_index"]
        if call["weight"] is None:
            return _Terms(losses, labelled)
        masses = call["weight"][target.where(labelled, 0)]
        return _Terms(losses, masses.where(labelled, 0), counted=False)

    def _selected(self, terms: _Terms, scale: Tensor, reduction: str) -> Tensor:
        """The weighted mean over selected positions, or that times the mass of all."""
        shape, length = terms.losses.shape, terms.losses.numel() // len(self.report.selected)
        chosen, weights = (x[:, :length].reshape(shape) for x in self.report.by_position())
        masses = terms.masses * scale.abs()
        total = (terms.losses * scale * weights).masked_fill(~chosen, 0).sum()
        mass = (masses if terms.counted else masses * weights)[chosen].sum()
        mean = total / mass.where(mass != 0, 1)
        return mean * masses.sum() if reduction == "sum" else mean

    def _scaled(self, value: Tensor) -> _Terms | None:
        """The terms that a value is made of by constant factors alone, as autograd recorded it."""
        of_terms = {x.losses.grad_fn: x for x in self.terms if x.losses.grad_fn is not None}
        node, last, scaled = value.grad_fn, True, False
        while node is not None and node not in of_terms:
            name = node.name()
            summed = last and name.startswith(("Sum", "Mean"))
            is_scale = name.startswith(_SCALING)
            if not summed and not is_scale and not name.startswith(_MOVING):
                return None
            scaled = scaled or is_scale
            before = [x for x, _ in node.next_functions if x is not None]
            node, last = before[0] if len(before) == 1 else None, False
        if node is None:
            return None
        terms = of_terms[node]
        return terms._replace(counted=terms.counted and not scaled)

    def _detaches_terms(self, x: Any, other: Any) -> bool:
        tensors = isinstance(x, Tensor) and isinstance(other, Tensor)
        return tensors and x.data_ptr() == other.data_ptr() and self._scaled(x) is not None


def _refuse_hidden_rows(program: Program) -> None:
    """Say where the reference can't cut a gradient that the step cuts.

    Raises:
        InputError: rows that a parameter makes reach an operation that reads all of them, and are
            the result of no module on the way.
    """
    facts = program.facts
    for node in program.graph.nodes:
        plan = facts.plans.get(node)
        if not isinstance(plan, Plan) or not isinstance(plan.rows, Rows):
            continue
        if operation(node) == "token_statistics":  # weighed by `_of_outside`
            continue
        if not any(needs_grad(x) and not facts.token_sized(x) for x in node.all_input_nodes):
            continue
        reader = _reader_of_all(node, facts)
        if reader is not None:
            raise InputError(
                f"check_gradients can't tell for this model: {called(node)} in "
                f"{module_path(node) or 'the model'} makes rows from a parameter, and "
                f"{called(reader)} reads those of all tokens. No module has them as its result, "
                "so that the module hooks of the reference can't cut gradients where masked "
                f"backprop does ({where(node)}). Make them by a module (torch.nn.Linear) for the "
                "check, or compare a model without this operation."
            )


def _reader_of_all(start: fx.Node, facts: Facts) -> fx.Node | None:
    """What reads a value of all tokens that per-token operations of one module make of `start`."""
    seen: set[fx.Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if user.op == "output" or not needs_grad(user) or not _same_module(node, user):
                continue
            plan = facts.plans.get(user)
            wanted = [w.node for w in wants_of(plan) if _of_all(w, facts)] if plan else [node]
            if node in wanted:
                return user
            queue.append(user)
    return None


def _of_all(want: Any, facts: Facts) -> bool:
    """Whether an operand is read at all tokens, or at others' places: a mask's rows, of keys'."""
    if not isinstance(want, RowsOf):
        return isinstance(want, Full)
    return facts.rows.get(want.node) != want.rows.shift(example(want.node).dim() - want.rank)


def _same_module(node: fx.Node, user: fx.Node) -> bool:
    """Whether a value is read within the module that makes it, before its hook."""
    innermost = list(node.meta.get("nn_module_stack") or ())[-1:]
    return all(module in (user.meta.get("nn_module_stack") or ()) for module in innermost)


def _tolerance(program: Program) -> float:
    """By the lowest precision among the values that carry gradient."""
    dtypes = {
        tensor.dtype
        for node in program.graph.nodes
        for tensor in tensors_of(example(node))
        if tensor.requires_grad and tensor.dtype in _TOLERANCES
    }
    return max((_TOLERANCES[dtype] for dtype in dtypes), default=1e-4)


@contextmanager
def _put_back(model: nn.Module, step: SeekStep) -> Iterator[Callable[[], None]]:
    """Puts gradients and counts back in the end; the model's state then, and when it is called."""
    count, last = step.recorder.step, step.recorder.last
    restore = state_of(model)
    try:
        with as_before(model):
            yield restore
    finally:
        restore()
        step.recorder.step, step.recorder.last = count, last
