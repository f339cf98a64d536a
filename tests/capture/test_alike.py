"""Layers that look alike are traced once, and the graph is that of a plain capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from models import batch, tiny_llama, tiny_lora, without_casts
from torch import Tensor, fx, nn
from torch._dynamo.guards import install_guard
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

import fxseek
from fxseek import _torch
from fxseek.capture import alike, reuse
from fxseek.capture.alike import Regions
from fxseek.capture.step import SeekStep, step_of
from fxseek.inspect.explain import capture
from fxseek.passes.inline import inline

needs_regions = pytest.mark.skipif(
    not alike.overrides(), reason="this torch has no regions that are traced once"
)


def told(graph: fx.Graph) -> list[Any]:
    """What a graph does, in order: operations, operands, values, lines and modules.

    Sizes, and a weight's attributes, are told by what they are: a region makes those anew that it
    is not given, and asks for these when it begins.
    """
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    places: dict[fx.Node, str] = {}
    found = []
    for node in graph.nodes:
        value = node.meta.get("example_value")
        operands = repr(map_arg((node.args, dict(node.kwargs)), places.__getitem__))
        if isinstance(value, (torch.SymInt, torch.Size)) or node.target is torch.Size:
            places[node] = str(list(value) if isinstance(value, tuple) else value)
            continue
        if node.target is getattr:
            places[node] = operands
            continue
        places[node] = f"%{len(found)}"
        where = _torch.source_path(node) if node.op == "placeholder" else _place(node)
        what = node.target if node.op.startswith("call") else node.op
        found.append((what, operands, repr(tree_map(_shown, value)), where))
    return found


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.dtype} {value.shape} {value.stride()} {value.requires_grad}"


def _place(node: fx.Node) -> tuple[list[str], list[str]]:
    """The line of the model's source, and the path of the module."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    lines = [x for x in (node.stack_trace or "").splitlines() if x.lstrip().startswith("File")]
    return lines[-1:], paths[-1:]


def captured(
    model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, wanted: bool
) -> tuple[list[Any], Regions]:
    """The flat graph of a call, and the regions of its capture."""
    made: list[Regions] = []

    def regions(find: Callable[[], dict[nn.Module, str]], **options: bool) -> Regions:
        made.append(Regions(find if wanted else dict, **options))
        return made[-1]

    torch._dynamo.reset()
    config = fxseek.SeekConfig.make(0.5, score="random")
    with monkeypatch.context() as patched:
        patched.setattr(alike, "Regions", regions)
        found = capture(SeekStep(model, config), inputs)
    return told(inline(found.graph)), made[-1]


def regions_of(
    model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """How many layers were captured, and traced, as regions; the graph is that of a plain one."""
    graph, regions = captured(model, inputs, monkeypatch, wanted=True)
    plain, _ = captured(model, inputs, monkeypatch, wanted=False)
    assert graph == plain
    return regions.calls, regions.traced


FEW = ("llama", "mixtral")


@needs_regions
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # Jamba
@pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.sweep) for name in FAMILIES],
)
def test_families(name: str, monkeypatch: pytest.MonkeyPatch):
    family = FAMILIES[name]
    if family.refused:
        pytest.skip("cannot be trained")
    regions_of(family.make(family.attentions[0]).train(), family.batch(), monkeypatch)


def frozen(model: Any) -> None:
    model.model.layers[2].mlp.requires_grad_(False)


def dropping(model: Any) -> None:
    model.model.layers[2].self_attn.attention_dropout = 0.5


def evaluated(model: Any) -> None:
    model.model.layers[2].eval()


def other_activation(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = nn.ReLU()


def other_scale(model: Any) -> None:
    model.model.layers[2].self_attn.scaling = 0.25


def hooked(model: Any) -> None:
    model.model.layers[2].register_forward_hook(lambda module, given, result: result * 0.5)


def with_a_bias(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.bias = nn.Parameter(torch.ones(29))


def counting(model: Any) -> None:
    for at, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = Scaled(at)


class Scaled(nn.Module):
    """A number of its own in each layer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.number)


class Split(nn.Module):
    """Elements of a tuple, which are told apart by identity."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.cat([x, x.sigmoid()], -1).chunk(2, dim=-1)
        return first * second


class Writing(nn.Module):
    """A write to a value of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y += x.sigmoid()
        return y


class Keyed(nn.Module):
    """Numbers by name."""

    def __init__(self, **numbers: float) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        for name, number in self.numbers.items():
            x = (x.sigmoid() if name == "gate" else x) * number
        return x


def other_key(model: Any) -> None:
    for at, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = Keyed(**{"gate" if at == 2 else "plain": 0.5})


def other_value(model: Any) -> None:
    for at, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = Keyed(plain=0.25 if at == 2 else 0.5, gate=0.5)


def activations(kind: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.act_fn = kind()

    return change


@needs_regions
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, (4, 1)),
        (frozen, (4, 2)),
        (other_scale, (4, 2)),
        (hooked, (3, 1)),
        *(
            pytest.param(*case, marks=pytest.mark.sweep)
            for case in [
                (dropping, (4, 2)),
                (evaluated, (4, 2)),
                (other_activation, (4, 2)),
                (with_a_bias, (4, 2)),
                (counting, (4, 4)),
                (other_key, (4, 2)),
                (other_value, (4, 2)),
                (activations(lambda: Keyed(plain=0.5, gate=0.5)), (4, 1)),
                (activations(Split), (4, 1)),
                (activations(Writing), (4, 4)),
            ]
        ),
    ],
)
def test_layers_that_differ(
    change: Callable[[Any], None] | None,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
):
    model = tiny_llama(num_hidden_layers=4).train()
    if change is not None:
        change(model)
    assert regions_of(model, batch(37), monkeypatch) == expected


class Takes(nn.Module):
    """A layer that reads all that it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), 0.9))

    def forward(self, x: Tensor, *more: Any, by: Any = 1.0, **named: Any) -> Tensor:
        for place, value in enumerate((*more, by, *named.values())):
            for part in value if isinstance(value, (tuple, list)) else (value,):
                for one in part if isinstance(part, tuple) else (part,):
                    if isinstance(one, Takes):
                        x = x + one.gain * (place + 1)
                    elif isinstance(one, Tensor):
                        x = x + one * (place + 1)
                    elif isinstance(one, float):
                        x = x * one
        return x * self.gain * (2.0 if isinstance(by, list) else 1.0)


class Taking(nn.Module):
    """A norm, and layers that are called with arguments of their own."""

    def __init__(
        self, norm: nn.Module, width: int, given: Callable[[Tensor, Tensor, Any], Any]
    ) -> None:
        super().__init__()
        self.norm, self.given = norm, given
        self.layers = nn.ModuleList(Takes(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        given = self.given(x.sigmoid(), x.tanh(), self.layers)
        for layer, (args, kwargs) in zip(self.layers, given, strict=True):
            x = layer(x, *args, **kwargs)
        return x


@needs_regions
@pytest.mark.parametrize(
    ("given", "traced"),
    [
        (lambda a, b, m: [((), {"by": (a, 2.0)})] * 3, 1),
        (lambda a, b, m: [((a, a), {}), ((a, b), {}), ((b, b), {})], 2),
        (lambda a, b, m: [((), {"by": (a, a)}), ((), {"by": (a, b)}), ((), {"by": (b, b)})], 2),
        (lambda a, b, m: [((m[0],), {}), ((m[0],), {}), ((m[2],), {})], 2),
        (lambda a, b, m: [((m[1], m[1]), {}), ((m[0], m[2]), {}), ((m[0], m[1]), {})], 2),
        (lambda a, b, m: [((m[0].gain,), {}), ((m[0].gain,), {}), ((m[2].gain,), {})], 2),
        *(
            pytest.param(*case, marks=pytest.mark.sweep)
            for case in [
                (lambda a, b, m: [((a, b), {}), ((b, a), {}), ((a, a), {})], 2),
                (lambda a, b, m: [((m[2].gain,), {})] * 3, 1),
                (lambda a, b, m: [((m[2],), {})] * 3, 2),
                (lambda a, b, m: [((m[1], m[0]), {}), ((m[0], m[1]), {}), ((m[0], m[1]), {})], 2),
                (
                    lambda a, b, m: [
                        ((), {"by": (a, 2.0)}),
                        ((), {"by": [a, 2.0]}),
                        ((a, 2.0), {}),
                    ],
                    3,
                ),
                (lambda a, b, m: [((), {"by": (a, number)}) for number in (2.0, 3.0, 2.0)], 2),
                (lambda a, b, m: [((b,), {"by": x}) for x in (None, a, None)], 2),
                (lambda a, b, m: [((), {"by": ((a, b),)}), ((), {"by": (a, b)}), ((a, b), {})], 3),
                (lambda a, b, m: [((), {"a": a, "b": b}), ((), {"b": b, "a": a}), ((a,), {})], 3),
                (lambda a, b, m: [((), {"by": {"a": a}})] * 3, 1),
                (lambda a, b, m: [((a,), {"by": x}) for x in (b, b.detach() + 1, b)], 2),
            ]
        ),
    ],
)
def test_arguments_that_differ(given: Any, traced: int, monkeypatch: pytest.MonkeyPatch):
    """Dynamo alone takes a layer that was given one value twice for a layer with two."""
    model: Any = without_casts(tiny_llama(num_hidden_layers=2).double())
    model.model.norm = Taking(model.model.norm, model.config.hidden_size, given).double()
    inputs: dict[str, Any] = batch(37)
    calls, found = regions_of(model.train(), inputs, monkeypatch)
    assert (calls, found) == (5, 1 + traced)
    fxseek.compile(model, ratio=0.5, score="random")
    assert fxseek.check_gradients(model, **inputs).error <= 1e-9


def _leaves(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a kernel is for that is not installed."""
    return x.sigmoid()


class ReadsOnly(nn.Module):
    """Reads a tensor of its own, which the graph has no use for."""

    def __init__(self, width: int, kind: str, form: str) -> None:
        super().__init__()
        w = torch.ones(width)
        if kind == "buffer":
            self.register_buffer("w", w)
        else:
            self.w = nn.Parameter(w, requires_grad=kind == "trained")
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "argument":
            return _leaves(x, weight=self.w)
        if self.form == "shape":
            return x * (1 / self.w.shape[0])
        return x if self.w is None else x.tanh()


@needs_regions
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("trained", "argument"),
        ("frozen", "shape"),
        ("buffer", "none"),
        *(
            pytest.param(*case, marks=pytest.mark.sweep)
            for case in [
                ("trained", "shape"),
                ("trained", "none"),
                ("frozen", "argument"),
                ("frozen", "none"),
                ("buffer", "argument"),
                ("buffer", "shape"),
            ]
        ),
    ],
)
def test_a_tensor_that_is_only_read(kind: str, form: str, monkeypatch: pytest.MonkeyPatch):
    model: Any = without_casts(tiny_llama(num_hidden_layers=2).double())
    for layer in model.model.layers:
        layer.mlp.act_fn = ReadsOnly(29, kind, form).double()
    inputs: dict[str, Any] = batch(37)
    assert regions_of(model, inputs, monkeypatch) == (2, 1)
    fxseek.compile(model, ratio=0.5, score="random")
    assert fxseek.check_gradients(model, **inputs).error <= 1e-9
    step = step_of(model)
    assert step is not None and step._alike and len(step.recorder.steps) == 1
    last = model.model.layers[1].mlp.act_fn
    last.w.requires_grad_(kind != "trained")
    assert fxseek.check_gradients(model, **inputs).error <= 1e-9
    assert len(step.recorder.steps) == 2
    model(**inputs)
    assert len(step.recorder.steps) == 2


@needs_regions
@pytest.mark.parametrize("layers", [None, pytest.param([1, 2], marks=pytest.mark.sweep)])
def test_adapters(layers: list[int] | None, monkeypatch: pytest.MonkeyPatch):
    options = {} if layers is None else {
        "layers_to_transform": layers, "target_modules": ["q_proj", "up_proj"]
    }  # fmt: skip
    model = tiny_lora(tiny_llama(num_hidden_layers=4), **options).train()
    calls, traced = regions_of(model, batch(37), monkeypatch)
    assert (calls, traced) == ((4, 2) if layers is None else (4, 4))


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        *(
            pytest.param(x, marks=pytest.mark.sweep)
            for x in (frozen, other_activation, other_scale)
        ),
    ],
)
def test_a_layer_that_is_changed_later(change: Callable[[Any], None]):
    model = without_casts(tiny_llama(num_hidden_layers=3).double())
    fxseek.compile(model, ratio=0.5, score="random")
    inputs: dict[str, Any] = batch(37)
    before = model(**inputs).loss
    change(model)
    fxseek.resume(model, 0)
    after = model(**inputs).loss
    assert change is frozen or not torch.equal(before, after)
    assert fxseek.check_gradients(model, **inputs).error <= 1e-9


def _fails(*_: Any, **__: Any) -> bool:
    raise RuntimeError("unsupported guard")


def _guards_what_fails(self: Any, check: Any) -> None:
    """Guards are built when the graph has been compiled."""
    install_guard(self._moved(check.guard.originating_source).make_guard(_fails))


@needs_regions
@pytest.mark.parametrize(
    ("name", "method"), [("settled", _fails), ("_install", _guards_what_fails)]
)
def test_a_capture_that_fails_with_regions(
    name: str, method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reuse.Reuse, name, method)
    model = without_casts(tiny_llama(num_hidden_layers=3).double())
    fxseek.compile(model, ratio=0.5, score="random")
    inputs: dict[str, Any] = batch(37)
    model(**inputs).loss.backward()
    assert fxseek.check_gradients(model, **inputs).error <= 1e-9
    step = step_of(model)
    assert step is not None and not step._alike and len(step.recorder.steps) == 1
