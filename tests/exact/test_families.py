"""Families of transformers, captured as they are: exact in float64, and what is general."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from families import FAMILIES, Family
from models import double_throughout
from oracle import assert_exact_causal
from torch import fx, nn

import fxseek
from fxseek.capture.step import step_of
from fxseek.passes.facts import module_path
from fxseek.passes.rules import called

pytestmark = pytest.mark.filterwarnings(
    # transformers' own, of what it does in a capture
    "ignore:.*:UserWarning",
    "ignore:.*:FutureWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)
SDPA_ALONE = {
    "diffllama", "jetmoe", "llama4", "gemma3n", "deepseek_v3", "modernbert", "esm", "whisper",
    "paligemma_images", "bert_classes", "deepseek_v2", "distilbert", "distilbert_classes",
    "llama_classes", "phi3_longrope", "qwen3_vl_text", "roberta", "roberta_classes", "t5", "trocr",
    "qwen2", "qwen3", "mistral", "olmo2", "smollm3", "stablelm", "granite", "phi3", "opt",
    "qwen3_moe", "gpt_neox", "falcon", "glm4_moe", "vit", "llava_images",
}  # fmt: skip
"""Families whose eager attention is left to the sweep."""
SWEPT = {
    "albert", "electra", "roformer", "qwen2_moe", "olmoe", "granitemoe", "mpt", "bart",
    "smolvlm_text", "smolvlm_images", "paligemma_text", "roberta_classes", "gemma3_images",
    "qwen2_vl_images", "qwen2_5_vl_images", "qwen3_vl_images", "deit", "dinov2", "siglip",
    "youtu", "glm4_moe_lite", "minicpm3", "jamba", "zamba2", "bamba", "falcon_h1",
    "qwen3_next",
}  # fmt: skip
"""Families left to the sweep: another one is much like them."""
SCANS = {"jamba"}
"""Families whose scan over tokens counts them by an expression of its own: what is added to its
result is not known to have as many."""


def _marks(family: Family, attention: str) -> tuple[pytest.MarkDecorator, ...]:
    swept = family.name in SWEPT or (family.name in SDPA_ALONE and attention == "eager")
    return (pytest.mark.sweep,) if swept else ()


CELLS = [
    pytest.param(
        family, attention, id=f"{family.name}-{attention}", marks=_marks(family, attention)
    )
    for family in FAMILIES.values()
    for attention in family.attentions
    if not family.mixer and not family.refused
]
MIXERS = [
    pytest.param(family, id=family.name, marks=_marks(family, "sdpa"))
    for family in FAMILIES.values()
    if family.mixer
]


def fallbacks(model: nn.Module) -> list[fx.Node]:
    step = step_of(model)
    assert step is not None
    learn = step.recorder.steps[0].program.learn
    assert learn is not None
    return learn.general


def general(model: nn.Module) -> list[str]:
    return [node.name for node in fallbacks(model)]


def general_in_experts(model: nn.Module) -> list[str]:
    layers = re.compile(r"layers\.\d+\.(mlp|feed_forward|block_sparse_moe|self_attention\.experts)")
    return [node.name for node in fallbacks(model) if layers.search(module_path(node))]


@pytest.mark.parametrize(("family", "attention"), CELLS)
def test_exact(family: Family, attention: str):
    with double_throughout():
        model = family.make(attention).double()
        batch = family.batch(dtype=torch.float64)
        fxseek.compile(model, 0.3, score=family.score)
        fxseek.check_gradients(model, 1e-9, **batch)
        longer = family.batch(batch=3, tokens=31, seed=1, dtype=torch.float64)
        fxseek.check_gradients(model, 1e-9, **longer)
    step = step_of(model)
    assert step is not None
    assert len(step.recorder.steps) <= 2  # at most one more for the other batch and length
    if family.dense:
        assert general(model) == []
    assert general_in_experts(model) == []


@pytest.mark.parametrize("family", MIXERS)
def test_mixers_of_other_kinds_take_the_general_path(family: Family):
    """Scans over tokens, delta rules, convolutions; and nothing else does.

    Their own parameters are added inside their forward, where module hooks cannot cut.
    """
    with double_throughout():
        model = family.make(family.attentions[0]).double()
        fxseek.compile(model, 0.3, score=family.score)
        assert_exact_causal(model, family.batch(batch=5, dtype=torch.float64))
    assert "conv1d" in " ".join(general(model))
    outside = [
        called(node)
        for node in fallbacks(model)
        if family.mixer not in module_path(node).split(".")
    ]
    assert outside == (["add"] if family.name in SCANS else [])


@pytest.mark.parametrize("name", [name for name, x in FAMILIES.items() if x.refused])
def test_refused(name):
    family = FAMILIES[name]
    model = fxseek.compile(family.make(), 0.3, score="random")
    with pytest.raises(fxseek.GraphError, match=family.refused):
        model(**family.batch())


@pytest.mark.parametrize("name", ["bert_classes", "roberta_classes", "llama_classes", "vit"])
@pytest.mark.parametrize("score", ["random", "tokenseek"])
def test_the_pooled_token_is_always_kept(name, score):
    family = FAMILIES[name]
    model = fxseek.compile(family.make().double(), 0.1, score=score)
    batch = family.batch(batch=3, dtype=torch.float64)
    pooled = torch.zeros(3, dtype=torch.int64)
    if name == "llama_classes":
        pooled = batch["attention_mask"].sum(1) - 1
    for _ in range(4):
        model(**batch).loss.backward()
        selected = fxseek.report(model).selected
        assert (selected == pooled[:, None]).any(1).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_decoder_of_the_length_of_its_encoder():
    """Equal lengths do not make one token dimension of two."""
    family = FAMILIES["t5"]
    with double_throughout():
        model = family.make().double()
        batch = family.batch(tokens=23)
        batch["input_ids"] = batch["input_ids"][:, :23]
        batch["attention_mask"] = batch["attention_mask"][:, :23]
        fxseek.compile(model, 0.3, score=family.score)
        fxseek.check_gradients(model, 1e-9, **batch)
        fxseek.check_gradients(model, 1e-9, **family.batch(tokens=12))


PUBLISHED = {
    "Qwen2.5-0.5B": ("Qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "Llama-3.2-1B": ("Llama", 128256, 2048, 8192, 16, 32, 8, True),
    "Llama-3.2-3B": ("Llama", 128256, 3072, 8192, 28, 24, 8, True),
    "Llama-3-8B": ("Llama", 128256, 4096, 14336, 32, 32, 8, False),
}


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-0.5B",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in list(PUBLISHED)[1:]),
    ],
)
def test_published_shapes_go_through_all_passes(name):
    """On the meta device: no weights, all passes, and the stages on fake tensors."""
    family, vocab, width, ffn, depth, heads, kv_heads, tied = PUBLISHED[name]
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(
            vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=depth,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
            max_position_embeddings=8192,
        )  # fmt: skip
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).train()
        ids = torch.zeros(1, 512, dtype=torch.long)
    fxseek.compile(model, 0.1)
    found = fxseek.explain(model, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert (found.tokens, found.kept, found.attentions) == (512, 52, depth)
    assert found.fallbacks == ()
    assert f"model.layers.{depth - 2}" in found.block_input
    assert found.predicted_saved_bytes < 0.25 * found.ordinary_saved_bytes
