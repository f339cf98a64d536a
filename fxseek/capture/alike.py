"""Layers that look alike are traced once, where Dynamo can take one for another (torch 2.13, 2.14).

A module that stands in a `ModuleList` beside others of its class is captured as a region of its own
(`torch.compiler.nested_compile_region`). Dynamo takes the region of an earlier layer for it where
all that it has read of that one, its guards, holds of this one too: classes, flags, numbers, hooks,
and what its tensors are. `fxseek.passes.inline` puts the regions in the place of their calls, so
that the passes see the graph of a plain capture.

Dynamo's own check leaves things out. `_fingerprint` tells arguments apart that are one value for
one layer and two for another; `_Reuse` looks at guards on what no variable stands for, objects that
must be one and the same, arguments that are a layer's own, numbers of a layer that are inputs of
the graph, and regions that write or whose sizes depend on data. And Dynamo does not guard a layer
that it has not traced: a hook that is put on it later, say, would not count. `_Reuse` guards it as
the first is guarded.

Where a capture fails in this way, `fxseek.capture.step` captures again without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.torch_version import TorchVersion

from fxseek.capture.stand_ins import StandIn
from fxseek.errors import GraphError
from fxseek.passes.facts import example, tensors_of
from fxseek.passes.inline import AS_MODULES, AsModules
from fxseek.passes.writes import write_of

__all__ = ["Regions", "alike_layers", "overrides", "repeated"]


class Regions:
    """The layers that are captured as regions: each with its path in the model.

    `begun`: a region has been entered; `calls`: how many calls of regions were captured; `traced`:
    how many regions were traced for it.
    """

    def __init__(self, find: Callable[[], dict[nn.Module, str]]) -> None:
        self._find = find
        self.calls = self.traced = 0
        self.begun = self.inside = False
        self._first: dict[fx.GraphModule, nn.Module] = {}
        self._traced: dict[fx.GraphModule, _Traced] = {}

    @functools.cached_property
    def layers(self) -> dict[nn.Module, str]:
        """Looked for by a capture alone: most steps capture nothing."""
        return self._find()

    def first(self, body: fx.GraphModule, layer: nn.Module) -> nn.Module:
        """The layer that a body was traced for: this one, if nothing was said before."""
        self.calls += 1
        self.traced += body not in self._first
        return self._first.setdefault(body, layer)

    def traced_by(self, entry: Any, make: Callable[[], _Traced]) -> _Traced:
        """What is known of a traced region."""
        if entry.body_gmod not in self._traced:
            self._traced[entry.body_gmod] = make()
        return self._traced[entry.body_gmod]


class _Current(threading.local):
    regions: Regions | None = None


_CURRENT = _Current()


@contextlib.contextmanager
def alike_layers(model: nn.Module, *, wanted: bool = True) -> Iterator[Regions]:
    """Let captures in this thread meanwhile trace alike layers once; nothing where not `wanted`."""
    before = _CURRENT.regions
    _CURRENT.regions = regions = Regions(functools.partial(repeated, model) if wanted else dict)
    try:
        yield regions
    finally:
        _CURRENT.regions = before


def repeated(model: nn.Module) -> dict[nn.Module, str]:
    """The layers of a model that may look alike, with their paths; none inside another.

    They have siblings of their class in a `ModuleList`, and parameters. One with hooks is left out:
    what a hook keeps of a value must come from the graph itself.
    """
    found: dict[nn.Module, str] = {}
    inside: set[nn.Module] = set()
    for path, parent in model.named_modules():
        if not isinstance(parent, nn.ModuleList) or parent in inside:
            continue
        kinds = [type(child) for child in parent]
        for name, child in parent.named_children():
            if kinds.count(type(child)) < 2 or next(child.parameters(), None) is None:
                continue
            within = list(child.modules())
            inside.update(within)
            if not any(map(_hooked, within)):
                found[child] = f"{path}.{name}"
    return found


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _call_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


# ---- the patches ---------------------------------------------------------------------------


def overrides() -> list[StandIn]:
    """Methods of Dynamo, and what makes those that take their place; none in another torch."""
    if TorchVersion(torch.__version__) < "2.13":
        return []
    try:
        from torch._dynamo.variables import invoke_subgraph
        from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable as Module

        assert hasattr(invoke_subgraph, "is_reusable")
        region = torch.compiler.nested_compile_region(_call_layer, max_reuse_entries=_MOST)  # type: ignore[call-arg]
    except (ImportError, AssertionError, TypeError):
        return []

    def called(plain: Any) -> Any:
        def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
            regions = _CURRENT.regions
            if (
                regions is None
                or regions.inside
                or self.source is None
                or self.value not in regions.layers
            ):
                return plain(self, tx, args, kwargs)
            return _as_region(region, regions, self, tx, args, kwargs)

        return call_function

    def checked(ask: Any) -> Any:
        def is_reusable(tx: Any, condition: Any, fingerprint: Any, entry: Any) -> bool:
            regions = _CURRENT.regions
            if regions is None:
                return ask(tx, condition, fingerprint, entry)
            inputs = fingerprint._replace(arg_sources=entry.arg_sources)  # these alone: no guards
            if not ask(tx, condition, inputs, entry):
                return False
            return _Reuse(tx, regions, condition, fingerprint, entry).settled()

        return is_reusable

    return [
        (Module, "call_function", called),
        (invoke_subgraph, "is_reusable", checked),
        (invoke_subgraph, "build_input_fingerprint", _fingerprint),
    ]


_MOST = 1_000_000
"""Regions of a model; Dynamo refuses more than 8 unless it is told."""


def _as_region(region: Any, regions: Regions, layer: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Call a layer as a region, and note on the call which layer it is of."""
    from torch._dynamo.utils import _make_inlined

    cache = tx.output.tracing_context.hop_dispatch_set_cache.get_cache(
        torch.ops.higher_order.invoke_subgraph
    )
    cache.dynamo_installed_submodules.clear()  # one that Dynamo only compares by its graph
    before = _last_call(tx.output.graph)
    regions.begun = regions.inside = True
    try:
        result = _make_inlined(tx, region)(layer, *args, **kwargs)
    finally:
        regions.inside = False
    call = _last_call(tx.output.graph)
    if call is None or call is before:
        return result  # it has done nothing
    first = regions.first(tx.output.nn_modules[call.args[1]], layer.value)
    if first is not layer.value:
        call.meta[AS_MODULES] = _in_place_of(first, layer.value, regions.layers)
    return result


def _fingerprint(ask: Any) -> Any:
    """What Dynamo knows the arguments of a region by: their nesting, and which are one value.

    It asks pytree for the nesting, whose code it traces for each call with keywords: a third of
    what a layer costs that is not traced again. And a region to which one value was given twice
    would stand for a call with two.
    """
    from torch._dynamo.variables import ListVariable, TupleVariable
    from torch._dynamo.variables.invoke_subgraph import InputFingerprint, InputTag, classify_vt

    objects = getattr(InputTag, "OBJECT", None) or InputTag.MODULE  # torch 2.14, 2.13

    def build(tx: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        leaves: list[tuple[Any, Any]] = []
        places: dict[int, int] = {}

        def nesting(value: Any) -> Any:
            value = value.realize()
            if type(value) in (ListVariable, TupleVariable):
                return type(value), *map(nesting, value.items)
            tag = classify_vt(value)
            leaves.append((tag, value))
            if tag in (None, InputTag.CONSTANT):
                return None
            one = value.value if tag is objects else value.as_proxy().node
            return places.setdefault(id(one), len(places))

        given = [nesting(x) for x in args], [(key, nesting(x)) for key, x in kwargs.items()]
        if any(tag is None for tag, _ in leaves):
            return ask(tx, args, kwargs)
        return InputFingerprint(leaves, [x.source for _, x in leaves], treespec=given)  # type: ignore[arg-type]

    return build


def _last_call(graph: fx.Graph) -> fx.Node | None:
    calls = graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    return calls[-1] if calls else None


def _in_place_of(first: nn.Module, layer: nn.Module, paths: dict[nn.Module, str]) -> AsModules:
    """What `layer` and its modules are called where the graph has `first` and those of it."""
    keys = {
        str(id(one)): str(id(other))
        for one, other in zip(first.modules(), layer.modules(), strict=True)
    }
    before, after = (".".join(paths[x].split(".")[-2:]) for x in (first, layer))
    return AsModules(keys, before, after)


class _Reuse:
    """Whether a traced region stands for another layer; where it does, that one is guarded."""

    def __init__(
        self, tx: Any, regions: Regions, condition: Any, fingerprint: Any, entry: Any
    ) -> None:
        self.tx = tx
        self.condition = condition
        self.fingerprint = fingerprint
        self.entry = entry
        pairs = zip(entry.arg_sources, fingerprint.arg_sources, strict=True)
        self.given = {old: new for old, new in pairs if old and new}
        self.moved = {old: new for old, new in self.given.items() if old != new}
        self.traced = regions.traced_by(entry, lambda: _Traced(tx, entry, set(self.moved)))
        self.of_source = dict(self.moved)
        self.values: dict[Any, Any] = {}

    def settled(self) -> bool:
        """Whether it does."""
        if not self.moved:
            return True
        if not self.traced.repeats or not self._same_constants() or self._written():
            return False
        if any(self._by_base(old) not in (old, new) for old, new in self.given.items()):
            return False  # the first layer was given what is its own, and this one was not
        moved = [
            (check, self._moved(check.guard.originating_source)) for check in self.traced.checks
        ]
        if not all(self._holds(check, source) for check, source in moved):
            return False
        for check, source in moved:
            self._install(check, source)
        return True

    def _same_constants(self) -> bool:
        """A constant is a part of the region, wherever it comes from."""
        checks = zip(self.condition.input_checks, self.fingerprint.flat_vts, strict=True)
        return all(
            _is_constant(known, given.value)
            for (tag, known), (_, given) in checks
            if tag.name == "CONSTANT"
        )

    def _written(self) -> bool:
        """Whether something of the layer was set in this capture."""
        return any(
            _is_of(source, layer)
            for source in self.tx.output.side_effects.mutated_sources
            for layer in self.moved.values()
        )

    def _moved(self, source: Any) -> Any:
        """What a source of the first layer is for this one."""
        if source not in self.of_source:
            self.of_source[source] = self._by_base(source)
        return self.of_source[source]

    def _by_base(self, source: Any) -> Any:
        if not hasattr(source, "base"):
            return source
        inner = {
            field.name: self._moved(getattr(source, field.name))
            for field in dataclasses.fields(source)
            if hasattr(getattr(source, field.name), "guard_source")
        }
        return dataclasses.replace(source, **inner)

    def _holds(self, check: _Check, source: Any) -> bool:
        try:
            value = _value(self.tx, source, self.values)
            if check.same_as is not None:
                return value is _value(self.tx, self._moved(check.same_as), self.values)
            return check.spec.eval_fn(value, check.expected)
        except Exception:  # there is no such attribute, or item
            return False

    def _install(self, check: _Check, source: Any) -> None:
        from torch._dynamo.guards import GuardBuilder, install_guard

        make = check.guard.create_fn
        if check.same_as is not None:
            make = functools.partial(make, source_b=self._moved(check.same_as))
        elif check.guard.create_fn_name() == "TENSOR_MATCH":
            if check.guard.originating_source in self.traced.inputs:
                return  # Dynamo guards it when it makes it an input of the region
            make = GuardBuilder.TENSOR_MATCH  # of its own value, not the first layer's
        guard = source.make_guard(make)
        guard.user_stack = check.guard.user_stack
        install_guard(guard)


@dataclass(frozen=True)
class _Check:
    """A guard of a traced layer: what Dynamo asks of the value, or which object it must be."""

    guard: Any
    spec: Any
    expected: Any
    same_as: Any


class _Traced:
    """A traced region: the guards of its layer, by `sources`, and whether it may be repeated."""

    def __init__(self, tx: Any, entry: Any, sources: set[Any]) -> None:
        self.sources = sources
        self.checks: list[_Check] = []
        self.inputs = {
            item.source for item in entry.subgraph_input_mapping if hasattr(item, "source")
        }
        nodes = entry.body_gmod.graph.nodes
        self.repeats = (
            all(map(_is_pure, nodes)) and not self._reads_numbers(tx) and self._read_guards(tx)
        )

    def _is_of(self, source: Any) -> bool:
        return any(_is_of(source, layer) for layer in self.sources)

    def _reads_numbers(self, tx: Any) -> bool:
        """Whether a number of the layer is an input of the graph: another layer has its own."""
        arguments = [node.meta.get("grapharg") for node in tx.output.placeholders]
        return any(
            argument.source is not None and self._is_of(argument.source)
            for argument in arguments
            if argument is not None and not argument.is_tensor
        )

    def _read_guards(self, tx: Any) -> bool:
        """Note the guards; answers whether all of them can be asked of another layer."""
        from torch._dynamo.guards import GUARD_VALUE_DISPATCH, GuardCheckSpec

        values: dict[Any, Any] = {}
        for guard in tx.output.guards:
            source = guard.originating_source
            if not self._is_of(source):
                continue
            other = getattr(guard.create_fn, "keywords", {}).get("source_b")
            if other is not None:
                self.checks.append(_Check(guard, None, None, other))
                continue
            spec = GUARD_VALUE_DISPATCH.get(guard.create_fn_name())
            if not isinstance(spec, GuardCheckSpec):
                return False
            expected = spec.get_metadata_fn(guard, _value(tx, source, values))
            self.checks.append(_Check(guard, spec, expected, None))
        return True


def _value(tx: Any, source: Any, values: dict[Any, Any]) -> Any:
    """What a source is of; `values` keeps those of its bases."""
    root = tx.output.root_tx
    return source.get_value({"G": root.f_globals, "L": root.f_locals}, {}, values)


def _is_of(source: Any, base: Any) -> bool:
    """Whether a source is something of `base`, or `base` itself."""
    while source != base:
        source = getattr(source, "base", None)
        if source is None:
            return False
    return True


def _is_constant(known: Any, value: Any) -> bool:
    """Whether a value is what Dynamo noted: that value, or, since torch 2.14, its type and it."""
    return (type(value), value) in (known, (type(known), known))


def _is_pure(node: fx.Node) -> bool:
    """Whether a node writes to nothing, and makes no size that depends on data.

    The values of two layers would share what is written, and the size.
    """
    try:
        if write_of(node) is not None:
            return False
    except GraphError:
        return False
    value = example(node)
    sizes = [value] if isinstance(value, _NUMBERS) else []
    for tensor in tensors_of(value):
        sizes += [*tensor.shape, *tensor.stride(), tensor.storage_offset()]
    return not any(isinstance(x, _NUMBERS) and has_free_unbacked_symbols(x) for x in sizes)


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
