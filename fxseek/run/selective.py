"""Running a stage so that autograd keeps products, and not what follows from them cheaply.

Autograd hands each tensor that it saves to a pair of hooks (`fxseek.run.saved`). In the place of
one that a cheap region has made (`fxseek.passes.rematerialise`) a note is kept of how to make it.
The region runs again when backward asks for the first of its tensors, and lets go of each as it is
given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxseek import _torch
from fxseek.ops.autocast import same_autocast
from fxseek.passes.facts import ancestors, tensors_of
from fxseek.passes.rematerialise import Region
from fxseek.run.boxed import Root, unpack_list, with_source_lines
from fxseek.run.recipe import Layout, Note, Recipe, Remake
from fxseek.run.saved import Held, Known, SavedBytes

__all__ = ["Selectively"]

Owners = frozenset[fx.Node]


class Selectively:
    """Runs a stage on boxed values: its outputs, and the bytes that autograd keeps.

    Of each region, backward recomputes those saved tensors that leave the fewest bytes to keep.
    What they are made of counts only where nothing else keeps it. The first runs decide; later runs
    look at the nodes that mattered. Hooks of the caller see the same tensors in the same order in
    every run, as a checkpoint around the model asks for.
    """

    def __init__(self, root: Root, graph: fx.Graph, regions: Iterable[Region]) -> None:
        self.root = root
        self.nodes = tuple(graph.nodes)
        self.whole = self._plan(
            _Watched(region.nodes, region.nodes, region.last, {}, {}) for region in regions
        )
        self.narrowed: _Plan | None = None

    def __call__(self, values: list[Any], exclude: Known) -> tuple[Any, int]:
        """The list is emptied; memory of `exclude` is not counted."""
        hooked = _torch.outer_saved_tensor_hooks() is not None
        narrows = self.narrowed is None and not hooked
        plan = self.whole if self.narrowed is None or hooked else self.narrowed
        regions = [_Running(watched) for watched in plan.watched]
        with _Selective(exclude, self.nodes, regions, narrows=narrows) as saved:
            outputs = plan.run(saved, values)
        if narrows and torch.is_grad_enabled():
            self.narrowed = self._plan(x.narrowed for x in regions if x.narrowed is not None)
        return outputs, saved.total

    def _plan(self, watched: Iterable[_Watched]) -> _Plan:
        watched = list(watched)
        run = fx.GraphModule(self.root, _instrumented(self.nodes, watched))
        return _Plan(watched, with_source_lines(run))


class _Plan(NamedTuple):
    """Which regions are watched, and the code that says so."""

    watched: list[_Watched]
    run: Callable[..., Any]


class _Watched(NamedTuple):
    """A region: nodes whose memory autograd may save (`owners`), and what making them takes."""

    owners: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    last: fx.Node
    choices: dict[Owners, Owners]
    """By the nodes whose memory autograd saves, those that backward makes again."""
    remakes: dict[tuple[Owners, Owners], Remake]
    """By both, how."""

    def narrow(self, owners: Set[fx.Node]) -> _Watched:
        """These alone, and what making them takes."""
        needed = ancestors(owners, set(self.nodes).__contains__)
        nodes = tuple(node for node in self.nodes if node in needed)
        return _Watched(tuple(node for node in nodes if node in owners), nodes, self.last, {}, {})


class _Running:
    """A region in a step."""

    def __init__(self, watched: _Watched) -> None:
        self.watched = watched
        self.narrowed: _Watched | None = None
        """What to watch of it from now on; None where autograd saves nothing of it."""
        self.inside = set(watched.nodes)
        self.sources: dict[fx.Node, Any] = {}
        self.given: set[int] = set()
        """Memory of the sources."""
        self.notes: list[Note] = []
        self.layouts: dict[fx.Node, Layout] = {}

    def reads(self, made: Set[fx.Node], kept: Set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """What making nodes reads, sources and those of the region that are `kept`; what runs."""
        nodes = ancestors(made, lambda node: node in self.inside and node not in kept)
        return {x for node in nodes for x in node.all_input_nodes} - nodes, nodes


class _Selective(SavedBytes):
    """The hooks. What a region has made is noted, what nobody knows is held as it is.

    `narrows`: the run tells what to watch from now on.
    """

    def __init__(
        self, exclude: Known, nodes: Sequence[fx.Node], regions: Sequence[_Running], *,
        narrows: bool,
    ) -> None:  # fmt: skip
        super().__init__(exclude)
        self.nodes = nodes
        self.regions = regions
        self.narrows = narrows
        self._owners: dict[int, tuple[Any, _Running, fx.Node]] = {}
        self._kept: dict[int, Any] = {}
        self._unclear: list[Note] | None = None

    def _pack(self, tensor: Tensor) -> Held:
        key = _torch.storage_key(tensor)
        _, running, owner = self._owners.get(key, (None, None, None))
        known = key in self._known or (running is None and self._unclear is None)
        if known or tensor.is_conj() or tensor.is_neg():
            return self._hold(tensor)
        note = Note(tensor)
        note.version = _torch.version(tensor)
        if self._counts:
            self._held.add(note)
        if running is None or owner is None:
            assert self._unclear is not None
            self._unclear.append(note)
        elif running.layouts[owner].dtype == note.layout.dtype:
            note.owner = owner
            running.notes.append(note)
        else:
            self._settle_as_it_is(note)
        return note

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # Autograd holds these hooks until it has asked for the last tensor, and then nobody.
        self.regions, self._unclear = (), None
        self._owners.clear()

    def _hold(self, tensor: Tensor) -> Held:
        self._keep(tensor)
        return super()._pack(tensor)

    def _keep(self, tensor: Tensor) -> None:
        """The memory of a tensor is kept in any case, for as long as it is there."""
        if tensor.layout is torch.strided:
            self._kept[_torch.storage_key(tensor)] = weakref.ref(tensor.untyped_storage())

    def _is_kept(self, key: int) -> bool:
        return key in self._known or (key in self._kept and self._kept[key]() is not None)

    def _settle_as_it_is(self, note: Note) -> None:
        note.settled = True
        self._keep(note.packed)
        if self._outer is not None:
            note.packed = self._outer[0](note.packed)

    def _unpack(self, held: Held) -> Tensor:
        if isinstance(held, Note) and held.recipe is not None:
            return held.recipe.tensor(held)
        if isinstance(held, Note) and not held.settled:  # a backward within the stage
            return self._unchanged(held)
        return super()._unpack(held)

    # ---- what the stage's code says ------------------------------------------------------

    def source(self, region: int, place: int, value: Any) -> None:
        """A region reads a value from outside: that of the node at `place`."""
        running = self.regions[region]
        running.sources[self.nodes[place]] = value
        running.given.update(
            _torch.storage_key(x) for x in tensors_of(value) if x.layout is torch.strided
        )

    def begin(self) -> None:
        """A node of a region runs: what it saves of memory that is new may be its result."""
        self._unclear = []

    def end(self, region: int, place: int, value: Any) -> None:
        """The node at `place`, of a region, has run: new memory of its value is the node's."""
        node, running = self.nodes[place], self.regions[region]
        unclear, self._unclear = self._unclear or [], None
        key = None
        if isinstance(value, Tensor) and value.layout is torch.strided:
            key = _torch.storage_key(value)
            if not (key in self._owners or key in running.given or self._is_kept(key)):
                owners = self._owners
                gone = weakref.ref(value.untyped_storage(), lambda _: owners.pop(key, None))
                owners[key] = (gone, running, node)
                running.layouts[node] = Layout.of(value)
        for note in unclear:
            if (
                note.storage == key
                and node in running.layouts
                and running.layouts[node].dtype == note.layout.dtype
            ):
                note.owner = node
                running.notes.append(note)
            else:
                self._settle_as_it_is(note)

    def settle(self, region: int) -> None:
        """Nothing reads a region any more: decide what is kept of it."""
        running = self.regions[region]
        for key in [key for key, (_, whose, _) in self._owners.items() if whose is running]:
            del self._owners[key]
        owners = frozenset(note.owner for note in running.notes if note.owner is not None)
        dropped = self._made_again(running, owners)
        recipe = self._recipe(running, owners, dropped) if dropped else None
        if owners and self.narrows:
            running.narrowed = running.watched.narrow(owners)
        for note in running.notes:
            if recipe is None or note.owner not in dropped:
                self._settle_as_it_is(note)
            else:
                note.packed, note.recipe, note.settled = None, recipe, True
                self._held.discard(note)
                recipe.notes.add(note)
        running.sources.clear()
        running.notes.clear()

    def _made_again(self, running: _Running, owners: Owners) -> Owners:
        """Which of the nodes whose memory is saved are made again.

        Decided once for each set of nodes, except where the caller has hooks, which have a say.
        """
        if self._outer is not None:
            return self._least(running, owners)
        choices = running.watched.choices
        if owners not in choices:
            choices[owners] = self._least(running, owners)
        return choices[owners]

    def _least(self, running: _Running, owners: Owners) -> Owners:
        """Those of the owners of saved memory whose dropping leaves the least to keep.

        Either all of them, from the region's sources, or those that can be made of the others and
        of sources that are kept anyway.
        """
        kept = set(owners)
        for node in reversed(running.watched.nodes):
            if node in owners:
                read, _ = running.reads({node}, kept - {node})
                if not self._cost(running, read - kept) and self._restores(running, read):
                    kept.discard(node)
        read, _ = running.reads(owners, set())
        keeping = sum(running.layouts[node].nbytes for node in kept)
        if _saves(self._cost(running, read), keeping) and self._restores(running, read):
            return owners
        return owners - kept

    def _cost(self, running: _Running, sources: set[fx.Node]) -> int:
        """Bytes of the sources that are not kept anyway."""
        storages = {
            _torch.storage_key(x): x.untyped_storage().nbytes()
            for node in sources
            for x in tensors_of(running.sources[node])
        }
        return sum(nbytes for key, nbytes in storages.items() if not self._is_kept(key))

    def _restores(self, running: _Running, read: set[fx.Node]) -> bool:
        """Whether hooks of the caller, which may copy, give back what lies in memory as it did."""
        if self._outer is None:
            return True
        sources = (x for node in read for x in tensors_of(running.sources.get(node)))
        layouts = [Layout.of(x) for x in sources]
        layouts += [running.layouts[node] for node in read if node in running.layouts]
        return all(layout.copies_alike() for layout in layouts)

    def _recipe(self, running: _Running, owners: Owners, made: Owners) -> Recipe:
        """How to make some nodes of a region's sources, and of those of its own that are kept."""
        remakes = running.watched.remakes
        if (owners, made) not in remakes:
            read, nodes = running.reads(made, owners - made)
            remakes[owners, made] = Remake(
                [node for node in self.nodes if node in read],
                [node for node in running.watched.nodes if node in nodes],
            )
        remake, values = remakes[owners, made], dict(running.sources)
        for note in running.notes:
            owner = note.owner
            if owner is not None and owner not in made:
                layout = running.layouts[owner]
                values[owner] = note.packed.as_strided(layout.size, layout.stride, layout.offset)
        device = running.notes[0].packed.device.type
        return Recipe(
            remake,
            [self._source(values[node]) for node in remake.read],
            running.layouts,
            same_autocast(device),
        )

    def _source(self, value: Any) -> Callable[[], Any]:
        """Hold what a region is made of; a function that gives it back."""
        if isinstance(value, (list, tuple)):
            parts, kind = [self._source(x) for x in value], type(value)
            return lambda: kind(part() for part in parts)
        if not isinstance(value, Tensor):
            return lambda: value
        held, layout = self._hold(value), Layout.of(value)

        def given() -> Tensor:
            found = self._unpack(held)
            if found.stride() == layout.stride:
                return found
            return found.new_empty_strided(layout.size, layout.stride).copy_(found)

        return given


def _saves(more: int, less: int) -> bool:
    """Whether keeping `more` bytes in the place of `less` is worth it."""
    return more < less


def _instrumented(nodes: Sequence[fx.Node], regions: Sequence[_Watched]) -> fx.Graph:
    """The stage as a function of the hooks and of a boxed list; it tells the hooks of regions.

    Before a node of a region runs, the hooks are given what it reads from outside; if autograd may
    save the node's memory, they are told when it starts and what it made. After the last reader of
    a region they settle it.
    """
    graph = fx.Graph()
    hooks = graph.placeholder("hooks")
    copies = unpack_list(graph, [node for node in nodes if node.op == "placeholder"])
    region_of = {node: region for region, watched in enumerate(regions) for node in watched.nodes}
    owners = {node for watched in regions for node in watched.owners}
    ending: dict[fx.Node, list[int]] = {}
    for region, watched in enumerate(regions):
        ending.setdefault(watched.last, []).append(region)
    place = {node: index for index, node in enumerate(nodes)}
    given: set[tuple[int, fx.Node]] = set()
    for node in nodes:
        region = region_of.get(node)
        if region is not None:
            for operand in node.all_input_nodes:
                if region_of.get(operand) != region and (region, operand) not in given:
                    given.add((region, operand))
                    args = (hooks, region, place[operand], copies[operand])
                    graph.call_method("source", args)
        if region is not None and node in owners:
            graph.call_method("begin", (hooks,))
            copies[node] = graph.node_copy(node, copies.__getitem__)
            graph.call_method("end", (hooks, region, place[node], copies[node]))
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        for ended in ending.get(node, ()):
            graph.call_method("settle", (hooks, ended))
    return graph
