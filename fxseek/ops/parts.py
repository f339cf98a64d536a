"""Values that the parts of a row share: keys and values, and the gradients that wait for a part.

The kept tokens of a row are learned in parts, the last one first. A later part reads keys and
values of an earlier one; what gradient it sends to them waits here until that part is run, which
sends it on to whatever made them (SeCO, arXiv 2505.16710).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxseek.ops.offload import HostTensor
from fxseek.ops.once import once_in_parts
from fxseek.ops.rows import Rows, gather_rows, only_rows, placed, put_rows_

__all__ = ["Joint", "Part", "join_rows", "pass_joint"]


class Part:
    """The part of the kept tokens that is being run.

    `kept`: LongTensor[batch, kept], all of them, ascending; `filled`: Bool[batch, kept] or None, as
    a `Selection` has them; `slots`: those of the part; `keys`: how many tokens are read for its
    queries, None where that is not known; `seen`: how many slots of a row may hold these;
    `backward`: its backward is under way; `writes`: the rows that it makes are what later parts
    read.
    """

    def __init__(self, kept: Tensor, filled: Tensor | None, *, writes: bool = False) -> None:
        self.kept = kept
        self.filled = filled
        self.slots = slice(0, kept.shape[1])
        self.keys: int | None = None
        self.seen = kept.shape[1]
        self.backward = False
        self.writes = writes

    def begin(self, slots: slice, reads: tuple[int, int] | None) -> None:
        """Go on with this part; `reads`: `keys` and `seen`, where they are known."""
        self.slots, self.backward = slots, False
        self.keys, self.seen = reads or (None, self.kept.shape[1])

    @property
    def positions(self) -> Tensor:
        """LongTensor[batch, slots]."""
        return self.kept[:, self.slots]

    def left_out(self, slots: slice) -> Tensor | None:
        """Which slots hold a position that is not selected, Bool[batch, slots]; None for none."""
        return None if self.filled is None else self.filled[:, slots]


class Joint:
    """A value of all tokens, of which each part makes its own rows with gradient.

    `base`: the value, as an earlier pass over all tokens has made it, [..., tokens, ...]; `at`:
    where its tokens are; `cuts`: whether tokens behind a part's last query may be left out;
    `wide`: gradients wait in float32 at least, else in the value's own precision.
    """

    def __init__(
        self, base: Tensor | HostTensor, at: Rows, part: Part, *, cuts: bool, wide: bool
    ) -> None:
        self.base = base
        self.at = at
        self.part = part
        self.cuts = cuts
        self.wide = wide
        self.waiting: Tensor | None = None
        """Gradient for the slots before those that have run, [..., slots, ...]."""
        self.behind: Tensor | None = None
        """Bool scalar: gradient has arrived at tokens whose part has run."""

    def value(self) -> Tensor:
        """The tokens that the part may read: a tensor of its own in the base's memory."""
        base = self.base
        if isinstance(base, HostTensor):
            base = base.fetch(self.part.backward)
        if not self.cuts or self.part.keys is None:
            return base.detach()
        return base.detach().narrow(self.at.row, 0, self.part.keys)

    def rewind(self) -> None:
        """Another part will read it from its beginning."""
        if isinstance(self.base, HostTensor):
            self.base.rewind()

    def write(self, rows: Tensor) -> None:
        """Let the base have the rows that the part has made."""
        left_out = self.part.left_out(self.part.slots)
        base = self.base.fetch(False) if isinstance(self.base, HostTensor) else self.base
        if left_out is not None:
            own = gather_rows(base, self.part.positions, self.at)
            rows = torch.where(placed(left_out, rows, self.at), own, rows)
        put_rows_(base, rows, self.part.positions, self.at)
        if isinstance(self.base, HostTensor):
            self.base.store(base)

    def receive(self, slope: Tensor, slots: slice) -> Tensor:
        """Take the gradient of the value that the part at `slots` has read; its own rows of it.

        With them goes what later parts have left.
        """
        part, at = self.part, self.at
        own = gather_rows(slope, part.kept[:, slots], at)
        if self.waiting is not None:
            waited = _slots(self.waiting, at, slots).to(own)
            own = own + (waited.flatten(at.row, at.row + 1) if at.packed else waited)
        left_out = part.left_out(slots)
        if left_out is not None:
            own = own.masked_fill(placed(left_out, own, at), 0.0)
        if slots.start > 0:
            self._add(gather_rows(slope, part.kept[:, : slots.start], at), slots.start)
        self._check(slope, at, slots)
        return own

    def passed(self, slope: Tensor, at: Rows, slots: slice) -> Tensor:
        """The gradient of what the value has been expanded to, at tokens of this part and earlier.

        `at`: where these are in it.
        """
        slots_read = slice(0, slots.stop)
        self._check(slope, at, slots)
        return only_rows(slope, self.part.kept[:, slots_read], at, self.part.left_out(slots_read))

    def _add(self, earlier: Tensor, count: int) -> None:
        if self.at.packed:
            earlier = earlier.unflatten(self.at.row, (len(self.part.kept), -1))
        if self.waiting is None:
            least = torch.float32 if self.wide else earlier.dtype
            dtype = torch.promote_types(earlier.dtype, least)
            place = torch.device("cpu") if isinstance(self.base, HostTensor) else earlier.device
            self.waiting = earlier.to(place, dtype)
            return
        self.waiting = _slots(self.waiting, self.at, slice(0, count))
        self.waiting += earlier.to(self.waiting)

    def _check(self, slope: Tensor, at: Rows, slots: slice) -> None:
        """Note whether gradient has arrived behind a part, at tokens that were read.

        Of tokens that were cut off none can. Some are read behind a row's last query for the sake
        of other rows, and of kernels that want whole numbers of keys.
        """
        part = self.part
        keys = part.keys if self.cuts else None
        behind = slice(slots.stop, part.kept.shape[1] if keys is None else part.seen)
        if behind.stop <= behind.start:
            return
        positions = part.kept[:, behind]
        left_out = part.left_out(behind)
        if keys is not None:
            cut = positions >= keys
            left_out = cut if left_out is None else left_out | cut
            positions = positions.clamp(max=keys - 1)
        later = gather_rows(slope, positions, at)
        arrived = later.abs() > 0  # not where it is NaN, as it is elsewhere then
        if left_out is not None:
            arrived &= ~placed(left_out, later, at)
        found = arrived.any()
        self.behind = found if self.behind is None else self.behind | found


def _slots(waiting: Tensor, at: Rows, slots: slice) -> Tensor:
    """A view of some of the slots; merged with the batch, they have a dimension of their own."""
    return waiting.narrow(at.row + at.packed, slots.start, slots.stop - slots.start)


class _Join(torch.autograd.Function):
    """The rows of a part in their place among those of all tokens; the value is the base's."""

    @staticmethod
    def forward(ctx: Any, joint: Joint, rows: Tensor) -> Tensor:
        ctx.joint, ctx.slots = joint, joint.part.slots
        return joint.value()

    @staticmethod
    @once_in_parts
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, ctx.joint.receive(slope, ctx.slots)


def join_rows(joint: Joint, rows: Tensor) -> Tensor:
    """`rows` [..., slots, ...] of the part that runs as a part of all tokens, [..., tokens, ...].

    The values are those of the joint, which its pass over all tokens has made; gradient reaches
    `rows` from this part and from those that have run before.
    """
    if joint.part.writes:
        joint.write(rows)
        return joint.value()
    return _Join.apply(joint, rows)  # type: ignore[return-value]


class _PassJoint(torch.autograd.Function):
    """What a joint is expanded to; gradient passes it at tokens of the part and of earlier ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joint: Joint, at: Rows) -> Tensor:
        ctx.joint, ctx.at, ctx.slots = joint, at, joint.part.slots
        return x.view_as(x)

    @staticmethod
    @once_in_parts
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.joint.passed(slope, ctx.at, ctx.slots), None, None


def pass_joint(x: Tensor, joint: Joint, at: Rows) -> Tensor:
    """`pass_kept` of what a joint is expanded to, [..., tokens that the part may read, ...]."""
    return _PassJoint.apply(x, joint, at)  # type: ignore[return-value]
