"""Estimates: the peak of a real step, known byte counts, large models, bad arguments."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peaks import training_peak
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config

import fxseek
from estimate import LLAMA_3, llama_3
from fxseek.inspect.kernels import Kernels
from fxseek.inspect.memory import CATEGORIES, module_tensors
from gpu import config_of

pytestmark = pytest.mark.filterwarnings(
    # transformers' and peft's own
    "ignore:.*:UserWarning",
    "ignore:.*:FutureWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


def small(**options: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 1031, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**(sizes | options))


def rows(tokens: int, batch: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 1031, (batch, tokens))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def with_lora(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("tokens", [101, pytest.param(512, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(
    ("tuning", "dtype", "options"),
    [
        ("full", torch.float32, {}),
        ("full", torch.bfloat16, {"score": "random"}),
        ("full", torch.float32, {"ratio": 0.5, "score": "context"}),
        ("full", torch.float32, {"ordinary": True}),
        ("lora", torch.bfloat16, {"ratio": 0.3}),
        ("lora", torch.bfloat16, {"ratio": 1.0, "learn_chunk": 24}),
        ("full", torch.float32, {"ratio": 0.5, "score": "random", "learn_chunk": 24}),
        ("lora", torch.bfloat16, {"ordinary": True}),
    ],
)
def test_the_peak_is_that_of_a_real_step(tuning, dtype, options, tokens):
    estimated = fxseek.estimate(
        small(), tokens, 2, tuning=tuning, dtype=dtype, device="cpu", **options
    )
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_config(small(), dtype=dtype).train()
    if tuning == "lora":
        model = with_lora(model)
    options = dict(options)
    if not options.pop("ordinary", False):
        fxseek.compile(model, **options)
    peak = training_peak(model, rows(tokens), optimise=True)
    assert estimated.peak_bytes == pytest.approx(peak, rel=0.02)


@pytest.mark.model
@pytest.mark.sweep
@pytest.mark.parametrize("tokens", [256, pytest.param(1024, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("ordinary", [False, True])
def test_the_peak_of_a_pretrained_model(smollm2_folder: Path, tokens: int, ordinary: bool):
    from common import find_model, load_model

    model = load_model(find_model(str(smollm2_folder)), torch.float32).train()
    estimated = fxseek.estimate(
        model, tokens, optimizer=None, device="cpu", dtype=torch.float32, ordinary=ordinary
    )
    torch._dynamo.reset()
    if not ordinary:
        fxseek.compile(model, 0.1)
    peak = training_peak(model, rows(tokens, 1), optimise=False)
    print(f"{tokens} tokens: {estimated.peak_bytes} estimated, {peak} measured")
    assert estimated.peak_bytes == pytest.approx(peak, rel=0.1)


def test_the_bytes_of_a_large_model():
    """Two blocks of an 8B model: what is known beforehand."""
    config = llama_3("Llama-3.1-8B")
    config.num_hidden_layers = 2
    found = fxseek.estimate(config, 8192, tuning="lora", device="hopper")
    weights = 2 * (2 * 128256 * 4096 + 2 * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)))
    assert found.largest["parameters"] == pytest.approx(weights, rel=0.02)
    assert found.largest["gradients"] == pytest.approx(4 * found.trainable, rel=1e-3)
    assert found.largest["optimiser state"] == pytest.approx(8 * found.trainable, rel=1e-3)
    keys_and_values = 2 * 2 * 8 * 128 * 8192 * 2
    assert keys_and_values <= found.largest["K/V"] <= 2 * keys_and_values
    assert sum(found.at_peak.values()) == found.peak_bytes
    assert set(found.at_peak) == set(CATEGORIES)
    assert (found.tokens, found.kept, found.batch) == (8192, 820, 1)


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        pytest.param(name, tuning, marks=pytest.mark.sweep)
        for name in LLAMA_3
        for tuning in ("full", "lora", "qlora")
    ],
)
def test_published_models(name, tuning):
    found = fxseek.estimate(llama_3(name), 4096, tuning=tuning, device="hopper")
    everything = fxseek.estimate(llama_3(name), 4096, tuning=tuning, device="hopper", ordinary=True)
    assert found.parameters == everything.parameters
    assert found.parameters == pytest.approx(float(name[10:-1]) * 1e9, rel=0.3)
    assert found.peak_bytes < everything.peak_bytes
    assert found.largest["activations"] < 0.25 * everything.largest["activations"]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "tuning", "tokens", "batch", "options", "most"),
    [
        ("Llama-3.2-3B", "qlora", 4096, 2, {}, 4.6 * 2**30),
        ("Llama-3.2-1B", "lora", 32768, 1, {}, 6.9 * 2**30),
        ("Llama-3.1-8B", "qlora", 200_000, 1, {"kv": "offload"}, 24e9),
    ],
)
def test_what_the_documentation_promises_fits(name, tuning, tokens, batch, options, most):
    options = {"recompute": "block", "prefill_chunk": 2048, "chunk_bytes": 2**26, **options}
    found = fxseek.estimate(llama_3(name), tokens, batch, tuning=tuning, **options)
    assert found.peak_bytes < most


PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
COLUMNS: tuple[dict[str, Any], ...] = ({}, {"kv_grad_dtype": "model"}, {"kv": "offload"})


def every_token() -> list[tuple[str, str, int, dict[str, Any], float]]:
    """What the page says of all tokens in parts: model, tuning, tokens, options, GiB."""
    cases, model, tuning = [], "", ""
    lines = iter(PAGE.read_text().splitlines())
    for line in lines:
        if line.startswith("| model, tuning | tokens | K/V on the device |"):
            break
    next(lines)
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        name, tokens, *numbers = (cell.strip() for cell in line.split("|")[1:6])
        if name:
            model, tuning = name.split(", ")
        options: dict[str, Any] = {"learn_chunk": 256 if model == "Llama-3.1-8B" else 512}
        if model != "Llama-3.2-1B":
            options["recompute"] = "block"
        for column, number in zip(COLUMNS, numbers, strict=True):
            if number:
                count = int(tokens.replace(" ", ""))
                cases.append((model, tuning, count, options | column, float(number.split()[0])))
    return cases


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "tuning", "tokens", "options", "gib"), every_token(), ids=str)
def test_what_the_documentation_says_of_every_token(name, tuning, tokens, options, gib):
    found = fxseek.estimate(
        config_of(name), tokens, 1, 1.0, tuning=tuning.lower(), device="cuda", optimizer=None,
        prefill_chunk=2048, chunk_bytes=2**26, **options,
    )  # fmt: skip
    assert found.peak_bytes / 2**30 == pytest.approx(gib, abs=0.051)


def test_a_ratio_by_mass_is_the_most_that_it_may_come_to():
    assert fxseek.estimate(small(), 101, ratio="mass:0.9", ratio_bounds=(0.1, 0.4)).kept == 41


def test_a_million_tokens_are_quick():
    config = small(num_hidden_layers=2, max_position_embeddings=1 << 20)
    found = fxseek.estimate(config, 1 << 20, ratio=0.01, device="hopper")
    assert found.largest["K/V"] >= 2 * 2 * 2 * 16 * 2**20 * 2


@pytest.mark.parametrize("device", ["cuda", "hopper", "cpu"], ids="on {}".format)
def test_attention_on_chunks_of_queries(device):
    """Backward runs the chunks again by the kernels of the device."""
    config = small(num_hidden_layers=2, max_position_embeddings=1 << 14, num_key_value_heads=4)
    found = fxseek.estimate(config, 1 << 14, device=device, chunk_bytes=64 << 20)
    whole = 4 * found.kept * found.tokens
    assert whole > 64 << 20
    assert found.largest["transients"] < 2 * whole


def test_qlora_stores_what_bitsandbytes_stores(tmp_path):
    import transformers

    AutoModelForCausalLM.from_config(small(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.bfloat16
    )
    model = with_lora(model)
    held = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in module_tensors(model)}
    found = fxseek.estimate(small(), 101, tuning="qlora", device="cpu")
    assert found.largest["parameters"] == pytest.approx(sum(held.values()), rel=0.01)
    given = fxseek.estimate(model, 101, device="cpu")
    assert given.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)
    assert (given.parameters, given.trainable) == (found.parameters, found.trainable)
    assert all(x.device.type == "cpu" for x in module_tensors(model))


def test_a_module_is_left_as_it_is():
    model = AutoModelForCausalLM.from_config(small(), dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    by_module = fxseek.estimate(model, 101, device="cpu", tuning="lora")
    by_config = fxseek.estimate(small(), 101, device="cpu", tuning="lora", dtype=torch.float32)
    assert by_module.changes == by_config.changes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    fxseek.compile(model, 0.3)  # a compiled model can be estimated too
    assert fxseek.estimate(model, 101, device="cpu", optimizer=None).kept == 11


def test_an_optimiser_of_ones_own():
    def momentum(trained: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)

    none = fxseek.estimate(small(), 101, optimizer=None, device="cpu")
    own = fxseek.estimate(small(), 101, optimizer=momentum, device="cpu")
    adam = fxseek.estimate(small(), 101, device="cpu")
    state = [x.largest["optimiser state"] for x in (none, own, adam)]
    assert state[0] == 0
    assert state[1] == own.largest["gradients"]
    assert state[2] == pytest.approx(2 * state[1], rel=0.01)
    assert "optimiser" not in none.stage_peaks
    for found, kept in ((own, state[1]), (adam, state[2])):  # it makes nothing, and holds much
        held = found.largest["parameters"] + found.largest["gradients"] + kept
        assert held <= found.stage_peaks["optimiser"] <= found.peak_bytes


def test_it_prints_and_plots(tmp_path):
    found = fxseek.estimate(small(), 128)
    text = str(found)
    assert "llama, full, ratio 0.1, 1 row of 128 tokens, 13 kept, on cuda" in text
    assert f"in {found.peak_stage}" in text
    assert "optimiser state" in text
    assert found.fits(found.peak_bytes)
    assert not found.fits(found.peak_bytes - 1)
    assert found.plot(tmp_path / "step.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 1}, "tokens=1 is out of range; pass an integer of at least 2"),
        ({"batch": 0}, "batch=0 is out of range; pass an integer of at least 1"),
        ({"tuning": "lore"}, "tuning='lore' is not accepted; did you mean 'lora'?"),
        ({"ordinary": "checkpoint"}, "ordinary='checkpoint' must be False, True or"),
        ({"device": "tpu"}, "device='tpu' is not accepted; .*use one of 'cuda', 'hopper', 'cpu'"),
        ({"optimizer": "adam"}, "optimizer='adam' must be 'adamw', None, or a function"),
        ({"backend": "inductor"}, "backend='inductor' cannot be estimated"),
        ({"memory_budget_bytes": 1 << 30}, "leave the budget out"),
        ({"shards": 0}, "shards=0 is out of range; pass an integer of at least 1"),
        ({"shards": 8, "ordinary": True}, "FSDP2 without fxseek can't be estimated"),
        ({"ratios": 0.1}, "did you mean 'ratio'"),
        ({"config_or_model": 7}, "config_or_model=7 is of type int: pass"),
        ({"config_or_model": "./no-such-folder"}, "no-such-folder.*can't be loaded"),
        ({"config_or_model": T5Config()}, r"T5Config is of no causal language model .{,200}; make"),
        ({"dtype": "bfloat16", "tuning": "qlora"}, "dtype='bfloat16' must be a torch.dtype of"),
        ({"dtype": torch.int8}, "dtype=torch.int8 must be a torch.dtype of floating point"),
        ({"optimizer": lambda parameters: None}, "optimizer= gave a NoneType"),
        ({"config_or_model": torch.nn.Linear(3, 3)}, "Linear.forward takes input"),
    ],
)
def test_bad_arguments(arguments, message):
    given: dict[str, Any] = {"config_or_model": small(), "tokens": 101, **arguments}
    with pytest.raises(fxseek.ConfigError, match=message):
        fxseek.estimate(**given)


def test_what_a_model_has_already_is_not_added_again():
    adapted = with_lora(AutoModelForCausalLM.from_config(small()))
    for tuning in ("lora", "qlora"):
        with pytest.raises(fxseek.ConfigError, match=r"has its own: pass 'full'"):
            fxseek.estimate(adapted, 64, tuning=tuning)
    with pytest.raises(fxseek.ConfigError, match=r"^tunings=.*has its own: pass 'full'"):
        fxseek.compare_memory(adapted, 64, tunings=("full", "lora"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert fxseek.estimate(adapted, 64).trainable == trained
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(fxseek.ConfigError, match="no parameter of the model requires grad"):
        fxseek.estimate(adapted, 64)


def test_a_shard_of_a_model():
    config = small(tie_word_embeddings=False)
    options: dict[str, Any] = {"ratio": 1.0, "learn_chunk": 32, "device": "cpu"}
    whole = fxseek.estimate(config, 128, recompute="block", **options)
    shard = fxseek.estimate(config, 128, shards=4, **options)
    for category in ("parameters", "gradients", "optimiser state"):
        assert shard.largest[category] == pytest.approx(whole.largest[category] / 4, rel=0.05)
    assert shard.largest["K/V"] == whole.largest["K/V"]
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    root = sum(p.nbytes for p in (model.model.norm.weight, model.lm_head.weight))
    assert 0 < shard.largest["whole parameters"] <= 1.05 * (block + root)
    assert "a shard of 4" in str(shard)


def test_a_model_that_checkpoints_itself():
    """Its blocks run again in backward, with the attention of the device."""
    model = AutoModelForCausalLM.from_config(small())
    plain = fxseek.estimate(model, 128, ordinary=True).peak_bytes
    asked = fxseek.estimate(model, 128, ordinary="checkpointing").peak_bytes
    assert asked < plain
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert fxseek.estimate(model.train(), 128, ordinary=True).peak_bytes == asked


def test_checkpointing_of_a_real_step():
    estimated = fxseek.estimate(
        small(), 101, 2, dtype=torch.float32, device="cpu", ordinary="checkpointing"
    )
    model = AutoModelForCausalLM.from_config(small(), dtype=torch.float32).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peak = training_peak(model, rows(101), optimise=True)
    assert estimated.peak_bytes == pytest.approx(peak, rel=0.02)


def test_an_attention_that_cannot_be_compiled():
    model = AutoModelForCausalLM.from_config(small())
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(fxseek.ConfigError, match="flex_attention"):
        fxseek.estimate(model, 128)


def test_a_transformers_that_cannot_run_on_meta(monkeypatch: pytest.MonkeyPatch):
    """As before 5.4: `torch.is_autocast_enabled("meta")` raises."""

    def asks(device_type: str, **_: Any) -> None:
        torch.is_autocast_enabled(device_type)

    monkeypatch.setattr("transformers.utils.generic.maybe_autocast", asks)
    with pytest.raises(fxseek.ConfigError, match=r"upgrade to transformers 5\.4"):
        fxseek.estimate(LlamaConfig(num_hidden_layers=1), tokens=16)


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 4, 5, 8), (1, 2, 13, 8), (1, 2, 13, 8)),
        ((1, 2, 5, 8), (1, 2, 13, 8), (1, 2, 13, 16)),
        ((2, 5, 8), (2, 13, 8), (2, 13, 8)),
    ],
)
def test_a_causal_flag_for_fewer_queries_than_keys(shapes: tuple[tuple[int, ...], ...]):
    """Blocks of keys stand for it where the CPU's kernel takes them."""
    query, key, value = (torch.empty(shape, device="meta") for shape in shapes)
    grouped = query.shape[1] != key.shape[1] and query.dim() == 4
    found = Kernels("cpu").attend(query, key, value, is_causal=True, enable_gqa=grouped)
    assert found.shape == (*query.shape[:-1], value.shape[-1])
