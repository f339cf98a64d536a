"""Writes in place: as they are in eager mode, or a GraphError that names the line. Never wrong."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    BATCH,
    TOKENS,
    WIDTH,
    Model,
    assert_exact,
    assert_exact_step,
    inputs_of,
    masked_gradients,
    model_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect.compare import compare

# ---- writes that become new values ---------------------------------------------------------------


def add_in_place(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y += m.scale
    return y * x


def chained_methods(m: Model, x: Tensor) -> Tensor:
    y = x * 2
    y.mul_(m.scale).add_(x).sub_(0.5)
    return y


def all_operators(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y += 1
    y -= m.scale
    y *= x
    y /= 3
    y **= 2
    y %= 0.7
    return y


def product_in_place(m: Model, x: Tensor) -> Tensor:
    y = x * 2
    y @= m.first.weight
    return y


def features(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y[:, :, 1:3] = x[:, :, 2:4]
    y[..., 0] = 0.5
    y[:, :, -1] = m.scale[0]
    return y


def features_added(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y[..., 1:3] += x[..., :2]
    y[:, :, 0] *= 2
    return y


def tokens_shifted(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y[:, 1:] = x[:, :-1]
    return y + x


def first_token(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y[:, 0] = y[:, 1] * 2
    y[:, -1] += x[:, 0]
    return y


def by_mask(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y[x > 0.2] = 0.7
    y.masked_fill_(x < -0.2, 0.1)
    return y + x


def by_own_mask(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.masked_fill_(y > 0, 0.1)
    return y + x


def by_index(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y[torch.arange(x.shape[0]), torch.zeros(x.shape[0], dtype=torch.long)] = x[:, 2]
    y.index_add_(1, torch.tensor([0, 3]), x[:, :2])
    return y + x


def added_by_index(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    index = torch.zeros(x.shape, dtype=torch.long)
    y.scatter_add_(1, index, x)
    return y


def put_by_index(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.index_put_((torch.arange(x.shape[0]),), x, accumulate=True)
    return y


def into_zeros(m: Model, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, ::2] = x[:, ::2] * m.scale
    y[:, 1::2] = x[:, 1::2]
    return y + x


def into_empty(m: Model, x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    for i in range(WIDTH):
        y[..., i] = x[..., -i - 1] * m.scale[i]
    return y


def copied(m: Model, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y.copy_(x * m.scale)
    return y + x


def copied_into_narrower(m: Model, x: Tensor) -> Tensor:
    y = torch.empty_like(x, dtype=torch.float32)
    y.copy_(m.scale.detach())
    return y.double() * x


def zeroed(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    z = y.clone()
    z.zero_()
    w = y.clone()
    w.fill_(0.3)
    return y + z + w


def filled_by_tensor(m: Model, x: Tensor) -> Tensor:
    y = x.clone()
    y.fill_(m.scale[1])
    return y + x


def scan_in_place(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.cumsum_(1)
    return y


def clamped(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.clamp_(min=-0.3, max=0.4)
    torch.relu_(y)
    return y


def clone_first(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    z = y.clone()
    z += 1
    return y * z


def both_names(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    z = y.add_(x)
    w = z.mul_(2)
    return y + z * w


def result_and_operand(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    z = F.selu(y, True)
    return y * z + x


def view_after(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y += 1
    z = y.view(-1, WIDTH)
    return (z * z).view(x.shape) + y


def positions(m: Model, x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    at += 1
    at.clamp_(max=5)
    return x + m.embed(at)


def mask_of_constants(m: Model, x: Tensor) -> Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype)
    mask.triu_(1)
    mask = mask[None].repeat(x.shape[0], 1, 1)
    mask[:, :, 0] = 0.0
    scores = x @ (x * m.scale).transpose(1, 2)
    scores += mask
    return scores.softmax(-1) @ x


def compared(m: Model, x: Tensor) -> Tensor:
    y = x.detach().clone()
    y.gt_(0.1)
    z = x.detach().clone()
    z.logical_not_()
    return x * y + z


def another_dtype(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y += m.scale.float()
    y[:, :, 0] = x[:, :, 1].float()
    return y


def added_without_grad(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
        y += 1
    return y * x


HANDLED = [
    add_in_place,
    chained_methods,
    all_operators,
    product_in_place,
    features,
    features_added,
    tokens_shifted,
    first_token,
    by_mask,
    by_own_mask,
    by_index,
    added_by_index,
    put_by_index,
    into_zeros,
    into_empty,
    copied,
    copied_into_narrower,
    zeroed,
    filled_by_tensor,
    scan_in_place,
    clamped,
    clone_first,
    both_names,
    result_and_operand,
    view_after,
    positions,
    mask_of_constants,
    another_dtype,
    compared,
    added_without_grad,
]


@pytest.mark.parametrize("body", HANDLED, ids=lambda body: body.__name__)
def test_writes_that_become_new_values(body):
    assert_exact(model_of(body))


ACTIVATIONS = [
    nn.ReLU(True),
    nn.ReLU6(True),
    nn.LeakyReLU(0.2, True),
    nn.ELU(0.7, True),
    nn.SELU(True),
    nn.CELU(0.5, True),
    nn.SiLU(True),
    nn.Mish(True),
    nn.Hardtanh(-0.3, 0.4, True),
    nn.Hardswish(True),
    nn.Hardsigmoid(True),
    nn.Threshold(0.1, 0.05, True),
    nn.Dropout(0.0, True),
    nn.RReLU(0.25, 0.25, True),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=lambda layer: type(layer).__name__)
def test_layers_in_place(layer):
    def body(m: Model, x: Tensor) -> Tensor:
        y = x * m.scale
        z = m.layers[0](y)
        return y * z + x

    assert_exact(model_of(body, layer))


# ---- writes that are refused --------------------------------------------------------------------


def view_then_base(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    v = y[:, :3]
    v += 1  # here
    return y


def base_then_view(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    v = y.view(-1, WIDTH)
    y += 1  # here
    return v.view(x.shape)


def part_of_a_part(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y[:, 0][:, 1] = 0  # here
    return y


def through_detach(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.detach().mul_(2)  # here
    return y


def through_data(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.data.mul_(2)  # here
    return y


def transposed_view(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    v = y.mT
    v[:, 0] = 0  # here
    return y


def other_half(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    a, b = y[..., :3], y[..., 3:]
    a += 1  # here
    return b.repeat(1, 1, 2)


def buffer_counts(m: Model, x: Tensor) -> Tensor:
    m.count += 1  # here
    return x * m.count


def buffer_by_method(m: Model, x: Tensor) -> Tensor:
    m.count.mul_(0.9).add_(x.detach().mean())  # here
    return x


def buffer_by_view(m: Model, x: Tensor) -> Tensor:
    flat = m.count.view(-1)
    flat.add_(1)  # here
    return x


def buffer_by_index(m: Model, x: Tensor) -> Tensor:
    m.count[0, 1] = 3.0  # here
    return x


def buffer_row(m: Model, x: Tensor) -> Tensor:
    row = m.count[0]
    row[1] = 3.0  # here
    return x


def buffer_with_gradient(m: Model, x: Tensor) -> Tensor:
    m.count.add_(x.mean())  # here
    return x


def parameter_that_was_read(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    with torch.no_grad():
        m.scale.mul_(0.5)  # here
    return y


def parameter_by_a_value(m: Model, x: Tensor) -> Tensor:
    m.scale.data.add_(x.detach().mean())  # here
    return x * m.scale


def noise(m: Model, x: Tensor) -> Tensor:
    return x + torch.empty_like(x).uniform_()  # here


def list_in_place(m: Model, x: Tensor) -> Tensor:
    y, z = x * m.scale, x + 1
    torch._foreach_add_([y, z], 1.0)  # type: ignore[attr-defined]  # here
    return y + z


@torch.library.custom_op("fxseek_tests::double_in_place", mutates_args={"x"})
def double_in_place(x: Tensor) -> None:
    x.mul_(2)


def unknown_operation(m: Model, x: Tensor) -> Tensor:
    y = x.detach() * 3
    double_in_place(y)  # here
    return x * y


REFUSED = [
    through_detach,
    through_data,
    transposed_view,
    buffer_with_gradient,
    parameter_that_was_read,
    parameter_by_a_value,
    noise,
    list_in_place,
    unknown_operation,
]


def rows_and_columns(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.transpose(1, 2)[:, 1:3].mul_(2)
    y.permute(2, 0, 1)[0] = x[..., 1]
    return y


def written_by_parts(m: Model, x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    y[..., :2].copy_(x[..., 4:])
    y[..., 2:].copy_(x[..., :4] * m.scale[:4])
    return y


def chunks_in_place(m: Model, x: Tensor) -> Tensor:
    y = x.detach() * 3  # autograd takes no write to a part of what carries gradient
    a, b = y.chunk(2, -1)
    b *= a
    c, d, e = y.split(2, dim=-1)
    d.add_(e)
    return x * y + torch.cat((d, a, c[..., :1]), -1)


def reshaped_parts(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    z = y.view(*x.shape[:2], 2, 3)
    z[..., 1, :] += z[..., 0, :] * 3
    return y.unsqueeze(0)[0] + z.flatten(2)


def by_select_and_narrow(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    u = y.select(-1, -1)
    u.copy_(x[..., 0])
    y.narrow(-1, 1, 2).mul_(u.clone()[..., None])
    return y + u[..., None]


def base_twice(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    v = y[..., 1:]
    y += 1
    a = v * 2
    y.mul_(x)
    return torch.cat((v + a, y[..., :1]), -1)


def same_memory(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    z = y.contiguous()
    z.add_(1)
    return y * x


def constant_through_detach(m: Model, x: Tensor) -> Tensor:
    y = x.detach() * 3
    y.detach()[..., 0].zero_()
    return x * y


FOLLOWED = [
    view_then_base,
    base_then_view,
    part_of_a_part,
    other_half,
    rows_and_columns,
    written_by_parts,
    chunks_in_place,
    reshaped_parts,
    by_select_and_narrow,
    base_twice,
    same_memory,
    constant_through_detach,
]


@pytest.mark.parametrize("body", FOLLOWED, ids=lambda body: body.__name__)
def test_writes_that_are_followed_through_views(body):
    assert_exact(model_of(body))


def buffer_and_its_reader(m: Model, x: Tensor) -> Tensor:
    before = m.count * 2
    m.count.mul_(0.9).add_(x.detach().mean(dim=(0, 1)))
    return x * m.count + before


def buffer_in_two_writes(m: Model, x: Tensor) -> Tensor:
    m.count[:, 1:].add_(1)
    y = x * m.count.clone()
    m.count.copy_(m.count * 2)
    return y * m.count


BUFFERS = [
    buffer_counts,
    buffer_by_method,
    buffer_by_view,
    buffer_by_index,
    buffer_row,
    buffer_and_its_reader,
    buffer_in_two_writes,
]


OPTIONS: list[dict[str, Any]] = [{"recompute": "block"}, {"outputs": "full"}]


@pytest.mark.parametrize(
    ("body", "options"),
    [(body, {}) for body in BUFFERS] + [(buffer_in_two_writes, given) for given in OPTIONS],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_buffers_are_written_once_a_step(body, options):
    model, ordinary, inputs = model_of(body), model_of(body), inputs_of()
    fxseek.compile(model, 0.4, score="random", **options)
    for _ in range(3):
        fxseek.explain(model, **inputs)
        before = model.count.clone()
        buffer = model.count
        loss = model(**inputs)["loss"]
        assert model.count is buffer
        written = model.count.clone()
        model.count = before  # what the oracle's forward starts from
        assert_exact_step(model, loss, lambda: model.logits(inputs["input_ids"]), inputs["labels"])
        assert torch.equal(model.count, written)
        model.count = buffer
        model.zero_grad()
        ordinary(**inputs)
        torch.testing.assert_close(written, ordinary.count, rtol=1e-12, atol=1e-12)


def parameter_without_grad(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.scale.mul_(0.5)
    return x * m.scale


def parameter_by_data(m: Model, x: Tensor) -> Tensor:
    m.scale.data.clamp_(0.4, 0.9)
    m.scale.data[1:].add_(0.1)
    return x * m.scale + m.scale.data


@pytest.mark.parametrize("body", [parameter_without_grad, parameter_by_data])
def test_parameters_are_written_once_a_step(body):
    model, ordinary, inputs = model_of(body), model_of(body), inputs_of()
    fxseek.compile(model, 0.4, score="random")
    for _ in range(3):
        before = model.scale.detach().clone()
        loss = model(**inputs)["loss"]
        written = model.scale.detach().clone()
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        model.scale.data.copy_(before)  # what the oracle's forward starts from
        report = fxseek.report(model)
        wanted, gradients = masked_gradients(
            model,
            lambda: model.logits(inputs["input_ids"]),
            inputs["labels"],
            report.selected,
            report.weights,
        )
        torch.testing.assert_close(loss.detach(), wanted, rtol=1e-12, atol=1e-12)
        assert compare(found, gradients).error <= 1e-9
        assert torch.equal(model.scale, written)
        ordinary(**inputs)
        assert torch.equal(written, ordinary.scale)
        model.zero_grad()


def read_without_grad(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    v = y[..., :3]
    y.mul_(m.scale)
    with torch.no_grad():
        a = v * 2
    return y + (v + a).sum(-1, keepdim=True)


def view_of_a_view_read_without_grad(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    v = y.view(*x.shape)
    w = v[..., 1:4]
    y.add_(x * m.scale)
    with torch.no_grad(), torch.enable_grad(), torch.no_grad():
        a = w * 2
    return y * v + (w + a).sum(-1, keepdim=True)


def view_of_other_strides(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    v, w = y.view(len(x), -1), y.view_as(x)
    y.copy_((x * m.scale).transpose(1, 2).contiguous().transpose(1, 2))
    return y * w + v.sum(-1)[:, None, None]


def view_of_a_base(m: Model, x: Tensor) -> Tensor:
    y = (x * m.scale).transpose(1, 2).contiguous().transpose(1, 2)
    v = y.transpose(1, 2).view(len(x), -1)
    y.mul_(m.scale)
    return y + v.sum(-1)[:, None, None]


@pytest.mark.parametrize(
    "body",
    [
        read_without_grad,
        view_of_a_view_read_without_grad,
        view_of_other_strides,
        view_of_a_base,
    ],
    ids=lambda body: body.__name__,
)
def test_views_read_after_a_write(body):
    assert_exact(model_of(body))


def test_a_buffer_bound_to_a_new_tensor():
    def body(m: Any, x: Tensor) -> Tensor:
        m.count = m.count * 0.5 + 1
        m.calls += 1
        return x * m.count

    model: Any = model_of(body)
    inputs: dict[str, Any] = inputs_of()
    model.calls = 0
    fxseek.compile(model, 0.4, score="random")
    for step in range(1, 6):
        model(**inputs)["loss"].backward()
        torch.testing.assert_close(model.count[0, 0], torch.tensor(2 - 0.5 ** (step - 1)).double())
        assert model.calls == step
    before = model.count.clone()
    fxseek.check_gradients(model, **inputs)
    assert torch.equal(model.count, before)
    assert model.calls == 5


def test_a_counter_is_captured_twice_at_most_and_counts():
    def body(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return x * (m.scale + m.calls / 7)

    model: Any = model_of(body)
    inputs: dict[str, Any] = inputs_of()
    model.calls = 0
    fxseek.compile(model, 0.4, score="random")
    step = step_of(model)
    assert step is not None
    for _ in range(4):
        fxseek.check_gradients(model, **inputs)
        model(**inputs)["loss"].backward()
    assert len(step.recorder.steps) <= 2


@pytest.mark.parametrize("outputs", ["loss", "full"])
def test_a_buffer_set_to_an_activation(outputs):
    def body(m: Model, x: Tensor) -> Tensor:
        m.count = x.detach()
        return x * m.scale

    model = model_of(body)
    fxseek.compile(model, 0.4, score="random", outputs=outputs)
    before = model.count
    if outputs == "full":
        model(**inputs_of())
        assert model.count.shape == (BATCH, TOKENS, WIDTH)
        return
    for _ in range(2):
        with pytest.raises(fxseek.InputError, match=r"'count'.*outputs=\"full\""):
            model(**inputs_of())
        assert model.count is before
    assert set(model.state_dict()) == set(model_of(body).state_dict())


def test_a_weight_set_to_its_own_memory():
    def body(m: Any, x: Tensor) -> Tensor:
        m.scale.data = m.alias
        return x * m.scale

    model = model_of(body)
    model.register_buffer("alias", model.scale.detach())
    assert_exact(model)


def test_a_buffer_of_a_step_that_fails():
    def fails(given: Any) -> Tensor:
        raise ValueError("no scores")

    model = model_of(buffer_counts)
    fxseek.compile(model, 0.4, score=fails)
    with pytest.raises(ValueError, match="no scores"):
        model(**inputs_of())
    assert model.count.sum() == 0


def line_of(body: Callable[..., Any]) -> str:
    lines = inspect.getsource(body).splitlines()
    return next(line for line in lines if line.endswith("# here")).split("#")[0].strip()


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: body.__name__)
def test_writes_that_are_refused(body):
    model = fxseek.compile(model_of(body), 0.4, score="random")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(fxseek.GraphError) as caught:
        model(**inputs_of())
    assert line_of(body) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def shape_in_place(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    y.transpose_(1, 2)
    return y.transpose(1, 2) + x


def unsqueezed_in_place(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    z = y + 1
    y.unsqueeze_(1)
    return (y * z[:, None])[:, 0]


def written_out(m: Model, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x.detach(), 2.0, out=y)
    return y * x


def two_halves(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    a, b = y[..., :3], y[..., 3:]
    a += 1
    return torch.cat((a, b), -1)


def read_before_it_is_put_back(m: Model, x: Tensor) -> Tensor:
    y = x * m.scale
    u, v = y[:, 0], y[:, 0]
    v += 1
    z = u * 2
    y[:, 0] = v
    return y + z[:, None]


@pytest.mark.parametrize(
    "body",
    [shape_in_place, unsqueezed_in_place, written_out, two_halves, read_before_it_is_put_back],
    ids=lambda body: body.__name__,
)
def test_writes_that_are_exact_or_refused(body):
    with contextlib.suppress(fxseek.GraphError, fxseek.CaptureError):
        assert_exact(model_of(body))


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_writes_to_inputs_are_refused(name):
    class Writes(Model):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            {"input_ids": input_ids, "labels": labels}[name][:, 0] = 1
            return super().forward(input_ids, labels)

    torch.manual_seed(0)
    model = fxseek.compile(Writes(lambda m, x: x).double().train(), 0.4, score="random")
    inputs = inputs_of()
    before = inputs[name].clone()
    with pytest.raises(fxseek.GraphError, match=name):
        model(**inputs)
    assert torch.equal(inputs[name], before)


STATISTICS: dict[str, Callable[..., Tensor]] = {
    "by name": lambda x, mean, var: F.batch_norm(
        x, running_mean=mean, running_var=var, training=True
    ),
    "instances, by default": lambda x, mean, var: F.instance_norm(x, mean, var),
    "of torch": lambda x, mean, var: torch.batch_norm(
        x, None, None, mean, var, True, 0.1, 1e-5, False
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_refused_wherever_they_are_given(name):
    def body(m: Model, x: Tensor) -> Tensor:
        norm: Any = m.layers[0]
        return STATISTICS[name](x.transpose(1, 2), norm.running_mean, norm.running_var).mT

    model = fxseek.compile(model_of(body, nn.BatchNorm1d(WIDTH)), 0.4, score="random")
    with pytest.raises(fxseek.GraphError, match="eval mode"):
        model(**inputs_of())


def test_a_draw_in_place_is_by_its_probability():
    """In place it is 0.5, and not what the tensor holds."""
    seen: list[Tensor] = []

    def body(m: Model, x: Tensor) -> Tensor:
        return x * torch.ones_like(x).bernoulli_() * torch.zeros_like(x).bernoulli_(p=0.9)

    model = fxseek.compile(model_of(body), 1.0, score="random", outputs="full")
    model.first.register_forward_hook(lambda *_: None)
    kept = fxseek.compile(model_of(lambda m, x: torch.ones_like(x).bernoulli_(0.5)), 1.0)
    for _ in range(2):
        seen += [model(**inputs_of())["loss"].detach(), kept(**inputs_of())["loss"].detach()]
    assert seen[0] != seen[2] and seen[1] != seen[3]


def test_batch_norm_is_refused_in_training_and_exact_in_eval():
    def body(m: Model, x: Tensor) -> Tensor:
        return m.layers[0](x.transpose(1, 2)).transpose(1, 2)

    model = fxseek.compile(model_of(body, nn.BatchNorm1d(WIDTH)), 0.4, score="random")
    with pytest.raises(fxseek.GraphError, match="eval mode"):
        model(**inputs_of())
    model = model_of(body, nn.BatchNorm1d(WIDTH))
    model.layers.eval()
    assert_exact(model)
