"""`fxseek.compare_memory`: its bars are estimates, stacked; its table, its plot, bad arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxseek

pytestmark = pytest.mark.filterwarnings(
    # transformers' and peft's own
    "ignore:.*:UserWarning",
    "ignore:.*:FutureWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)

CONFIG = LlamaConfig(
    vocab_size=101, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> fxseek.MemoryComparison:
    torch._dynamo.reset()
    return fxseek.compare_memory(
        CONFIG, 101, batches=(1, 2), tunings=("full",), ratios=(0.3,), score="random",
        progress=False,
    )  # fmt: skip


def test_a_bar_is_an_estimate_whose_parts_add_up(found):
    assert [(bar.batch, bar.way) for bar in found.bars] == [
        (batch, way) for batch in (1, 2) for way in ("ordinary", "checkpointing", "fxseek, 0.3")
    ]
    for bar in found.bars:
        assert sum(bar.parts.values()) == bar.estimate.peak_bytes
        assert bar.parts["activations"] <= bar.most_activations
        at_peak = bar.estimate.at_peak
        assert bar.parts["parameters"] == at_peak["parameters"]
        owned = at_peak["gradients"] + at_peak["optimiser state"]
        assert bar.parts["gradients and optimiser state"] == owned
        assert bar.estimate.kept == (31 if "fxseek" in bar.way else 101)
    given: dict[str, Any] = {"ratio": 0.3, "score": "random"}
    alone = fxseek.estimate(CONFIG, 101, 2, **given)
    assert found.bars[-1].estimate.peak_bytes == alone.peak_bytes


def test_ways_save_activations_and_rows_cost_them(found):
    one, two = found.bars[:3], found.bars[3:]
    for ordinary, *others in (one, two):
        assert all(x.most_activations < ordinary.most_activations for x in others)
    for few, many in zip(one, two, strict=True):
        assert 1.8 < many.most_activations / few.most_activations < 2.1


def test_it_prints_a_table_and_plots(found, tmp_path: Path):
    title, _, head, rule, *rows = str(found).splitlines()
    assert title == "llama, rows of 101 tokens, cuda; MiB at the peak"
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    assert len(rows) == 6
    assert [cell.strip() for cell in rows[0].split("|")[1:4]] == ["full", "1", "ordinary"]
    assert rows[0].split("|")[8].strip() == "100 %"
    found.plot(tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    for shown in ("1 row of 101 tokens", "2 rows of 101 tokens", "checkpointing", "activations"):
        assert shown in text
    with pytest.raises(fxseek.InputError, match=r"must end in \.png or \.svg"):
        found.plot(tmp_path / "bars.pdf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": 1}, r"batches=1 must be a list"),
        ({"tunings": "full"}, r"tunings='full' must be a list"),
        ({"ratios": ()}, r"ratios=\(\) must be a list with something in it"),
        ({"ratio": 0.1}, r"ratio= is not for compare_memory"),
        ({"tunings": ["full", "lore"]}, r"^tunings=.*: tuning='lore' is not accepted"),
        ({"batches": (1, 0)}, r"^batches=\(1, 0\): batch=0 is out of range"),
        ({"batches": (1, True)}, r"^batches=\(1, True\): batch=True is not an integer"),
        ({"ratios": (0.3, "bad")}, r"^ratios=.*ratio='bad'"),
        ({"span": 0}, r"^invalid fxseek configuration: span=0"),
        ({"shards": 8}, r"shards= is not for compare_memory"),
    ],
)
def test_bad_arguments(options, message, monkeypatch):
    monkeypatch.setattr("fxseek.inspect.compare_memory.estimate", None)  # before the first estimate
    with pytest.raises(fxseek.ConfigError, match=message):
        fxseek.compare_memory(CONFIG, 101, progress=False, **options)


def test_without_tunings_those_that_the_model_can_have():
    from bitsandbytes.nn.modules import Linear4bit
    from peft import LoraConfig, get_peft_model

    def tunings_of(config_or_model: Any) -> list[str]:
        found = fxseek.compare_memory(
            config_or_model, 101, batches=(1,), score="random", device="cpu", progress=False
        )
        return list(dict.fromkeys(bar.tuning for bar in found.bars))

    assert tunings_of(CONFIG) == ["full", "lora", "qlora"]
    model = LlamaForCausalLM(CONFIG)
    for layer in model.model.layers:
        mlp: Any = layer.mlp
        linear = Linear4bit(*mlp.down_proj.weight.T.shape, bias=False)
        mlp.down_proj = linear.to("cpu")
    assert tunings_of(model) == ["full", "lora"]
    adapters = LoraConfig(target_modules="all-linear")
    assert tunings_of(get_peft_model(LlamaForCausalLM(CONFIG), adapters)) == ["full"]


def test_a_ratio_is_named_as_it_was_given():
    def growing(step: int) -> float:
        return 0.1

    given = (growing, fxseek.SeekConfig(0.25), "labelled")
    found = fxseek.compare_memory(
        CONFIG, 101, batches=(1,), tunings=("full",), ratios=given, progress=False
    )
    names = [bar.way for bar in found.bars]
    assert names[2:] == ["fxseek, growing", "fxseek, 0.25", "fxseek, labelled"]
