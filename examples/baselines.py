"""Other ways to save memory, written as plain modules for the benchmark to measure fxseek against.

- `ChunkedLoss`: all tokens are trained on; the head and the loss run a few tokens at a time, so
  that tokens × vocabulary logits never exist at once.
- `TokenTune`: the method of arXiv 2501.19277 (EMNLP Findings 2024). Each layer takes its tokens in
  two groups, selected ones with gradient and the others without; attention of the selected ones
  reads the keys and values of all. One forward, random selection.
- `TokenSeek`: the schedule of arXiv 2601.19739 (ICLR 2026): a pass over all tokens that only
  scores them, then a forward of TokenTune's kind with the best ones.

Written from the papers' descriptions. The last two are for transformers' Llama architecture with
rows of equal length, as their authors' are for one model class each: that they had to be is why
fxseek is a compiler pass. Their gradients equal masked full backprop (tests/test_baselines.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from common import IGNORED, ExampleError
from fxseek import selecting
from fxseek.scores import measures, tokenseek
from fxseek.scores.random import random_scores


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model itself, out of PEFT's wrapper: its layers hold the adapters."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    return inner


def next_tokens(labels: Tensor) -> Tensor:
    """What each position is to predict: the label after it. Long [batch, tokens]."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the positions with a target, in nats, as transformers takes it."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


# ------------------------------------------------------------------------------ loss in chunks


class ChunkedLoss(nn.Module):
    """Ordinary fine-tuning whose head and loss run on ``chunk`` tokens of all rows at a time.

    Each chunk's logits are computed again in backward. For any causal language model of
    transformers whose logits are its head on its base model's last hidden state.

    Raises:
        ExampleError: The model scales or caps its logits, which this doesn't.
    """

    def __init__(self, model: nn.Module, chunk: int = 256) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        inner = base_of(model)
        config = inner.config.get_text_config()
        changed = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        found = [name for name in changed if getattr(config, name, None) not in (None, 1, 1.0)]
        if found:
            raise ExampleError(
                f"{type(inner).__name__} changes its logits ({', '.join(found)}), and the chunked "
                "loss doesn't: leave it out of --methods"
            )

    def forward(self, labels: Tensor, **inputs: Any) -> CausalLMOutput:
        """The mean loss of all tokens with a label; no logits."""
        inner = base_of(self.model)
        hidden = getattr(inner, inner.base_model_prefix)(**inputs).last_hidden_state
        targets = next_tokens(labels)
        head = inner.get_output_embeddings()
        assert head is not None

        def part(hidden: Tensor, targets: Tensor) -> Tensor:
            return summed_loss(head(hidden), targets)

        total = hidden.new_zeros(())
        for some, wanted in zip(
            hidden.split(self.chunk, dim=1), targets.split(self.chunk, dim=1), strict=True
        ):
            loss = checkpoint(part, some, wanted, use_reentrant=False, preserve_rng_state=False)
            total = total + loss
        return CausalLMOutput(loss=total / (targets != IGNORED).sum())


# ------------------------------------------------------------------------- two groups of tokens


Rotary = tuple[Tensor, Tensor]  # cos and sin, [batch or 1, some tokens, width of a head]


class _Group(NamedTuple):
    """Some tokens of each row: where they are, [batch, some], and their rotary table."""

    at: Tensor
    rotary: Rotary


class TokenTune(nn.Module):
    """A Llama that trains on ``ceil(ratio · tokens)`` tokens of each row, drawn at random.

    Every linear layer, norm and activation runs twice, on the selected tokens with gradient and
    on the others without: on each token once. Selected queries attend to the keys and values
    of all tokens, those of the others without gradient. The loss is the mean over selected tokens.

    The others' attention is one causal call for all queries, of which the selected ones are then
    dropped: that is faster than a mask, as the causal kernel leaves out half of the map.

    Raises:
        ExampleError: The model is not transformers' Llama, or (when called) rows are padded.
    """

    def __init__(self, model: nn.Module, ratio: float, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(base_of(model), LlamaForCausalLM):
            raise ExampleError(
                f"this baseline is written for transformers' Llama, not "
                f"{type(base_of(model)).__name__}: leave it out of --methods"
            )
        self.model = model
        self.ratio = ratio
        self.seed = seed
        self.steps = 0
        self.kept: Tensor | None = None
        """The last step's selected positions, ascending. Long [batch, kept]."""

    @property
    def llama(self) -> LlamaForCausalLM:
        """The model without wrappers."""
        inner = base_of(self.model)
        assert isinstance(inner, LlamaForCausalLM)
        return inner

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> CausalLMOutput:
        """The mean loss of the selected tokens that have a label; no logits."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ExampleError("this baseline takes rows without padding only")
        targets = next_tokens(labels)
        self.kept = self._select(input_ids, targets)
        self.steps += 1
        hidden = self._last_hidden(input_ids, self.kept)
        targets = targets.gather(1, self.kept)
        total = summed_loss(self.llama.lm_head(hidden), targets)
        return CausalLMOutput(loss=total / (targets != IGNORED).sum().clamp_min(1))

    def _select(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        scores = random_scores(
            input_ids.shape, seed=self.seed, step=self.steps, device=input_ids.device
        )
        return self._best(scores, targets)

    def _best(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The best-scoring positions, chosen as fxseek chooses them. Long [batch, kept]."""
        count = selecting.count_kept(self.ratio, scores.shape[1])
        valid = torch.ones_like(targets, dtype=torch.bool)
        return selecting.select_topk(scores, count, valid=valid, supervised=targets != IGNORED).kept

    def _last_hidden(self, input_ids: Tensor, kept: Tensor) -> Tensor:
        """The selected tokens after the last layer and norm, [batch, kept, width]."""
        base = self.llama.model
        tokens = input_ids.shape[1]
        is_rest = torch.ones_like(input_ids, dtype=torch.bool).scatter_(1, kept, False)
        rest = is_rest.nonzero()[:, 1].view(input_ids.shape[0], -1)
        x = base.embed_tokens(input_ids.gather(1, kept))
        with torch.no_grad():
            others = base.embed_tokens(input_ids.gather(1, rest))
        mine, theirs = (_Group(at, base.rotary_emb(x, position_ids=at)) for at in (kept, rest))
        # Additive, once for all layers: attention would make one of a boolean mask in each.
        later = torch.arange(tokens, device=kept.device) > kept[:, None, :, None]
        mask = x.new_zeros(later.shape).masked_fill_(later, -torch.inf)
        for block in base.layers:
            x, others = _two_groups(block, x, others, mine, theirs, mask)
        return base.norm(x)


def _two_groups(
    block: Any, x: Tensor, others: Tensor, mine: _Group, theirs: _Group, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """A layer on the selected tokens ``x`` with gradient, and on ``others`` without."""
    with torch.no_grad():
        q_other, k_other, v_other = _heads(block, others, theirs.rotary)
    q, k, v = _heads(block, x, mine.rotary)
    keys, values = (_together(a, b, mine, theirs) for a, b in ((k, k_other), (v, v_other)))
    with torch.no_grad():
        queries = _together(q, q_other, mine, theirs)
        attended = _attend(queries, keys, values)[_rows(theirs.at), theirs.at]
        others = _rest_of_block(block, others, attended)
    return _rest_of_block(block, x, _attend(q, keys, values, mask)), others


def _heads(block: Any, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values: [batch, tokens, heads, width of a head]."""
    attention = block.self_attn
    x = block.input_layernorm(x)
    shape = (*x.shape[:2], -1, attention.head_dim)
    q, k, v = (p(x).view(shape) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
    return q, k, v


def _together(mine: Tensor, others: Tensor, at: _Group, others_at: _Group) -> Tensor:
    """Both groups' parts in the order of the tokens, [batch, tokens, ...]."""
    tokens = mine.shape[1] + others.shape[1]
    whole = mine.new_empty(mine.shape[0], tokens, *mine.shape[2:])
    whole[_rows(others_at.at), others_at.at] = others.detach()
    whole[_rows(at.at), at.at] = mine
    return whole


def _rows(at: Tensor) -> Tensor:
    return torch.arange(at.shape[0], device=at.device)[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention, causal without a ``mask``; arguments and result [batch, tokens, heads, width]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if mask is not None and q.device.type == "cuda":
        # There grouped queries with a mask would get the slowest kernel.
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
    ).transpose(1, 2)


def _rest_of_block(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What follows attention in a layer, on any of its tokens."""
    x = x + block.self_attn.o_proj(attended.flatten(2))
    return x + block.mlp(block.post_attention_layernorm(x))


# ------------------------------------------------------------------- a scoring pass of its own


class TokenSeek(TokenTune):
    """TokenTune with tokens that are scored first, by a forward of the whole model.

    The layers before the last run without gradient; then comes the loss of all tokens and its
    gradient at the input of the last layer, with no parameter's gradient. The context score is
    the column sums of the last layer's attention map. Nothing of this pass is used again.
    """

    def _select(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        *before, last = self.llama.model.layers
        with torch.no_grad():
            hidden = self.llama.model.embed_tokens(input_ids)
            at = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            rotary = self.llama.model.rotary_emb(hidden, position_ids=at)
            for block in before:
                q, k, v = _heads(block, hidden, rotary)
                hidden = _rest_of_block(block, hidden, _attend(q, k, v))
        with _frozen(self.model), torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            q, k, v = _heads(last, hidden, rotary)
            context = measures.attention_column_sums(
                q.detach().transpose(1, 2), k.detach().transpose(1, 2), is_causal=True
            )
            x = self.llama.model.norm(_rest_of_block(last, hidden, _attend(q, k, v)))
            loss = summed_loss(self.llama.lm_head(x), targets) / (targets != IGNORED).sum()
            (gradient,) = torch.autograd.grad(loss, hidden)
        valid = torch.ones_like(targets, dtype=torch.bool)
        scores = tokenseek.combine(context, measures.gradient_magnitude(gradient), valid)
        return self._best(scores, targets)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient, so that nothing is kept for one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
