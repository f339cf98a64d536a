"""Learning in parts: the gradients are those of one part, and at ratio 1.0 ordinary training's."""

from __future__ import annotations

import copy
import dataclasses
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import (
    TinyConfig,
    TinyDecoder,
    batch,
    double_throughout,
    tiny_gpt2,
    tiny_llama,
    tiny_lora,
    without_casts,
)
from oracle import WIDTH, Model, assert_exact, model_of
from strategies import batches, ratios, tiny_configs
from sweeps import sampled
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from tuners import TUNERS

import fxseek
from fxseek.capture.step import step_of
from fxseek.errors import GraphError, InputError
from fxseek.ops.masks import Mask, MaskRows, looks_ahead
from fxseek.ops.offload import HostTensor
from fxseek.ops.parts import Joint
from fxseek.ops.rows import Rows
from fxseek.passes.parts import Parts
from fxseek.run import parts as run_parts
from fxseek.run.stages import Gather
from fxseek.selecting import Selection

TOKENS = 23


def llama(**options: Any) -> nn.Module:
    return without_casts(tiny_llama(**options).double())


def rows(**options: Any) -> dict[str, Tensor]:
    return batch(37, tokens=TOKENS, **options)


def gradients(model: nn.Module, arguments: dict[str, Any], ratio: float | None, **options: Any):
    """The loss and the gradients of step 0; of ordinary training without a ratio."""
    if ratio is not None:
        fxseek.compile(model, ratio, **{"score": "random", **options})
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**arguments).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)  # each example is captured twice


def parts_of(model: nn.Module) -> Parts | str:
    step = step_of(model)
    assert step is not None and step.recorder.latest is not None
    return step.recorder.latest.program.parts


def assert_in_parts(model: nn.Module, arguments: dict[str, Any], *chunks: int, **options: Any):
    """The gradients of parts are those of one part; the model is left in parts."""
    ratio = options.pop("ratio", 0.5)
    loss, wanted = gradients(model, arguments, ratio, **options)
    assert wanted
    for chunk in chunks:
        fxseek.uncompile(model)
        other, found = gradients(model, arguments, ratio, learn_chunk=chunk, **options)
        assert isinstance(parts_of(model), Parts), parts_of(model)
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def assert_ordinary(model: nn.Module, arguments: dict[str, Any]) -> None:
    """At ratio 1.0 parts are ordinary training."""
    loss, wanted = gradients(model, arguments, None)
    other, found = gradients(model, arguments, 1.0, learn_chunk=7)
    assert isinstance(parts_of(model), Parts), parts_of(model)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_gradients_are_those_of_one_part(recompute, padding):
    assert_in_parts(llama(), rows(padding=padding), 1, 5, recompute=recompute)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_ratio_1_is_ordinary_training(attention, padding):
    """Labels that padding predicts, such as a row's first behind padding on its left, count too."""
    if (attention, padding) == ("eager", "left"):
        pytest.skip("ordinary training gives NaN: every key of a row is hidden")
    assert_ordinary(llama(attn=attention), rows(padding=padding))


@pytest.mark.parametrize("counted", [41, torch.tensor(41)], ids=["number", "tensor"])
def test_labels_that_a_trainer_has_counted(counted):
    assert_ordinary(llama(), {**rows(padding="right"), "num_items_in_batch": counted})


CASES: dict[str, dict[str, Any]] = {
    "offload": {"recompute": "block", "kv": "offload"},
    "prefill": {"prefill_chunk": 4},
    "sample": {"select": "sample", "score": "context"},
    "mass": {"ratio": "mass:0.6", "score": "context"},
    "tokenseek": {"score": "tokenseek"},
    "small_logits": {"chunk_bytes": 1000},
}


@pytest.mark.parametrize("case", CASES)
def test_with_other_settings(case):
    assert_in_parts(llama(), rows(padding="right"), 3, **CASES[case])


GENERAL = ("gemma3n",)
"""Causal models of which an operation takes the general path, so that it may mix tokens."""
FAST = ("llama", "gemma2", "mpt")
CELLS = [
    f"{name}-{attention}"
    for name, family in FAMILIES.items()
    if not family.refused
    for attention in family.attentions
]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # Jamba
@pytest.mark.parametrize("cell", sampled(CELLS, [x for x in CELLS if x.split("-")[0] in FAST]))
def test_families(cell):
    """The gradients of one part, and at ratio 1.0 ordinary training's."""
    name, attention = cell.split("-")
    family = FAMILIES[name]
    with double_throughout():
        model = family.make(attention).double()
        arguments = family.batch(dtype=torch.float64)
        for ratio, whole in ((1.0, None), (0.5, 0.5)):
            loss, wanted = gradients(model, arguments, whole)
            fxseek.uncompile(model)
            other, found = gradients(model, arguments, ratio, learn_chunk=3)
            in_parts = parts_of(model)
            fxseek.uncompile(model)
            if family.task == "causal" and not family.mixer and name not in GENERAL:
                assert isinstance(in_parts, Parts), in_parts
            assert in_parts  # the reason why not
            torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


WHOLE = ("diffllama", "jetmoe")
"""Their attentions read keys or values that are made of several others."""
DECODERS = [
    name
    for name, family in FAMILIES.items()
    if family.task == "causal" and family.dense and "sdpa" in family.attentions
    if not family.refused and not family.mixer and name not in WHOLE
]


@pytest.mark.parametrize("name", sampled(DECODERS, ("llama", "phi3", "gpt2")))
def test_no_key_behind_the_last_query_is_read(name, monkeypatch):
    seen: list[tuple[int, int]] = []
    value = Joint.value

    def watched(self: Joint) -> Tensor:
        found = value(self)
        last = int(self.part.positions.max())
        seen.append((last, found.shape[self.at.row]))
        return found

    monkeypatch.setattr(Joint, "value", watched)
    model, arguments = FAMILIES[name].make("sdpa"), FAMILIES[name].batch()
    gradients(model, arguments, 0.5, learn_chunk=3)
    tokens = arguments["labels"].shape[1]
    assert seen and all(keys <= min(-(-(last + 1) // 16) * 16, tokens) for last, keys in seen)
    seen.clear()
    fxseek.uncompile(model)
    gradients(model, arguments, 1.0, learn_chunk=3)
    assert seen and all(keys == last + 1 for last, keys in seen)


@pytest.mark.parametrize("name", sampled(TUNERS, ("lora",)))
def test_tuners(name):
    model, arguments = TUNERS[name].make(), rows(padding="right")
    loss, wanted = gradients(model, arguments, 0.5)
    fxseek.uncompile(model)
    other, found = gradients(model, arguments, 0.5, learn_chunk=4)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    # peft makes FourierFT's weights in float32, so that each part's gradient is rounded to it
    error = 1e-5 if name == "fourierft" else 1e-9
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)
    assert isinstance(parts_of(model), Parts), parts_of(model)


def any_decoder(data: st.DataObject) -> None:
    """Against one part; `test_exact.py` draws parts against masked full backprop."""
    torch._dynamo.reset()
    config = data.draw(tiny_configs(), label="config")
    arguments = data.draw(batches(config), label="arguments")
    ratio = data.draw(ratios(), label="ratio")
    span = data.draw(st.sampled_from((1, 1, 4)), label="span")
    chunk = data.draw(st.sampled_from((1, 2, 3, 5, 7, 100)), label="chunk")
    assert_in_parts(TinyDecoder(config).double(), arguments, chunk, ratio=ratio, span=span)


@settings(max_examples=3, phases=UNSHRUNK)
@given(data=st.data())
def test_any_decoder_batch_ratio_and_chunk(data):
    any_decoder(data)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@settings(max_examples=60, phases=UNSHRUNK)
@given(data=st.data())
def test_any_decoder_at_length(data):
    any_decoder(data)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_causal"])
def test_spans_need_no_mask(attention, monkeypatch):
    """Where a part's positions are consecutive it is attended to as at ratio 1.0."""
    seen: list[range | None] = []
    gather = Gather.forward

    def watched(self: Gather, env: Any, selection: Any) -> None:
        seen.append(selection.consecutive)
        gather(self, env, selection)

    monkeypatch.setattr(Gather, "forward", watched)
    config = dataclasses.replace(TINY, attention=attention)
    inputs = batch(37, batch=1, tokens=40)
    assert_in_parts(TinyDecoder(config).double(), inputs, 3, span=12)
    runs = [x for x in seen if x is not None]
    assert runs and all(len(x) <= 3 for x in runs)
    assert any(x.start > 0 for x in runs)


def test_a_part_that_is_consecutive_in_each_row_alone():
    """At other positions in each, which no flag knows."""
    kept = torch.tensor([[0, 1, 2, 3, 9, 10], [2, 3, 4, 6, 9, 10]])
    found = []
    for filled in (None, torch.tensor([[0] * 6, [0] * 5 + [1]]).bool()):
        step: Any = SimpleNamespace(
            selection=Selection(kept, kept.float(), filled),
            slots=[slice(0, 2), slice(2, 4), slice(4, 6)],
        )
        found.append(run_parts._Step._runs(step))
    assert found == [[None, None, range(9, 11)], [None, None, None]]


def test_packed_rows():
    arguments = rows()
    positions = torch.cat((torch.arange(9), torch.arange(14))).expand(2, -1)
    arguments = {
        "input_ids": arguments["input_ids"], "labels": arguments["labels"],
        "position_ids": positions, "use_cache": False,
    }  # fmt: skip
    assert_in_parts(llama(), arguments, 5)
    model = llama()
    assert_ordinary(model, arguments)


def test_inputs_that_are_trained():
    model = llama()
    given = rows(padding="right")
    ids = given.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    found = []
    for chunk in (None, 4):
        x = embeds.clone().requires_grad_()
        fxseek.compile(model, 0.5, score="random", learn_chunk=chunk)
        model(inputs_embeds=x * 1.0, **given).loss.backward()
        found.append(x.grad)
        fxseek.uncompile(model)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_autocast(padding):
    """The parts run in the precision of the forward, though backward is outside of it."""
    model = tiny_llama()
    arguments = rows(padding=padding)
    if padding == "none":
        arguments.pop("attention_mask", None)
    found = []
    for chunk in (None, 5):
        fxseek.compile(model, 1.0, learn_chunk=chunk)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**arguments).loss
        loss.backward()
        found.append([p.grad for p in model.parameters()])
        fxseek.uncompile(model)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.05 * one.norm()


@pytest.mark.parametrize("kv", ["device", "offload"])
def test_the_precision_of_gradients_that_wait(kv, monkeypatch):
    """In the model's own they round once more for each later part, and take half the bytes."""
    found: dict[str, dict[str, Tensor]] = {}
    seen: dict[str, set[torch.dtype]] = {"float32": set(), "model": set()}
    add = Joint._add
    for choice, dtypes in seen.items():

        def noted(joint: Joint, *given: Any, dtypes: set[torch.dtype] = dtypes) -> None:
            add(joint, *given)
            assert joint.waiting is not None
            dtypes.add(joint.waiting.dtype)

        monkeypatch.setattr(Joint, "_add", noted)
        options = {"learn_chunk": 5, "recompute": "block", "kv": kv, "kv_grad_dtype": choice}
        _, found[choice] = gradients(tiny_llama().bfloat16(), rows(), 1.0, **options)
    assert seen == {"float32": {torch.float32}, "model": {torch.bfloat16}}
    for name, wanted in found["float32"].items():
        off = (found["model"][name].double() - wanted.double()).norm()
        assert off <= 0.02 * wanted.double().norm(), name


def test_an_estimate_knows_the_precision_of_gradients_that_wait():
    model = tiny_llama().bfloat16()
    options = {"ratio": 1.0, "learn_chunk": 16, "recompute": "block", "dtype": torch.bfloat16}
    wide, narrow = (
        fxseek.estimate(model, tokens=512, kv_grad_dtype=x, **options).stage_peaks["backward"]
        for x in ("float32", "model")
    )
    config: Any = model.config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    waiting = 2 * config.num_hidden_layers * heads * (512 - 16)
    assert 2 * waiting <= wide - narrow <= 2.5 * waiting  # and what is made of them on the way


# ---- dropout -------------------------------------------------------------------------------------


def with_dropout() -> nn.Module:
    return tiny_lora(without_casts(tiny_llama()), lora_dropout=0.4).double().train()


def test_one_part_draws_as_ever():
    """One part of all tokens gives what the learn stage gives, draw by draw."""
    model, arguments = with_dropout(), rows()
    loss, wanted = gradients(model, arguments, 0.5)
    fxseek.uncompile(model)
    other, found = gradients(model, arguments, 0.5, learn_chunk=100)
    parts = parts_of(model)
    assert isinstance(parts, Parts) and parts.draws
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_parts_draw_the_same_in_backward():
    """The gradient is that of the loss that was returned: by finite differences, at ratio 1.0."""
    model, arguments = with_dropout(), rows()
    _, found = gradients(model, arguments, 1.0, learn_chunk=6)
    name = next(x for x in found if "layers.0" in x and "v_proj" in x)
    parameter = dict(model.named_parameters())[name]

    def loss_at(shift: float) -> Tensor:
        with torch.no_grad():
            parameter[0, 0] += shift
        torch.manual_seed(0)
        loss = model(**arguments).loss.detach()
        with torch.no_grad():
            parameter[0, 0] -= shift
        return loss

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    torch.testing.assert_close(found[name][0, 0], slope, rtol=1e-6, atol=1e-9)


# ---- backward ------------------------------------------------------------------------------------


def loss_of(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    fxseek.resume(model, 0)
    return model(**arguments).loss


def in_parts(**options: Any) -> nn.Module:
    return fxseek.compile(llama(), 0.5, score="random", learn_chunk=5, **options)


def test_each_gradient_arrives_once():
    model, arguments = in_parts(), rows()
    arrived: dict[str, int] = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda _, name=name: arrived.__setitem__(name, arrived.get(name, 0) + 1)
        )
    loss_of(model, arguments).backward()
    assert arrived and set(arrived.values()) == {1}


def test_an_optimiser_in_backward():
    """Each weight is written as soon as its gradient is there, which is not before it was read."""
    models = [llama(), fxseek.compile(llama(), 1.0, learn_chunk=5)]

    def write(p: Tensor) -> None:
        assert p.grad is not None
        p.data.sub_(p.grad, alpha=0.1)

    for model in models:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(write)
        for seed in (0, 1):
            model.zero_grad()
            model(**rows(seed=seed)).loss.backward()
    wanted, found = (dict(model.named_parameters()) for model in models)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_head_runs_once():
    """Products with the vocabulary's rows are as many with many parts as with one."""
    counts = []
    for chunk in (2, 100):
        model = fxseek.compile(llama(), 0.5, score="random", learn_chunk=chunk)
        loss_of(model, rows()).backward()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            loss_of(model, rows()).backward()
        events = [x for x in profiler.events() or () if x.name in ("aten::mm", "aten::addmm")]
        counts.append(sum(any(37 in shape for shape in x.input_shapes) for x in events))
    assert counts[0] == counts[1] > 0


def test_gradients_are_added_to_those_that_are_there():
    model, arguments = in_parts(), rows()
    loss_of(model, arguments).backward()
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss_of(model, arguments).backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(twice, [2 * x for x in once], rtol=1e-12, atol=1e-12)


def test_backward_once_more():
    model, arguments = in_parts(), rows()
    loss = loss_of(model, arguments)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    (loss * 2).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, [3 * x for x in once], rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_steps_at_once():
    """Backward of a step after the forward of the next."""
    model, arguments = in_parts(), rows()
    first, second = loss_of(model, arguments), loss_of(model, rows(seed=1))
    second.backward()
    model.zero_grad()
    first.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss_of(model, arguments).backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_gradients_of_some_parameters():
    model, arguments = in_parts(), rows()
    some = list(model.parameters())[1:4]
    found = torch.autograd.grad(loss_of(model, arguments), some)
    loss_of(model, arguments).backward()
    torch.testing.assert_close(list(found), [p.grad for p in some], rtol=1e-12, atol=1e-12)


def test_a_gradient_of_the_gradient_is_an_error():
    model, arguments = in_parts(), rows()
    some = list(model.parameters())[1]
    loss = loss_of(model, arguments)
    with pytest.raises(InputError, match=r"create_graph=True.*compile without learn_chunk"):
        torch.autograd.grad(loss, some, create_graph=True)
    loss.backward()
    assert some.grad is not None


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_a_gradient_of_the_gradient_without_parts(recompute):
    model = llama(attn="eager")
    expected = copy.deepcopy(model)
    fxseek.compile(model, 1.0, recompute=recompute)
    for each in (model, expected):
        loss, some = each(**rows()).loss, list(each.parameters())[1]
        (slope,) = torch.autograd.grad(loss, some, create_graph=True)
        (loss + slope.pow(2).sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    wanted = {name: p.grad for name, p in expected.named_parameters()}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_what_waits_on_the_host_goes_with_the_saved_tensors(monkeypatch):
    """Though the loss is still there; a graph that is retained keeps it."""
    made: list[weakref.ref[HostTensor]] = []

    def noted(tensor: Tensor) -> HostTensor:
        made.append(weakref.ref(host := HostTensor(tensor)))
        return host

    monkeypatch.setattr("fxseek.ops.offload.HostTensor", noted)
    model = in_parts(recompute="block", kv="offload")
    loss = loss_of(model, rows())
    loss.backward(retain_graph=True)
    assert any(x() is not None for x in made)
    loss.backward()
    assert made and not any(x() is not None for x in made)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_what_was_written_to_since_is_an_error():
    model, arguments = in_parts(), rows()
    loss = loss_of(model, arguments)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = loss_of(model, arguments)
    arguments["input_ids"].add_(1)
    with pytest.raises(InputError, match="written to in place"):
        loss.backward()


@pytest.mark.parametrize("parts", [0, 2])
def test_an_error_in_mid_backward_leaves_nothing_behind(parts):
    """Before the first part, and when two have sent gradients to earlier ones."""
    model, arguments = in_parts(), rows()
    loss_of(model, arguments).backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = loss_of(model, arguments)
    with pytest.MonkeyPatch.context() as patch:
        slopes = iter([run_parts.rows_of_chunk] * parts)
        failing = lambda *given: next(slopes, lambda *_: 1 / 0)(*given)  # noqa: E731
        patch.setattr(run_parts, "rows_of_chunk", failing)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    before_the_head = [p for name, p in model.named_parameters() if "layers.0." in name]
    assert all(p.grad is None for p in before_the_head)
    model.zero_grad()
    loss_of(model, arguments).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_only_keys_values_and_the_gradient_of_the_exit_wait():
    """Without layers' activations: what is kept does not depend on the part."""
    arguments = rows()
    kept = []
    for chunk in (2, 9):
        model = fxseek.compile(llama(), 1.0, learn_chunk=chunk)
        model(**arguments).loss.backward()
        kept.append(fxseek.report(model).saved_bytes)
    config: Any = model.config
    tokens = arguments["input_ids"].numel() * 8
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    head = sum(
        p.numel() * 8 for name, p in model.named_parameters()
        if name in ("lm_head.weight", "model.norm.weight") or "layers.1.mlp" in name
        or "layers.1.post_attention" in name
    )  # fmt: skip
    assert kept[0] == kept[1] <= tokens * (keys + config.hidden_size) + head + 3000


# ---- one part ------------------------------------------------------------------------------------


def test_an_encoder_is_learned_in_one_part(caplog):
    family = FAMILIES["bert"]
    model = fxseek.compile(family.make(), 0.5, score="random", learn_chunk=3)
    with caplog.at_level(logging.WARNING, "fxseek"):
        model(**family.batch()).loss.backward()
    (told,) = [x for x in caplog.messages if "learn_chunk" in x]
    assert "learned in one part, since the attention at" in told
    assert "learned in one part, since the attention at" in str(
        fxseek.explain(model, **family.batch())
    )


def test_a_mask_that_shows_later_tokens(caplog):
    """A prefix language model's: nothing of the graph says so, its values do."""
    arguments = rows()
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    seen[:9, :9] = True
    arguments["attention_mask"] = seen.expand(2, 1, -1, -1)
    model = llama()
    loss, wanted = gradients(model, arguments, 0.5)
    fxseek.uncompile(model)
    with caplog.at_level(logging.WARNING, "fxseek"):
        other, found = gradients(model, arguments, 0.5, learn_chunk=4)
        model(**arguments)
    assert [x for x in caplog.messages if "shows later tokens" in x and "one part" in x] != []
    assert sum("learn_chunk" in x for x in caplog.messages) == 1
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [False, True])
def test_gradient_that_comes_too_late_is_an_error(cut, monkeypatch):
    """If nobody had looked at the mask; also where keys behind a part's last query are cut off.

    A few of them are read even so: those that make their number a multiple.
    """
    arguments = rows()
    arguments["attention_mask"] = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    model = fxseek.compile(llama(), 0.9, score="random", learn_chunk=4)
    monkeypatch.setattr(run_parts, "looks_ahead", lambda *_: False)
    if not cut:
        nothing = lambda self, *_, **__: [None] * len(self.slots)  # noqa: E731
        monkeypatch.setattr(run_parts._Step, "_reads", nothing)
    with pytest.raises(GraphError, match="a token has read a later one"):
        model(**arguments).loss.backward()


def test_outputs_with_gradient_beside_the_loss(caplog):
    model = fxseek.compile(llama(), 0.5, score="random", learn_chunk=4, outputs="selected")
    with caplog.at_level(logging.WARNING, "fxseek"):
        model(**rows()).loss.backward()
    assert "learned in one part" in caplog.text
    assert "outputs='selected'" in caplog.text
    assert "carries gradient past the loss" in caplog.text
    assert isinstance(parts_of(model), str)


def test_compiled_stages_are_learned_in_one_part(caplog):
    model = fxseek.compile(tiny_gpt2(), 0.5, score="random", learn_chunk=4, backend="aot_eager")
    with caplog.at_level(logging.WARNING, "fxseek"):
        model(**rows()).loss.backward()
    assert "backend='aot_eager'" in caplog.text


def test_explain_says_parts():
    model = fxseek.compile(llama(), 0.5, learn_chunk=4)
    told = str(fxseek.explain(model, **rows()))
    assert "learned in parts of 4 tokens" in told


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("trained", ["layers.1.self_attn.o_proj", "layers.1.self_attn.v_proj"])
def test_little_is_trained(attention, trained):
    """No keys carry gradient, or values alone do, of a model whose tokens all see each other."""
    arguments = rows()
    arguments["attention_mask"] = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    if attention == "eager":
        arguments["attention_mask"] = torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.float64)
    model = llama(attn=attention)
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    loss, wanted = gradients(model, arguments, 0.5)
    assert loss > 1
    fxseek.uncompile(model)
    other, found = gradients(model, arguments, 0.5, learn_chunk=4)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_product_behind_the_last_attention_reads_tokens_of_all_chunks():
    """It has no softmax, so that it is none of the attentions; its keys carry gradient."""

    def body(m: Model, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(x, x * m.scale, x, is_causal=True)
        weights = (m.layers[0](x) @ x.mT).relu().tril()
        return x + weights @ m.layers[1](x)

    ways: list[dict[str, Any]] = [{}, {"chunk_bytes": 256}, {"chunk_bytes": 256, "learn_chunk": 3}]
    for options in ways:
        assert_exact(model_of(body, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), **options)


def test_one_masked_softmax_of_two_hides_nothing_of_the_other(caplog):
    def body(m: Model, x: Tensor) -> Tensor:
        scores = m.layers[0](x) @ x.transpose(1, 2)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        local = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ x
        return x + local + scores.softmax(-1) @ (x * m.scale)

    with caplog.at_level(logging.WARNING, "fxseek"):
        assert_exact(model_of(body, nn.Linear(WIDTH, WIDTH)), learn_chunk=3)
    assert "learned in one part" in caplog.text and "reads later tokens" in caplog.text


def test_an_encoder_that_draws_is_run_once():
    """In each chunk of logits the last cross-attention would see another one."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {
        "vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.2)).double().train()
    given = batch(37, tokens=TOKENS)
    given = {"input_ids": given["input_ids"], "labels": given["labels"][:, :13].contiguous()}
    losses = []
    for chunk_bytes in (1 << 10, 1 << 26):
        fxseek.compile(model, 0.5, score="random", chunk_bytes=chunk_bytes)
        torch.manual_seed(0)
        losses.append(model(**given).loss.detach())
        fxseek.uncompile(model)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def test_a_kernel_that_the_model_asks_for_is_told(caplog):
    def body(m: Model, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return x + F.scaled_dot_product_attention(x, x * m.scale, x, is_causal=True)

    with caplog.at_level(logging.WARNING, "fxseek"):
        assert_exact(model_of(body))
    assert "sdpa_kernel in the model has no effect" in caplog.text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_without_gradient(attention):
    """The first layer's keys are constants: no adapter is on them."""
    model = tiny_lora(llama(attn=attention), target_modules=["q_proj", "v_proj"]).double()
    assert_in_parts(model, rows(padding="right"), 4)


def test_an_estimate_with_dropout():
    model = tiny_lora(tiny_llama(), lora_dropout=0.1)
    found = fxseek.estimate(model, tokens=64, ratio=1.0, learn_chunk=8)
    assert found.stage_peaks["backward"] > 0


def test_estimate_and_profile_know_parts():
    peaks = [
        fxseek.estimate(tiny_llama(), tokens=64, batch=2, ratio=1.0, learn_chunk=chunk).stage_peaks
        for chunk in (4, 16, None)
    ]
    assert peaks[0]["backward"] < peaks[1]["backward"] < peaks[2]["backward"]
    model = fxseek.compile(tiny_llama(), 1.0, learn_chunk=4)
    whole = fxseek.compile(tiny_llama(), 1.0)
    found, other = (fxseek.profile(x, **rows(seed=1)) for x in (model, whole))
    assert found.stage_peaks["backward"] < other.stage_peaks["backward"]
    assert found.saved_bytes < other.saved_bytes


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "7", True])
def test_bad_chunks(chunk):
    with pytest.raises(fxseek.ConfigError, match="learn_chunk"):
        fxseek.SeekConfig(learn_chunk=chunk)


def test_ratio_1_measures_nothing():
    """Every token is kept, so that no score is needed."""
    arguments = rows(padding="right")
    model = fxseek.compile(llama(), 1.0)
    model(**arguments).loss.backward()
    report = fxseek.report(model)
    assert report.parts == {} and report.full_loss is None
    assert report.selected.tolist() == [list(range(TOKENS))] * 2  # padding too


TINY = TinyConfig(attention="sdpa_causal", repeat="gqa", heads=4, kv_heads=2)


def test_a_model_without_a_mask():
    """Only the causal flag says that it is causal."""
    assert_in_parts(TinyDecoder(TINY).double(), rows(), 4)


class ViewedLogits(nn.Module):
    """A model whose logits are what follows its last attention, in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.skip, self.out = nn.Embedding(37, 8), nn.Linear(8, 37), nn.Linear(8, 37)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        y = x.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(y, y, y, is_causal=True).squeeze(1)
        logits = self.skip(x) + self.out(mixed)
        return {"loss": F.cross_entropy(logits.view(-1, 37), labels.view(-1))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_gradient_that_is_the_logits_own(dtype):
    """Chunks of the head share memory, and no gradient that outlives a chunk lies in it."""
    arguments = {name: rows()[name] for name in ("input_ids", "labels")}
    torch.manual_seed(0)
    ordinary = ViewedLogits().to(dtype)
    model = copy.deepcopy(ordinary)
    fxseek.compile(model, 1.0, learn_chunk=6, chunk_bytes=6 * 37 * 8)
    found = []
    for each in (ordinary, model):
        loss = each(**arguments)["loss"]
        loss.backward()
        assert loss.dtype == dtype
        found.append({name: p.grad for name, p in each.named_parameters()})
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (0.1, 0.01)
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=atol)


def test_a_causal_mask_does_not_vouch_for_a_row_that_reads_nothing():
    """Spelled out, such a row reads all keys alike, whatever is known of the other mask."""
    kept = torch.arange(5)[None]
    causal = MaskRows(lambda at: at[:, None, :, None] >= torch.arange(5), (), square=True)
    hidden = torch.zeros(1, 1, 5, 5).index_fill(-1, torch.tensor([0]), -torch.inf)
    both = [Mask(causal, Rows(2, 0)), Mask(hidden, Rows(2, 0))]
    for _ in range(2):
        assert looks_ahead(both, kept, None, 5)
        assert not looks_ahead(both[:1], kept, None, 5)
        assert causal.causal(kept.device)
