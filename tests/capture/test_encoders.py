"""Encoders that cannot be captured run ahead of the step: images of any size, or none, in a row."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, IMAGE
from models import double_throughout
from torch import Tensor, nn
from tuners import spread

import fxseek
from fxseek.capture.step import step_of

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
QWEN = FAMILIES["qwen2_vl_images"]


def batch(tokens: int = 23, seed: int = 0) -> dict[str, Tensor]:
    return QWEN.batch(2, tokens, seed, torch.float64)


def with_grid(given: dict[str, Tensor], *grid: int) -> dict[str, Tensor]:
    """The batch with an image more than 4 tokens large as that of the first row."""
    rows, count = given["input_ids"], grid[0] * grid[1] * grid[2] // 4
    draw = torch.Generator().manual_seed(1)
    first = torch.zeros_like(rows)
    first[0, 2 : 2 + count] = 1
    more = torch.randn(4 * count - 16, given["pixel_values"].shape[1], generator=draw)
    return {
        **given,
        "input_ids": rows.masked_fill(first == 1, IMAGE),
        "labels": given["labels"].masked_fill(first == 1, -100),
        "mm_token_type_ids": given["mm_token_type_ids"] | first,
        "image_grid_thw": torch.cat((torch.tensor([grid]), given["image_grid_thw"][1:])),
        "pixel_values": torch.cat((given["pixel_values"], more.double())),
    }


def without_images(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The batch with text alone in a row."""
    kinds = given["mm_token_type_ids"].clone()
    kinds[row] = 0
    ids = given["input_ids"].where(given["input_ids"] != IMAGE, 5)
    ids[1 - row] = given["input_ids"][1 - row]
    counts = [1, 2]
    grids = given["image_grid_thw"].split(counts)[1 - row]
    pixels = given["pixel_values"].split([16, 24])[1 - row]
    images = {"mm_token_type_ids": kinds, "image_grid_thw": grids, "pixel_values": pixels}
    return {**given, "input_ids": ids, **images}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fxseek.compile(QWEN.make().double(), 0.3)


def test_images_of_any_size(model, caplog):
    with double_throughout(), caplog.at_level(logging.WARNING, logger="fxseek"):
        for given in (batch(), with_grid(batch(31, 1), 1, 4, 8)):
            fxseek.check_gradients(model, 1e-9, **given)
    assert "report(model).saved_bytes does not count" in caplog.text
    step = step_of(model)
    assert step is not None
    assert len(step.recorder.steps) == 1


def test_features_without_a_place_are_the_models_own_error(model):
    given = batch()
    given["input_ids"][0, 2] = 5
    with double_throughout():
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(**given)
        model(**batch()).loss.backward()
    assert "get_placeholder_mask" not in vars(model.get_submodule("model"))


@pytest.mark.sweep
def test_rows_without_an_image(model):
    text = {name: batch()[name] for name in ("input_ids", "attention_mask", "labels")}
    with double_throughout():
        fxseek.check_gradients(model, 1e-9, **without_images(batch(), 1))
        fxseek.check_gradients(model, 1e-9, **without_images(batch(), 0))
        fxseek.check_gradients(model, 1e-9, **{**text, "input_ids": text["input_ids"] % IMAGE})


def adapted() -> nn.Module:
    config = peft.LoraConfig(r=3, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)")
    model = peft.get_peft_model(QWEN.make(), config).double()
    spread(model)
    return model


@pytest.mark.sweep
def test_a_frozen_encoder_records_nothing():
    with double_throughout():
        model = adapted()
        seen: list[Tensor] = []
        tower = model.get_submodule("base_model.model.model.visual")
        tower.register_forward_hook(lambda m, args, out: seen.append(out.pooler_output))
        fxseek.compile(model, 0.3, supervised_only=True)
        fxseek.check_gradients(model, 1e-9, **batch())
        model(**batch()).loss.backward()
    assert seen
    assert not any(x.requires_grad for x in seen)
    rows = fxseek.report(model).selected
    targets = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:]
    assert (targets.gather(1, rows.clamp(min=0))[rows >= 0] != -100).all()


@pytest.mark.sweep
def test_every_token_in_parts_is_ordinary_training():
    with double_throughout():
        model, plain = adapted(), adapted()
        fxseek.compile(model, 1.0, learn_chunk=8)
        for each in (model, plain):
            each(**batch()).loss.backward()
    step = step_of(model)
    assert step is not None
    assert not isinstance(step.recorder.steps[0].program.parts, str)
    wanted = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if name not in wanted:
            continue
        torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-9, atol=1e-12)
