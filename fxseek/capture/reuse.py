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

    def settled(self, *, guarded: bool) -> bool:
        """Whether it does; `guarded`: what is captured is called again."""
        if not self.moved:
            return True
        if not self.traced.repeats or not self._same_constants() or self._written():
            return False
        if any(self._by_base(old) not in (old, new) for old, new in self.given.items()):
            return False  # the first layer was given what is its own, and this one was not
        if not self._hold():
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

    def _hold(self) -> bool:
        """Whether this layer has all that is guarded of the first one."""
        scope, found = _scope(self.tx), []
        try:
            for base, step in self.traced.steps:
                if base is None:
                    found.append(self._moved(step).get_value(scope, {}, {}))
                else:
                    found.append(eval(step, scope, {"base": found[base]}))
            return all(
                found[check.at] is found[check.same]
                if check.same is not None
                else check.spec.eval_fn(found[check.at], check.expected)
                for check in self.traced.checks
            )
        except Exception:  # there is no such attribute, or item
            return False

    def _install(self, check: _Check) -> None:
        from torch._dynamo.guards import GuardBuilder, install_guard

        make = check.guard.create_fn
        if check.same is not None:
            make = functools.partial(make, source_b=self._moved(make.keywords["source_b"]))
        elif check.guard.create_fn_name() == "TENSOR_MATCH":
            source = check.guard.originating_source
            if source in self.traced.inputs:
                return  # Dynamo guards it when it makes it an input of the region
            known = self.tx.output.input_source_to_sizes_strides
            if source in known:  # this layer's is of that size, as _hold() has found
                known.setdefault(self._moved(source), known[source])
            make = GuardBuilder.TENSOR_MATCH  # of its own value, not the first layer's
        guard = self._moved(check.guard.originating_source).make_guard(make)
        guard.user_stack = check.guard.user_stack
        install_guard(guard)


@dataclass(frozen=True)
class _Check:
    """A guard of a traced layer: what Dynamo asks of a value, or which other one it must be.

    `at`, `same`: by which of the `steps` the values are found.
    """

    guard: Any
    at: int
    spec: Any = None
    expected: Any = None
    same: int | None = None


class Traced:
    """A traced region: the guards of its layer, by `sources`, and whether it may be repeated."""

    def __init__(self, tx: Any, entry: Any, sources: set[Any]) -> None:
        self.sources = sources
        self.checks: list[_Check] = []
        self.steps: list[tuple[int | None, Any]] = []
        """How values are found: by an expression of that of an earlier step, or by a source."""
        self.step_of: dict[Any, int] = {}
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

        scope, values = _scope(tx), {}
        for guard in tx.output.guards:
            source = guard.originating_source
            if not self._is_of(source):
                continue
            other = getattr(guard.create_fn, "keywords", {}).get("source_b")
            at = self._step(source)
            if other is not None:
                self.checks.append(_Check(guard, at, same=self._step(other)))
                continue
            spec = GUARD_VALUE_DISPATCH.get(guard.create_fn_name())
            if not isinstance(spec, GuardCheckSpec):
                return False
            expected = spec.get_metadata_fn(guard, source.get_value(scope, {}, values))
            self.checks.append(_Check(guard, at, spec, expected))
        return True

    def _step(self, source: Any) -> int:
        """By which step the value of a source is found.

        As `Source.get_value` does, which compiles the expression each time. A source by a key that
        is a source itself, and what the layers are found by, are asked for their values.
        """
        if source not in self.step_of:
            fields = [x.name for x in dataclasses.fields(source) if x.name != "base"]
            keyed = any(hasattr(getattr(source, name), "guard_source") for name in fields)
            if keyed or source in self.sources or not hasattr(source, "base"):
                step = (None, source)
            else:
                expression = source._name_template.format("base")
                step = (self._step(source.base), compile(expression, "<source>", "eval"))
            self.step_of[source] = len(self.steps)
            self.steps.append(step)
        return self.step_of[source]


def _scope(tx: Any) -> dict[str, Any]:
    """What the expressions of sources are of."""
    root = tx.output.root_tx
    return {"G": root.f_globals, "L": root.f_locals}


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
