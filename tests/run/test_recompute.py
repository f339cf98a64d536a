"""What is kept for backward, and where: block recomputation, chunks, offloading, masks by rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from models import (
    Attention,
    TinyConfig,
    TinyDecoder,
    batch,
    double_throughout,
    tiny_llama,
    tiny_lora,
)
from sweeps import sampled, thinned
from test_stages import shapes_of, stages
from torch import Tensor, nn

import fxseek
from fxseek.config import SeekConfig
from fxseek.ops.attention import attend_all, attend_folded
from fxseek.ops.masks import MaskRows
from fxseek.scores.measures import gradient_magnitude

VOCAB, TOKENS, HEADS = 211, 67, 3
CONFIG = TinyConfig(vocab=VOCAB, heads=HEADS, kv_heads=1, depth=3)
LEAN: dict[str, dict[str, Any]] = {
    "none": {"recompute": "none"},
    "block": {"recompute": "block"},
    "offload": {"recompute": "block", "kv": "offload"},
    "chunks": {"prefill_chunk": 13, "chunk_bytes": 1 << 12},
    "all": {"recompute": "block", "kv": "offload", "prefill_chunk": 13, "chunk_bytes": 1 << 12},
    "block_aot": {"recompute": "block", "backend": "aot_eager"},
    "chunks_aot": {"chunk_bytes": 1 << 12, "backend": "aot_eager"},
}


CELLS = [
    pytest.param(
        options,
        attention,
        id=f"{attention}-{name}",
        marks=() if attention == "sdpa" or name == "all" else pytest.mark.sweep,
    )
    for attention in ("sdpa", "sdpa_causal", "sdpa_float", "eager")
    for name, options in LEAN.items()
]


@pytest.mark.parametrize(("options", "attention"), CELLS)
def test_exact(options: dict[str, Any], attention: str):
    config = TinyConfig(vocab=VOCAB, attention=attention, depth=3)
    model = TinyDecoder(config).double().train()
    fxseek.compile(model, 0.2, **options)
    padding = None if attention == "sdpa_causal" else "left"
    inputs = batch(VOCAB, tokens=TOKENS, padding=padding or "none", labels="some")
    assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


@pytest.mark.sweep
@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_exact_compiled_by_inductor(recompute: str):
    model = TinyDecoder(CONFIG).double().train()
    fxseek.compile(model, 0.2, backend="inductor", recompute=recompute)
    inputs = batch(VOCAB, tokens=TOKENS, padding="left", labels="some")
    assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


@pytest.mark.parametrize("name", sampled(LEAN, ("block", "all", "block_aot")))
def test_exact_lora(name: str):
    with double_throughout():
        model = tiny_lora(tiny_llama()).double().train()
        fxseek.compile(model, 0.2, **LEAN[name])
        inputs = batch(37, tokens=29, padding="right", labels="some")
        assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


@pytest.mark.parametrize("family", ["gemma3", "t5"])
def test_exact_families(family: str):
    with double_throughout():
        model = FAMILIES[family].make(FAMILIES[family].attentions[0]).double()
        fxseek.compile(model, 0.3, **LEAN["all"])
        fxseek.check_gradients(model, 1e-9, **FAMILIES[family].batch())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_weights_that_are_computed_in_the_head(backend: str):
    class Scaled(TinyDecoder):
        """Its vocabulary's weights are a product of two trained ones."""

        def __init__(self) -> None:
            super().__init__(CONFIG)
            self.scale = nn.Parameter(torch.full((1,), 1.5))
            self.mixed = nn.Linear(VOCAB, VOCAB, bias=False)

        def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> Any:  # type: ignore[override]
            logits = super().forward(input_ids, **rest).logits
            assert logits is not None
            logits = F.linear(logits, self.mixed.weight * self.scale)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return {"loss": loss}

    model = Scaled().double().train()
    inputs = batch(VOCAB, tokens=31, labels="some")
    fxseek.compile(model, 0.3, recompute="block", backend=backend)
    model(**inputs)["loss"].backward()
    assert model.scale.grad is not None and model.scale.grad.abs().item() > 0
    fxseek.check_gradients(model, 1e-9, **inputs)


def gradients(model: nn.Module, inputs: dict[str, Tensor], **context: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(context.get("autocast"))):
        loss = model(**inputs)["loss"]
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("kind", ["dropout", "autocast"])
def test_recomputation_repeats_the_forward(kind: str):
    torch.manual_seed(0)
    options = {"lora_dropout": 0.5} if kind == "dropout" else {}
    model = tiny_lora(tiny_llama(), **options).train()
    inputs = batch(37, tokens=29)
    found = []
    for recompute in ("none", "selective", "block"):
        fxseek.compile(model, 0.3, score="random", recompute=recompute)
        found.append(gradients(model, inputs, autocast=kind == "autocast"))
        fxseek.uncompile(model)
    assert found[0]
    for again in found[1:]:
        assert again.keys() == found[0].keys()
        for name, gradient in found[0].items():
            assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_backward_twice(recompute: str):
    model = fxseek.compile(TinyDecoder(CONFIG).double().train(), 0.2, recompute=recompute)
    loss = model(**batch(VOCAB, tokens=TOKENS))["loss"]
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_weights_changed_before_backward_are_an_error(recompute: str):
    model = fxseek.compile(TinyDecoder(CONFIG).train(), 0.2, recompute=recompute)
    loss = model(**batch(VOCAB, tokens=TOKENS))["loss"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def saved_bytes(**options: Any) -> int:
    model = fxseek.compile(TinyDecoder(CONFIG).train(), 0.2, score="random", **options)
    model(**batch(VOCAB, batch=1, tokens=TOKENS))["loss"].backward()
    return fxseek.report(model).saved_bytes


def test_a_block_keeps_its_inputs_alone():
    rows = -(-TOKENS // 5)
    width, depth = CONFIG.width, CONFIG.depth
    keys_and_values = 2 * depth * TOKENS * CONFIG.kv_heads * CONFIG.head_dim * 4
    inputs = (depth + 1) * rows * width * 4
    constants = rows * (TOKENS + 64 + 4 * depth * CONFIG.head_dim * 4) + TOKENS * 8
    lean = saved_bytes(recompute="block")
    assert keys_and_values < lean <= keys_and_values + inputs + constants
    on_host = saved_bytes(recompute="block", kv="offload")
    assert on_host == lean - keys_and_values
    assert saved_bytes(recompute="none") > 2 * (lean - keys_and_values) + keys_and_values


@pytest.mark.parametrize("padding", ["none", "left"])
def test_no_stage_makes_a_mask_of_all_tokens(padding: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fxseek.ops.masks.CHUNK_BYTES", 4 * TOKENS * 2 * 8)
    monkeypatch.setattr("fxseek.ops.masks._COMPARED_ROWS", 8)
    model = fxseek.compile(tiny_llama().train(), 0.2, chunk_bytes=1 << 12)
    inputs = batch(37, tokens=TOKENS, padding=padding)
    model(**inputs)["loss"].backward()
    module = stages(model)
    for name in ("prefill", "score", "gather", "learn"):
        made = shapes_of(module.get_submodule(name), lambda: model(**inputs))
        assert made
        assert not any(shape[-2:] == (TOKENS, TOKENS) for shape in made), name


def test_the_prefill_holds_a_chunk_of_the_mlp():
    model = fxseek.compile(TinyDecoder(CONFIG).train(), 0.2, score="random", prefill_chunk=16)
    inputs = batch(VOCAB, batch=1, tokens=TOKENS)
    model(**inputs)
    made = shapes_of(stages(model).prefill, lambda: model(**inputs))
    inner = [shape for shape in made if len(shape) > 1 and shape[-1] == CONFIG.ffn]
    assert inner and max(shape[-2] for shape in inner) == 16


DENSE = ("llama", "qwen3", "gemma3", "olmo2", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "bert")
FAST = ("llama", "gpt2", "gpt_neox")


@pytest.mark.parametrize("family", sampled(DENSE, FAST))
def test_scores_on_chunks_of_tokens(family: str):
    """The last block before and after its attention on chunks, two times: the same scores."""
    found = []
    with double_throughout():
        inputs = batch(37, tokens=TOKENS, padding="left", labels="some")
        for size in (None, 13):
            torch.manual_seed(0)
            model = FAMILIES[family].make("sdpa").double().train()
            fxseek.compile(model, 0.2, prefill_chunk=size)
            model(**inputs)
            found.append(fxseek.report(model))
            gradient = stages(model).score.plan.gradient
            assert (gradient.lead is None) == (gradient.end.tail is None) == (size is None)
    torch.testing.assert_close(found[0].scores, found[1].scores, equal_nan=True)
    torch.testing.assert_close(found[0].full_loss, found[1].full_loss)


class Gated(nn.Module):
    """A norm with a gate that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(CONFIG.width, CONFIG.width)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate(x).sigmoid()
        return F.layer_norm(x, x.shape[-1:]) * gate


@pytest.mark.parametrize(
    ("attention", "trained", "size"), thinned(["sdpa", "eager"], ["", "head"], [None, 13])
)
def test_what_the_model_keeps_from_a_gradient_gets_none(
    size: int | None, trained: str, attention: str
):
    """In the last block and in what follows it, on chunks or not: scores and gradients.

    Scoring asks for a gradient of values that have none in training, where weights are frozen.
    """
    inputs = batch(VOCAB, tokens=TOKENS, padding="left", labels="some")
    model = TinyDecoder(replace(CONFIG, attention=attention))
    model.final_norm = Gated()
    model.blocks[-1].attention_norm = Gated()
    model.double().train()
    assert_scored_by_gradient(model, inputs, trained, size)


def assert_scored_by_gradient(
    model: TinyDecoder, inputs: dict[str, Tensor], trained: str, size: int | None
) -> None:
    """Scores are of the gradient at the last block's input, whichever weights are `trained`."""
    entries: list[Tensor] = []
    hook = model.blocks[-1].register_forward_pre_hook(lambda _, given: entries.append(given[0]))
    (slope,) = torch.autograd.grad(model(**inputs)["loss"], entries)
    hook.remove()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    fxseek.compile(model, 0.2, score="gradient", prefill_chunk=size)
    model(**inputs)
    wanted = gradient_magnitude(slope, SeekConfig.make(0.2).gradient_norm)
    torch.testing.assert_close(fxseek.report(model).gradient, wanted, rtol=1e-9, atol=1e-12)
    assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


class Centred(nn.Module):
    """A norm of what is left of a token without the mean of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(CONFIG.width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x - x.mean(1, keepdim=True) * self.weight, x.shape[-1:])


@pytest.mark.parametrize(
    ("attention", "trained", "size"), thinned(["sdpa", "eager"], ["", "head"], [None, 13])
)
def test_a_mean_over_tokens_after_the_last_attention(
    size: int | None, trained: str, attention: str
):
    """Where it is frozen it is a constant to training, and not to the scores."""
    torch.manual_seed(0)
    model = TinyDecoder(replace(CONFIG, attention=attention))
    model.final_norm = Centred()
    inputs = batch(VOCAB, tokens=TOKENS, labels="some")
    assert_scored_by_gradient(model.double().train(), inputs, trained, size)


def test_scoring_in_chunks_makes_dropout_the_same_in_backward():
    model = tiny_lora(tiny_llama(), lora_dropout=0.5).train()
    fxseek.compile(model, 0.2, prefill_chunk=13, score="gradient")
    inputs = batch(37, tokens=TOKENS)
    model(**inputs)
    lead = stages(model).score.gradient.lead
    states: list[Tensor] = []
    rows = lead.rows

    def recorded(*args: Any) -> tuple[Tensor, ...]:
        states.append(torch.get_rng_state())
        return rows(*args)

    lead.rows = recorded
    model(**inputs)
    chunks = -(-TOKENS // 13)
    assert len(states) == 2 * chunks
    forward, backward = states[:chunks], states[chunks:]
    assert not torch.equal(forward[0], forward[1])
    assert all(any(torch.equal(x, y) for y in backward) for x in forward)


def test_chunks_bound_the_memory_of_scoring():
    config = tiny_llama(hidden_size=64, intermediate_size=128).config
    sizes = {"tuning": "lora", "recompute": "block", "device": "cpu", "chunk_bytes": 1 << 14}
    peaks = [
        fxseek.estimate(config, 2048, prefill_chunk=size, **sizes).stage_peaks["score"]
        for size in (None, 128)
    ]
    assert peaks[1] < 0.5 * peaks[0]


# ---- constants before the first attention --------------------------------------------------------


def test_a_token_s_own_constants_are_made_anew():
    """The prefill hands on keys and values alone, and no embedding: adapters leave it frozen."""
    model = tiny_lora(tiny_llama()).train()
    fxseek.compile(model, 0.2, score="random")
    model(**batch(37, tokens=29))
    module = stages(model)
    kept = [node for node in module.prefill.outputs if node in module.prefill.bases]
    rest = {node for node in module.prefill.outputs if node not in module.prefill.bases}
    assert len(kept) == 5  # and the labels
    assert rest <= {item.node for item in module.gather.reads} | {module.score.plan.targets.target}
    assert not any("embed_tokens" in str(node.meta.get("nn_module_stack")) for node in rest)


class Unlearned(nn.Embedding):
    """An embedding that requires grad and is given none."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(input)


class Dropped(nn.Embedding):
    """A frozen embedding with dropout: keys of the prefill and queries of learn share its mask."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), 0.5, self.training)


@pytest.mark.parametrize("kind", [Unlearned, Dropped])
def test_constants_that_are_not_made_anew(kind: type[nn.Embedding]):
    model = TinyDecoder(CONFIG).double().train()
    model.embed = kind(VOCAB, CONFIG.width, dtype=torch.float64)
    model.embed.weight.requires_grad_(kind is Unlearned)
    fxseek.compile(model, 0.2, score="random")
    inputs = batch(VOCAB, tokens=29)
    model(**inputs)["loss"].backward()
    assert model.embed.weight.grad is None
    module = stages(model)
    assert not any("dropout" in str(node.target) for node in module.learn.graph.nodes)
    if kind is Unlearned:
        assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


def test_the_head_holds_a_chunk_of_logits():
    model = fxseek.compile(TinyDecoder(CONFIG).train(), 0.5, score="random", chunk_bytes=VOCAB * 40)
    inputs = batch(VOCAB, batch=1, tokens=TOKENS)
    model(**inputs)
    made = shapes_of(stages(model).learn, lambda: model(**inputs))
    logits = [shape for shape in made if len(shape) > 1 and shape[-1] == VOCAB]
    assert logits and all(shape[-2] <= 10 or shape[-2] == CONFIG.width for shape in logits)


# ---- masks by rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["causal", "padded", "window"])
def test_attention_on_chunks_of_queries(kind: str, groups: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fxseek.ops.masks.CHUNK_BYTES", 4 * 7 * 11 * 2)
    at = torch.arange(11)
    mask = (at[None] <= at[:, None]).expand(2, 1, 11, 11).clone()
    if kind == "padded":
        mask[1, :, :, :4] = False
        mask[1, :, at, at] = True
    if kind == "window":
        mask &= at[:, None] - at[None] < 3
    q = torch.randn(2, 2 * groups, 11, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 11, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    rows = MaskRows.of(mask)
    assert rows.causal(q.device) == (kind == "causal")
    found = attend_all(q, k, v, rows, enable_gqa=True)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    for got, want in zip(
        torch.autograd.grad(found, (q, k, v), upstream),
        torch.autograd.grad(wanted, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("groups", "recompute", "family"),
    thinned([False, True], ["none", "block"], ["llama", "mistral", "gemma3", "tiny"]),
)
def test_learn_on_chunks_of_queries(
    family: str, recompute: Any, groups: bool, monkeypatch: pytest.MonkeyPatch
):
    """Queries of selected tokens 3 at a time, with the rows of the mask made for them."""
    monkeypatch.setattr("fxseek.ops.masks.CHUNK_BYTES", 4 * TOKENS * 2 * 3)
    if groups:
        monkeypatch.setattr("fxseek.ops.attention._grouped", ())
    with double_throughout():
        if family == "tiny":
            model = TinyDecoder(CONFIG).double().train()
        else:
            model = FAMILIES[family].make("sdpa").double().train()
        fxseek.compile(model, 0.2, recompute=recompute)
        inputs = batch(37, tokens=TOKENS, padding="left", labels="some")
        assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9
        made = shapes_of(stages(model).learn, lambda: model(**inputs)["loss"].backward())
    kept = int(fxseek.report(model).selected.shape[1])
    rows = [shape for shape in made if len(shape) > 1 and shape[-1] == TOKENS]
    if family != "tiny":  # its mask is not by rows
        assert any(shape[-2] == 3 for shape in rows)
        assert not any(shape[-2:] == (kept, TOKENS) for shape in rows)


def test_layers_of_other_groups_share_no_folded_mask(monkeypatch: pytest.MonkeyPatch):
    """Each layer may have its own number of key heads."""
    monkeypatch.setattr("fxseek.ops.attention._grouped", ())
    model = TinyDecoder(replace(CONFIG, heads=6, kv_heads=3, repeat="gqa"))
    for block, kv_heads in zip(model.blocks, (3, 2, 3), strict=True):
        block.attention = Attention(replace(model.config, kv_heads=kv_heads))
    fxseek.compile(model.double().train(), 0.2)
    inputs = batch(VOCAB, tokens=TOKENS, padding="left", labels="some")
    assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


class Sighted(Attention):
    """Attention whose mask is made of what it reads: some tokens see all before, some a window."""

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        assert mask is not None
        at = torch.arange(x.shape[1])
        far = (x.mean(-1) > 0)[:, None, :, None]
        return super().forward(x, mask & (far | (at[None, :] > at[:, None] - 5)), rotary)


@pytest.mark.parametrize("size", [None, 13])
def test_masks_made_of_the_stream(size: int | None):
    torch.manual_seed(0)
    model = TinyDecoder(CONFIG)
    for block in model.blocks:
        block.attention = Sighted(CONFIG)
    fxseek.compile(model.double().train(), 0.2, prefill_chunk=size)
    inputs = batch(VOCAB, tokens=TOKENS, labels="some")
    assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


class Viewing(TinyDecoder):
    """Its mask is made of a view of what it is given."""

    def _mask(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None):
        assert attention_mask is not None
        at = torch.arange(x.shape[1])
        return (at[None, :] <= at[:, None])[None, None] & attention_mask[:, None, None, :]


def test_a_mask_written_to_before_backward(monkeypatch: pytest.MonkeyPatch):
    """Backward would make other rows of it; where they are kept, the write does no harm."""
    gradients = []
    for size in (64 << 20, 4 * TOKENS * 2 * 3):
        monkeypatch.setattr("fxseek.ops.masks.CHUNK_BYTES", size)
        model = fxseek.compile(Viewing(CONFIG).double().train(), 0.2, score="random")
        inputs = batch(VOCAB, tokens=TOKENS, padding="left")
        inputs["attention_mask"] = inputs["attention_mask"].bool()
        for written in (False, True):
            fxseek.resume(model, 0)
            model.zero_grad()
            loss = model(**inputs)["loss"]
            if written:
                inputs["attention_mask"].fill_(True)
            if written and gradients[2:]:
                with pytest.raises(fxseek.InputError, match="between forward and backward"):
                    loss.backward()
                continue
            loss.backward()
            gradients.append(model.embed.weight.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(gradients, gradients[:1] * 3)


class Twice(Attention):
    """Spelled out, and by torch's own attention: both read one mask, the former as it is."""

    spelled_out_last = False

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Any) -> Tensor:
        def heads(layer: nn.Linear) -> Tensor:
            return layer(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        def fused() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        q, k, v = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        assert mask is not None
        found = fused() if self.spelled_out_last else 0
        found = found + torch.where(mask, q @ k.mT, -1e9).softmax(-1) @ v
        found = found if self.spelled_out_last else found + fused()
        return self.o_proj(found.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("score", ["context", "tokenseek"])
@pytest.mark.parametrize("spelled_out_last", [True, False])
def test_a_mask_that_is_read_as_it_is_too(score: str, spelled_out_last: bool):
    config = TinyConfig(vocab=VOCAB)
    model = TinyDecoder(config)
    model.blocks[-1].attention = Twice(config)
    model.blocks[-1].attention.spelled_out_last = spelled_out_last
    fxseek.compile(model.double().train(), 0.3, score=score)
    inputs = batch(VOCAB, tokens=13, padding="left")
    assert fxseek.check_gradients(model, None, **inputs).error <= 1e-9


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 1, 5, 7), (2, 6, 5, 7), (5, 7), (2, 1, 1, 7)])
def test_groups_as_further_queries(shape: tuple[int, ...]):
    torch.manual_seed(0)
    q = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 7, 3, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(*shape) > 0.3
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(attend_folded(q, k, v, mask, scale=0.3), wanted)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "blocks"}, r"recompute='blocks'.*did you mean 'block'"),
        ({"kv": "host"}, r"kv='host'.*'device', 'offload'"),
        ({"kv": "offload"}, r"kv='offload'.*use recompute='block'"),
        ({"kv": "offload", "recompute": "block", "backend": "inductor"}, r"backend='eager'"),
        ({"prefill_chunk": 0}, r"prefill_chunk=0"),
        ({"prefill_chunk": 1.5}, r"prefill_chunk=1.5"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(fxseek.ConfigError, match=message):
        fxseek.SeekConfig(0.1, **options)
