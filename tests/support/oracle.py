"""Masked full backprop of any eager code: a mode that marks the result of every operation.

Gradient passes the result of an operation at selected tokens alone. A hook does that, so that the
result stays the tensor it was: views stay views, and writes in place are seen by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from graphs import NodeMask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fxseek
from fxseek import _torch
from fxseek.inspect.compare import compare

IGNORED = -100


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class Marked(TorchFunctionMode):
    """In it, results of the selected tokens `kept` ([batch, kept]) alone pass gradient.

    `tokens` and the batch must differ from all other sizes. `packed`: batch × tokens in one
    dimension are row by row.
    """

    def __init__(self, kept: Tensor, tokens: int, *, packed: bool = True) -> None:
        super().__init__()
        self.mask = NodeMask(kept, tokens, packed=packed)
        self.made: dict[int, bool] = {}  # by id: whether from an input that has rows' tokens
        self.held: list[Tensor] = []  # so that no other tensor has its id

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        written = func is Tensor.__setitem__ or (name[-1:] == "_" != name[-2:-1])
        of_rows = any(map(self._of_rows, _tensors((*args, *(kwargs or {}).values()))))
        self._mark(args[0] if written else result, written, of_rows)
        return result

    def _of_rows(self, given: Tensor) -> bool:
        """Whether an operand is an input that has tokens of the rows, or made from one."""
        return self.made.get(id(given), self.mask.of_rows(given))

    def _mark(self, value: Any, written: bool, of_rows: bool) -> None:
        for tensor in _tensors(value):
            self.made[id(tensor)] = of_rows
            self.held.append(tensor)
            if written and tensor._base is not None:
                self._mark(tensor._base, False, of_rows)
            passes = self.mask(tensor, of_rows) if tensor.grad_fn is not None else None
            if passes is not None:
                tensor.register_hook(lambda slope, passes=passes: slope * passes)


def masked_gradients(
    module: nn.Module,
    logits_of: Callable[[], Tensor],
    targets: Tensor,
    kept: Tensor,
    weights: Tensor,
    *,
    packed: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the weighted mean over selected positions that have a label."""
    batch, tokens = targets.shape
    at = kept.where(kept >= 0, tokens)  # -1, a slot that is not used, has a place of its own
    weight = torch.zeros(batch, tokens + 1, dtype=torch.float64)
    weight = weight.scatter_(1, at, weights.to(torch.float64))[:, :tokens]
    chosen = torch.zeros(batch, tokens + 1).bool().scatter_(1, at, True)[:, :tokens]
    with Marked(kept, tokens, packed=packed):
        logits = logits_of()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * weight
    loss = losses.sum() / (chosen & (targets != IGNORED)).sum().clamp(min=1)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(
        loss, [p for _, p in named], allow_unused=True, materialize_grads=True
    )
    return loss.detach(), {name: g for (name, _), g in zip(named, found, strict=True)}


def assert_exact_step(
    model: nn.Module,
    loss: Tensor,
    logits_of: Callable[[], Tensor],
    targets: Tensor,
    *,
    tolerance: float = 1e-9,
    packed: bool = True,
) -> None:
    """The step that a compiled model has just run is that of masked full backprop.

    `loss`: the step's own, which is back-propagated; `targets`: [batch, tokens], shifted already.
    """
    loss.backward()
    report = fxseek.report(model)
    wanted, gradients = masked_gradients(
        model, logits_of, targets, report.selected, report.weights, packed=packed
    )
    coarse = tolerance > 1e-9  # of a model in float32
    torch.testing.assert_close(
        loss.detach(), wanted, rtol=tolerance, atol=tolerance, check_dtype=not coarse
    )
    found = compare({name: p.grad for name, p in model.named_parameters()}, gradients)
    assert found.error <= tolerance, f"gradient of {found.name} is off by {found.error:.2e}"


def assert_exact_causal(
    model: nn.Module, batch: dict[str, Tensor], *, tolerance: float = 1e-9
) -> None:
    """One step of a compiled causal model of transformers is that of masked full backprop."""
    loss = model(**batch).loss
    given = {name: x for name, x in batch.items() if name != "labels"}
    assert_exact_step(
        model,
        loss,
        lambda: _torch.eager_call(model)(**given).logits,
        F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:],
        tolerance=tolerance,
    )


BATCH, TOKENS, WIDTH, VOCAB = 5, 11, 6, 17
Body = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Embedding, a linear layer, any body, another layer, the loss. Sizes are all different."""

    count: Tensor

    def __init__(self, body: Body, layers: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.body = body
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.scale = nn.Parameter(torch.linspace(0.3, 1.2, WIDTH))
        self.layers = nn.ModuleList(layers)
        self.register_buffer("count", torch.zeros(1, WIDTH))

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.body(self, self.first(self.embed(input_ids)))
        return self.head(self.last(x).tanh())

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(input_ids)
        return {"loss": F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))}


def model_of(body: Body, *layers: nn.Module) -> Model:
    torch.manual_seed(0)
    return Model(body, layers).double().train()


def inputs_of(batch: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (batch, TOKENS), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, IGNORED)
    return {"input_ids": ids, "labels": labels}


def assert_exact(
    model: Model, *, batch: int = BATCH, packed: bool = True, ratio: float = 0.4, **options: Any
) -> None:
    """One compiled step has the loss and gradients of masked full backprop."""
    inputs = inputs_of(batch)
    fxseek.compile(model, ratio, **{"score": "random", "select": "sample", **options})
    loss = model(**inputs)["loss"]
    assert_exact_step(
        model, loss, lambda: model.logits(inputs["input_ids"]), inputs["labels"], packed=packed
    )


__all__ = [
    "BATCH",
    "IGNORED",
    "TOKENS",
    "VOCAB",
    "WIDTH",
    "Marked",
    "Model",
    "assert_exact",
    "assert_exact_causal",
    "assert_exact_step",
    "inputs_of",
    "masked_gradients",
    "model_of",
]
