"""Model families of transformers at a size for tests, and the batches that they train on.

A family is a configuration class and a model class; nothing here knows what is inside. The widths
are as different from each other as the families allow, and no width equals a number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 97
IMAGE = VOCAB
"""The token that an image's features take the place of, in vocabularies of one more."""
IMAGE_TOKENS = 4
FRAMES = 19
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


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


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
    lora: tuple[str, ...] = ()
    """The layers that LoRA adapts; all linear layers where it is empty."""
    refused: str = ""
    """A part of the error's message, where the family cannot be trained."""
    score: str = "tokenseek"
    """ "random" where a model has no attention, or no residual stream."""
    mixer: str = ""
    """The module that mixes tokens by other means than attention, and has parameters of its own.

    Hooks on modules cannot cut inside it; its operations may take the general path."""

    def make(self, attention: str = "sdpa", **changes: Any) -> nn.Module:
        """The model in training mode, float32, the same weights every time."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **changes})
        config._attn_implementation = attention
        model = getattr(transformers, self.model)(config)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # a factor of 0 would hide every gradient behind it
                    parameter.normal_(std=0.1)
        return model.train()

    def batch(
        self,
        batch: int = 2,
        tokens: int = 23,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """The arguments of a training step: padding on the right, some positions without label.

        `tokens` are those that the loss is over: the decoder's in a model with an encoder.
        `dtype`: of images and speech.
        """
        made = BATCHES[self.task](batch, tokens, torch.Generator().manual_seed(seed))
        return {n: x.to(dtype) if x.is_floating_point() else x for n, x in made.items()}


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


def _speech(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(3, VOCAB, (batch, tokens), generator=draw)
    return {"input_features": torch.randn(batch, 12, 2 * FRAMES, generator=draw), "labels": labels}


def _images(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch, 3, 20, 20, generator=draw)
    return {"pixel_values": pixels, "labels": torch.randint(0, 3, (batch,), generator=draw)}


def _transcription(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(3, VOCAB, (batch, tokens), generator=draw)
    return {**_images(batch, tokens, draw), "labels": labels}


def _prefix(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    """A prefix that attends in both directions, and what is to be learned after it."""
    words = _causal(batch, tokens, draw)
    kinds = torch.ones_like(words["input_ids"])
    kinds[:, :IMAGE_TOKENS] = 0
    return {**words, "token_type_ids": kinds}


def _after_images(
    words: Callable[[int, int, torch.Generator], dict[str, Tensor]], *shape: int
) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """`words` whose rows start with the tokens of an image; `shape`: of the pixels of a row."""

    def build(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
        made = words(batch, tokens, draw)
        made["input_ids"][:, :IMAGE_TOKENS] = IMAGE
        made["labels"][:, :IMAGE_TOKENS] = -100
        return {**made, "pixel_values": torch.randn(batch, *shape, generator=draw)}

    return build


_GRIDS = (((1, 4, 4),), ((1, 4, 2), (1, 4, 4)))
PATCH = 3 * 2 * 5 * 5
"""Numbers of a patch: of three colours, twice, 5 × 5 of each."""


def _grids(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Rows of one image or two, of their own sizes; a token is made of 2 × 2 patches."""
    made = _causal(batch, tokens, draw)
    kinds = torch.zeros_like(made["input_ids"])
    grids: list[tuple[int, int, int]] = []
    for row in range(batch):
        at = 2
        for grid in _GRIDS[row % 2]:
            count = math.prod(grid) // 4
            kinds[row, at : at + count] = 1
            grids.append(grid)
            at += count + 2
    made["input_ids"][kinds == 1] = IMAGE
    made["labels"][kinds == 1] = -100
    patches = sum(map(math.prod, grids))
    return {
        **made,
        "mm_token_type_ids": kinds,
        "image_grid_thw": torch.tensor(grids),
        "pixel_values": torch.randn(patches, PATCH, generator=draw),
    }


def _typed_images(batch: int, tokens: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Rows that start with an image, whose tokens attend to each other in both directions."""
    made = _after_images(_causal, 3, 20, 20)(batch, tokens, draw)
    return {**made, "token_type_ids": (made["input_ids"] == IMAGE).long()}


BATCHES: dict[str, Callable[[int, int, torch.Generator], dict[str, Tensor]]] = {
    "causal": _causal,
    "masked": _causal,
    "classification": _classification,
    "translation": _translation,
    "speech": _speech,
    "images": _images,
    "transcription": _transcription,
    "prefix": _prefix,
    "images and text": _after_images(_causal, 1, 3, 20, 20),
    "an image and text": _after_images(_causal, 3, 20, 20),
    "images and prefix": _after_images(_prefix, 3, 20, 20),
    "typed images": _typed_images,
    "grids": _grids,
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
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_SPEAKER = {
    "vocab_size": VOCAB, "d_model": 40, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 44, **_NO_DROPOUT, **_ENDS,
}  # fmt: skip
_LATENT = {
    **_NO_GROUPS, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 28, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 14, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6,
    "v_head_dim": 10,
}  # fmt: skip
_LATENT_LORA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_SMALL_LATENT = {k: v for k, v in _LATENT.items() if k.startswith(("q_", "kv_", "qk_", "v_"))}
_STATES = {
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_chunk_size": 8,
}  # fmt: skip
_EYES = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 20,
}  # fmt: skip
_READER = {**DENSE, "vocab_size": VOCAB + 1}
_SMOLVLM = {
    "text_config": {"model_type": "llama", **_READER}, "vision_config": {**_EYES, "patch_size": 5},
    "scale_factor": 2, "image_token_id": IMAGE,
}  # fmt: skip
_PALIGEMMA = {
    "text_config": {"model_type": "gemma", "head_dim": 10, **_READER},
    "vision_config": {
        "model_type": "siglip_vision_model", **_EYES, "patch_size": 10, "vision_use_head": False,
    },
    "projection_dim": 40, "hidden_size": 40, "image_token_index": IMAGE, "pad_token_id": 0,
}  # fmt: skip
_QWEN = {
    "depth": 2, "num_heads": 3, "patch_size": 5, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_QWEN_EYES = {**_QWEN, "hidden_size": 36, "intermediate_size": 52, "out_hidden_size": 40}
_ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
_ROTATED = {"rope_parameters": {**_ROTATION, "mrope_section": [1, 2, 2]}}
_INTERLEAVED = {
    "rope_parameters": {**_ROTATION, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
}
_MARKS = {"image_token_id": IMAGE, "video_token_id": IMAGE + 1}
_VIT = {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "pad_token_id")}
_PATCHES = {**_VIT, "image_size": 20, "patch_size": 4, "num_labels": 3}

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
        Family("phi3_longrope", "Phi3Config", "Phi3ForCausalLM",
               {**DENSE, "original_max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                                    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
                                    "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4]}},
               dense=False),
        Family("olmo2", "Olmo2Config", "Olmo2ForCausalLM", DENSE),
        Family("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM",
               {**DENSE, "no_rope_layers": [1, 0]}),
        Family("stablelm", "StableLmConfig", "StableLmForCausalLM", DENSE),
        Family("granite", "GraniteConfig", "GraniteForCausalLM",
               {**DENSE, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.2, "logits_scaling": 2.0}),
        Family("diffllama", "DiffLlamaConfig", "DiffLlamaForCausalLM", DENSE),
        Family("qwen3_vl_text", "Qwen3VLConfig", "Qwen3VLForConditionalGeneration",
               {"text_config": {**_READER, "head_dim": 12, **_INTERLEAVED},
                "vision_config": {"depth": 1, "hidden_size": 36, "intermediate_size": 52,
                                  "num_heads": 3, "patch_size": 5, "out_hidden_size": 40,
                                  "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
                "image_token_id": IMAGE}, dense=False),
        Family("gemma3n", "Gemma3nTextConfig", "Gemma3nForCausalLM",
               {**DENSE, "head_dim": 10, **_SLIDING, "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB,
                "hidden_size_per_layer_input": 12, "altup_num_inputs": 4, "laurel_rank": 6,
                "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
               dense=False, score="random"),
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
        Family("mpt", "MptConfig", "MptForCausalLM",
               {"vocab_size": VOCAB, "d_model": 40, "n_layers": 2, "n_heads": 4,
                "max_seq_len": 128, "expansion_ratio": 2}, attentions=("eager",)),
        Family("mixtral", "MixtralConfig", "MixtralForCausalLM",
               {**DENSE, **EXPERTS, "num_local_experts": 4}, dense=False),
        Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
               {**DENSE, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 28, "head_dim": 10},
               dense=False),
        Family("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
               {**DENSE, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 28,
                "shared_expert_intermediate_size": 36}, dense=False),
        Family("olmoe", "OlmoeConfig", "OlmoeForCausalLM",
               {**DENSE, **EXPERTS, "num_experts": 4}, dense=False),
        Family("granitemoe", "GraniteMoeConfig", "GraniteMoeForCausalLM",
               {**DENSE, **EXPERTS, "num_local_experts": 4}, dense=False),
        Family("gpt_oss", "GptOssConfig", "GptOssForCausalLM",
               {**DENSE, **EXPERTS, **_SLIDING, "num_local_experts": 4, "head_dim": 10},
               attentions=("eager",), dense=False),
        Family("glm4_moe", "Glm4MoeConfig", "Glm4MoeForCausalLM",
               {**DENSE, **EXPERTS, "n_routed_experts": 4, "moe_intermediate_size": 28,
                "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 10},
               dense=False),
        Family("jetmoe", "JetMoeConfig", "JetMoeForCausalLM",
               {**DENSE, "kv_channels": 10, "num_local_experts": 4, "num_experts_per_tok": 2},
               dense=False),
        Family("llama4", "Llama4TextConfig", "Llama4ForCausalLM",
               {**DENSE, "head_dim": 10, "intermediate_size_mlp": 44, "num_local_experts": 4,
                "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0],
                "attention_chunk_size": 8, "floor_scale": 8}, dense=False,
               lora=(*ATTENTION, "gate_proj", "up_proj", "down_proj")),
        Family("deepseek_v2", "DeepseekV2Config", "DeepseekV2ForCausalLM",
               {**_LATENT, "topk_method": "group_limited_greedy"}, dense=False,
               lora=_LATENT_LORA),
        Family("deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", _LATENT,
               dense=False, lora=_LATENT_LORA),
        Family("mamba2", "Mamba2Config", "Mamba2ForCausalLM",
               {"vocab_size": VOCAB, "hidden_size": 40, "num_hidden_layers": 2, "num_heads": 8,
                "head_dim": 10, "state_size": 12, "n_groups": 2, "chunk_size": 8, "expand": 2},
               attentions=("eager",), dense=False, lora=("in_proj",), score="random",
               mixer="mixer"),
        Family("jamba", "JambaConfig", "JambaForCausalLM",
               {**DENSE, **EXPERTS, "num_experts": 4, "attn_layer_period": 2,
                "attn_layer_offset": 1, "mamba_d_state": 12, "mamba_dt_rank": 6},
               attentions=("sdpa",), dense=False, mixer="mamba"),
        Family("zamba2", "Zamba2Config", "Zamba2ForCausalLM",
               {**DENSE, "num_hidden_layers": 3, "n_mamba_heads": 8, "mamba_ngroups": 2,
                "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
                "mamba_d_state": 12, "chunk_size": 8, "use_shared_attention_adapter": True,
                "adapter_rank": 6, "use_mem_rope": True, "num_key_value_heads": 4},
               attentions=("sdpa",), dense=False, mixer="mamba"),
        Family("bamba", "BambaConfig", "BambaForCausalLM",
               {**DENSE, **_STATES, "attn_layer_indices": [1]},
               attentions=("sdpa",), dense=False, mixer="mamba"),
        Family("falcon_h1", "FalconH1Config", "FalconH1ForCausalLM",
               {**DENSE, **_STATES, "mamba_d_ssm": 80}, attentions=("sdpa",), dense=False,
               mixer="mamba", lora=(*ATTENTION, "gate_proj", "up_proj", "down_proj", "in_proj")),
        Family("qwen3_next", "Qwen3NextConfig", "Qwen3NextForCausalLM",
               {**DENSE, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 28,
                "shared_expert_intermediate_size": 36, "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_key_head_dim": 6, "linear_value_head_dim": 10,
                "linear_num_key_heads": 2, "linear_num_value_heads": 4},
               attentions=("sdpa",), dense=False, mixer="linear_attn"),
        Family("lfm2", "Lfm2Config", "Lfm2ForCausalLM",
               {**DENSE, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3,
                "block_auto_adjust_ff_dim": False},
               attentions=("sdpa",), dense=False, mixer="conv"),
        Family("minicpm3", "MiniCPM3Config", "MiniCPM3ForCausalLM",
               {**_NO_GROUPS, **_SMALL_LATENT}, attentions=("sdpa",), dense=False),
        Family("youtu", "YoutuConfig", "YoutuForCausalLM",
               {**_NO_GROUPS, **_SMALL_LATENT}, attentions=("sdpa",), dense=False),
        Family("glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM",
               {**_LATENT, "mlp_layer_types": ["dense", "sparse"]},
               attentions=("sdpa",), dense=False),
        Family("bert", "BertConfig", "BertForMaskedLM", ENCODER, "masked", dense=False),
        Family("roberta", "RobertaConfig", "RobertaForMaskedLM", ENCODER, "masked", dense=False),
        Family("distilbert", "DistilBertConfig", "DistilBertForMaskedLM",
               {"vocab_size": VOCAB, "dim": 40, "hidden_dim": 56, "n_layers": 2, "n_heads": 4,
                "max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0},
               "masked", dense=False),
        Family("albert", "AlbertConfig", "AlbertForMaskedLM",
               {**ENCODER, "embedding_size": 12}, "masked", dense=False),
        Family("electra", "ElectraConfig", "ElectraForMaskedLM",
               {**ENCODER, "embedding_size": 12}, "masked", dense=False),
        Family("modernbert", "ModernBertConfig", "ModernBertForMaskedLM",
               {**{k: v for k, v in ENCODER.items() if "dropout" not in k},
                "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
                "layer_types": ["full_attention", "sliding_attention"], "local_attention": 8},
               "masked", dense=False),
        Family("esm", "EsmConfig", "EsmForMaskedLM",
               {**ENCODER, "mask_token_id": 3, "token_dropout": True,
                "position_embedding_type": "rotary", "emb_layer_norm_before": False},
               "masked", dense=False),
        Family("roformer", "RoFormerConfig", "RoFormerForMaskedLM",
               {**ENCODER, "embedding_size": 12}, "masked", attentions=("eager",), dense=False),
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
        Family("bart", "BartConfig", "BartForConditionalGeneration",
               {**_SPEAKER, "max_position_embeddings": 128}, "translation", dense=False),
        Family("whisper", "WhisperConfig", "WhisperForConditionalGeneration",
               {**_SPEAKER, "num_mel_bins": 12, "max_source_positions": FRAMES,
                "max_target_positions": 128}, "speech", dense=False),
        Family("trocr", "VisionEncoderDecoderConfig", "VisionEncoderDecoderModel",
               {"encoder": {"model_type": "vit", **_VIT, "image_size": 20, "patch_size": 4},
                "decoder": {"model_type": "trocr", "vocab_size": VOCAB, "d_model": 40,
                            "decoder_layers": 2, "decoder_attention_heads": 4,
                            "decoder_ffn_dim": 44, "cross_attention_hidden_size": 40,
                            "is_decoder": True, "add_cross_attention": True,
                            "max_position_embeddings": 128, **_NO_DROPOUT, **_ENDS},
                "pad_token_id": 0, "decoder_start_token_id": 2},
               "transcription", attentions=("eager",), dense=False),
        Family("smolvlm_text", "SmolVLMConfig", "SmolVLMForConditionalGeneration", _SMOLVLM),
        Family("smolvlm_images", "SmolVLMConfig", "SmolVLMForConditionalGeneration", _SMOLVLM,
               "images and text", dense=False),
        Family("paligemma_text", "PaliGemmaConfig", "PaliGemmaForConditionalGeneration",
               _PALIGEMMA, "prefix", dense=False),
        Family("paligemma_images", "PaliGemmaConfig", "PaliGemmaForConditionalGeneration",
               _PALIGEMMA, "images and prefix", dense=False),
        Family("llava_images", "LlavaConfig", "LlavaForConditionalGeneration",
               {"text_config": {"model_type": "llama", **_READER},
                "vision_config": {"model_type": "clip_vision_model", **_EYES, "patch_size": 10},
                "image_token_index": IMAGE}, "an image and text", dense=False),
        Family("gemma3_images", "Gemma3Config", "Gemma3ForConditionalGeneration",
               {"text_config": {**_READER, **_GEMMA},
                "vision_config": {**_EYES, "patch_size": 5, "vision_use_head": False},
                "mm_tokens_per_image": IMAGE_TOKENS, "image_token_index": IMAGE},
               "typed images", attentions=("sdpa",), dense=False),
        Family("qwen2_vl_images", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration",
               {"text_config": {**_READER, **_ROTATED},
                "vision_config": {**_QWEN, "embed_dim": 36, "mlp_ratio": 2, "hidden_size": 40},
                **_MARKS}, "grids", dense=False),
        Family("qwen2_5_vl_images", "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration",
               {"text_config": {**_READER, **_ROTATED},
                "vision_config": {**_QWEN_EYES, "window_size": 20, "fullatt_block_indexes": [1]},
                **_MARKS}, "grids", attentions=("sdpa",), dense=False),
        Family("qwen3_vl_images", "Qwen3VLConfig", "Qwen3VLForConditionalGeneration",
               {"text_config": {**_READER, "head_dim": 12, **_INTERLEAVED},
                "vision_config": {**_QWEN_EYES, "num_position_embeddings": 16,
                                  "deepstack_visual_indexes": [0]}, **_MARKS},
               "grids", attentions=("sdpa",), dense=False),
        Family("vit", "ViTConfig", "ViTForImageClassification", _PATCHES, "images", dense=False),
        Family("deit", "DeiTConfig", "DeiTForImageClassification", _PATCHES, "images",
               attentions=("sdpa",), dense=False),
        Family("dinov2", "Dinov2Config", "Dinov2ForImageClassification",
               {**_PATCHES, "mlp_ratio": 2}, "images", attentions=("sdpa",), dense=False),
        Family("siglip", "SiglipConfig", "SiglipForImageClassification",
               {"vision_config": {**_EYES, "patch_size": 4},
                "num_labels": 3}, "images", attentions=("sdpa",), dense=False),
        Family("beit_relative", "BeitConfig", "BeitForImageClassification",
               {**_PATCHES, "use_relative_position_bias": True}, "images",
               attentions=("sdpa",), dense=False, refused="adds what has a row for each"),
        Family("swin", "SwinConfig", "SwinForImageClassification",
               {"image_size": 20, "patch_size": 2, "embed_dim": 12, "depths": [1, 1],
                "num_heads": [2, 4], "window_size": 5, "drop_path_rate": 0.0, "num_labels": 3},
               "images", attentions=("sdpa",), dense=False, refused="not windows of it"),
    )
}  # fmt: skip
