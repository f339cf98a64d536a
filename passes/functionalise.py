"""Functionalise: every write becomes a new value.

Before::

    y = x.view(2, -1)
    x.add_(1)            # or x += 1, relu(x, inplace=True), x[:, 0] = 0
    z = y * 2

After::

    x_1 = x.add(1)
    y_1 = x_1.view(2, -1)    # read after the write, so it is made anew
    z = y_1 * 2

A stage computes a node from values that may have been replayed, gathered or scattered, so a
write through an alias would be lost. A write to a view is written through to what it is a view of;
an alias that cannot be followed is refused. Buffers get their new values after the step.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxseek import _torch
from fxseek.errors import GraphError
from fxseek.passes.facts import (
    example,
    is_tensor,
    listed,
    needs_grad,
    switches_grad,
    tensors_of,
    where,
)
from fxseek.passes.writes import (
    BOOLEAN,
    check_function,
    leaves_as_it_is,
    refuse,
    refuse_input,
    set_item,
    write_of,
)


@dataclass(frozen=True)
class Functional:
    """A graph without writes.

    `written`: the buffers that the captured graph writes to; their new values are the graph's last
    outputs, in this order. `returned`: outputs of the captured graph that are such a buffer itself,
    by their place (``self.count += 1`` puts it back into the module).
    """

    graph: fx.Graph
    written: tuple[fx.Node, ...]
    returned: dict[int, fx.Node]
    first: fx.Graph
    """Writes to parameters, in place, to be run ahead of the graph without grad. Its placeholders
    stand for `parameters`."""
    parameters: tuple[fx.Node, ...]


def functionalise(graph: fx.Graph) -> Functional:
    """A copy of `graph` without writes.

    Raises:
        GraphError: a write to an input or a parameter, or through an alias that can't be followed.
    """
    return _Functionalise(graph).run()


class _Functionalise:
    """The walk. `current` has the latest value of each captured tensor, as of its `version`.

    A write to a view is written through to the tensor that it is a view of, and so on down to the
    one that owns the memory; views of it that are read later are made anew.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.source = graph
        self.copy = fx.Graph(owning_module=graph.owning_module)
        self.new_of: dict[fx.Node, fx.Node] = {}
        self.current: dict[fx.Node, fx.Node] = {}
        self.first_of: dict[int, fx.Node] = {}
        self.seen: dict[fx.Node, tuple[int, ...]] = {}
        self.version: dict[int, int] = {}
        self.owner: dict[int, fx.Node] = {}
        self.parents: dict[fx.Node, fx.Node] = {}
        self.written: dict[fx.Node, None] = {}
        self.first = fx.Graph()
        self.made_first: dict[fx.Node, fx.Node] = {}
        # Dynamo's example values show the requires_grad of the end: here it is as of now.
        self.carrying: set[fx.Node] = set()
        self.tracks = True
        self.untracked: fx.Node | None = None
        """The switch that began the present stretch without grad."""

    def run(self) -> Functional:
        for node in self.source.nodes:
            if node.op == "output":
                break
            switch = switches_grad(node)
            if switch:
                self.tracks = bool(node.args[0])
            if leaves_as_it_is(node):
                same: Any = node.args[0]
                self.new_of[node] = self.current[node] = self._latest(same)
                continue
            if getattr(node.target, "__name__", "") == "autograd_function_apply":
                check_function(node)
            write = write_of(node) if node.op.startswith("call_") else None
            if write is None:
                made = self.copy.node_copy(node, self._latest)
                if switch:
                    self.untracked = None if self.tracks else self.untracked or made
                if needs_grad(node):
                    self._note(made)
                out = node.kwargs.get("out")
                if isinstance(out, fx.Node):  # into memory of its own, see _into_unread
                    self._through(node, out, made)
                self._define(node, made)
            elif not self._puts_back(node):
                self._write(node, *write)
        output = self.source.output_node()
        results: Any = map_arg(output.args[0], self._latest)
        news = tuple(self._latest(node) for node in self.written)
        last = self.copy.output((*results, *news) if news else results)
        last.meta = dict(output.meta)
        firsts = [
            self.first_of.get(id(example(node))) if is_tensor(node) else None
            for node in output.args[0]  # type: ignore[union-attr]
        ]
        returned = {i: self.new_of[x] for i, x in enumerate(firsts) if x and x in self.written}
        self.first.output(None)
        parameters = [self.new_of[x] for x in self.made_first if x.op == "placeholder"]
        written = tuple(self.new_of[x] for x in self.written)
        return Functional(self.copy, written, returned, self.first, tuple(parameters))

    def _define(self, node: fx.Node, made: fx.Node) -> None:
        """Note what a captured node has become, and whose memory its value is in."""
        self.new_of[node] = self.current[node] = made
        tensors = list(tensors_of(example(node)))
        if not tensors:
            return
        first = self.first_of.setdefault(id(example(node)), node)
        keys = [_torch.storage_key(tensor) for tensor in tensors]
        self.seen[node] = tuple(self.version.setdefault(key, 0) for key in keys)
        if first is not node:  # the very same tensor
            self.parents[node] = first
            if node.target is operator.getitem and not is_tensor(node.args[0]):
                self.current[node] = self._latest(first)  # an element that may have been written to
            return
        for key in keys:
            owner = self.owner.setdefault(key, node)
            if owner is not node and node not in self.parents:
                operands = [x for x in node.all_input_nodes if key in _keys(x)]
                self.parents[node] = operands[0] if operands else owner

    def _latest(self, node: fx.Node) -> fx.Node:
        """The value of a captured node as a read at this place of the graph sees it."""
        if node not in self.parents:
            return self.current[node]
        version = tuple(self.version[key] for key in _keys(node))
        if self.seen[node] == version:
            return self.current[node]
        parent = self.parents[node]
        made = self.new_of[node]
        if _same(node, parent):
            fresh = self._latest(parent)
        elif parent in node.all_input_nodes:
            before, after = self._operand(node, parent), self._latest(parent)

            def replaced(x: fx.Node) -> fx.Node:
                return after if x is before else x

            args, kwargs = map_arg(made.args, replaced), map_arg(made.kwargs, replaced)
            carries = made in self.carrying and after in self.carrying
            tracked = carries and self.untracked is not None
            with self.copy.inserting_before(self.untracked) if tracked else nullcontext():
                fresh = self.copy.create_node(made.op, _replayed(made), args, kwargs)
            fresh.meta = dict(made.meta)
            if tracked:
                self.carrying.add(fresh)
            self._note(fresh)
        else:
            raise refuse(
                node,
                f"{node.name!r} shares memory that is written to, and is read later, by a way that "
                "cannot be followed",
                "Clone it before the write.",
            )
        self.current[node], self.seen[node] = fresh, version
        return fresh

    def _operand(self, node: fx.Node, parent: fx.Node) -> fx.Node:
        """What the copy of a view reads in the parent's place."""
        pairs = zip(node.all_input_nodes, self.new_of[node].all_input_nodes, strict=True)
        return next(made for captured, made in pairs if captured is parent)

    def _note(self, made: fx.Node) -> fx.Node:
        """Note whether a new value carries gradient."""
        leaf = made.op == "placeholder" and is_tensor(made) and example(made).requires_grad
        if leaf or (self.tracks and any(x in self.carrying for x in made.all_input_nodes)):
            self.carrying.add(made)
        return made

    def _make(
        self, node: fx.Node, like: fx.Node, target: Any, *args: Any, **kwargs: Any
    ) -> fx.Node:
        made = self.copy.call_function(target, args, kwargs)
        made.meta = {**node.meta, "example_value": example(like)}
        return self._note(made)

    # ---- writes --------------------------------------------------------------------------

    def _puts_back(self, node: fx.Node) -> bool:
        """Whether a node puts a view back in its own place, as ``x[i] += y`` does at its end."""
        if node.target is not operator.setitem:
            return False
        base, index, value = node.args
        while isinstance(value, fx.Node) and value in self.parents:
            parent = self.parents[value]
            if value.target is operator.getitem and _is(parent, base) and value.args[1] == index:
                return True
            if not _same(value, parent):
                return False
            value = parent
        return False

    def _write(
        self, node: fx.Node, written: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict
    ) -> None:
        key = _torch.storage_key(example(written))
        owner = self.owner[key]
        if owner.op == "placeholder":
            if self._write_first(node, written, owner):
                return
            if not is_tensor(owner) or not _torch.is_buffer(owner):
                raise refuse_input(node, owner)
            self.written[owner] = None
        before = self._latest(written)
        if not self.tracks and before in self.carrying:
            raise refuse(
                node,
                "a write under torch.no_grad() to a tensor that carries gradient",
                "Write to a detached copy, or outside of no_grad.",
            )
        fresh = self.copy.create_node(
            "call_function", target, map_arg(args, self._latest), map_arg(kwargs, self._latest)
        )
        self._note(fresh).meta = {**node.meta, "example_value": example(written)}
        value, operands = example(written), [t for a in args[1:] for t in _tensors(a)]
        other = any(t.dtype != value.dtype for t in operands) and target is not set_item
        if other or getattr(target, "__name__", "") in BOOLEAN:
            fresh = self._make(node, written, torch.Tensor.to, fresh, value.dtype)
        if any(t.requires_grad for t in operands) and not value.requires_grad:
            result = example(node)
            if isinstance(result, torch.Tensor):
                fresh.meta["example_value"] = result
        if owner.op == "placeholder" and fresh in self.carrying:
            raise refuse(
                node,
                f"the graph writes a value with gradient to {_torch.source_path(owner)}",
                "Write its detach().",
            )
        self._through(node, written, fresh)
        self.new_of[node] = self.current[node] = fresh
        if is_tensor(node):
            self._define(node, fresh)

    def _write_first(self, node: fx.Node, written: fx.Node, owner: fx.Node) -> bool:
        """Move a write to a parameter ahead of the graph, if it reads no more than the parameter.

        A weight that is clamped in forward is a leaf with another value from there on. Nothing may
        have read it before.
        """
        if not is_tensor(owner) or not isinstance(example(owner), torch.nn.Parameter):
            return False
        chain = [written]
        while chain[-1] is not owner:
            chain.append(self.parents[chain[-1]])
        key = _torch.storage_key(example(owner))
        earlier = [x for x in self.made_first if is_tensor(x) and key in _keys(x)]
        views = {self.new_of[x] for x in (*chain, *earlier)}
        read = any(user not in views for view in views for user in view.users)
        gradient = self.tracks and self._latest(written) in self.carrying
        if read or gradient or any(x not in chain for x in node.all_input_nodes):
            return False
        for x in (*reversed(chain), node):
            if x not in self.made_first:
                self.made_first[x] = self.first.node_copy(x, self.made_first.__getitem__)
        self.new_of[node] = self.current[node] = self._latest(written)
        if is_tensor(node):
            self._define(node, self._latest(written))
        return True

    def _through(self, node: fx.Node, written: fx.Node, fresh: fx.Node) -> None:
        """Give a tensor its new value, and what it is a view of, down to the owner."""
        key, before = _torch.storage_key(example(written)), self._latest(written)
        chain = [(written, fresh)]
        while (parent := self.parents.get(written)) is not None:
            if _same(written, parent):
                value = fresh
            elif not is_tensor(parent):  # a part of chunk(), split(), ...
                if parent not in self.parents:
                    break
                value, parent = self._into_part(node, written, fresh), self.parents[parent]
            elif self._latest(parent) in self.carrying and before not in self.carrying:
                raise refuse(
                    node,
                    f"a write through {written.name!r}, which was kept from gradient, changes a "
                    "tensor that carries it, and autograd does not see that",
                    "Write to the tensor itself, or to a copy.",
                )
            else:
                whole = _is_whole(written, parent)
                value = fresh if whole else self._into(node, written, parent, fresh)
            chain.append((parent, value))
            written, fresh, before = parent, value, self._latest(parent)
        self.version[key] += 1
        for tensor, value in chain:
            self.current[tensor], self.seen[tensor] = value, (self.version[key],)

    def _into(self, node: fx.Node, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """The parent's new value when one of its views has a new one."""
        base, made = self._latest(parent), self.new_of[view]
        name = str(getattr(view.target, "__name__", view.target))
        if view.args and view.args[0] is parent:
            if view.target is operator.getitem or name == "__getitem__":
                return self._make(node, parent, set_item, base, made.args[1], value)
            if name in ("select", "narrow") and not view.kwargs and isinstance(view.args[1], int):
                at: Any = view.args[1]
                dim = at % example(parent).dim()
                start: Any = made.args[2]
                if name == "narrow":
                    length: Any = made.args[3]
                    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
                        raise self._unknown(node, view)
                    start = slice(start, start + length)
                return self._make(
                    node, parent, set_item, base, (*[slice(None)] * dim, start), value
                )
            if name in ("transpose", "swapaxes", "swapdims") and not view.kwargs:
                return self._make(node, parent, torch.transpose, value, *made.args[1:])
            if name == "permute" and not view.kwargs:
                dims = listed(made)
                if all(isinstance(dim, int) for dim in dims):
                    places = [dim % len(dims) for dim in dims]
                    back = [places.index(dim) for dim in range(len(dims))]
                    return self._make(node, parent, torch.permute, value, back)
            if name in _REGROUP:
                return self._make(node, parent, torch.Tensor.reshape_as, value, base)
        raise self._unknown(node, view)

    def _into_part(self, node: fx.Node, part: fx.Node, value: fx.Node) -> fx.Node:
        """The new value of what was split when one of the parts has a new one."""
        split = self.parents[part]
        whole = split.args[0]
        name, index = str(getattr(split.target, "__name__", split.target)), part.args[1]
        known = name in ("chunk", "split", "unbind") and self.parents[split] is whole
        if not known or not isinstance(whole, fx.Node) or not isinstance(index, int):
            raise self._unknown(node, part)
        at = 1 if name == "unbind" else 2
        dim = split.kwargs.get("dim", split.args[at] if len(split.args) > at else 0)
        if not isinstance(dim, int):
            raise self._unknown(node, part)
        rank, count = example(whole).dim(), len(example(split))
        dim, index = dim % rank, index % count
        place: Any = index
        if name != "unbind":
            lengths = [tensor.shape[dim] for tensor in example(split)[: index + 1]]
            if not all(isinstance(length, int) for length in lengths):
                raise self._unknown(node, part)
            place = slice(sum(lengths[:-1]), sum(lengths))
        base = self._latest(whole)
        return self._make(node, whole, set_item, base, (*[slice(None)] * dim, place), value)

    def _unknown(self, node: fx.Node, view: fx.Node) -> GraphError:
        return refuse(
            node,
            f"a write through {view.name!r}, a view that is made at {where(view)} by an operation "
            "that cannot be followed back",
            "Write to a slice of the tensor itself (x[...] = value), or to a copy.",
        )


_REGROUP = (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
    *("ravel", "contiguous", "detach", "_get_data_attr"),
)
"""Views that hold every element of what they are views of, in the same order."""


def _replayed(made: fx.Node) -> Any:
    """The operation that makes a view anew: the strides of a written tensor may be others."""
    if made.target == "view" and not any(isinstance(x, torch.dtype) for x in made.args):
        return "reshape"
    return "reshape_as" if made.target == "view_as" else made.target


def _keys(node: fx.Node) -> list[int]:
    return [_torch.storage_key(tensor) for tensor in tensors_of(example(node))]


def _tensors(arg: Any) -> list[torch.Tensor]:
    return [example(arg)] if is_tensor(arg) else []


def _same(alias: fx.Node, written: fx.Node) -> bool:
    """Whether an alias is the written tensor itself (the result of an earlier write)."""
    return example(alias) is example(written)


def _is(node: fx.Node, other: Any) -> bool:
    return isinstance(other, fx.Node) and (node is other or _same(node, other))


def _is_whole(view: fx.Node, parent: fx.Node) -> bool:
    """Whether a view is all of its parent, as it is: ``x.contiguous()``, ``x.to(x.dtype)``."""
    return _layout(example(view)) == _layout(example(parent))


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    """Type, sizes, strides and offset, as expressions: to compare symbols would add guards."""
    numbers = (*x.shape, *x.stride(), x.storage_offset())
    return (x.dtype, *map(_torch.size_expression, numbers))


__all__ = ["Functional", "functionalise"]
