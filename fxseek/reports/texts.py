"""The texts of tokens, as a person can read them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from fxseek.errors import InputError

__all__ = ["check_tokenizer", "legible", "texts_of"]


_CONVERT = "convert_ids_to_tokens"
_CONVERTERS = (_CONVERT, "id_to_token", "id_to_piece", "decode_single_token_bytes")
"""What gives a token as its vocabulary has it: of transformers, tokenizers, sentencepiece,
tiktoken."""


def check_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or that of a processor.

    Raises:
        InputError: it makes no text of ids.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    names = hasattr(inner, _CONVERT) and not hasattr(tokenizer, _CONVERT)
    for found in (inner, tokenizer) if names else (tokenizer, inner):
        if found is not None and any(
            callable(getattr(found, name, None)) for name in ("decode", _CONVERT)
        ):
            return found
    given = "none was given" if tokenizer is None else f"got {type(tokenizer).__name__}"
    raise InputError(
        f"tokenizer= is needed to show tokens as text, and {given}: pass the one that made the "
        "input_ids, such as AutoTokenizer.from_pretrained(...). It must have decode(ids) or "
        "convert_ids_to_tokens(id)."
    )


def texts_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The legible text of each id; ``⟨id 17⟩`` where the tokenizer has none for it.

    Raises:
        InputError: the tokenizer raises an error.
    """
    return {number: legible(_text(tokenizer, number)) or f"⟨id {number}⟩" for number in set(ids)}


def _text(tokenizer: Any, number: int) -> str:
    if number < 0:
        return "⟨virtual⟩" if number == -1 else ""
    try:
        token = text = None
        for name in _CONVERTERS:
            if token is None and callable(convert := getattr(tokenizer, name, None)):
                token = convert(number)
        if callable(decode := getattr(tokenizer, "decode", None)):
            text = decode([number])
    except Exception as error:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) has no text for the id {number}: {error}. "
            "Is it the one that made the input_ids?"
        ) from error
    if isinstance(token, bytes):
        return _decoded(token)
    token = token if isinstance(token, str) else None
    if not isinstance(text, str):
        return token or ""
    if token is None:
        return text
    if "\ufffd" in text:  # a part of a character
        return _bytes_of(token)
    if not text and len(token) == 1 and "\x80" <= token <= "\xff":
        return f"⟨{ord(token):02X}⟩"  # ByT5 leaves parts of characters out of what it decodes
    if spaces := len(token) - len(token.lstrip("▁")):
        return " " * spaces + text.lstrip(" ")  # SentencePiece takes one off what it decodes
    return text or token  # tokenizers decodes no special tokens


def _decoded(token: bytes) -> str:
    """A token that is given as bytes."""
    try:
        return token.decode()
    except UnicodeDecodeError:  # a part of a character
        return f"⟨{token.hex(' ').upper()}⟩"


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2) writes bytes as."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    found = {chr(byte): byte for byte in itself}
    return found | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _bytes_of(token: str) -> str:
    """A part of a character as its bytes, ``⟨E2 80⟩``; else the token as it is."""
    if found := _BYTE_TOKEN.fullmatch(token):
        return f"⟨{found[1].upper()}⟩"
    if all(character in _BYTES for character in token):
        return f"⟨{bytes(_BYTES[c] for c in token).hex(' ').upper()}⟩"
    return token


_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and signs that are blank: fillers of Hangul, and Braille without dots."""

_JOINERS = "\u200c\u200d"
_SIGNS = {"\n": "↵\n", "\r": "␍", "\t": "⇥"}


def legible(text: str) -> str:
    """Text whose spaces, line ends and invisible characters can be seen.

    Of spaces, a single one between or before other characters stays. Invisible characters, and
    those that would turn the direction of the text, become their code, such as ``⟨200B⟩``.
    """
    text = re.sub(r" {2,}| $", lambda spaces: "·" * len(spaces[0]), text)
    joins = any(not _is_hidden(c) for c in text)  # joiners shape what is beside them
    shown = "".join(
        _SIGNS[c]
        if c in _SIGNS
        else f"⟨{ord(c):02X}⟩"
        if _is_hidden(c) and not (joins and c in _JOINERS)
        else c
        for c in text
    )
    if shown and unicodedata.category(shown[0]).startswith("M"):
        return f"◌{shown}"  # it would join the token before
    return shown


def _is_hidden(character: str) -> bool:
    """Whether a character shows nothing: controls, formats, spaces other than the plain one."""
    category = unicodedata.category(character)
    blank = character in _BLANKS or (category[0] == "Z" and character != " ")
    return category[0] == "C" or blank
