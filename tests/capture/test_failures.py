"""What leaves a step that fails: the model's own exception, or one of fxseek's.

Dynamo reads code that raises as code that it cannot capture, and lets some exceptions of torch
through as they are.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from models import batch, double_throughout, tiny_llama
from oracle import inputs_of, model_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxseek

VOCABULARY = 37


def given() -> dict[str, Any]:
    return batch(VOCABULARY, 2, 11)


class OfTheUser(Exception):
    def __init__(self, code: int, *, place: str) -> None:
        super().__init__(f"{code} in {place}")
        self.code = code


def _raise(error: Exception) -> Any:
    raise error


def _asserts(outputs: Any, _: Any) -> Tensor:
    assert outputs.logits.shape[-1] == 3, "three classes"
    return outputs.logits.mean()


RAISING: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "a key that was popped": (lambda o, b: b["targets"].sum(), KeyError, "targets"),
    "an attribute": (lambda o, b: o.logitz.sum(), AttributeError, "logitz"),
    "an argument": (lambda o, b: F.cross_entropy(foo=1), TypeError, "foo"),  # type: ignore[call-arg]
    "an operand": (lambda o, b: None + o.logits, TypeError, "NoneType"),  # type: ignore[operator]
    "an index": (lambda o, b: [o.logits.mean()][5], IndexError, "out of range"),
    "a value": (lambda o, b: _raise(ValueError("my message")), ValueError, "my message"),
    "one of the user's": (lambda o, b: _raise(OfTheUser(7, place="here")), OfTheUser, "7 in here"),
    "an assertion": (_asserts, AssertionError, "three classes"),
    "shapes": (lambda o, b: F.cross_entropy(o.logits, b["labels"]), RuntimeError, r"\[2, 37\]"),
    "a file": (lambda o, b: Path("/no/such/file").read_text(), FileNotFoundError, "/no/such/file"),
}


@pytest.mark.parametrize("name", RAISING)
def test_a_loss_that_raises(name):
    loss, kind, message = RAISING[name]
    model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3, loss=loss)
    with pytest.raises(kind, match=message) as raised:
        model(**given())
    assert type(raised.value) is kind
    assert getattr(raised.value, "code", 7) == 7
    told = "".join(traceback.format_exception(raised.value))
    assert "when fxseek captured a training step" in told
    assert "given input_ids, " in told
    assert "Dynamo" not in told
    assert __file__ in told  # the user's own line
    model.train()
    with pytest.raises(kind, match=message):
        fxseek.explain(model, **given())


RETURNED: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda o, b: None, "it returned NoneType"),
    "a tuple": (lambda o, b: (o.logits.mean(), 1), "it returned tuple"),
    "a tensor of many": (lambda o, b: o.logits.mean(-1), r"it returned shape \[2, 11\]"),
    "a number": (lambda o, b: 3.0, "it returned float"),
    "an item": (lambda o, b: o.logits.mean().item(), "it returned float"),
    "a detached tensor": (lambda o, b: o.logits.mean().detach(), "no gradient flows"),
    "a sum of labels": (lambda o, b: b["labels"].sum(), "no gradient flows"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_loss_that_is_none(name):
    loss, message = RETURNED[name]
    model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3, loss=loss)
    with pytest.raises(fxseek.InputError, match=rf"^loss= .*{message}"):
        model(**given())


def test_a_loss_of_a_frozen_model():
    def loss(outputs: Any, given: Any) -> Tensor:
        return F.cross_entropy(outputs.logits.flatten(0, 1), given["labels"].flatten())

    model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3, loss=loss)
    model.requires_grad_(False)
    assert not model(**given()).loss.requires_grad


def test_a_model_that_raises():
    def forward(m: Any, x: Tensor) -> Tensor:
        raise NotImplementedError("my layer")

    with pytest.raises(NotImplementedError, match="my layer"):
        fxseek.compile(model_of(forward), 0.3, score="random")(**inputs_of())


def test_a_hook_that_raises():
    model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3)
    handle = model.lm_head.register_forward_hook(lambda *_: _raise(OfTheUser(7, place="a hook")))
    with pytest.raises(OfTheUser, match="7 in a hook"):
        model(**given())
    handle.remove()
    model(**given()).loss.backward()


def test_a_score_that_raises():
    def score(*_: Any) -> Tensor:
        raise KeyError("entropy")

    model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3, score=score)
    with pytest.raises(KeyError, match="entropy"):
        model(**given())


def test_a_call_that_only_dynamo_does_not_take():
    """Without fxseek it raises nothing: there is no exception of the model's own to show."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with open(__file__) as file:
            return m.first(x) * len(file.readline())

    with pytest.raises(fxseek.CaptureError, match=r"could not capture .*open\(__file__\)"):
        fxseek.compile(model_of(forward), 0.3, score="random")(**inputs_of())


def by_values(m: Any, x: Tensor) -> Tensor:
    """Sizes are read out of a tensor, as vision towers read those of their images."""
    lengths = torch.repeat_interleave(torch.tensor([3]), torch.tensor([2]))
    flat = m.first(x).flatten(0, 1)[:6]
    parts = torch.split(flat, lengths.tolist())
    return x + torch.cat(parts).sum()


def test_sizes_that_depend_on_values():
    model = fxseek.compile(model_of(by_values), 0.3, score="random")
    with pytest.raises(fxseek.CaptureError, match=r"(?s)test_failures.*depend on the values"):
        model(**inputs_of())


def test_experts_that_run_one_by_one():
    family = FAMILIES["mixtral"]
    model: Any = family.make("sdpa")
    model.set_experts_implementation("eager")
    fxseek.compile(model, 0.5)
    with pytest.raises(fxseek.CaptureError, match=r"set_experts_implementation\('grouped_mm'\)"):
        model(**family.batch())
    model.set_experts_implementation("batched_mm")
    model(**family.batch()).loss.backward()


def test_lines_of_exceptions_that_torch_lets_through():
    from fxseek import _torch

    raw = ArithmeticError("of a symbol")
    assert _torch.translated(raw, "M") is None
    raw.real_stack = traceback.StackSummary.from_list([("model.py", 7, "forward", "x.view(n)")])  # type: ignore[attr-defined]
    told = _torch.translated(raw, "M")
    assert isinstance(told, fxseek.CaptureError)
    assert "model.py:7: x.view(n)" in str(told)
    assert "ArithmeticError: of a symbol" in str(told)


def test_a_defect_of_the_passes(monkeypatch):
    def build(*_: Any, **options: Any) -> Any:
        raise ZeroDivisionError("of a pass")

    monkeypatch.setattr("fxseek.capture.backend.build", build)
    model: Any = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3)
    message = r"no step could be made of it: ZeroDivisionError: of a pass\n.*defect of fxseek"
    with pytest.raises(fxseek.GraphError, match=message):
        model(**given())


# ---- the way out of sizes that depend on values --------------------------------------------------


def sees_sizes() -> Any:
    torch.manual_seed(0)
    text = {
        "vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 40, "num_heads": 2, "mlp_ratio": 2,
              "patch_size": 4}  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=90, video_token_id=91,
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).double().train()


def images() -> dict[str, Tensor]:
    found = batch(80, 2, 23, padding="right")
    found["input_ids"][:, 3:9] = torch.tensor([92, 90, 90, 90, 90, 93])
    generator = torch.Generator().manual_seed(3)
    found["pixel_values"] = torch.randn(32, 96, generator=generator, dtype=torch.float64)
    found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    found["mm_token_type_ids"] = (found["input_ids"] == 90).int()
    return found


def embedded(model: Any, given: dict[str, Tensor], positions: bool) -> dict[str, Tensor]:
    """The call with the images' features among the embeddings, as the message says."""
    given = dict(given)
    ids, grid = given.pop("input_ids"), given.pop("image_grid_thw")
    kinds, pixels = given.pop("mm_token_type_ids"), given.pop("pixel_values")
    features = torch.cat(model.model.get_image_features(pixels, grid).pooler_output)
    embeddings = model.get_input_embeddings()(ids)
    given["inputs_embeds"] = embeddings.masked_scatter((ids == 90)[..., None], features)
    if positions:
        mask = given["attention_mask"]
        index = model.model.get_rope_index
        given["position_ids"], _ = index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=mask
        )
    return given


@pytest.mark.parametrize("positions", [False, True])
def test_a_vision_tower_outside_of_the_graph(positions, monkeypatch):
    """The way out for models whose encoders fxseek can't run ahead of the step."""
    monkeypatch.setattr("fxseek.capture.encoders._OUTPUTS", "of_another_library")
    model = fxseek.compile(sees_sizes(), 1.0)
    arguments = images()
    with pytest.raises(fxseek.CaptureError, match=r"(?s)depend on the values.*inputs_embeds="):
        model(**arguments)
    with double_throughout():
        plain = sees_sizes()
        outside = plain(**(arguments if positions else embedded(plain, arguments, False)))
        outside.loss.backward()
        wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert any("visual" in name for name in wanted)
        model(**embedded(model, arguments, positions)).loss.backward()
        for name, parameter in model.named_parameters():
            if name in wanted:
                assert torch.allclose(parameter.grad, wanted[name], rtol=0, atol=1e-9), name
        fxseek.compile(fxseek.uncompile(model), 0.3)
        given = {n: x.detach() for n, x in embedded(model, arguments, positions).items()}
        fxseek.check_gradients(model, 1e-9, **given)


def test_a_dispatch_mode():
    """Under one torch.compile captures nothing: it runs the model as it is, on all tokens."""
    model = fxseek.compile(tiny_llama(), 0.3, score="random")
    with (
        FlopCounterMode(display=False),
        pytest.raises(fxseek.CaptureError, match="TorchDispatchMode"),
    ):
        model(**batch(37))
    model(**batch(37)).loss.backward()


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_compilation_switched_off(stance: Any):
    """Never a step on all tokens, before a capture or after it."""
    model = fxseek.compile(tiny_llama(), 0.3, score="random")
    for rows in (1, 2):
        given = batch(37, batch=rows)
        with torch.compiler.set_stance(stance), pytest.raises(fxseek.CaptureError):
            model(**given)
        model(**given).loss.backward()
