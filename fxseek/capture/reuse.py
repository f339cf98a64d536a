"""Whether a region that Dynamo has traced for one layer stands for another (torch 2.13, 2.14).

Dynamo's own check leaves out guards on what no variable stands for, objects that must be one and
the same, arguments that are a layer's own, numbers of a layer that are inputs of the graph, and
regions that write or whose sizes depend on data. And Dynamo does not guard a layer that it has not
traced: a hook that is put on it later, say, would not count. `Reuse` guards it as the first is
guarded.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from fxseek.errors import GraphError
from fxseek.passes.facts import example, tensors_of
from fxseek.passes.writes import write_of

__all__ = ["Reuse", "Traced"]


class Reuse:
    """Whether a traced region stands for another layer; where it does, that one is guarded."""

    def __init__(
        self,
        tx: Any,
        known: dict[fx.GraphModule, Traced],
        condition: Any,
        fingerprint: Any,
        entry: Any,
    ) -> None:
        self.tx = tx
        self.condition = condition
        self.fingerprint = fingerprint
        self.entry = entry
        pairs = zip(entry.arg_sources, fingerprint.arg_sources, strict=True)
        self.given = {old: new for old, new in pairs if old and new}
        self.moved = {old: new for old, new in self.given.items() if old != new}
        if entry.body_gmod not in known:
            known[entry.body_gmod] = Traced(tx, entry, set(self.moved))
        self.traced = known[entry.body_gmod]
        self.of_source = dict(self.moved)
        self.by_key: dict[Any, Any] = {}

    @functools.cached_property
    def values(self) -> dict[Any, Any]:
        """By which a source of the first layer has the value of what it is for this one."""
        return {old: _value(self.tx, new, {}) for old, new in self.moved.items()}

    def settled(self, *, guarded: bool) -> bool:
        """Whether it does; `guarded`: what is captured is called again."""
        if not self.moved:
            return True
        if not self.traced.repeats or not self._same_constants() or self._written():
            return False
        if any(self._by_base(old) not in (old, new) for old, new in self.given.items()):
            return False  # the first layer was given what is its own, and this one was not
        if not all(map(self._holds, self.traced.checks)):
            return False
        if guarded:
            for check in self.traced.checks:
                self._install(check)
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

    def _value(self, source: Any) -> Any:
        """The value of what a source of the first layer is for this one."""
        if source not in self.traced.keyed:
            return _value(self.tx, source, self.values)
        return _value(self.tx, self._moved(source), self.by_key)

    def _holds(self, check: _Check) -> bool:
        try:
            value = self._value(check.guard.originating_source)
            if check.same_as is not None:
                return value is self._value(check.same_as)
            return check.spec.eval_fn(value, check.expected)
        except Exception:  # there is no such attribute, or item
            return False

    def _install(self, check: _Check) -> None:
        from torch._dynamo.guards import GuardBuilder, install_guard

        make = check.guard.create_fn
        if check.same_as is not None:
            make = functools.partial(make, source_b=self._moved(check.same_as))
        elif check.guard.create_fn_name() == "TENSOR_MATCH":
            if check.guard.originating_source in self.traced.inputs:
                return  # Dynamo guards it when it makes it an input of the region
            make = GuardBuilder.TENSOR_MATCH  # of its own value, not the first layer's
        guard = self._moved(check.guard.originating_source).make_guard(make)
        guard.user_stack = check.guard.user_stack
        install_guard(guard)


@dataclass(frozen=True)
class _Check:
    """A guard of a traced layer: what Dynamo asks of the value, or which object it must be."""

    guard: Any
    spec: Any
    expected: Any
    same_as: Any


class Traced:
    """A traced region: the guards of its layer, by `sources`, and whether it may be repeated."""

    def __init__(self, tx: Any, entry: Any, sources: set[Any]) -> None:
        self.sources = sources
        self.checks: list[_Check] = []
        self.keyed: set[Any] = set()
        """Sources that are found by a key that is a source itself, which may be a layer's own."""
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
            self.keyed |= {x for x in (source, other) if not _only_bases(x)}
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
    """What a source is of; `values` keeps those of its bases.

    As `Source.get_value`, which compiles the expression each time.
    """
    if source in values:
        return values[source]
    root = tx.output.root_tx
    scope = {"G": root.f_globals, "L": root.f_locals}
    base = getattr(source, "base", None)
    if base is None:
        return source.get_value(scope, {}, values)
    given = {"base": _value(tx, base, values)}
    values[source] = found = eval(_expression(source._name_template), scope, given)
    return found


@functools.lru_cache(4096)
def _expression(template: str) -> CodeType:
    return compile(template.format("base"), "<source>", "eval")


@functools.cache
def _sources_in(kind: type) -> tuple[str, ...]:
    """The fields of a kind of source that may be sources themselves, beside its base."""
    return tuple(x.name for x in dataclasses.fields(kind) if x.name not in ("base", "member"))


def _only_bases(source: Any) -> bool:
    """Whether a source is reached from its first base by names and numbers alone."""
    while hasattr(source, "base"):
        if any(hasattr(getattr(source, x), "guard_source") for x in _sources_in(type(source))):
            return False
        source = source.base
    return True


def _is_of(source: Any, base: Any) -> bool:
    """Whether a source is something of `base`, or `base` itself."""
    key = hash(base)  # sources keep theirs
    while hash(source) != key or source != base:
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
