"""Small models and batches for tests.

Sizes that mean different things are different primes wherever they can be, so that a transposed or
confused dimension cannot agree by luck.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from fxseek.passes import normalise

IGNORED = -100

NORMS = ("layer", "rms", "post")
ACTIVATIONS = ("silu_gated", "gelu", "relu")
POSITIONS = ("learned", "rotary", "none")
ATTENTIONS = ("sdpa", "sdpa_causal", "sdpa_float", "eager")
REPEATS = ("expand", "interleave", "gqa")
SHIFTS = ("pad", "slice", "none")


@dataclass(frozen=True)
class TinyConfig:
    """The shape of a ``TinyDecoder``.

    ``norm``: "layer" and "rms" come before each sublayer, "post" is a layer norm after it.
    ``attention``: "sdpa" has a boolean mask, "sdpa_float" an additive one, "sdpa_causal" only the
    causal flag (padding and packing are then not looked at), "eager" is matmul, softmax, matmul.
    ``repeat``: how key and value heads are repeated: expand + reshape, repeat_interleave, or
    SDPA's own ``enable_gqa``.
    ``shift``: how the loss shifts labels: labels padded, logits sliced, or not at all.
    """

    vocab: int = 37
    depth: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 6
    width: int = 11
    ffn: int = 13
    norm: str = "rms"
    activation: str = "silu_gated"
    bias: bool = False
    tied: bool = False
    positions: str = "rotary"
    attention: str = "sdpa"
    repeat: str = "expand"
    shift: str = "pad"
    max_tokens: int = 64
    seed: int = 0


class RMSNorm(nn.Module):
    """Root-mean-square norm in plain operations, as transformers writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


def _norm(config: TinyConfig) -> nn.Module:
    return RMSNorm(config.width) if config.norm == "rms" else nn.LayerNorm(config.width)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _repeat(x: Tensor, times: int, how: str) -> Tensor:
    if times == 1 or how == "gqa":
        return x
    if how == "interleave":
        return x.repeat_interleave(times, dim=1)
    batch, heads, tokens, width = x.shape
    x = x[:, :, None].expand(batch, heads, times, tokens, width)
    return x.reshape(batch, heads * times, tokens, width)


class Attention(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=config.bias)
        self.k_proj = nn.Linear(config.width, kv, bias=config.bias)
        self.v_proj = nn.Linear(config.width, kv, bias=config.bias)
        self.o_proj = nn.Linear(inner, config.width, bias=config.bias)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        config = self.config
        batch, tokens, _ = x.shape
        shape = (batch, tokens, -1, config.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if rotary is not None:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        times = config.heads // config.kv_heads
        k, v = _repeat(k, times, config.repeat), _repeat(v, times, config.repeat)
        if config.attention == "eager":
            scores = torch.matmul(q, k.transpose(2, 3)) * config.head_dim**-0.5
            if mask is not None:
                scores = scores + mask
            result = torch.matmul(F.softmax(scores, dim=-1), v)
        else:
            result = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=config.attention == "sdpa_causal",
                enable_gqa=config.repeat == "gqa" and times > 1,
            )
        return self.o_proj(result.transpose(1, 2).reshape(batch, tokens, -1))


class FeedForward(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        if config.activation == "silu_gated":
            self.gate_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.activation == "silu_gated":
            up = F.silu(self.gate_proj(x)) * up
        elif self.activation == "gelu":
            up = F.gelu(up)
        else:
            up = F.relu(up)
        return self.down_proj(up)


class Block(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.post = config.norm == "post"
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.ffn_norm = _norm(config)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if self.post:
            x = self.attention_norm(x + self.attention(x, mask, rotary))
            return self.ffn_norm(x + self.ffn(x))
        x = x + self.attention(self.attention_norm(x), mask, rotary)
        return x + self.ffn(self.ffn_norm(x))


class TinyDecoder(nn.Module):
    """A causal transformer of a few lines, called as transformers' models are."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_tokens, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = _norm(config)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # Large enough that attention is far from uniform and biases matter.
                scale = 0.3 if parameter.ndim == 1 else 1.5 / math.sqrt(parameter.shape[-1])
                parameter.copy_(noise * scale + (1.0 if self._is_gain(parameter) else 0.0))
        if config.tied:
            self.head.weight = self.embed.weight

    def _is_gain(self, parameter: nn.Parameter) -> bool:
        norms = (RMSNorm, nn.LayerNorm)
        return any(m.weight is parameter for m in self.modules() if isinstance(m, norms))

    def _mask(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None):
        """What attention is given: bool or additive ``[batch or 1, 1, tokens, tokens]``, or None.

        A row of ``position_ids`` may hold several documents, each of which starts again from 0.
        """
        if self.config.attention == "sdpa_causal":
            return None
        tokens = x.shape[1]
        at = torch.arange(tokens, device=x.device)
        mask = (at[None, :] <= at[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        if position_ids is not None:
            document = (position_ids == 0).cumsum(-1)
            mask = mask & (document[:, None, :, None] == document[:, None, None, :])
        if self.config.attention == "sdpa":
            return mask
        lowest = torch.finfo(x.dtype).min
        zeros = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
        return zeros.masked_fill(~mask, lowest)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        config = self.config
        x = self.embed(input_ids)
        mask = self._mask(x, attention_mask, position_ids)
        at = position_ids
        if at is None:
            at = torch.arange(x.shape[1], device=x.device)[None]
        rotary = None
        if config.positions == "learned":
            x = x + self.positions(at)
        elif config.positions == "rotary":
            half = torch.arange(0, config.head_dim, 2, device=x.device) / config.head_dim
            angles = at[:, :, None].to(x.dtype) * (100.0 ** -half.to(x.dtype))
            angles = torch.cat((angles, angles), dim=-1)[:, None]
            rotary = (angles.cos(), angles.sin())
        for block in self.blocks:
            x = block(x, mask, rotary)
        logits = self.head(self.final_norm(x))
        loss = None
        if labels is not None:
            scored, targets = logits, labels
            if config.shift == "pad":
                targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
            elif config.shift == "slice":
                scored, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(
                scored.reshape(-1, config.vocab),
                targets.reshape(-1),
                ignore_index=IGNORED,
                reduction=reduction,
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


# ---- transformers' own ------------------------------------------------------------------------


def tiny_llama(attn: str = "sdpa", **options: Any) -> nn.Module:
    """transformers' Llama for causal language modelling, random and tiny, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 37,
        "use_cache": False,
        "attn_implementation": attn,
        "hidden_size": 20,
        "intermediate_size": 29,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**(sizes | options))
    return _spread(LlamaForCausalLM(config)).train()


def tiny_gpt2(attn: str = "sdpa", **options: Any) -> nn.Module:
    """transformers' GPT-2 language model, random and tiny, without dropout, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "vocab_size": 37,
        "use_cache": False,
        "attn_implementation": attn,
        "n_embd": 22,
        "n_inner": 31,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = GPT2Config(**(sizes | options))
    return _spread(GPT2LMHeadModel(config)).train()


def tiny_lora(model: nn.Module, **options: Any) -> nn.Module:
    """``model`` with LoRA adapters on every linear layer but the head, none of them zero."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    fan_in_fan_out = any(type(module).__name__ == "Conv1D" for module in model.modules())
    settings["fan_in_fan_out"] = fan_in_fan_out
    config = LoraConfig(**(settings | options))
    with warnings.catch_warnings():  # peft asks transformers for a name that it deprecated
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = get_peft_model(model, config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def cache_name(model: nn.Module) -> str:
    """What a model of transformers calls its cache: `cache` since 5.24."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def without_casts(model: nn.Module) -> nn.Module:
    """A transformers model in float64 throughout.

    ``.double()`` alone leaves the casts to float32 that transformers writes into root-mean-square
    norms and into the loss, and these would hide errors below 1e-7.
    """
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, RMSNorm):
            plain = RMSNorm(0)
            plain.weight = module.get_parameter("weight")
            model.set_submodule(name, plain)

    def loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
        targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)
        reduction = "mean" if num_items_in_batch is None else "sum"
        value = F.cross_entropy(logits.reshape(-1, vocab_size), targets, reduction=reduction)
        return value if num_items_in_batch is None else value / num_items_in_batch

    model.loss_function = loss  # type: ignore[assignment]
    return model.double()


@contextlib.contextmanager
def double_throughout() -> Iterator[None]:
    """Inside, models that cast to float32 cast to float64: their errors are those of float64.

    transformers writes these casts into norms, softmaxes, rotary tables and losses. The names of
    the type and `Tensor.float` are read when the code runs, captured or not.
    """
    float32 = torch.float32
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    normalise._DTYPES["float"] = torch.float64
    try:
        yield
    finally:
        torch.float32 = torch.float = float32  # type: ignore[misc]
        del torch.Tensor.float
        normalise._DTYPES["float"] = float32


def _spread(model: nn.Module) -> nn.Module:
    """Redraws all weights so that attention is far from uniform and biases are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith("weight")
            scale = 0.3 if parameter.ndim == 1 else 1.5 / math.sqrt(parameter.shape[-1])
            parameter.copy_(noise * scale + (1.0 if gain else 0.0))
    return model


# ---- batches ----------------------------------------------------------------------------------

PADDINGS = ("none", "left", "right")
LABELS = ("all", "completion", "some", "none_in_row", "none")


def batch(
    model_vocab: int,
    batch: int = 2,
    tokens: int = 11,
    padding: str = "none",
    labels: str = "all",
    packed: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The arguments of one training step.

    Args:
        model_vocab: Ids are drawn below this.
        padding: "none" gives no attention mask; "left" and "right" pad rows to different lengths,
            the first row not at all.
        labels: "all" valid tokens; only the "completion" (a last part of each row); "some" at
            random, at least one; "none_in_row": all but for the last row, which has none; "none".
        packed: Rows hold two or more documents, told by ``position_ids`` that start again.
        seed: Of everything random.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    ids = torch.randint(0, model_vocab, (batch, tokens), generator=generator)
    valid = torch.ones(batch, tokens, dtype=torch.long)
    if padding != "none":
        for row in range(1, batch):
            length = draw((tokens + 1) // 2, tokens)
            unused = slice(0, tokens - length) if padding == "left" else slice(length, tokens)
            valid[row, unused] = 0
    targets = ids.masked_fill(valid == 0, IGNORED)
    if labels == "completion":
        for row in range(batch):
            start = draw(tokens // 3, max(tokens // 3, tokens - 3))
            first = int(valid[row].argmax())
            targets[row, : min(first + start, tokens - 1)] = IGNORED
    elif labels == "some":
        drop = torch.rand(batch, tokens, generator=generator) < 0.6
        drop[0, tokens // 2] = False
        targets = targets.masked_fill(drop, IGNORED)
    elif labels == "none_in_row":
        targets[-1] = IGNORED
    elif labels == "none":
        targets[:] = IGNORED
    result = {"input_ids": ids, "labels": targets}
    if padding != "none":
        result["attention_mask"] = valid
    if packed:
        positions = torch.arange(tokens).repeat(batch, 1)
        for row in range(batch):
            for _ in range(2):
                start = draw(1, max(1, tokens - 1))
                if start < tokens:
                    positions[row, start:] = torch.arange(tokens - start)
        result["position_ids"] = positions
    return result


def random_kept(batch: int, tokens: int, kept: int, seed: int = 0) -> Tensor:
    """Distinct ascending positions, ``[batch, kept]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator)[:kept] for _ in range(batch)]
    return torch.stack(rows).sort(dim=1).values
