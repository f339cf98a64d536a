"""What a person reads of a token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from byte_models import byte_tokenizer

import fxseek
from fxseek.reports.texts import check_tokenizer, legible, texts_of


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        (" ", "·"),
        ("    x", "····x"),
        ("x ", "x·"),
        ("\n\n", "↵\n↵\n"),
        ("\r\n\t", "␍↵\n⇥"),
        ("a\u2028b", "a⟨2028⟩b"),
        ("\u200b", "⟨200B⟩"),
        ("\u202etext", "⟨202E⟩text"),
        ("\xa0", "⟨A0⟩"),
        ("\u0301", "◌\u0301"),
        ("\u200d", "⟨200D⟩"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("שלום", "שלום"),
        ("\ud800", "⟨D800⟩"),
        ("a\u3164\u2800", "a⟨3164⟩⟨2800⟩"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str):
    assert legible(text) == shown


def test_parts_of_characters_are_bytes():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é x")["input_ids"]
    texts = texts_of(tokenizer, ids)
    assert [texts[i] for i in ids] == ["⟨C3⟩", "⟨A9⟩", "·", "x"]


def test_sentencepiece_keeps_its_spaces_and_bytes():
    tokens = {0: "▁the", 1: "re", 2: "<0xE2>", 3: "▁▁", 4: "▁▁▁▁", 5: "▁▁x"}
    decoded = {0: "the", 1: "re", 2: "\ufffd", 3: " ", 4: "   ", 5: "  x"}
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=tokens.get, decode=lambda ids: decoded[ids[0]]
    )
    assert texts_of(tokenizer, tokens) == {
        0: " the", 1: "re", 2: "⟨E2⟩", 3: "··", 4: "····", 5: "··x",
    }  # fmt: skip


def test_bytes_that_decode_to_nothing():
    """As those of ByT5, whose tokens are characters of Latin-1."""
    tokenizer = SimpleNamespace(convert_ids_to_tokens=chr, decode=lambda ids: "")
    assert texts_of(tokenizer, [0xC3, 0x85]) == {0xC3: "⟨C3⟩", 0x85: "⟨85⟩"}


def test_a_tokenizer_without_transformers():
    tokens = {0: "Ġa", 1: "Ã"}
    tokenizer = SimpleNamespace(id_to_token=tokens.get, decode=lambda ids: [" a", "\ufffd"][ids[0]])
    assert texts_of(tokenizer, [0, 1]) == {0: " a", 1: "⟨C3⟩"}


def test_special_tokens_that_are_not_decoded():
    """As `tokenizers` does: `decode` leaves them out."""
    tokenizer = SimpleNamespace(id_to_token=lambda i: "<s>", decode=lambda ids: "")
    assert texts_of(tokenizer, [0]) == {0: "<s>"}


def test_sentencepiece_without_transformers():
    pieces = {0: "▁the", 1: "▁", 2: "<0xE2>"}
    decoded = {0: "the", 1: "", 2: "\ufffd"}
    tokenizer = SimpleNamespace(id_to_piece=pieces.get, decode=lambda ids: decoded[ids[0]])
    assert texts_of(tokenizer, pieces) == {0: " the", 1: "·", 2: "⟨E2⟩"}


def test_tokens_that_are_bytes():
    """As those of tiktoken."""
    tokens = {0: b" a", 1: b"\xe2\x80"}
    tokenizer = SimpleNamespace(
        decode_single_token_bytes=tokens.__getitem__,
        decode=lambda ids: tokens[ids[0]].decode(errors="replace"),
    )
    assert texts_of(tokenizer, tokens) == {0: " a", 1: "⟨E2 80⟩"}


def test_ids_that_have_no_text_are_numbers():
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda i: None)
    assert texts_of(tokenizer, [49152, -1, -200]) == {
        49152: "⟨id 49152⟩",
        -1: "⟨virtual⟩",
        -200: "⟨id -200⟩",
    }


def test_what_is_no_tokenizer():
    with pytest.raises(fxseek.InputError, match=r"none was given.*AutoTokenizer"):
        check_tokenizer(None)
    with pytest.raises(fxseek.InputError, match="got int"):
        check_tokenizer(3)
    inner = SimpleNamespace(decode=lambda ids: "a")
    assert check_tokenizer(SimpleNamespace(tokenizer=inner)) is inner  # a processor
    named = SimpleNamespace(decode=lambda ids: "a", convert_ids_to_tokens=str)
    processor = SimpleNamespace(tokenizer=named, decode=lambda ids: "a")
    assert check_tokenizer(processor) is named
    assert check_tokenizer(named) is named
    words = ["a"]
    broken = SimpleNamespace(decode=lambda ids: words[ids[0]])
    with pytest.raises(fxseek.InputError, match="no text for the id 5: list index"):
        texts_of(broken, [5])
