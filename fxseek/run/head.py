"""The end of a model on chunks of tokens: its last layers, the vocabulary, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fxseek.config import SeekConfig
from fxseek.ops.autocast import autocast_dtype
from fxseek.ops.loss import Scratch, cross_entropy_slope, mass_of, mean_of_parts
from fxseek.ops.once import once_in_parts
from fxseek.ops.shards import Unshard, in_buckets
from fxseek.ops.sweep import CatRows, Sum, chunks_of, rows_of_chunk, sweep
from fxseek.passes.facts import example
from fxseek.passes.head import Head
from fxseek.passes.ir import Given, Input, Selected
from fxseek.passes.unshard import sharding_of
from fxseek.run.lowering import run_segment
from fxseek.run.piece import module_of

__all__ = ["ChunkedHead"]


class ChunkedHead(nn.Module):
    """From rows after the last attention to the loss, a chunk of them at a time.

    Chunks hold at most ``chunk_bytes`` of logits. Where there are several, or with
    ``recompute="block"``, backward makes the logits again instead of keeping them. With `once` they
    are made once, except in float16: the gradients are found in the forward, and wait for that of
    the loss.
    """

    def __init__(self, head: Head, config: SeekConfig, *, once: bool = False) -> None:
        super().__init__()
        self.head = head
        self.once = once
        self.chunk_bytes = config.most_chunk_bytes
        self.recompute = config.recompute == "block"
        self.weighted = config.select == "sample"
        module = module_of(head.stage, "Head")
        self.run: Callable[..., tuple[Tensor, Tensor]] = run_segment(module, config.backend, "none")
        self.run_again: Callable[..., tuple[Tensor, Tensor]] = run_segment(
            module, config.backend, "block"
        )
        self.logits: Callable[..., tuple[Tensor, Tensor]] = run_segment(
            module_of(head.logits, "Logits"), config.backend, "none"
        )
        inputs = head.stage.inputs
        self.dtype = example(head.loss.node).dtype
        self.rows_at = inputs.index(Given(head.entry))
        self.positions_at = [i for i, item in enumerate(inputs) if isinstance(item, Selected)]
        self.weights_at = inputs.index(Selected("weights"))
        full = head.full if head.loss.reduction == "sum" else ()
        self.unshards = _unshards([*inputs, *full])

    def forward(self, *arguments: Any) -> Tensor:
        """The loss, a scalar, of the head's inputs.

        Behind them, where the loss is a sum, the targets, class weights and scales of all tokens.
        """
        values = list(arguments)
        for places, gather in self.unshards:  # once for all chunks, however many there are
            found = list(gather(*[values[place] for place in places]))
            for place in reversed(places):
                values[place] = found.pop()
        inputs = len(self.head.stage.inputs)
        given, full = values[:inputs], values[inputs:]
        del values
        weights = given[self.weights_at]
        chunks = self.chunks(*weights.shape)
        run = self.run_again if self.recompute or len(chunks) > 1 else self.run

        def part(chunk: slice) -> tuple[Tensor, Tensor]:
            return run(*(given if len(chunks) == 1 else self.sliced(given, chunk)))

        rows = given[self.rows_at]
        if self.once and not _in_float16(rows):
            trained = [
                i for i, x in enumerate(given)
                if i != self.rows_at and isinstance(x, Tensor) and x.requires_grad
            ]  # fmt: skip
            values = [given[i] for i in trained]
            total, labelled = _Once.apply(self, given, chunks, trained, rows, *values)
        else:
            total, labelled = sweep(chunks, part, (Sum(), Sum()), weights)
        mass = mass_of(*full, ignore_index=self.head.loss.ignore_index) if full else None
        return mean_of_parts(total, labelled, mass).to(self.dtype)

    def slope(
        self, rows: Tensor, arguments: Sequence[Any], scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """∂ sum of the losses / ∂ `rows`, and that sum, for weights of 0 and 1.

        The arguments are the head's inputs, `rows` among them; their logits must fit a chunk.
        """
        if not self.head.loss.plain:
            with torch.enable_grad():
                total, _ = self.run(*arguments)
            (slope,) = torch.autograd.grad(total, rows)
            return slope, total.detach()
        edge, found, total, _ = self._slope_of_logits(arguments, scratch, weighted=False)
        (slope,) = torch.autograd.grad(edge, rows, found)
        return slope, total

    def backward(self, arguments: Sequence[Any], scratch: Scratch) -> tuple[Tensor, Tensor]:
        """The sum of the losses and the number of labels; gradients go to the arguments."""
        if self.head.loss.plain:
            edge, slope, total, labelled = self._slope_of_logits(
                arguments, scratch, weighted=self.weighted
            )
            torch.autograd.backward([edge], [slope])
            leaves = (x for x in arguments if isinstance(x, Tensor) and x.is_leaf)
            scratch.leave_to(x.grad for x in leaves if x.grad is not None)
            dtype = slope.dtype
            if autocast_dtype(slope.device.type) is not None:  # `cross_entropy` is in float32 then
                dtype = torch.promote_types(dtype, torch.float32)
            return total.to(dtype), labelled
        with torch.enable_grad():
            total, labelled = self.run(*arguments)
        total.backward()
        return total.detach(), labelled

    def _slope_of_logits(
        self, arguments: Sequence[Any], scratch: Scratch, *, weighted: bool
    ) -> tuple[GradientEdge, Tensor, Tensor, Tensor]:
        """Where the logits' gradient goes, that, the sum of the losses, the number of labels."""
        with torch.enable_grad():
            logits, target = self.logits(*arguments)
        edge = torch.autograd.graph.get_gradient_edge(logits)
        with torch.no_grad():
            slope, total, labelled = cross_entropy_slope(
                logits.detach(),
                target,
                arguments[self.weights_at],
                ignore_index=self.head.loss.ignore_index,
                label_smoothing=self.head.loss.label_smoothing,
                scratch=scratch,
                weighted=weighted,
            )
        return edge, slope, total, labelled

    def chunks(self, batch: int, length: int) -> list[slice]:
        """Slices of `length` positions of each of `batch` rows whose logits fit a chunk."""
        return chunks_of(length, self.chunk_bytes // max(1, batch * self.head.logit_bytes))

    def sliced(self, arguments: Sequence[Any], chunk: slice) -> list[Any]:
        """The arguments for a chunk of the positions."""
        found = list(arguments)
        batch = found[self.weights_at].shape[0]
        found[self.rows_at] = rows_of_chunk(found[self.rows_at], self.head.rows, batch, chunk)
        for index in self.positions_at:
            if found[index] is not None:
                found[index] = found[index][:, chunk]
        return found


def _unshards(inputs: Sequence[Input | None]) -> list[tuple[list[int], Unshard]]:
    """Where the sharded parameters are among the inputs, and what gathers them."""
    found = {i: x for i, item in enumerate(inputs) if item and (x := sharding_of(item)) is not None}
    return [(list(bucket), Unshard(list(bucket.values()))) for bucket in in_buckets(found)]


def _in_float16(rows: Tensor) -> bool:
    """Whether gradients are float16, whose range they leave unless the loss is scaled first."""
    return (autocast_dtype(rows.device.type) or rows.dtype) == torch.float16


class _Once(torch.autograd.Function):
    """The sum of the losses and the number of labels; the gradients are found on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        head: ChunkedHead,
        given: Sequence[Any],
        chunks: Sequence[slice],
        places: Sequence[int],
        rows: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        arguments = list(given)
        arguments[head.rows_at] = rows.detach()
        for place, value in zip(places, trained, strict=True):
            arguments[place] = value.detach().requires_grad_()

        scratch = Scratch()

        def part(chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
            own = head.sliced(arguments, chunk)
            own[head.rows_at].requires_grad_()
            total, labelled = head.backward(own, scratch)
            return total, labelled, own[head.rows_at].grad

        collect = (Sum(), Sum(), CatRows(head.head.rows, len(given[head.weights_at])))
        total, labelled, slope = sweep(chunks, part, collect, rows)
        slopes = [arguments[place].grad for place in places]
        ctx.found = [x is not None for x in slopes]
        ctx.save_for_backward(slope, *(x for x in slopes if x is not None))
        ctx.mark_non_differentiable(labelled)
        return total, labelled

    @staticmethod
    @once_in_parts
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, *others = ctx.saved_tensors
        rest = iter(others)
        found = [next(rest) * slope if there else None for there in ctx.found]
        return None, None, None, None, rows * slope, *found
