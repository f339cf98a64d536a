"""Learning in parts: the kept tokens are run with gradient a part at a time, in backward.

A step's forward has the exits of all kept tokens from the prefill (from a first run of the body
where it draws), and the head's loss on them. When backward brings their gradient, each part is run
forward and backward, the last one first (fxseek/passes/parts.py). Between forward and backward only
keys, values and the gradients that the head has found are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import get_device_states, set_device_states

from fxseek import _torch
from fxseek.config import SeekConfig
from fxseek.errors import GraphError, InputError
from fxseek.ops.autocast import same_autocast
from fxseek.ops.masks import Mask, looks_ahead
from fxseek.ops.once import once_in_parts
from fxseek.ops.parts import Joint, Part
from fxseek.ops.rows import gather_rows
from fxseek.ops.sweep import CatRows, few, rows_of_chunk, slices_of, sweep
from fxseek.ops.team import telling
from fxseek.passes.causality import Hides
from fxseek.passes.ir import Gathered, Joined, Piece
from fxseek.passes.parts import Parts
from fxseek.passes.unshard import sharding_of
from fxseek.run.env import Env
from fxseek.run.lowering import Run
from fxseek.run.saved import Known, SavedBytes
from fxseek.run.stages import Gather, Learn
from fxseek.selecting import Selection

__all__ = ["ONE_PART", "LearnInParts"]

log = logging.getLogger("fxseek")

ONE_PART = "learn_chunk: all kept tokens are learned in one part, since {reason}"

_ALIGNED = 16
"""Numbers of keys are multiples of it, as fused kernels want them."""


class LearnInParts(Learn):
    """The selected tokens with grad, at most `size` of each row at a time."""

    def __init__(self, parts: Parts, config: SeekConfig, body: Run, piece: Piece, run: Run) -> None:
        super().__init__(piece, run)
        assert config.learn_chunk is not None
        self.parts = parts
        self.size = config.learn_chunk
        self.wide = config.kv_grad_dtype == "float32"
        self.body = body
        self.told = False
        inputs = parts.body.inputs
        self.joined = [item for item in inputs if isinstance(item, Joined)]
        shardings = [x for node in parts.body.reads() if (x := sharding_of(node)) is not None]
        self.team = shardings[0].team if shardings else None
        self.gather = Gather([x for x in inputs if isinstance(x, Gathered)], parts.masks)

    def forward(self, env: Env, selection: Selection) -> tuple[tuple[Any, ...], int]:
        """As `Learn`: the outputs, and the bytes that wait for backward."""
        parts, kept = self.parts, selection.kept
        step = _Step(self, env, selection)
        trained = [step.values[node] for node in step.trained]
        if parts.draws:
            exits = step.first()
        else:
            exits = gather_rows(env.values.pop(parts.exit), kept, parts.rows)
        with torch.enable_grad(), SavedBytes(env.arguments) as saved:
            exits = _Parts.apply(step, exits, *trained)
        waiting = saved.total
        env.values[parts.exit] = exits
        outputs, more = super().forward(env, selection)
        return outputs, waiting + more


class _Step:
    """What the parts of one step share.

    `values`: what the body reads, by captured node; `slots`: those of each part; `idle`: how many
    more parts another process has, so that this one joins in their gathers of the body's
    parameters. By the first slot of a part: `reads`, how many tokens are read for its queries, and
    which slots hold these, None where that is not known; `runs`, its positions where they are
    consecutive, and the same in all rows; `random`, the generators' states before it was run.
    """

    def __init__(self, learn: LearnInParts, env: Env, selection: Selection) -> None:
        self.learn = learn
        self.selection = selection
        reads = dict.fromkeys(learn.parts.body.reads())
        self.values: dict[fx.Node, Any] = {node: env.read(node) for node in reads}
        self.constants = [node for node in reads if node in env.places and not self._trained(node)]
        self.versions = _torch.versions(self.values[node] for node in self.constants)
        kept = selection.kept
        batch, count = kept.shape
        first = learn.joined[0]
        rows = self.values[first.node].shape[first.rows.row]
        self.tokens: int = rows // batch if first.rows.packed else rows
        ahead = self._looks_ahead()
        if ahead and not learn.told:
            learn.told = True
            log.warning(
                "fxseek: %s", ONE_PART.format(reason="an attention mask shows later tokens")
            )
        self.slots = slices_of(count, count if ahead else learn.size)
        starts, known = [part.start for part in self.slots], not ahead and learn.parts.mixing.cuts
        self.reads = dict(zip(starts, self._reads(count, known=bool(known)), strict=True))
        self.runs = dict(zip(starts, self._runs(), strict=True))
        self.random: dict[int, _RandomStates] = {}
        self.idle = 0
        if learn.team is not None:
            most = learn.team.largest(torch.tensor([len(self.slots)]))
            self.idle = int(most) - len(self.slots)
        self.precision = same_autocast(kept.device.type)

    def _trained(self, node: fx.Node) -> bool:
        value = self.values[node]
        return isinstance(value, Tensor) and value.requires_grad

    @property
    def trained(self) -> list[fx.Node]:
        """The captured nodes of what gets gradient."""
        return [node for node in self.values if self._trained(node)]

    def _looks_ahead(self) -> bool:
        """Whether masks let a token read later ones. Waits for the device."""
        kept, filled = self.selection.kept, self.selection.filled

        def of(hides: Hides) -> Mask:
            value, item = self.values[hides.mask.node], hides.mask
            value = value[(None,) * item.unsqueezed] if item.unsqueezed else value
            return Mask(value, item.rows, hides.inverted, hides.fused)

        return any(
            looks_ahead([*map(of, masks)], kept, filled, self.tokens)
            for masks in self.learn.parts.mixing.must_hide
        )

    def _reads(self, count: int, *, known: bool) -> Sequence[tuple[int, int] | None]:
        """How many tokens are read for each part, and how many slots of a row hold them at most.

        They are those up to the last query of any row; their number is raised to a multiple of
        `_ALIGNED`, except where all positions are kept.
        """
        if not known:
            return [None] * len(self.slots)
        kept, stops = self.selection.kept, [part.stop for part in self.slots]
        if self.selection.consecutive is not None:
            return [(stop, stop) for stop in stops]
        if not _torch.has_values(kept):
            return [(self._aligned(-(-self.tokens * stop // count)), stop) for stop in stops]
        ascending = kept.cummax(1).values  # filled slots are behind the others, wherever they are
        last = ascending[:, [stop - 1 for stop in stops]].amax(0)
        tokens = [self._aligned(end) for end in (last + 1).tolist()]
        bounds = torch.tensor(tokens, device=kept.device).repeat(len(kept), 1)
        slots = torch.searchsorted(ascending, bounds).amax(0).tolist()
        return [*zip(tokens, slots, strict=True)]

    def _aligned(self, tokens: int) -> int:
        return min(-(-tokens // _ALIGNED) * _ALIGNED, self.tokens)

    def _runs(self) -> list[range | None]:
        """The positions of each part where they are consecutive, and the same in all rows."""
        kept, filled = self.selection.kept, self.selection.filled
        if self.selection.consecutive is not None:
            return [self.selection.consecutive[part] for part in self.slots]
        if not _torch.has_values(kept):
            return [None] * len(self.slots)
        last = [part.stop - 1 for part in self.slots]
        first = kept[:, [part.start for part in self.slots]]
        steps = torch.tensor([part.stop - part.start - 1 for part in self.slots])
        same = (first == first[:1]) & (kept[:, last] - first == steps.to(kept.device))
        if filled is not None:
            same &= ~filled[:, last]
        found = torch.where(same.all(0), first[0], -1).tolist()
        return [
            range(start, start + part.stop - part.start) if start >= 0 else None
            for start, part in zip(found, self.slots, strict=True)
        ]

    # ---- the parts -----------------------------------------------------------------------

    def first(self) -> Tensor:
        """Run all parts without grad, in order: the exits of all kept tokens.

        Later parts read the keys and values of earlier ones. What is drawn will be drawn again in
        backward.
        """
        kept, rows = self.selection.kept, self.learn.parts.rows
        part = Part(kept, self.selection.filled, writes=True)
        joints, known = self._joints(self.values, part), _known(self.values)

        def run(slots: slice) -> tuple[Tensor]:
            self.random[slots.start] = _RandomStates(kept)
            part.begin(slots, self.reads[slots.start])
            return (self._run(self.values, joints, part, known),)

        with torch.no_grad():
            for _ in range(self.idle):  # what the first part has written, it writes again
                run(self.slots[0])
            (exits,) = sweep(self.slots, run, [CatRows(rows, len(kept))], kept)
        return exits

    def take(self) -> tuple[list[fx.Node], list[Tensor]]:
        """Tensors that autograd is to keep; they leave `values`."""
        constants = set(self.constants)
        nodes = [n for n, x in self.values.items() if isinstance(x, Tensor) and n not in constants]
        return nodes, [self.values.pop(node) for node in nodes]

    def backward(
        self, saved: Mapping[fx.Node, Tensor], trained: Sequence[fx.Node], slope: Tensor
    ) -> list[Tensor | None]:
        """The gradients of `trained`, from that of the exits.

        Raises:
            InputError: a constant was written to since the forward.
            GraphError: a part has sent gradient to tokens whose part had run.
        """
        if _torch.versions(self.values[node] for node in self.constants) != self.versions:
            raise InputError(
                "an input of the model, a buffer or a frozen parameter was written to in place "
                "between forward and backward, which reads it again. Write to a copy, or call "
                "backward first."
            )
        values = {**self.values, **saved}
        for node in trained:
            values[node] = values[node].detach().requires_grad_()
        part, known = Part(self.selection.kept, self.selection.filled), _known(values)
        last = self.slots[-1]
        for _ in range(self.idle):  # while no gradient waits; nor does any arrive
            part.begin(last, self.reads[last.start])
            with torch.enable_grad(), self.precision():
                exits = self._run(values, self._joints(values, part), part, known)
            part.backward = True
            torch.autograd.backward(exits, torch.zeros_like(exits))
        joints = self._joints(values, part)
        batch, exit_at = len(self.selection.kept), self.learn.parts.rows
        for slots, _ in few(self.slots[::-1], slope):
            part.begin(slots, self.reads[slots.start])
            states = self.random.get(slots.start)
            with nullcontext() if states is None else states.again():
                with torch.enable_grad(), self.precision():
                    exits = self._run(values, joints, part, known)
                part.backward = True
                torch.autograd.backward(exits, rows_of_chunk(slope, exit_at, batch, slots))
        behind = [x.behind for x in joints.values() if x.behind is not None]
        if behind and _torch.has_values(behind[0]) and bool(torch.stack(behind).any()):
            raise GraphError(
                "learning in parts: a token has read a later one, so that its gradient came too "
                "late. This is a defect of fxseek: please report it with the model's "
                "configuration, and leave learn_chunk out meanwhile."
            )
        found = [values[node].grad for node in trained]
        for node in trained:
            values[node].grad = None  # the only owner hands it on without a copy
        return found

    def _joints(self, values: Mapping[fx.Node, Any], part: Part) -> dict[Gathered | Joined, Joint]:
        learn, cuts = self.learn, self.learn.parts.mixing.cuts
        return {
            item: Joint(values[item.node], item.rows, part, cuts=item.node in cuts, wide=learn.wide)
            for item in learn.joined
        }

    def _run(
        self, values: Mapping[fx.Node, Any], joints: Mapping[Gathered | Joined, Joint], part: Part,
        known: Known,
    ) -> Tensor:  # fmt: skip
        """The exits of a part."""
        learn, slots, chosen = self.learn, part.slots, self.selection
        filled = part.left_out(slots)
        run = self.runs[slots.start]
        selection = Selection(part.positions, chosen.weights[:, slots], filled, run)
        env = Env((), {})
        env.values.update(values)
        for joint in joints.values():
            joint.rewind()
        with torch.no_grad():
            learn.gather(env, selection)
        env.rows.update(joints)
        (exits,), _ = learn.body(env.take(learn.parts.body.inputs, selection), known)
        return exits


def _known(values: Mapping[fx.Node, Any]) -> Known:
    """Nothing is counted: what a part reads exists anyway, what it saves is freed at its end."""
    return Known.of(values.values(), counts=False)


class _Parts(torch.autograd.Function):
    """The exits of all kept tokens; backward learns them in parts."""

    @staticmethod
    def forward(ctx: Any, step: _Step, exits: Tensor, *trained: Tensor) -> Tensor:
        ctx.step, ctx.trained = step, step.trained
        ctx.nodes, tensors = step.take()
        ctx.save_for_backward(*tensors)
        return exits.view_as(exits)

    @staticmethod
    @once_in_parts
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = dict(zip(ctx.nodes, ctx.saved_tensors, strict=True))
        with nullcontext() if ctx.step.learn.team is None else telling():
            slopes = ctx.step.backward(saved, ctx.trained, slope)
        if not _torch.keeps_graph():
            ctx.step.values.clear()  # what waits on the host is freed with the saved tensors
        return None, None, *slopes


class _RandomStates:
    """The states of the random generators, to draw the same once more."""

    def __init__(self, like: Tensor) -> None:
        self.host = torch.get_rng_state()
        self.devices, self.states = get_device_states(like)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same; the generators are as before afterwards."""
        kind = torch.accelerator.current_accelerator()
        device = "cuda" if kind is None else kind.type  # where there is none, no states are kept
        with torch.random.fork_rng(self.devices, device_type=device):
            torch.set_rng_state(self.host)
            set_device_states(self.devices, self.states, device_type=device)
            yield
