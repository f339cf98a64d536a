"""What a batch may hold: masks of every kind, positions, caches, packed rows, choices."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, cache_name, tiny_llama, without_casts
from torch import Tensor

import fxseek
from fxseek.errors import GraphError, InputError
from fxseek.ops.masks import read_tokens

VOCAB, TOKENS = 37, 23


def llama(**options: Any) -> Any:
    return without_casts(tiny_llama(**options).double())


def exact(model: Any, arguments: dict[str, Any], ratio: float = 0.3, **options: Any) -> Any:
    """The report of a compiled step that is masked full backprop."""
    fxseek.compile(model, ratio, **{"score": "random"} | options)
    assert fxseek.check_gradients(model, **arguments).error <= 1e-9
    model(**arguments)["loss"].backward()
    return fxseek.report(model)


# ---- masks ---------------------------------------------------------------------------------------


def square(mask: Tensor, window: int = TOKENS) -> Tensor:
    """The causal mask [batch, 1, tokens, tokens] of a padding mask."""
    causal = torch.ones(mask.shape[1], mask.shape[1]).bool().tril().triu(1 - window)
    return causal & mask.bool()[:, None, None]


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "float": lambda mask: mask.double(),
    "boolean": lambda mask: mask.bool(),
    "square": square,
    "additive": lambda mask: torch.zeros(()).double().masked_fill(~square(mask), -1e30),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_tells_padding(kind):
    ids = torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    arguments = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    report = exact(llama(), {**arguments, "attention_mask": KINDS[kind](mask)}, 0.25)
    assert torch.equal(report.valid, mask.bool())
    assert (report.selected >= 0).sum(1).tolist() == [6, 2]
    assert report.selected[1].max() < 8


def test_masks_that_say_what_is_read():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for given in (mask, mask.double(), mask.bool(), (mask - 1).double() * 1e9):
        assert torch.equal(read_tokens(given), mask.bool())
    for given in (square(mask), torch.zeros(()).masked_fill(~square(mask), -torch.inf)):
        assert torch.equal(read_tokens(given), mask.bool())
    for shape in ((2, 3), (1, 1, 3, 3)):
        assert read_tokens(torch.zeros(shape)).all()  # additive: it hides nothing
        assert not read_tokens(torch.zeros(shape, dtype=torch.int64)).any()
        assert not read_tokens(torch.zeros(shape, dtype=torch.bool)).any()
    assert read_tokens(torch.ones(2, 3)).all()


def test_masks_in_a_dictionary():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=29, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=10, max_position_embeddings=64,
        sliding_window=7, layer_types=["sliding_attention", "full_attention"], use_cache=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = without_casts(Gemma3ForCausalLM(config).double().train())
    for tokens in (TOKENS, 19):
        arguments: dict[str, Any] = batch(VOCAB, tokens=tokens, padding="left", seed=2)
        mask = arguments["attention_mask"]
        plain = exact(model, arguments)
        masks = {"full_attention": square(mask), "sliding_attention": square(mask, 7)}
        fxseek.uncompile(model)
        report = exact(model, {**arguments, "attention_mask": masks})
        assert torch.equal(report.valid, mask.bool())
        assert torch.equal(report.selected, plain.selected)
        fxseek.uncompile(model)


# ---- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, TOKENS])
def test_positions_of_three_kinds(rows):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]
        },
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 2, "hidden_size": 24, "patch_size": 2}
    options: dict[str, Any] = {
        "image_token_id": 36, "video_token_id": 35, "vision_start_token_id": 34, "use_cache": False
    }  # fmt: skip
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **options)
    torch.manual_seed(0)
    model: Any = without_casts(Qwen2VLForConditionalGeneration(config).double().train())
    for tokens in (TOKENS, 17):
        positions = torch.arange(tokens).expand(3, rows, tokens).clone()
        positions[1:] //= 3
        arguments = batch(33, batch=rows, tokens=tokens) | {"position_ids": positions}
        exact(model, arguments)
        fxseek.uncompile(model)


def packed(**options: Any) -> dict[str, Any]:
    return {**batch(VOCAB, tokens=TOKENS, packed=True), **options}


@pytest.mark.parametrize("cache", [None, False, True])
@pytest.mark.parametrize("by", ["config", "argument"])
def test_packed_rows_are_those_of_ordinary_training(cache, by, caplog):
    model = llama(use_cache=cache if by == "config" and cache is not None else True)
    arguments = packed(**{"use_cache": cache} if by == "argument" and cache is not None else {})
    ordinary = model(**arguments).loss.item()
    with caplog.at_level(logging.WARNING, logger="fxseek"):
        exact(model, arguments, 1.0)
        loss = model(**arguments).loss.item()
    assert loss == pytest.approx(ordinary, rel=1e-12)
    told = [record.message for record in caplog.records if "see each other" in record.message]
    assert len(told) == (0 if cache is False else 1)


def test_rows_that_are_packed_later_are_told(caplog):
    model = fxseek.compile(llama(use_cache=True), 0.4)
    one = {**batch(VOCAB, tokens=TOKENS), "position_ids": torch.arange(TOKENS)[None]}
    with caplog.at_level(logging.WARNING, logger="fxseek"):
        model(**one)
        assert not caplog.records
        for _ in range(2):
            model(**packed())
    assert ["see each other" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_that_hides_nothing_is_no_padding(attention: str):
    """Additive, it has zeros alone, as a tokens x tokens mask of padding that lets nothing read."""
    arguments = batch(VOCAB, tokens=TOKENS)
    zeros = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.float64)
    model = llama(attn_implementation=attention)
    arguments["attention_mask"] = zeros
    report = exact(model, arguments, 0.25)
    assert report.valid.all() and (report.selected >= 0).all()
    assert model(**arguments).loss > 1


def test_rows_of_one_document_need_no_word(caplog):
    arguments = {**batch(VOCAB, tokens=TOKENS), "position_ids": torch.arange(TOKENS)[None]}
    with caplog.at_level(logging.WARNING, logger="fxseek"):
        exact(llama(use_cache=True), arguments)
    assert not caplog.records


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_refused_and_stays_as_it_was(name: str):
    """By either name: transformers 5.24 calls it `cache`, and takes the other one as well."""
    from transformers import DynamicCache

    arguments = batch(VOCAB)
    model = llama(use_cache=True)
    cache: Any = DynamicCache()
    with torch.no_grad():
        model.eval()(arguments["input_ids"], **{cache_name(model): cache})
    before = [layer.keys.clone() for layer in cache.layers]
    fxseek.compile(model.train(), 0.3)
    for given in (cache, DynamicCache()):
        with pytest.raises(InputError, match=f"{name} was given"):
            model(**arguments, **{name: given})
    with pytest.raises(InputError, match="past_key_values was given"):
        model(**arguments, past_key_values=tuple((x, x) for x in before))
    assert all(torch.equal(x, layer.keys) for x, layer in zip(before, cache.layers, strict=True))
    assert model(**arguments, **{cache_name(model): None}).loss.requires_grad


def test_a_cache_that_is_asked_for(caplog):
    model = fxseek.compile(llama(), 0.3, score="random")
    with caplog.at_level(logging.WARNING, logger="fxseek"):
        for _ in range(2):
            output = model(**batch(VOCAB), use_cache=True)
            assert getattr(output, cache_name(model)) is None
    assert len([x for x in caplog.records if "use_cache=True is ignored" in x.message]) == 1


@pytest.mark.parametrize(
    ("token_dim", "message"), [(2, "nothing to select"), (1, "counts no tokens")]
)
def test_choices_are_no_tokens(token_dim, message):
    from transformers import BertConfig, BertForMultipleChoice

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=29, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = BertForMultipleChoice(config).train()
    fxseek.compile(model, 0.3, score="random", token_dim=token_dim)
    ids = torch.randint(0, VOCAB, (2, 3, 17))
    with pytest.raises(GraphError, match=message) as caught:
        model(input_ids=ids, labels=torch.tensor([1, 2]))
    assert "[2, 3, 17]" in str(caught.value)
    fxseek.uncompile(model)(input_ids=ids, labels=torch.tensor([1, 2])).loss.backward()


def test_lengths_that_are_equal_by_chance_without_assertions():
    """Two inputs of one length, and then of two: no graph serves both, under ``python -O`` too."""
    program = """
        import torch
        import torch.nn.functional as F
        from torch import nn

        import fxseek

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.other = nn.Embedding(13, 5), nn.Embedding(13, 5)
                self.mix, self.head = nn.Linear(5, 5), nn.Linear(5, 13)

            def forward(self, input_ids, others, labels):
                x = self.mix(self.embed(input_ids)) + self.other(others).sum(1, keepdim=True)
                logits = self.head(x.tanh()).flatten(0, 1)
                return {"loss": F.cross_entropy(logits, labels.flatten())}

        torch.manual_seed(0)
        model = Model().double()
        ids = torch.randint(0, 13, (2, 7))
        fxseek.compile(model, 0.4, score="random")
        for length in (7, 4, 9):
            others = torch.randint(0, 13, (2, length))
            given = {"input_ids": ids, "others": others, "labels": ids}
            loss = model(**given)["loss"]
            report = fxseek.report(model)
            found = torch.autograd.grad(loss, list(model.parameters()))
            x = model.mix(model.embed(ids)) + model.other(others).sum(1, keepdim=True)
            at = report.selected
            logits = model.head(x.tanh())
            chosen = logits.gather(1, at[:, :, None].expand(-1, -1, 13))
            wanted = F.cross_entropy(chosen.flatten(0, 1), ids.gather(1, at).flatten())
            if not torch.allclose(loss, wanted, rtol=1e-12):
                raise SystemExit(f"{loss} is not {wanted} at {length}")
        print("equal")
    """
    done = subprocess.run(
        [sys.executable, "-O", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr
