"""`fxseek.compile` as a user meets it: what stays, and what is said when it can't work."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import re
from typing import Any

import ddp
import pytest
import torch
import torch.nn.functional as F
from models import TinyConfig, TinyDecoder, batch, tiny_llama, without_casts
from torch import Tensor, nn

import fxseek
from fxseek.capture.step import step_of
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop
from fxseek.passes.rules import operation

GROUPED = TinyConfig(heads=4, kv_heads=2)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyDecoder(GROUPED).train()


@pytest.fixture
def inputs() -> dict[str, Any]:
    return batch(37)


def options(values: dict[str, Any]) -> Any:
    """torch's own annotation of ``options`` knows no float."""
    return values


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the model stays what it was -----------------------------------------------------------------


def test_the_same_object_comes_back_and_looks_the_same(model, inputs):
    signature, keys = inspect.signature(model.forward), list(model.state_dict())
    modules = list(model.named_modules())
    assert fxseek.compile(model) is model
    assert type(model) is TinyDecoder
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    assert list(model.named_modules()) == modules
    model(**inputs).loss.backward()
    assert list(model.state_dict()) == keys
    assert list(model.named_modules()) == modules


def test_eval_and_no_grad_run_the_original_forward(model, inputs):
    with torch.no_grad():
        wanted = model(**inputs)
    fxseek.compile(model)
    with torch.no_grad():
        found = model(**inputs)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=0)
    model.eval()
    torch.testing.assert_close(model(**inputs).logits, wanted.logits, rtol=0, atol=0)
    with pytest.raises(fxseek.InputError, match="no training step has run"):
        fxseek.report(model)


def test_uncompile_gives_the_ordinary_gradients_back(model, inputs):
    ordinary = copy.deepcopy(model)
    ordinary(**inputs).loss.backward()
    fxseek.compile(model, 0.2)
    model(**inputs).loss.backward()
    model.zero_grad()
    assert fxseek.uncompile(model) is model
    assert "_compiled_call_impl" not in model.__dict__
    model(**inputs).loss.backward()
    for name, gradient in gradients(ordinary).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    fxseek.uncompile(model)  # a second time is harmless


def test_generate_is_not_touched():
    model: Any = tiny_llama()
    ids = torch.randint(0, model.config.vocab_size, (2, 5))
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    wanted = model.eval().generate(ids, attention_mask=mask, **how)
    fxseek.compile(model.train())
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    assert torch.equal(model.generate(ids, attention_mask=mask, **how), wanted)


# ---- copies never call into the old model --------------------------------------------------------


def deep(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [deep, pickled, saved])
def test_a_copy_is_an_ordinary_model_of_its_own(duplicate, model, inputs):
    ordinary = copy.deepcopy(model)
    ordinary(**inputs).loss.backward()
    fxseek.compile(model, 0.2)
    model(**inputs).loss.backward()
    before = gradients(model)
    other = duplicate(model)
    other.zero_grad()
    other(**inputs).loss.backward()
    for name, gradient in gradients(ordinary).items():
        torch.testing.assert_close(other.get_parameter(name).grad, gradient)
    for name, gradient in before.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=0)
    fxseek.compile(other, 0.2)  # and it can be compiled


def test_save_pretrained_and_reload(tmp_path):
    model: Any = fxseek.compile(tiny_llama().train(), 0.3)
    ids = torch.randint(0, model.config.vocab_size, (2, 11))
    model(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    assert "_compiled_call_impl" not in again.__dict__


# ---- the step ------------------------------------------------------------------------------------


def test_the_report(model, inputs):
    fxseek.compile(model, 0.3, score="tokenseek")
    model(**inputs).loss.backward()
    report = fxseek.report(model)
    rows, tokens = inputs["input_ids"].shape
    assert report.tokens == tokens
    assert report.step == 0
    assert report.selected.shape == report.weights.shape
    for scores in (report.scores, report.context, report.gradient):
        assert scores is not None
        assert scores.shape == (rows, tokens)
    fxseek.uncompile(model)
    torch.testing.assert_close(report.full_loss, model(**inputs).loss.detach())


def test_saved_bytes_grow_with_what_is_kept_and_are_predicted(model):
    inputs = batch(37, tokens=61)
    found = []
    for ratio in (0.05, 0.3, 1.0):
        fxseek.compile(model, ratio, score="random")
        predicted = fxseek.explain(model, **inputs).predicted_saved_bytes
        model(**inputs).loss.backward()
        assert fxseek.report(model).saved_bytes == predicted
        found.append(predicted)
        fxseek.uncompile(model)
    assert found[0] < found[1] < found[2]
    assert found[0] < 0.5 * found[2]


def test_explain_runs_no_step_and_names_the_stages(model, inputs):
    fxseek.compile(model, 0.3)
    model.eval()
    page = str(fxseek.explain(model, **inputs))
    assert "prefill → score → select → gather → learn" in page
    assert "general path (scatter → op → gather): none" in page
    share = r"saved for backward: [\d.]+% of ordinary training's \(.* MiB of .* MiB\): "
    assert re.search(share + r"activations of \d+% of the tokens, keys, values and", page)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(fxseek.InputError, match="no training step has run"):
        fxseek.report(model)


def test_explain_of_a_second_model():
    """Dynamo makes a tensor of a Python float (here attention's scale) that changes.

    That of another model is no change: each model is captured as if it were the only one.
    """
    for width in (6, 8):
        model = fxseek.compile(tiny_llama(head_dim=width), 0.3)
        inputs = batch(37, tokens=11)
        model(**inputs).loss.backward()
        assert fxseek.explain(model, **inputs).predicted_saved_bytes > 0
        attentions = [
            node
            for step in step_of(model).recorder.steps  # type: ignore[union-attr]
            for node in step.program.graph.nodes
            if operation(node) == "scaled_dot_product_attention"
        ]
        assert {node.kwargs["scale"] for node in attentions} == {width**-0.5}


@pytest.mark.parametrize("kind", ["loss", "selected", "full"])
def test_token_shaped_outputs(kind, model, inputs):
    with torch.no_grad():
        logits = model(**inputs).logits
    fxseek.compile(model, 0.3, outputs=kind)
    found = model(**inputs).logits
    selected = fxseek.report(model).selected
    if kind == "loss":
        assert found is None
    elif kind == "full":
        torch.testing.assert_close(found, logits)
    else:
        rows = torch.arange(len(selected)).unsqueeze(1)
        torch.testing.assert_close(found, logits[rows, selected])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("trained", ["head", "blocks.1", "embed", "blocks.0.attention"])
def test_frozen_parts(trained, attention, inputs):
    torch.manual_seed(0)
    model = TinyDecoder(TinyConfig(attention=attention)).double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(trained)
    assert any(parameter.requires_grad for parameter in model.parameters())
    fxseek.compile(model, 0.3, score="tokenseek")
    assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


def test_the_callers_tensors_are_not_marked(model, inputs):
    fxseek.compile(model, 0.3)
    model(**inputs).loss.backward()
    for value in inputs.values():
        assert not [name for name in value.__dict__ if "dynamo" in name]


def test_lengths_may_change_from_step_to_step(model):
    fxseek.compile(model, 0.3, score="random")
    for tokens in (11, 29, 17, 23, 13, 31, 19):
        model(**batch(37, tokens=tokens)).loss.backward()
    step = step_of(model)
    assert step is not None
    assert len(step.recorder.steps) == 1


def test_check_gradients_leaves_no_trace(model, inputs):
    fxseek.compile(model.double(), 0.3)
    model(**inputs).loss.backward()
    before, state = gradients(model), torch.get_rng_state()
    check = fxseek.check_gradients(model, **inputs)
    assert check.error <= check.tolerance == 1e-9
    assert torch.equal(torch.get_rng_state(), state)
    for name, gradient in before.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)
    assert fxseek.report(model).step == 0


def test_check_gradients_finds_a_wrong_gradient(model, inputs, monkeypatch):
    fxseek.compile(model.double(), 0.3)
    monkeypatch.setattr("fxseek.passes.ditch.scatter_rows", _forgets_the_rows)
    with pytest.raises(fxseek.GradientMismatch, match="differs from masked full backprop"):
        fxseek.check_gradients(model, **inputs)


def _forgets_the_rows(base: Tensor, *_: Any) -> Tensor:
    return base


def test_a_loss_of_the_callers_own(model, inputs):
    def shifted(outputs: Any, given: dict[str, Any]) -> Tensor:
        logits, ids = outputs.logits[:, :-1], given["input_ids"][:, 1:]
        return F.cross_entropy(logits.reshape(-1, 37), ids.reshape(-1))

    fxseek.compile(model.double(), 0.3, loss=shifted)
    given = {"input_ids": inputs["input_ids"]}
    model(**given).loss.backward()
    assert not fxseek.explain(model, **given).fallbacks
    assert fxseek.check_gradients(model, **given).error <= 1e-9


def test_a_loss_that_is_no_cross_entropy_is_reported(model, inputs, caplog):
    fxseek.compile(model.double(), 0.3, score="context", loss=_mean_square)
    given = {"input_ids": inputs["input_ids"]}
    with caplog.at_level(logging.WARNING, "fxseek"):
        model(**given)
    assert "no cross-entropy over tokens" in caplog.text
    assert fxseek.check_gradients(model, **given).error <= 1e-9
    assert "keeps its full-token value" in str(fxseek.explain(model, **given))


def _mean_square(outputs: Any, given: dict[str, Any]) -> Tensor:
    return outputs.logits.square().mean()


def test_checkpointing_and_input_hooks_are_switched_off_and_back_on(caplog):
    model: Any = tiny_llama().train()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    embeddings = model.get_input_embeddings()
    hooks = len(embeddings._forward_hooks)
    assert hooks
    ids = torch.randint(0, model.config.vocab_size, (2, 11))
    with caplog.at_level(logging.WARNING, "fxseek"):
        fxseek.compile(model, 0.3)
    assert "gradient checkpointing is switched off" in caplog.text
    assert "input-require-grads hook is removed" in caplog.text
    model(input_ids=ids, labels=ids).loss.backward()
    assert not embeddings._forward_hooks
    fxseek.uncompile(model)
    assert model.model.gradient_checkpointing
    assert len(embeddings._forward_hooks) == hooks


def test_explain_keeps_what_was_switched_on_since(caplog):
    model: Any = fxseek.compile(tiny_llama().train(), 0.3)
    model.activation_checkpointing_enable()
    hooks = len(model.get_input_embeddings()._forward_hooks)
    ids = torch.randint(0, model.config.vocab_size, (2, 11))
    fxseek.explain(model, input_ids=ids, labels=ids)
    fxseek.uncompile(model)
    assert model.model.gradient_checkpointing
    assert len(model.get_input_embeddings()._forward_hooks) == hooks > 0


# ---- errors --------------------------------------------------------------------------------------


def test_no_labels(model, inputs):
    fxseek.compile(model)
    with pytest.raises(fxseek.GraphError, match=r"Pass labels to the model.*score="):
        model(input_ids=inputs["input_ids"])


@pytest.mark.parametrize("score", ["tokenseek", "context"])
def test_labels_by_another_name(score: str, caplog: pytest.LogCaptureFixture):
    """The bounds of an answer, by which a model of transformers computes its loss itself."""
    from transformers import BertConfig, BertForQuestionAnswering

    config = BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = fxseek.compile(BertForQuestionAnswering(config).double().train(), 0.3, score=score)
    given: dict[str, Any] = {
        "input_ids": torch.randint(37, (2, 13)),
        "start_positions": torch.tensor([2, 5]),
        "end_positions": torch.tensor([4, 9]),
    }
    assert fxseek.check_gradients(model, **given).error <= 1e-9
    assert "no cross-entropy over tokens" in caplog.text and "outside" not in caplog.text
    fxseek.uncompile(model)
    fxseek.compile(model, 0.3, score=score, select="sample")
    with pytest.raises(fxseek.GraphError, match=r"no cross-entropy over tokens.*select='topk'"):
        model(**given)


class Regression(nn.Module):
    """Computes its loss itself, from targets that nobody would take for labels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = without_casts(tiny_llama())

    def forward(self, input_ids: Tensor, wanted: Tensor) -> Any:
        outputs = self.inner(input_ids=input_ids)
        outputs["loss"] = (outputs.logits.mean(-1) - wanted).square().mean()
        return outputs


@pytest.mark.parametrize("score", ["tokenseek", "context"])
def test_a_loss_that_is_not_known_for_one(score: str, caplog: pytest.LogCaptureFixture):
    given: dict[str, Any] = {
        "input_ids": torch.randint(37, (2, 13)),
        "wanted": torch.zeros(2, 13).double(),
    }
    model = fxseek.compile(Regression().train(), 0.3, score=score)
    remedy = "loss=lambda outputs, batch: outputs.loss"
    if score == "context":
        model(**given)
        assert remedy in caplog.text
    else:
        with pytest.raises(fxseek.GraphError, match=remedy):
            model(**given)
    fxseek.uncompile(model)
    fxseek.compile(model, 0.3, score=score, loss=lambda outputs, batch: outputs.loss)
    assert fxseek.check_gradients(model, **given).error <= 1e-9


def test_a_second_compile(model):
    fxseek.compile(model, 0.2)
    with pytest.raises(fxseek.ConfigError, match=r"compiled by fxseek already.*uncompile"):
        fxseek.compile(model, 0.3)


def test_a_model_that_torch_compiled(model):
    model.compile()
    with pytest.raises(fxseek.ConfigError, match=r"compiled by torch\.compile already"):
        fxseek.compile(model)
    compiled: Any = torch.compile(TinyDecoder(GROUPED))
    with pytest.raises(fxseek.ConfigError, match=r"compiled by torch\.compile already"):
        fxseek.compile(compiled)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan"), "a tenth", True])
def test_a_ratio_that_is_none(model, ratio):
    with pytest.raises(fxseek.ConfigError, match="ratio"):
        fxseek.compile(model, ratio)
    assert "_compiled_call_impl" not in model.__dict__


def test_something_that_is_no_module():
    with pytest.raises(fxseek.ConfigError, match=r"must be a torch\.nn\.Module"):
        fxseek.compile("llama")  # type: ignore[arg-type]


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyDecoder(GROUPED)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        out: Any = self.inner(input_ids, labels=labels)
        if out.logits.sum().item() > 1e9:
            raise RuntimeError("too large")
        return out


def test_a_graph_break_names_the_line(inputs):
    model = fxseek.compile(Breaks().train())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxseek.CaptureError, match=r"one graph at .*test_compile\.py.*1e9"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    fxseek.uncompile(model)
    model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss.backward()


class NoTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.linear(x), labels)}


def test_a_model_without_tokens():
    model = fxseek.compile(NoTokens().train())
    with pytest.raises(fxseek.GraphError, match=r"no token dimension.*constant 5"):
        model(x=torch.randn(4, 5), labels=torch.zeros(4, dtype=torch.long))


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(37, 5), nn.Linear(5, 37)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.embedding(input_ids).cumsum(1))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("score", ["context", "tokenseek", "gradient"])
def test_a_score_without_its_attention(score, inputs):
    model = fxseek.compile(NoAttention().train(), score=score)
    given = {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}
    with pytest.raises(fxseek.GraphError, match=r"last attention.*random"):
        model(**given)
    fxseek.uncompile(model)
    fxseek.compile(model.double(), 0.3, score="random")
    fallbacks = fxseek.explain(model, **given).fallbacks
    assert [item.operation for item in fallbacks] == ["cumsum"]
    assert "test_compile.py" in fallbacks[0].line
    assert fallbacks[0].cost_bytes > 0
    assert fxseek.check_gradients(model, **given).error <= 1e-9


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda given: torch.zeros(3), r"returned shape \[3\]; expected \[batch, tokens\]"),
        (lambda given: given.valid * float("nan"), "NaN"),
        (lambda given: None, "returned"),
    ],
)
def test_a_score_function_that_is_wrong(score, message, model, inputs):
    fxseek.compile(model, score=score)
    with pytest.raises(fxseek.ScoreError, match=message):
        model(**inputs)


def test_activations_that_overflow(model, inputs):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    fxseek.compile(model)
    with pytest.raises(fxseek.ScoreError, match="token scores are not finite"):
        model(**inputs)


def test_a_score_function_of_the_callers_own(model, inputs):
    seen: list[Any] = []

    def longest(given: fxseek.ScoreInputs) -> Tensor:
        seen.append(given)
        return torch.arange(given.valid.shape[1]).expand(given.valid.shape)

    fxseek.compile(model, 0.2, score=longest)
    model(**inputs).loss.backward()
    tokens = inputs["input_ids"].shape[1]
    assert fxseek.report(model).selected[0].max() >= tokens - 2
    assert seen[0].hidden.shape[:2] == inputs["input_ids"].shape
    assert not seen[0].hidden.requires_grad


def test_arguments_that_do_not_fit_the_signature(model, inputs):
    fxseek.compile(model)
    with pytest.raises(fxseek.InputError, match="positional arguments"):
        model(*([inputs["input_ids"]] * 12))
    with pytest.raises(fxseek.InputError, match="given twice"):
        model(inputs["input_ids"], **inputs)


def test_positional_arguments(model, inputs):
    fxseek.compile(model, 0.3)
    model(inputs["input_ids"], labels=inputs["labels"]).loss.backward()
    assert fxseek.report(model).tokens == inputs["input_ids"].shape[1]


# ---- the backend of torch.compile ----------------------------------------------------------------


@pytest.mark.parametrize("score", ["random", "context", "tokenseek"])
def test_the_backend_with_the_loss_inside(score, model, inputs):
    model = model.double()
    compiled = torch.compile(
        model, backend="fxseek", dynamic=True, options=options({"ratio": 0.3, "score": score})
    )
    out = compiled(**inputs)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    out.loss.backward()
    report, found = fxseek.report(), gradients(model)
    reference = masked_backprop(model, inputs, report.selected, weights=report.weights)
    assert compare(found, reference.gradients).error <= 1e-9


@pytest.mark.parametrize("score", ["random", "context"])
def test_the_backend_with_the_loss_outside(score, model, inputs):
    model = model.double()
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        wanted = model(**given).logits
    compiled = torch.compile(
        model, backend="fxseek", dynamic=True, options=options({"ratio": 0.3, "score": score})
    )
    logits = compiled(**given).logits
    torch.testing.assert_close(logits.detach(), wanted)
    report = fxseek.report()
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    chosen = torch.zeros_like(targets, dtype=torch.bool).scatter(1, report.selected, True)
    F.cross_entropy(logits.flatten(0, 1), targets.where(chosen, -100).flatten()).backward()
    reference = masked_backprop(model, inputs, report.selected)
    assert compare(gradients(model), reference.gradients).error <= 1e-9


def test_the_backend_without_a_dynamic_length(model, inputs):
    compiled = torch.compile(model, backend="fxseek", options=options({"score": "random"}))
    with pytest.raises(Exception, match=r"captured as the constant.*dynamic=True"):
        compiled(**inputs)


def test_the_backend_with_a_bad_option(model, inputs):
    compiled = torch.compile(model, backend="fxseek", dynamic=True, options=options({"ratoi": 0.3}))
    with pytest.raises(Exception, match="ratio"):
        compiled(**inputs)


@pytest.mark.parametrize(
    "given", [{"memory_budget_bytes": 2**30}, {"loss": max}, {"outputs": "selected"}]
)
def test_the_backend_refuses_what_it_would_ignore(given, model, inputs):
    compiled = torch.compile(model, backend="fxseek", dynamic=True, options=options(given))
    with pytest.raises(Exception, match=rf"ConfigError: {next(iter(given))}=.*leave it out"):
        compiled(**inputs)


class InPieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 64)

    def forward(self, ids: Tensor, state: Tensor | None = None, breaks: str = "") -> Tensor:
        if breaks == "before":
            torch._dynamo.graph_break()
        x = self.first(self.embed(ids) if state is None else state[..., :8])
        if breaks == "within":
            torch._dynamo.graph_break()
        return self.second(x.tanh())


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute")  # Dynamo's, of an input that is no leaf
def test_the_backend_refuses_a_model_in_pieces(inputs):
    model = InPieces()
    compiled = torch.compile(
        model, backend="fxseek", dynamic=True, options=options({"score": "random"})
    )
    with pytest.raises(fxseek.InputError, match=r"in several graphs.*fullgraph=True"):
        compiled(inputs["input_ids"], breaks="within")


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute")
def test_the_backend_takes_what_is_no_piece_of_another(inputs):
    """A break in front of the model, inputs with a history, a step's output fed back."""
    model = InPieces()
    compiled = torch.compile(
        model, backend="fxseek", dynamic=True, options=options({"ratio": 1.0, "score": "random"})
    )
    compiled(inputs["input_ids"], breaks="before").sum().backward()
    prompt = torch.randn(8, requires_grad=True)
    state = torch.ones(*inputs["input_ids"].shape, 1) * prompt
    for _ in range(3):
        state = compiled(inputs["input_ids"], state)
    state.sum().backward()
    assert prompt.grad is not None and bool(prompt.grad.any())


def test_the_backend_refuses_to_be_split_for_ddp(tmp_path):
    ((said, trained),) = ddp.run(ddp.split_worker, tmp_path, processes=1)
    assert "optimize_ddp = False" in said
    assert trained


def test_the_backend_takes_a_configuration(model, inputs):
    given = fxseek.SeekConfig(0.3, score="random").to_dict()
    compiled = torch.compile(model, backend="fxseek", dynamic=True, options=options(given))
    assert compiled(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_the_backend_leaves_inference_alone(model, inputs):
    with torch.no_grad():
        wanted = model(**inputs).logits
        compiled = torch.compile(model, backend="fxseek", dynamic=True)
        torch.testing.assert_close(compiled(**inputs).logits, wanted)
