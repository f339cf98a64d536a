"""Layers that look alike are traced once, where Dynamo can take one for another (torch 2.13, 2.14).

A module that stands in a `ModuleList` beside others of its class is captured as a region of its own
(`torch.compiler.nested_compile_region`). Dynamo takes the region of an earlier layer for it where
all that it has read of that one, its guards, holds of this one too: classes, flags, numbers, hooks,
and what its tensors are. `fxseek.passes.inline` puts the regions in the place of their calls, so
that the passes see the graph of a plain capture.

Dynamo's own check leaves things out. `_fingerprint` tells arguments apart that are one value for
one layer and two for another; `fxseek.capture.reuse` asks for the rest.

Where a capture fails in this way, `fxseek.capture.step` captures again without.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.torch_version import TorchVersion

from fxseek.capture.reuse import Reuse, Traced
from fxseek.capture.stand_ins import StandIn
from fxseek.passes.inline import AS_MODULES, AsModules

__all__ = ["Regions", "alike_layers", "overrides", "repeated"]


class Regions:
    """The layers that are captured as regions: each with its path in the model.

    `begun`: a region has been entered; `calls`: how many calls of regions were captured; `traced`:
    how many regions were traced for it. `guarded`: layers that are not traced are guarded too.
    `known`: what is known of each traced region, by its graph.
    """

    def __init__(self, find: Callable[[], dict[nn.Module, str]], *, guarded: bool) -> None:
        self._find = find
        self.guarded = guarded
        self.calls = self.traced = 0
        self.begun = self.inside = False
        self._first: dict[fx.GraphModule, nn.Module] = {}
        self.known: dict[fx.GraphModule, Traced] = {}

    @functools.cached_property
    def layers(self) -> dict[nn.Module, str]:
        """Looked for by a capture alone: most steps capture nothing."""
        return self._find()

    def first(self, body: fx.GraphModule, layer: nn.Module) -> nn.Module:
        """The layer that a body was traced for: this one, if nothing was said before."""
        self.calls += 1
        self.traced += body not in self._first
        return self._first.setdefault(body, layer)


class _Current(threading.local):
    regions: Regions | None = None


_CURRENT = _Current()


@contextlib.contextmanager
def alike_layers(
    model: nn.Module, *, wanted: bool = True, guarded: bool = True
) -> Iterator[Regions]:
    """Let captures in this thread meanwhile trace alike layers once; nothing where not `wanted`.

    `guarded`: what is captured is called again, and must be captured anew where a layer changes.
    """
    before = _CURRENT.regions
    find = functools.partial(repeated, model) if wanted else dict
    _CURRENT.regions = regions = Regions(find, guarded=guarded)
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
            reuse = Reuse(tx, regions.known, condition, fingerprint, entry)
            return reuse.settled(guarded=regions.guarded)

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
