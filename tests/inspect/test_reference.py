"""Masked full backprop, held to hand-derived gradients and to a step written out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    IGNORED,
    SHIFTS,
    TinyConfig,
    TinyDecoder,
    batch,
    random_kept,
    tiny_gpt2,
    tiny_llama,
    tiny_lora,
    without_casts,
)
from strategies import batches, selections, tiny_configs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxseek
from fxseek.errors import InputError
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop


def everything(inputs: dict[str, Tensor]) -> Tensor:
    rows, tokens = inputs["input_ids"].shape
    return torch.arange(tokens).repeat(rows, 1)


def ordinary_gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        model(**inputs).loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


# ---- the step by hand: all tokens without gradient, then the kept ones with --------------------


def compact_step(
    model: TinyDecoder, inputs: dict[str, Tensor], kept: Tensor, weights: Tensor
) -> Tensor:
    """The loss of ``TinyDecoder`` on kept tokens, keys and values of the others constant.

    Another statement of masked full backprop: nothing is detached here; unselected tokens
    enter as numbers.
    """
    config = model.config
    ids = inputs["input_ids"]
    rows, tokens = ids.shape
    used = kept >= 0
    at = kept.clamp(min=0)
    positions = inputs.get("position_ids", torch.arange(tokens).repeat(rows, 1))
    mask = model._mask(model.embed(ids), inputs.get("attention_mask"), inputs.get("position_ids"))
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    mask = mask.expand(rows, 1, tokens, tokens)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)

    def gathered(x: Tensor, dim: int) -> Tensor:
        shape = [1] * x.ndim
        shape[0], shape[dim] = at.shape
        wide = list(x.shape)
        wide[dim] = at.shape[1]
        return x.gather(dim, at.view(shape).expand(wide))

    def heads(x: Tensor, where: Tensor) -> Tensor:
        return x.view(*where.shape, -1, config.head_dim).transpose(1, 2)

    def rotated(x: Tensor, where: Tensor) -> Tensor:
        if config.positions != "rotary":
            return x
        half = config.head_dim // 2
        rates = 100.0 ** -(torch.arange(half) * 2 / config.head_dim).double()
        angles = where[:, None, :, None] * rates
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, rows_of_mask: Tensor) -> Tensor:
        times = config.heads // config.kv_heads
        k, v = (x.repeat_interleave(times, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) / config.head_dim**0.5 + rows_of_mask
        # A query that may attend to nothing gives zeros, as SDPA with a boolean mask does.
        share = scores.softmax(-1).masked_fill((rows_of_mask == -torch.inf).all(-1, True), 0)
        return (share @ v).transpose(1, 2).flatten(2)

    def embedded(where: Tensor, tokens: Tensor) -> Tensor:
        x = model.embed(tokens)
        return x + model.positions(where) if config.positions == "learned" else x

    def feed(block: Any, x: Tensor, attended: Tensor) -> Tensor:
        if block.post:
            x = block.attention_norm(x + attended)
            return block.ffn_norm(x + block.ffn(x))
        x = x + attended
        return x + block.ffn(block.ffn_norm(x))

    kept_at = gathered(positions, 1)
    x = embedded(kept_at, gathered(ids, 1))
    with torch.no_grad():
        full = embedded(positions, ids)
    for block in model.blocks:
        part: Any = block
        entering = (lambda y: y) if part.post else part.attention_norm
        projections = part.attention
        with torch.no_grad():
            y = entering(full)
            q, k = (
                rotated(heads(p(y), positions), positions)
                for p in (projections.q_proj, projections.k_proj)
            )
            v = heads(projections.v_proj(y), positions)
            full = feed(part, full, projections.o_proj(attend(q, k, v, mask)))
        y = entering(x)
        q, own_k = (
            rotated(heads(p(y), at), kept_at) for p in (projections.q_proj, projections.k_proj)
        )
        own_v = heads(projections.v_proj(y), at)
        k, v = (
            torch.stack(
                [
                    constant[row].index_copy(1, at[row][used[row]], own[row][:, used[row]])
                    for row in range(rows)
                ]
            )
            for constant, own in ((k, own_k), (v, own_v))
        )
        x = feed(part, x, projections.o_proj(attend(q, k, v, gathered(mask, 2))))
    logits = model.head(model.final_norm(x))
    targets = inputs["labels"]
    if config.shift != "none":
        targets = F.pad(targets, (0, 1), value=IGNORED)[:, 1:]
    targets = gathered(targets, 1).masked_fill(~used, IGNORED)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    count = (targets != IGNORED).sum().clamp(min=1)
    return (losses * weights.flatten()).sum() / count


@settings(max_examples=60)
@given(st.data())
def test_equals_the_step_written_out_by_hand(data):
    config = data.draw(tiny_configs())
    inputs = data.draw(batches(config))
    kept, weights = data.draw(selections(*inputs["input_ids"].shape, unused=True))
    model = TinyDecoder(config).double()
    reference = masked_backprop(model, inputs, kept, weights=weights, shift=True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = compact_step(model, inputs, kept, weights)
    torch.testing.assert_close(reference.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    error, name = compare(dict(zip(names, found, strict=True)), reference.gradients)
    assert error < 1e-10, name


# ---- one attention by hand ---------------------------------------------------------------------


class OneAttention(nn.Module):
    """Tokens of width one, no mask: y_i = o · Σ_j a_ij · v·x_j, a_i = softmax_j(q·x_i · k·x_j)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(1, 1, bias=False) for _ in range(4))
        for layer, value in ((self.q, 0.7), (self.k, -1.3), (self.v, 0.4), (self.o, 1.9)):
            nn.init.constant_(layer.weight, value)

    def forward(self, x: Tensor) -> Tensor:
        share = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.o(share @ self.v(x))


def test_one_attention_by_hand():
    model = OneAttention().double()
    x = torch.tensor([0.5, -0.2, 1.1], dtype=torch.float64)
    kept = torch.tensor([[0, 2]])
    reference = masked_backprop(
        model, {"x": x[None, :, None]}, kept, loss=lambda y, _: y[:, [0, 2]].sum()
    )
    q, k, v, o = 0.7, -1.3, 0.4, 1.9
    share = (q * x[:, None] * k * x[None, :]).softmax(-1)
    mean = share @ x  # Σ_j a_ij x_j
    wanted = {name: torch.zeros((), dtype=torch.float64) for name in "qkvo"}
    for i in (0, 2):
        wanted["o"] += v * mean[i]
        for j in range(3):
            # ∂y_i/∂s_ij, where s_ij = q x_i · k x_j: the query is selected, all keys are read.
            slope = o * v * share[i, j] * (x[j] - mean[i])
            wanted["q"] += slope * x[i] * k * x[j]
            if j in (0, 2):  # the key and value of token 1 are constants
                wanted["k"] += slope * q * x[i] * x[j]
                wanted["v"] += o * share[i, j] * x[j]
    torch.testing.assert_close(reference.loss, (o * v * (mean[0] + mean[2])))
    for name, value in wanted.items():
        torch.testing.assert_close(reference.gradients[f"{name}.weight"].squeeze(), value)


# ---- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("items", [None, 5, torch.tensor(19)])
def test_keeping_everything_is_ordinary_backprop(shift, items):
    model = TinyDecoder(TinyConfig(shift=shift)).double()
    inputs: dict[str, Any] = batch(37, padding="left", labels="some")
    if items is not None:
        inputs["num_items_in_batch"] = items
    reference = masked_backprop(model, inputs, everything(inputs))
    torch.testing.assert_close(reference.loss, model(**inputs).loss.detach())
    assert compare(ordinary_gradients(model, inputs), reference.gradients).error < 1e-12


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_keeping_everything_in_transformers_models(make, attention, lora):
    model = without_casts(make(attention))
    model = tiny_lora(model).double() if lora else model
    inputs = batch(37, padding="right", labels="completion")
    reference = masked_backprop(model, inputs, everything(inputs))
    assert compare(ordinary_gradients(model, inputs), reference.gradients).error < 1e-12


def test_num_items_scales_the_selected_mean():
    model = TinyDecoder(TinyConfig()).double()
    inputs = batch(37, labels="some")
    kept = random_kept(2, 11, 4)
    mean = masked_backprop(model, inputs, kept)
    scaled = masked_backprop(model, {**inputs, "num_items_in_batch": 100}, kept)
    labelled = (inputs["labels"][:, 1:] != IGNORED).sum()
    torch.testing.assert_close(scaled.loss, mean.loss * labelled / 100)
    for name, gradient in mean.gradients.items():
        torch.testing.assert_close(scaled.gradients[name], gradient * labelled / 100)


def test_weights_multiply_their_positions():
    model = TinyDecoder(TinyConfig()).double()
    inputs, kept = batch(37), random_kept(2, 11, 3)
    weights = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.5, 3.0]])
    logits = model(inputs["input_ids"]).logits.detach()
    targets = F.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    count = (targets.gather(1, kept) != IGNORED).sum()
    reference = masked_backprop(model, inputs, kept, weights=weights)
    torch.testing.assert_close(reference.loss, (losses.gather(1, kept) * weights).sum() / count)


def test_unused_slots_are_ignored_in_any_order():
    model = TinyDecoder(TinyConfig()).double()
    inputs = batch(37)
    plain = masked_backprop(model, inputs, torch.tensor([[1, 4], [0, 10]]))
    padded = masked_backprop(model, inputs, torch.tensor([[4, -1, 1, -1], [-1, 10, -1, 0]]))
    torch.testing.assert_close(padded.loss, plain.loss)
    assert compare(padded.gradients, plain.gradients).error < 1e-14


def test_no_kept_position_with_a_label_gives_zeros():
    model = TinyDecoder(TinyConfig()).double()
    for labels in ("none", "all"):
        inputs = batch(37, labels=labels)
        kept = torch.full((2, 1), 10)  # the last token predicts nothing
        reference = masked_backprop(model, inputs, kept)
        assert reference.loss == 0
        assert all(not gradient.any() for gradient in reference.gradients.values())


# ---- which rows get gradient -------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: TinyDecoder(TinyConfig())])
def test_unselected_tokens_get_no_gradient(make, padding):
    model = make()
    inputs = batch(37, padding=padding)
    inputs["input_ids"] = torch.arange(22).view(2, 11)  # every token has an id of its own
    inputs["labels"] = inputs["input_ids"].clone()
    kept = torch.tensor([[2, 5, 7], [6, 8, 9]])
    gradients = masked_backprop(model, inputs, kept).gradients
    tables = ("embed.weight", "model.embed_tokens.weight")
    table = next((gradients[name] for name in tables if name in gradients), None)
    if table is None:  # GPT-2 ties its embedding to its head
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        table = masked_backprop(model, inputs, kept).gradients["transformer.wte.weight"]
    moved = table.abs().sum(-1).nonzero().flatten()
    assert moved.tolist() == (kept + torch.tensor([[0], [11]])).flatten().tolist()


@pytest.mark.parametrize(
    ("rows", "tokens", "options"),
    [
        (5, 5, {}),
        (2, 2, {}),
        (3, 3, {"heads": 3, "kv_heads": 3}),
        (6, 6, {"heads": 6, "kv_heads": 3, "head_dim": 6}),
        (2, 11, {"width": 11}),
        (11, 11, {"width": 11, "vocab": 11}),
        (2, 1, {}),
        (1, 1, {}),
        (1, 7, {"width": 7, "ffn": 7}),
    ],
)
def test_sizes_that_are_equal_are_not_confused(rows, tokens, options):
    model = TinyDecoder(TinyConfig(positions="learned", **options)).double()
    inputs = batch(model.config.vocab, rows, tokens, seed=3)
    kept = random_kept(rows, tokens, max(1, tokens // 2))
    weights = torch.ones(kept.shape)
    reference = masked_backprop(model, inputs, kept, shift=False)
    model.config = replace(model.config, shift="none")
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = compact_step(model, inputs, kept, weights)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert compare(dict(zip(names, found, strict=True)), reference.gradients).error < 1e-11


class PlacesAsKeys(nn.Module):
    """Queries of tokens, keys of learned positions, which all rows of a batch share."""

    def __init__(self, expanded: bool = False) -> None:
        super().__init__()
        self.embed, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(7, 4), nn.Linear(4, 9)
        self.expanded = expanded

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        places = torch.arange(input_ids.shape[1])[None]
        if self.expanded:
            places = places.expand(input_ids.shape[0], -1)
        x, keys = self.embed(input_ids), self.places(places)
        return {"logits": self.head((x @ keys.mT).softmax(-1) @ x)}


def test_a_batch_of_one_shares_what_two_rows_would():
    torch.manual_seed(0)
    model = PlacesAsKeys().double()
    inputs, kept = batch(9, 1, 7, seed=3), torch.tensor([[1, 4]])
    inputs = {name: inputs[name] for name in ("input_ids", "labels")}
    one = masked_backprop(model, inputs, kept, shift=False)
    two = masked_backprop(
        model, {name: x.repeat(2, 1) for name, x in inputs.items()}, kept.repeat(2, 1), shift=False
    )
    assert compare(one.gradients, two.gradients).error < 1e-11
    assert one.gradients["places.weight"].norm(dim=1).all()


@pytest.mark.parametrize("expanded", [False, True])
def test_places_of_a_batch_of_one_are_those_of_a_step(expanded):
    class Trained(PlacesAsKeys):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            found = super().forward(input_ids)
            if labels is not None:
                found["loss"] = F.cross_entropy(found["logits"].mT, labels)
            return found

    torch.manual_seed(0)
    model = fxseek.compile(Trained(expanded).double(), 0.4, score="random")
    ids = torch.randint(9, (1, 7))
    assert fxseek.check_gradients(model, 1e-9, input_ids=ids, labels=ids).error < 1e-9


class Pair(NamedTuple):
    first: Tensor
    rest: Any


@dataclass
class Record:
    rows: Tensor
    note: str = "kept"


class Nested(nn.Module):
    """A result of every kind that can hold tensors; only hooks on this module can mask it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.arange(1.0, 9.0).view(8, 1))  # not per-token: one a piece

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        s = self.scale
        packed = (y * s[5]).flatten(0, 1)
        return Pair(
            y * s[0],
            [
                (y * s[1], 3, None),
                {"deep": y * s[2], "two_dimensional": (y * s[3]).sum(-1)},
                Record(y * s[4]),
                packed,
                (y * s[6]).unsqueeze(2).expand(-1, -1, 2, -1),
                (y * s[7]).mean(1),
            ],
        )


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nested = Nested(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        pair = self.nested(x)
        plain, deep, record, packed, wide, pooled = pair.rest
        assert isinstance(pair, Pair)
        assert record.note == "kept"
        assert plain[1:] == (3, None)
        return torch.stack(
            [
                pair.first.sum((0, 2)),
                plain[0].sum((0, 2)),
                deep["deep"].sum((0, 2)),
                deep["two_dimensional"].sum(0),
                record.rows.sum((0, 2)),
                packed.view(x.shape[0], -1, 3).sum((0, 2)),
                wide[:, :, 0].sum((0, 2)),
                pooled.sum().expand(x.shape[1]),
            ]
        )


@pytest.mark.parametrize("shape", [(2, 5), (3, 3), (1, 4), (2, 3)])
def test_tensors_inside_any_result_are_masked(shape):
    model = Uses().double()
    x = torch.randn(*shape, 3, dtype=torch.float64)
    kept = torch.ones(shape[0], 1, dtype=torch.long)
    reference = masked_backprop(
        model, {"x": x}, kept, loss=lambda result, _: result[:7].sum() + result[7, 0]
    )
    y = model.nested.inner(x).detach()
    selected = y[:, 1].sum().expand(7)
    pooled = y.mean(1).sum()[None]  # has no token dimension, so it is not masked
    torch.testing.assert_close(
        reference.gradients["nested.scale"].flatten(), torch.cat([selected, pooled])
    )


# ---- nothing is left behind --------------------------------------------------------------------


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("inside the model")


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_removed_after_an_exception():
    model = nn.Sequential(nn.Linear(3, 3), Fails())
    inputs, kept = {"input": torch.randn(2, 5, 3)}, torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ZeroDivisionError, match="inside the model"):
        masked_backprop(model, inputs, kept, loss=lambda result, _: result.sum())
    assert hooks(model) == 0


def test_a_compiled_call_is_bypassed_and_put_back():
    model = TinyDecoder(TinyConfig()).double()
    inputs, kept = batch(37), random_kept(2, 11, 3)
    wanted = masked_backprop(model, inputs, kept)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the compiled call ran")

    model._compiled_call_impl = compiled
    found = masked_backprop(model, inputs, kept)
    assert model._compiled_call_impl is compiled
    assert compare(found.gradients, wanted.gradients).error == 0
    with pytest.raises(InputError):
        masked_backprop(model, {**inputs, "labels": None}, kept)
    assert model._compiled_call_impl is compiled


def test_a_module_wrapped_by_torch_compile_runs_eagerly():
    model = TinyDecoder(TinyConfig()).double()
    inputs, kept = batch(37), random_kept(2, 11, 3)

    def backend(*_: Any) -> Any:
        raise AssertionError("the compiled call ran")

    wrapped: Any = torch.compile(model, backend=backend)
    found = masked_backprop(wrapped, inputs, kept).gradients
    wanted = masked_backprop(model, inputs, kept).gradients
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
    assert compare(found, wanted).error == 0


class Stateful(nn.Module):
    """Keeps a running mean, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = TinyDecoder(TinyConfig())
        self.dropout = nn.Dropout(0.3)
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        self.seen += 1
        result = self.decoder(input_ids, labels=labels)
        self.dropout(result.logits)
        return result


@pytest.mark.parametrize("training", [True, False])
def test_gradients_random_state_buffers_and_mode_are_untouched(training):
    model = Stateful().train(training)
    inputs, kept = batch(37), random_kept(2, 11, 3)
    before = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    state = torch.get_rng_state()
    with torch.no_grad():  # gradients are wanted all the same
        assert masked_backprop(model, inputs, kept).gradients["decoder.head.weight"].any()
    assert torch.equal(state, torch.get_rng_state())
    assert model.seen == 0
    assert all(module.training is training for module in model.modules())
    assert hooks(model) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name]
        assert (before[name] == 7).all()


def test_frozen_parameters_have_no_entry_and_unused_ones_are_zero():
    model = TinyDecoder(TinyConfig())
    model.embed.requires_grad_(False)
    model.extra = nn.Parameter(torch.ones(3))
    inputs = batch(37)
    gradients = masked_backprop(model, inputs, everything(inputs)).gradients
    assert "embed.weight" not in gradients
    assert torch.equal(gradients["extra"], torch.zeros(3))


def test_checkpointed_blocks_are_masked_again_in_backward():
    model = tiny_llama()
    inputs, kept = batch(37), random_kept(2, 11, 3)
    wanted = masked_backprop(model, inputs, kept)
    for layer in model.get_submodule("model.layers").children():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    found = masked_backprop(model, inputs, kept)
    assert compare(found.gradients, wanted.gradients).error < 1e-5


# ---- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kept", "message"),
    [
        ({}, [[0, 11], [0, 1]], r"positions from 0 to 11.*rows have 11 tokens.*0 to 10"),
        ({}, [[0, -2], [0, 1]], r"positions from -2 to 1"),
        ({}, [[0, 1], [3, 3]], r"position 3 of row 1 more than once"),
        ({}, [[0, 1]], r"kept has 1 rows and input_ids has 2"),
        ({}, [0, 1], r"LongTensor \[batch, kept\].*got torch.int64 \(2,\)"),
        ({}, [[0.0], [1.0]], r"got torch.float32 \(2, 1\)"),
        ({"labels": None}, [[0], [1]], r"labels=None.*one label for each token, \(2, 11\)"),
        ({"labels": torch.zeros(2)}, [[0], [1]], r"labels=\(2,\)"),
        ({"input_ids": None, "labels": None}, [[0], [1]], r"no tensor \[batch, tokens, ...\]"),
    ],
)
def test_bad_inputs_say_what_to_pass(change, kept, message):
    inputs = {**batch(37), **change}
    with pytest.raises(InputError, match=message):
        masked_backprop(TinyDecoder(TinyConfig()), inputs, torch.tensor(kept))


class OtherLoss(TinyDecoder):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        result = super().forward(input_ids, labels=labels)
        if result.loss is not None:
            result.loss = result.loss * 2
        return result


class LogitsOnly(TinyDecoder):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids).logits


def test_a_loss_of_another_kind_is_refused_unless_shift_is_given():
    model = OtherLoss(TinyConfig()).double()
    inputs, kept = batch(37), random_kept(2, 11, 3)
    with pytest.raises(InputError, match=r"model's own loss is .* pass shift=True or shift=False"):
        masked_backprop(model, inputs, kept)
    plain = masked_backprop(TinyDecoder(TinyConfig()).double(), inputs, kept)
    torch.testing.assert_close(masked_backprop(model, inputs, kept, shift=True).loss, plain.loss)


def test_an_output_without_logits_needs_a_loss():
    model = LogitsOnly(TinyConfig()).double()
    inputs, kept = batch(37), random_kept(2, 11, 3)
    with pytest.raises(InputError, match=r"output \(Tensor\) lacks a loss"):
        masked_backprop(model, inputs, kept)
    with pytest.raises(InputError, match=r"output \(Tensor\) has logits None"):
        masked_backprop(model, inputs, kept, shift=True)

    def loss(logits: Tensor, given: Any) -> Tensor:
        targets = F.pad(given["labels"], (0, 1), value=IGNORED)[:, 1:].gather(1, kept)
        index = kept[:, :, None].expand(-1, -1, logits.shape[-1])
        return F.cross_entropy(logits.gather(1, index).flatten(0, 1), targets.flatten())

    found = masked_backprop(model, inputs, kept, loss=loss)
    wanted = masked_backprop(TinyDecoder(TinyConfig()).double(), inputs, kept)
    assert compare(found.gradients, wanted.gradients).error < 1e-14


# ---- compare -----------------------------------------------------------------------------------


def test_compare_finds_the_worst_parameter():
    reference = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0, -10.0])}
    found = {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([1.0, -10.0])}
    assert compare(found, reference) == (0.25, "a")
    assert compare(reference, reference).error == 0


def test_compare_counts_missing_gradients_as_zeros():
    one = torch.ones(2)
    assert compare({}, {"a": one}) == (1.0, "a")
    assert compare({"a": None}, {"a": one}) == (1.0, "a")
    assert compare({"a": one, "b": one}, {"a": one, "b": None}) == (1000.0, "b")
    assert compare({"a": None}, {"a": None}) == (0.0, "a")
    assert compare({}, {}) == (0.0, "")


def test_compare_does_not_divide_by_rounding():
    reference = {"large": torch.tensor([1.0]), "zero": torch.tensor([1e-17])}
    found = {"large": torch.tensor([1.0]), "zero": torch.tensor([-3e-17])}
    assert compare(found, reference).error < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_compare_never_passes_what_is_not_finite(bad):
    reference = {"a": torch.ones(2)}
    assert compare({"a": torch.tensor([1.0, bad])}, reference).error == float("inf")
    assert compare(reference, {"a": torch.tensor([1.0, bad])}).error == float("inf")


def test_compare_refuses_other_shapes():
    with pytest.raises(InputError, match=r"'a' has shape \(2,\) and its reference \(3,\)"):
        compare({"a": torch.ones(2)}, {"a": torch.ones(3)})
