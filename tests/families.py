"""Model families of transformers at a size for tests, and the batches that they train on.

A family is a configuration class and a model class; nothing here knows what is inside. The widths
are as different from each other as the families allow, and no width equals a number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 97
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,
    "experts_implementation": "batched_mm",  # the default has no float64
}


@dataclass(frozen=True)
class Family:
    """How to make a tiny random model of a family, and a batch for it."""

    name: str
    config: str
    model: str
    options: dict[str, Any]
    task: str = "causal"
    attentions: tuple[str, ...] = ("sdpa", "eager")
    dense: bool = True
    """A dense decoder: no operation may take the general path."""
    extra: dict[str, Any] = field(default_factory=dict)

    def make(self, attention: str = "sdpa", **changes: Any) -> nn.Module:
        """The model in training mode, float32, the same weights every time."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **changes})
        config._attn_implementation = attention
        model = getattr(transformers, self.model)(config)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model.train()

    def batch(self, batch: int = 2, tokens: int = 23, seed: int = 0) -> dict[str, Tensor]:
        """The arguments of a training step: padding on the right, some positions without label."""
        return BATCHES[self.task](batch, tokens, torch.Generator().manual_seed(seed))


def _words(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=draw)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, -4:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _causal(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    words = _words(batch, tokens, draw)
    unlabelled = torch.rand(batch, tokens, generator=draw) < 0.25
    unlabelled |= words["attention_mask"] == 0
    return {**words, "labels": words["input_ids"].masked_fill(unlabelled, -100)}


def _classification(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    words = _words(batch, tokens, draw)
    return {**words, "labels": torch.randint(0, 3, (batch,), generator=draw)}


def _translation(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    words = _words(batch, tokens + 6, draw)
    return {**words, "labels": torch.randint(3, VOCAB, (batch, tokens), generator=draw)}


def _images(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch, 3, 20, 20, generator=draw)
    return {"pixel_values": pixels, "labels": torch.randint(0, 3, (batch,), generator=draw)}


BATCHES: dict[str, Callable[[int, int, torch.Generator], dict[str, Tensor]]] = {
    "causal": _causal,
    "masked": _causal,
    "classification": _classification,
    "translation": _translation,
    "images": _images,
}

_GPT = {
    "vocab_size": VOCAB, "n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "n_inner": 56, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SLIDING = {"sliding_window": 8}
_GEMMA = {
    "head_dim": 10, "query_pre_attn_scalar": 10, **_SLIDING,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_NO_GROUPS = {**DENSE, "num_key_value_heads": 4}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "LlamaConfig", "LlamaForCausalLM", DENSE),
        Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM", DENSE),
        Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**DENSE, "head_dim": 10}),
        Family("mistral", "MistralConfig", "MistralForCausalLM", {**DENSE, **_SLIDING}),
        Family("gemma2", "Gemma2Config", "Gemma2ForCausalLM", {**DENSE, **_GEMMA},
               attentions=("eager",)),
        Family("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", {**DENSE, **_GEMMA}),
        Family("phi3", "Phi3Config", "Phi3ForCausalLM", DENSE),
        Family("olmo2", "Olmo2Config", "Olmo2ForCausalLM", DENSE),
        Family("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM",
               {**DENSE, "no_rope_layers": [1, 0]}),
        Family("stablelm", "StableLmConfig", "StableLmForCausalLM", DENSE),
        Family("granite", "GraniteConfig", "GraniteForCausalLM",
               {**DENSE, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.2, "logits_scaling": 2.0}),
        Family("gpt2", "GPT2Config", "GPT2LMHeadModel", _GPT),
        Family("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", DENSE),
        Family("opt", "OPTConfig", "OPTForCausalLM",
               {"vocab_size": VOCAB, "hidden_size": 40, "word_embed_proj_dim": 40, "ffn_dim": 56,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
                "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}),
        Family("falcon", "FalconConfig", "FalconForCausalLM",
               {**_NO_GROUPS, "multi_query": True, "new_decoder_architecture": False,
                "hidden_dropout": 0.0, "attention_dropout": 0.0}),
        Family("bloom", "BloomConfig", "BloomForCausalLM",
               {"vocab_size": VOCAB, "hidden_size": 40, "n_layer": 2, "n_head": 4,
                "hidden_dropout": 0.0, "attention_dropout": 0.0}, attentions=("eager",)),
        Family("mixtral", "MixtralConfig", "MixtralForCausalLM",
               {**DENSE, **EXPERTS, "num_local_experts": 4}, dense=False),
        Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
               {**DENSE, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 28, "head_dim": 10},
               dense=False),
        Family("mamba2", "Mamba2Config", "Mamba2ForCausalLM",
               {"vocab_size": VOCAB, "hidden_size": 40, "num_hidden_layers": 2, "num_heads": 8,
                "head_dim": 10, "state_size": 12, "n_groups": 2, "chunk_size": 8, "expand": 2},
               attentions=("eager",), dense=False),
        Family("bert", "BertConfig", "BertForMaskedLM", ENCODER, "masked", dense=False),
        Family("roberta", "RobertaConfig", "RobertaForMaskedLM", ENCODER, "masked", dense=False),
        Family("distilbert", "DistilBertConfig", "DistilBertForMaskedLM",
               {"vocab_size": VOCAB, "dim": 40, "hidden_dim": 56, "n_layers": 2, "n_heads": 4,
                "max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0},
               "masked", dense=False),
        Family("bert_classes", "BertConfig", "BertForSequenceClassification",
               {**ENCODER, "num_labels": 3}, "classification", dense=False),
        Family("roberta_classes", "RobertaConfig", "RobertaForSequenceClassification",
               {**ENCODER, "num_labels": 3}, "classification", dense=False),
        Family("distilbert_classes", "DistilBertConfig", "DistilBertForSequenceClassification",
               {"vocab_size": VOCAB, "dim": 40, "hidden_dim": 56, "n_layers": 2, "n_heads": 4,
                "max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0,
                "seq_classif_dropout": 0.0, "num_labels": 3}, "classification", dense=False),
        Family("llama_classes", "LlamaConfig", "LlamaForSequenceClassification",
               {**DENSE, "num_labels": 3}, "classification", dense=False),
        Family("t5", "T5Config", "T5ForConditionalGeneration",
               {"vocab_size": VOCAB, "d_model": 40, "d_kv": 10, "d_ff": 56, "num_layers": 2,
                "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
                "decoder_start_token_id": 0, "pad_token_id": 0}, "translation",
               dense=False),
        Family("vit", "ViTConfig", "ViTForImageClassification",
               {**{k: v for k, v in ENCODER.items() if k not in ("vocab_size", "pad_token_id")},
                "image_size": 20, "patch_size": 4, "num_labels": 3}, "images", dense=False),
    )
}  # fmt: skip
