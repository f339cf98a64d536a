"""The benchmark's baselines: an unfair comparison would begin with a wrong one."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from models import IGNORED, tiny_gpt2, tiny_llama, tiny_lora, without_casts
from torch import Tensor, nn

import baselines
import fxseek
from common import ExampleError
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop

TOKENS = 23


def model_of(tuning: str, **options: Any) -> nn.Module:
    model = without_casts(tiny_llama(**options))
    return model if tuning == "full" else tiny_lora(model).double()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("way", [baselines.TokenTune, baselines.TokenSeek])
@pytest.mark.parametrize("labels", ["all", "completion"])
def test_gradients_are_those_of_masked_full_backprop(
    way: type[baselines.TokenTune], tuning: str, labels: str
) -> None:
    model = model_of(tuning, tie_word_embeddings=tuning == "full")
    batch = models.batch(37, batch=3, tokens=TOKENS, labels=labels)
    trained = way(model, ratio=0.3)
    loss = trained(**batch).loss
    loss.backward()
    got = gradients(model)
    assert trained.kept is not None and trained.kept.shape == (3, 7)
    wanted = masked_backprop(model, batch, trained.kept)
    error = compare(got, wanted.gradients)
    assert error.error < 1e-9, error
    torch.testing.assert_close(loss.detach(), wanted.loss, rtol=1e-12, atol=0)
    assert any(g is not None and g.abs().max() > 0 for g in got.values())


def test_the_scored_tokens_are_those_that_fxseek_selects() -> None:
    model = model_of("full")
    batch = models.batch(37, batch=2, tokens=TOKENS)
    compiled = fxseek.compile(copy.deepcopy(model), 0.3, score="tokenseek")
    compiled(**batch).loss.backward()
    published = baselines.TokenSeek(model, ratio=0.3)
    published(**batch)
    assert published.kept is not None
    assert torch.equal(published.kept, fxseek.report(compiled).selected)


def test_random_tokens_change_from_step_to_step() -> None:
    model = baselines.TokenTune(model_of("full"), ratio=0.3, seed=5)
    batch = models.batch(37, batch=2, tokens=TOKENS)
    drawn = []
    for _ in range(2):
        model(**batch)
        assert model.kept is not None
        drawn.append(model.kept)
    assert not torch.equal(*drawn)
    assert all((kept.diff(dim=1) > 0).all() for kept in drawn)


def test_scoring_leaves_no_gradient_and_freezes_nothing() -> None:
    model = model_of("lora")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    baselines.TokenSeek(model, ratio=0.3)(**models.batch(37, batch=1, tokens=TOKENS))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("chunk", [5, TOKENS, 100])
def test_a_chunked_loss_is_the_ordinary_one(tuning: str, chunk: int) -> None:
    model = model_of(tuning)
    batch = models.batch(37, batch=2, tokens=TOKENS, labels="some", padding="right")
    wanted = model(**batch).loss
    wanted.backward()
    reference = gradients(model)
    loss = baselines.ChunkedLoss(model, chunk)(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    error = compare(gradients(model), reference)
    assert error.error < 1e-12, error


def test_other_causal_models_take_the_chunked_loss_too() -> None:
    model = tiny_gpt2()
    batch = models.batch(37, batch=2, tokens=TOKENS)
    torch.testing.assert_close(
        baselines.ChunkedLoss(model, 7)(**batch).loss, model(**batch).loss, rtol=1e-5, atol=0
    )


def test_what_a_baseline_does_not_do_is_said() -> None:
    with pytest.raises(ExampleError, match=r"Llama, not GPT2LMHeadModel: leave it out"):
        baselines.TokenTune(tiny_gpt2(), ratio=0.3)
    model = tiny_llama()
    padded = models.batch(37, batch=2, tokens=TOKENS, padding="right")
    with pytest.raises(ExampleError, match="without padding"):
        baselines.TokenTune(model, ratio=0.3)(**padded)
    model.config.final_logit_softcapping = 30.0  # type: ignore[union-attr]
    with pytest.raises(ExampleError, match="changes its logits \\(final_logit_softcapping\\)"):
        baselines.ChunkedLoss(model)


def test_the_last_token_predicts_nothing() -> None:
    assert baselines.next_tokens(torch.tensor([[1, 2, IGNORED, 4]])).tolist() == [
        [2, IGNORED, 4, IGNORED]
    ]
