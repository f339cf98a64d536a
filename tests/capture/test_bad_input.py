"""Models and batches that fxseek cannot take as they are: each works, or says what to do."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from models import batch, tiny_gpt2, tiny_llama, tiny_lora, without_casts
from torch import Tensor, nn
from torch.nn import functional as F

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop

VOCABULARY = 37


def given(rows: int = 2, tokens: int = 11, **options: Any) -> dict[str, Any]:
    return batch(VOCABULARY, rows, tokens, **options)


def exact(model: nn.Module, **arguments: Any) -> None:
    """One step of a float64 model has the gradients of masked full backprop, of each parameter."""
    model.zero_grad()
    model(**arguments).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    report = fxseek.report(model)
    reference = masked_backprop(model, arguments, report.selected, weights=report.weights)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert compare(found, reference.gradients).error <= 1e-9


@pytest.fixture(scope="module")
def shared() -> Any:
    """A compiled float64 model, for batches that it refuses before or after a capture."""
    return fxseek.compile(without_casts(tiny_llama()), 0.3)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["flash_attention_2", pytest.param("flex_attention", marks=pytest.mark.sweep)]
)
def test_attention_kernels_that_take_whole_sequences(name):
    model: Any = tiny_llama()
    model.config._attn_implementation = name
    with pytest.raises(fxseek.ConfigError, match=rf"{name}.*set_attn_implementation\(\"sdpa\"\)"):
        fxseek.compile(model)
    assert step_of(model) is None
    model.set_attn_implementation("sdpa")
    fxseek.compile(model, 0.3)
    model.config._attn_implementation = name
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxseek.InputError, match=rf"{name}.*eager"):
        model(**given())
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    model.set_attn_implementation("sdpa")
    model(**given()).loss.backward()


def test_the_attention_may_be_switched_after_compile(shared):
    exact(shared, **given())
    shared.set_attn_implementation("eager")
    exact(shared, **given())
    shared.set_attn_implementation("sdpa")
    exact(shared, **given())


def test_a_model_wrapped_for_data_parallel_training():
    model = nn.DataParallel(tiny_llama())
    message = r"wrapped by DataParallel.*Use DistributedDataParallel.*CUDA_VISIBLE_DEVICES"
    with pytest.raises(fxseek.ConfigError, match=message):
        fxseek.compile(model)
    assert step_of(model) is None
    assert step_of(model.module) is None


def test_a_model_of_which_a_part_is_compiled():
    inner = fxseek.compile(tiny_llama(), 0.3)
    with pytest.raises(fxseek.ConfigError, match=r"'inner' in the model is compiled .* already"):
        fxseek.compile(nn.ModuleDict({"inner": inner}))


def test_a_model_that_torch_compile_wraps_afterwards():
    model: Any = fxseek.compile(tiny_llama(), 0.3)
    outer: Any = torch.compile(model, backend="eager")
    outer(**given()).loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert fxseek.report(model).step == 0
    model.zero_grad()
    model(**given()).loss.backward()
    wanted = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if b is not None)


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="needs torch 2.13: before, models of one class share their number of captures",
)
def test_many_models_in_one_process(monkeypatch):
    monkeypatch.setattr("fxseek.capture.step._CAPTURES", 2)
    for _ in range(3):
        model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3, score="random")
        model(**given()).loss.backward()


def test_a_step_that_is_captured_again_and_again(monkeypatch):
    monkeypatch.setattr("fxseek.capture.step._CAPTURES", 2)
    model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3, score="random")
    model(**given())
    model.double()(**given())
    with pytest.raises(fxseek.CaptureError, match=r"captured 2 times.*TORCH_LOGS=recompiles"):
        model.to(torch.bfloat16)(**given())


# ---- moved, cast and switched after compile ------------------------------------------------------


def test_another_dtype_after_compile():
    model: Any = fxseek.compile(without_casts(tiny_llama()).float(), 0.3)
    model(**given()).loss.backward()
    exact(model.double(), **given())
    model.zero_grad()
    loss = model.to(torch.bfloat16)(**given()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert fxseek.report(model).step == 2


def test_the_meta_device_after_compile():
    model: Any = fxseek.compile(tiny_llama(), 0.3)
    model(**given())
    model.to("meta")
    with pytest.raises(fxseek.InputError, match=r"meta device.*real device"):
        model(**{name: x.to("meta") for name, x in given().items()})


@pytest.mark.cuda
def test_another_device_after_compile():
    model: Any = fxseek.compile(without_casts(tiny_llama()), 0.3)
    exact(model, **given())
    exact(model.cuda(), **{name: x.cuda() for name, x in given().items()})
    exact(model.cpu(), **given())


def test_training_and_evaluation_take_turns(shared):
    arguments = given()
    for _ in range(2):
        exact(shared.train(), **arguments)
        shared.eval()
        logits = shared(**arguments).logits
        assert logits.shape[:2] == arguments["input_ids"].shape
    shared.train()
    steps = fxseek.report(shared).step
    with torch.no_grad():
        assert shared(**arguments).logits is not None
    assert fxseek.report(shared).step == steps


def test_parameters_frozen_and_thawed_after_compile(shared):
    exact(shared, **given())
    for parameter in shared.model.layers[0].parameters():
        parameter.requires_grad_(False)
    exact(shared, **given())
    for parameter in shared.parameters():
        parameter.requires_grad_(True)
    exact(shared, **given())


def adapters(model: Any) -> set[str]:
    """The adapters that have a gradient."""
    return {
        name.rsplit(".", 2)[-2]
        for name, p in model.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }


def test_adapters_added_and_switched_after_compile():
    from peft import LoraConfig

    model: Any = fxseek.compile(tiny_lora(without_casts(tiny_llama())).double(), 0.3)
    arguments = given()
    exact(model, **arguments)
    first = model.eval()(**arguments).logits
    model.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(parameter.data)
    model.double().set_adapter("second")
    exact(model, **arguments)
    assert adapters(model) == {"second"}
    model.set_adapter("default")
    exact(model, **arguments)
    assert adapters(model) == {"default"}
    assert torch.equal(model.eval()(**arguments).logits, first)


def test_an_adapter_that_is_disabled():
    model: Any = fxseek.compile(tiny_lora(tiny_llama()), 0.3)
    arguments = given()
    model(**arguments).loss.backward()
    plain = tiny_llama()
    with model.disable_adapter():
        inside = model.eval()(**arguments).loss
        model.train()
        report = _loss_without_gradient(model, arguments)
    with torch.no_grad():
        assert torch.allclose(inside, plain(**arguments).loss)
        assert torch.allclose(report, plain(**arguments).loss)
    model.zero_grad()
    model(**arguments).loss.backward()
    assert adapters(model) == {"default"}


def _loss_without_gradient(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    """With its adapter disabled, nothing in the model is trained."""
    loss = model(**arguments).loss
    assert not loss.requires_grad
    return loss


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tokens"), [(0, 7), (2, 0)])
def test_an_empty_batch(rows, tokens, shared):
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    with pytest.raises(fxseek.InputError, match=r"input_ids.*the batch is empty. Skip it"):
        shared(input_ids=ids, labels=ids)
    exact(shared, **given())


def test_one_token(shared):
    with pytest.raises(fxseek.InputError, match=r"one token in a row.*pad it"):
        shared(**given(2, 1))
    arguments = given(2, 2)
    arguments["attention_mask"] = torch.tensor([[1, 0], [1, 0]])
    arguments["labels"][:, 1] = -100
    loss = shared(**arguments).loss
    loss.backward()
    assert loss.item() == 0  # no token is followed by another, so there is nothing to learn
    exact(shared, **given())


def test_two_tokens_and_one_row(shared):
    exact(shared, **given(1, 2))
    exact(shared, **given(2, 2))


def test_labels_of_another_length(shared):
    arguments = given()
    arguments["labels"] = arguments["labels"][:, :-2]
    message = r"labels has the shape \[2, 9\].*2 rows of 11 tokens"
    with pytest.raises(fxseek.InputError, match=message):
        shared(**arguments)
    arguments = given(padding="right")
    arguments["attention_mask"] = arguments["attention_mask"][:1, :5]
    with pytest.raises(fxseek.InputError, match="attention_mask has the shape"):
        shared(**arguments)


def test_embeddings_instead_of_ids(shared):
    arguments = given()
    embeddings = shared.get_input_embeddings()(arguments.pop("input_ids")).detach()
    embeddings.requires_grad_()
    shared.zero_grad()
    shared(inputs_embeds=embeddings, **arguments).loss.backward()
    report = fxseek.report(shared)
    touched = embeddings.grad.abs().sum(-1) > 0
    chosen = torch.zeros_like(touched).scatter(1, report.selected, True)
    assert torch.equal(touched, chosen)
    found = {n: p.grad for n, p in shared.named_parameters() if p.grad is not None}
    wanted = masked_backprop(
        shared, {"inputs_embeds": embeddings.detach(), **arguments}, report.selected
    )
    assert compare(found, {n: wanted.gradients[n] for n in found}).error <= 1e-9


def test_neither_ids_nor_embeddings(shared):
    with pytest.raises(fxseek.InputError, match="no tensor argument has a token dimension"):
        shared(labels=torch.tensor(3))


class Paired(nn.Module):
    """A model that returns logits and loss, whose labels have a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = without_casts(tiny_llama().double())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.inner(input_ids=idx).logits
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def of_logits(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs[0].flatten(0, 1), batch["targets"].flatten())


def of_the_second(outputs: Any, batch: Any) -> Tensor:
    return outputs[1]


def test_the_check_of_a_call_without_a_loss():
    model = fxseek.compile(Paired().train(), 0.3, score="context")
    ids = torch.randint(VOCABULARY, (2, 13))
    calls: list[dict[str, Any]] = [{"idx": ids}, {"idx": ids, "targets": ids}]
    for given in calls:
        with pytest.raises(fxseek.InputError, match=r"returned no loss.*Pass labels.*loss="):
            fxseek.check_gradients(model, **given)
    fxseek.check_gradients(model, loss=lambda outputs, _: outputs[0].square().mean(), idx=ids)
    plain = fxseek.compile(tiny_llama(), 0.3, score="context")
    with pytest.raises(fxseek.InputError, match=r"input_ids returned no loss.*Pass labels.*loss="):
        fxseek.check_gradients(plain, input_ids=ids)


def test_a_loss_for_the_check_of_a_model_that_has_its_own():
    ids = torch.randint(VOCABULARY, (2, 13))
    model = fxseek.compile(Paired().train(), 0.3, score="context")
    for loss in (of_logits, of_the_second):
        with pytest.raises(fxseek.InputError, match="this one has the model's own"):
            fxseek.check_gradients(model, loss=loss, idx=ids, targets=ids)
    fxseek.uncompile(model)
    fxseek.compile(model, 0.3, score="context", loss=of_the_second)
    assert fxseek.check_gradients(model, idx=ids, targets=ids).error <= 1e-9


def test_a_length_at_which_the_position_table_ends():
    model: Any = fxseek.compile(tiny_gpt2(n_positions=13), 0.3)
    fxseek.check_gradients(model, **given(2, 12))
    fxseek.check_gradients(model, **given(2, 13))
    with pytest.raises(IndexError, match="out of range"):  # the model's own error
        model(**given(2, 14))
    fxseek.check_gradients(model, **given(2, 13))


def test_labels_on_padding_do_not_count(shared):
    arguments = given(2, 13, padding="right", labels="all")
    exact(shared, **arguments)
    wanted = {n: p.grad.clone() for n, p in shared.named_parameters()}
    on_padding = arguments | {"labels": arguments["input_ids"].clone()}
    shared.zero_grad()
    shared(**on_padding).loss.backward()
    assert (fxseek.report(shared).selected < 0).any()
    found = {n: p.grad for n, p in shared.named_parameters()}
    # the last token of a shorter row predicts padding, which has a label here: it alone may differ
    assert all(bool(torch.isfinite(g).all()) for g in found.values() if g is not None)
    assert compare(found, wanted).error < 1


def test_no_label_at_all(shared):
    shared.zero_grad()
    loss = shared(**given(labels="none")).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(bool(p.grad.any()) for p in shared.parameters() if p.grad is not None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model: Any = fxseek.compile(tiny_llama(), 0.3)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = value
    with pytest.raises(fxseek.ScoreError, match=r"token scores are not finite.*learning rate"):
        model(**given())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 0.1
    model(**given()).loss.backward()
