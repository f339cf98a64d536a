"""Latent attention: what keys and values follow from waits for backward, and not they."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from models import double_throughout
from torch import Tensor, nn
from torch.nn import functional as F
from tuners import spread

import fxseek
from fxseek.capture.step import step_of
from fxseek.ops.parts import pass_joint
from fxseek.ops.rows import pass_kept
from fxseek.passes.facts import example
from fxseek.program import Program

FAMILY = FAMILIES["minicpm3"]
LATENT, ROTARY = 12, 6
SWEEP = pytest.mark.sweep
OFFLOAD = {"recompute": "block", "kv": "offload"}


def program_of(model: nn.Module) -> Program:
    step = step_of(model)
    assert step is not None
    return step.recorder.steps[-1].program


def kept_widths(program: Program) -> set[int]:
    """The widths of the values [batch, heads, tokens, width] that wait for the learn stage."""
    values = (example(node) for node in program.whole)
    return {int(value.shape[-1]) for value in values if value.dim() == 4}


def adapted(model: Any, dropout: float = 0.0) -> nn.Module:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=dropout)
    tuned = peft.get_peft_model(model, config).double().train()
    spread(tuned)
    return tuned


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({}, True),
        ({"learn_chunk": 3}, False),
        pytest.param({"learn_chunk": 3, "ratio": 1.0, "recompute": "block"}, True, marks=SWEEP),
        pytest.param({**OFFLOAD, "learn_chunk": 5, "prefill_chunk": 6}, True, marks=SWEEP),
        pytest.param(OFFLOAD, False, marks=SWEEP),
        pytest.param({"ratio": 1.0}, False, marks=SWEEP),
        pytest.param({"learn_chunk": 4, "ratio": "labelled"}, False, marks=SWEEP),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=SWEEP)])
@pytest.mark.parametrize("rows", [2, pytest.param(1, marks=SWEEP)])
def test_gradients_are_those_of_expanded_keys_and_values(options, lora, attention, rows):
    layers = 1 if rows == 2 else 2
    with double_throughout():
        model = FAMILY.make(attention, num_hidden_layers=layers).double()
        model = adapted(model) if lora else model
        fxseek.compile(model, **{"ratio": 0.3, **options})
        fxseek.check_gradients(model, 1e-9, **FAMILY.batch(rows, dtype=torch.float64))
    program = program_of(model)
    assert kept_widths(program) == {LATENT, ROTARY}
    assert isinstance(program.parts, str) is ("learn_chunk" not in options)
    learned = program.learned[0].graph
    target = pass_joint if "learn_chunk" in options else pass_kept
    assert len(learned.find_nodes(op="call_function", target=target)) == 2 * layers


class FrozenLatent(nn.Module):
    """Keys and values of a latent without gradient and of one with it."""

    def __init__(self, heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.embed = nn.Embedding(20, 32).requires_grad_(False)
        self.down = nn.Linear(32, 8).requires_grad_(False)
        self.up = nn.Linear(8, heads * 2 * width)
        self.rotary = nn.Linear(32, 4)
        self.query = nn.Linear(32, heads * (width + 4))
        self.head = nn.Linear(heads * width, 20)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = (
            x
            + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[
                :, 0
            ]
        )
        made = self.up(self.down(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        shared = self.rotary(x)[:, None].expand(-1, self.heads, -1, -1)
        key = torch.cat((made[..., : self.width], shared), dim=-1)
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, made[..., self.width :], is_causal=True)
        logits = self.head(mixed.transpose(1, 2).flatten(2))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_latent_without_gradient(chunk):
    torch.manual_seed(0)
    model = fxseek.compile(FrozenLatent().double(), 0.5, learn_chunk=chunk)
    ids = torch.randint(20, (2, 12))
    fxseek.check_gradients(model, 1e-9, input_ids=ids, labels=ids)
    program = program_of(model)
    assert isinstance(program.parts, str) is (chunk is None)
    target = pass_kept if chunk is None else pass_joint
    assert program.learned[0].graph.find_nodes(op="call_function", target=target)


class Scaled(nn.Linear):
    """A weight that is itself made of parameters, and a result that is scaled by them."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__(given, made)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, self.out_features))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.scale[:, None]) * self.scale.exp()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_what_is_made_of_parameters_learns_from_keys_and_values(chunk, recompute):
    torch.manual_seed(0)
    model = FrozenLatent()
    model.up = Scaled(model.up.in_features, model.up.out_features)
    model = fxseek.compile(model.double(), 0.5, learn_chunk=chunk, recompute=recompute)
    ids = torch.randint(20, (2, 12))
    fxseek.check_gradients(model, 1e-9, input_ids=ids, labels=ids)
    target = pass_kept if chunk is None else pass_joint
    assert program_of(model).learned[0].graph.find_nodes(op="call_function", target=target)


def test_a_stage_that_would_lose_gradient_is_refused(monkeypatch):
    monkeypatch.setattr("fxseek.passes.latents._Stage._trained", lambda *_: {})
    model = FrozenLatent()
    model.up = Scaled(model.up.in_features, model.up.out_features)
    fxseek.compile(model.double(), 0.5)
    ids = torch.randint(20, (2, 12))
    with pytest.raises(fxseek.GraphError, match=r"without its gradient \(.*self\.scale"):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("chunk", [None, 3])
def test_dora(chunk):
    with double_throughout():
        model = peft.get_peft_model(
            FAMILY.make(num_hidden_layers=1),
            peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True),
        )
        model = model.double().train()
        spread(model)
        fxseek.compile(model, 0.3, learn_chunk=chunk)
        fxseek.check_gradients(model, 1e-9, **FAMILY.batch(dtype=torch.float64))
    assert kept_widths(program_of(model)) == {LATENT, ROTARY}


@pytest.mark.sweep
@pytest.mark.parametrize("chunk", [None, 3])
def test_what_is_drawn_is_not_drawn_again(chunk):
    """Of an adapter with dropout, what is behind it is kept beside the latent: 3 more numbers."""
    model = adapted(FAMILY.make(num_hidden_layers=1), dropout=0.3)
    fxseek.compile(model, 0.3, learn_chunk=chunk)
    model(**FAMILY.batch(dtype=torch.float64)).loss.backward()
    assert kept_widths(program_of(model)) == {LATENT, ROTARY, 3}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_nothing_is_expanded_again_where_all_is_to_be_kept():
    model = fxseek.compile(FAMILY.make(num_hidden_layers=1), 0.3, recompute="none")
    model(**FAMILY.batch()).loss.backward()
    assert kept_widths(program_of(model)) == {8 + ROTARY, 10}


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"ratio": 0.1}, 0.15),
        ({"ratio": 1.0, "learn_chunk": 12}, 0.0),
        pytest.param({"ratio": 0.1, "recompute": "block"}, 0.0, marks=SWEEP),
        pytest.param({"ratio": 1.0}, 2.0, marks=SWEEP),
    ],
)
def test_saved_bytes_do_not_grow_with_the_heads(options, least):
    """Of all tokens 18 numbers are kept, however many heads are made of them.

    `least`: by how much a head may add, in shares of its keys and values of all tokens. Queries of
    the selected tenth are kept.
    """
    tokens, width, saved = 120, 14, []
    for heads in (4, 8):
        sizes: dict[str, Any] = {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "v_head_dim": width,
        }
        model = FAMILY.make(num_hidden_layers=1, **sizes)
        fxseek.compile(model, score="random", **options)
        model(**FAMILY.batch(1, tokens)).loss.backward()
        saved.append(fxseek.report(model).saved_bytes)
    keys_and_values = 4 * 2 * tokens * width * 4
    assert saved[1] - saved[0] <= least * keys_and_values
