"""The token page as text: its data, what they say, and that no token is taken for markup."""

from __future__ import annotations

import base64
import dataclasses
import gc
import hashlib
import html
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import batch, tiny_llama
from reports import Words, report
from torch import Tensor

import fxseek
from fxseek.reports.picture import _alone, _leftwards
from fxseek.reports.tokens import tokens_of

NASTY = [
    "</script>",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "\"'`${alert(1)}",
    "&lt;b&gt;",
    "\u2028\u2029",
    "{{data}}",
    "\ud800",
    "]]>",
]


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def data_of(page: str) -> dict[str, Any]:
    return json.loads(Elements(page).scripts[0])


def numbered(tokens: int) -> Words:
    return Words([f" w{i}" for i in range(tokens)])


def rows(batch: int, tokens: int) -> Tensor:
    return torch.arange(tokens).repeat(batch, 1)


def test_the_numbers_are_those_of_the_step():
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    found = report(rows(2, 8), 3, valid=valid)
    supervised = found.supervised
    assert supervised is not None
    supervised[0, :2] = False
    data = data_of(found.to_html(numbered(8)))
    assert (data["step"], data["ratio"], data["loss"], data["score"]) == (7, 0.25, 2.5, "tokenseek")
    assert data["counts"] == {"tokens": 13, "padding": 3, "selected": 6, "unlabelled": 3}
    kept = torch.zeros(2, 8, dtype=torch.bool).scatter(1, found.selected, True)
    assert data["kept"] == [int((kept & supervised).sum()), int(supervised.sum())]
    assert data["next"]
    assert [scale["name"] for scale in data["scales"]] == ["context", "gradient", "combined"]
    for at, row in enumerate(data["rows"]):
        assert [data["texts"][i] for i in row["text"]] == [f" w{i}" for i in range(8)]
        bits = [int(digit) for digit in row["state"]]
        assert [bool(b & 1) for b in bits] == valid[at].tolist()
        assert [bool(b & 2) for b in bits] == supervised[at].tolist()
        assert [bool(b & 4) for b in bits] == kept[at].tolist()
        assert row["weights"] == [1.0] * 3
        labels = [i + 1 if supervised[at, i] else None for i in range(8)]
        assert row["labels"] == labels
    context, gradient, combined = (scale for scale in data["rows"][1]["scales"])
    assert context["ranks"] == [1, 2, 3, 4, 5, 0, 0, 0]
    assert gradient["ranks"] == [5, 4, 3, 2, 1, 0, 0, 0]
    assert gradient["values"][3] == 0.375
    assert combined["values"][5:] == [None] * 3  # JSON has no infinity
    assert combined["levels"][5:] == "---"


@pytest.mark.parametrize("kind", ["normal", "equal", "many zeros", "-inf"])
def test_bands_hold_every_token_once(kind: str):
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    if kind == "equal":
        values = torch.full_like(values, 0.5)
    elif kind == "many zeros":
        values = values.clamp_min(1.0) - 1.0
    elif kind == "-inf":
        values[values < 0] = -torch.inf
    found = report(rows(3, 200), 20, parts={}, scores=values, score="longest_words")
    data = data_of(found.to_html(numbered(200)))
    (scale,) = data["scales"]
    assert scale["name"] == "score"
    bands = scale["bands"]
    shown = int(values.isfinite().sum())
    assert sum(band["tokens"] for band in bands) == shown
    assert all(band["tokens"] > 0 and band["low"] <= band["high"] for band in bands)
    levels = [band["level"] for band in bands]
    assert levels == sorted(set(levels))
    assert max(levels) <= 6
    by_level = {band["level"]: band for band in bands}
    for row in data["rows"]:
        for value, level in zip(
            row["scales"][0]["values"], row["scales"][0]["levels"], strict=True
        ):
            if value is None:
                assert level == "-"
            else:
                band = by_level[int(level)]
                assert band["low"] <= value <= band["high"]
    assert all(a["high"] < b["low"] for a, b in itertools.pairwise(bands))
    chosen = values.gather(1, found.selected)
    assert sum(band["selected"] for band in bands) == int(chosen.isfinite().sum())


def test_no_token_is_taken_for_markup():
    page = report(rows(1, len(NASTY)), score="<b>own</b>").to_html(Words(NASTY))
    plain = report(rows(1, 3)).to_html(Words(["a", "b", "c"]))
    assert Elements(page).tags == Elements(plain).tags
    assert len(Elements(page).scripts) == 2
    assert Elements(page).scripts[1] == Elements(plain).scripts[1]
    raw = Elements(page).scripts[0]
    assert raw.isascii()
    assert not set("<>&\n") & set(raw)
    texts = data_of(page)["texts"]
    assert texts[0] == "</script>"
    assert texts[NASTY.index("\u2028\u2029")] == "⟨2028⟩⟨2029⟩"
    assert texts[NASTY.index("{{data}}")] == "{{data}}"
    page.encode("utf-8")


def test_the_page_needs_nothing_and_allows_nothing_else(tmp_path: Path):
    path = tmp_path / "tokens.html"
    page = report(rows(1, 4)).to_html(numbered(4), path)
    assert path.read_text(encoding="utf-8") == page
    script = Elements(page).scripts[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'content="(default-src[^"]*)"', page)
    assert policy is not None
    assert policy[1] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert not re.search(r"https?://|@import|url\(|innerHTML|<link|eval", page)
    assert set(Elements(page).tags) & {"img", "iframe", "link"} == set()


def test_spans_weights_and_classes_are_shown():
    spans = torch.tensor([[0, 0, 1, 1, 1, 2]])
    found = report(
        rows(1, 6),
        spans=spans,
        selected=torch.tensor([[1, 3, -1]]),
        weights=torch.tensor([[2.5, 1.25, 0.0]]),
        labels=torch.tensor([[5, 4, 3, 2, 1, 0]]),  # classes of tokens, no tokens
        supervised=torch.ones(1, 6, dtype=torch.bool),
    )
    data = data_of(found.to_html(numbered(6)))
    (row,) = data["rows"]
    assert row["spans"] == [0, 0, 1, 1, 1, 2]
    assert row["weights"] == [2.5, 1.25]
    assert [int(x) & 4 for x in row["state"]] == [0, 4, 0, 4, 0, 0]
    assert not data["next"]
    assert row["labels"] == [5, 4, 3, 2, 1, 0]


def test_a_step_without_labels_says_so():
    data = data_of(report(rows(1, 5), labels=None, supervised=None).to_html(numbered(5)))
    assert data["kept"] is None
    assert "unlabelled" not in data["counts"]


def test_the_default_dtype_changes_nothing():
    found = report(rows(2, 9))
    page = found.to_html(numbered(9))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert found.to_html(numbered(9)) == page
    finally:
        torch.set_default_dtype(default)


# ---- what cannot be shown ------------------------------------------------------------------------


def test_reports_without_scores_are_refused():
    drawn = report(rows(1, 5), parts={}, score="random")
    for call in (drawn.to_html, drawn.plot, drawn.to_markdown):
        with pytest.raises(fxseek.InputError, match=r'score="random" draws.*score="tokenseek"'):
            call(numbered(5))
    with pytest.raises(fxseek.InputError, match="every token, or every one with a label"):
        report(rows(1, 5), parts={}, score=None).to_html(numbered(5))


def test_what_is_missing_is_named():
    found = report(rows(2, 5))
    with pytest.raises(fxseek.InputError, match="tokenizer= is needed"):
        found.to_html()
    with pytest.raises(fxseek.InputError, match="meta device"):
        dataclasses.replace(found, valid=found.valid.to("meta")).to_html(numbered(5))
    embedded = dataclasses.replace(found, input_ids=None)
    with pytest.raises(fxseek.InputError, match=r"no input_ids.*input_ids="):
        embedded.to_html(numbered(5))
    ids = rows(2, 5).index_fill(1, torch.tensor(0), -1)
    given = embedded.to_html(numbered(5), input_ids=ids)
    assert data_of(given)["rows"][0]["text"][0] == data_of(given)["numbers"].index(-1)
    assert "virtual" in embedded.to_markdown(numbered(5), input_ids=ids)
    for wrong in (rows(1, 5), rows(2, 4), rows(2, 6), rows(2, 5).float(), rows(2, 5) > 0, [1, 2]):
        with pytest.raises(fxseek.InputError, match=r"\[batch, tokens\] = \[2, 5\].*got"):
            embedded.to_html(numbered(5), input_ids=wrong)  # type: ignore[arg-type]


def test_paths_and_heights_are_checked():
    found, wrong = report(rows(1, 4)), 5
    for call in (found.to_html, found.plot):
        with pytest.raises(fxseek.InputError, match=r"path='?5'? must"):
            call(numbered(4), wrong)  # type: ignore[arg-type]
    for height in (0, True, "1px"):
        with pytest.raises(fxseek.InputError, match=r"height=.*pass an integer of at least 1"):
            found.show(numbered(4), height=height)  # type: ignore[arg-type]


def test_notebooks(monkeypatch: pytest.MonkeyPatch):
    found, shown = report(rows(1, 4)), []
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", None)
    with pytest.raises(fxseek.InputError, match=r"IPython is not installed.*to_html"):
        found.show(numbered(4))
    running: list[Any] = [None]
    core = SimpleNamespace(get_ipython=lambda: running[0])
    display = SimpleNamespace(HTML=lambda text: text, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.core", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", core)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    for none in (None, SimpleNamespace()):  # a terminal's shell, which has no kernel
        running[0] = none
        with pytest.raises(fxseek.InputError, match="none is running"):
            found.show(numbered(4))
    running[0] = SimpleNamespace(kernel=None)
    found.show(numbered(4), height=300)
    inside = re.search(r'srcdoc="([^"]*)"', shown[0])
    assert inside is not None
    assert html.unescape(inside[1]) == found.to_html(numbered(4))
    assert "height:300px" in shown[0]


# ---- the picture and the text --------------------------------------------------------------------


def test_the_picture_has_a_panel_for_each_score(tmp_path: Path):
    pytest.importorskip("matplotlib")
    words = Words([" a", "$x$", "语言", "\n", "שלום", "🙂", "x" * 200, " b"])
    valid = torch.ones(1, 8, dtype=torch.bool)
    valid[0, 6:] = False
    found = report(rows(1, 8), valid=valid)
    found.plot(words, tmp_path / "row.svg")
    drawn = (tmp_path / "row.svg").read_text()
    for title in ("selected by context: 2, of which", "selected by gradient: 2, of which"):
        assert f"<!-- {title}" in drawn
    assert "selected by combined" not in drawn
    for bad in ("row.pdf", None):
        with pytest.raises(fxseek.InputError, match=r"\.png or \.svg"):
            found.plot(words, bad)
    places: list[Any] = [{"row": 1}, {"row": True}, {"first": 8}, {"first": -1}]
    for bad in places:
        with pytest.raises(fxseek.InputError, match="must be an integer from 0 to"):
            found.plot(words, tmp_path / "row.png", **bad)


@pytest.mark.parametrize(
    "options",
    [{}, {"supervised_only": True}, {"sinks": 2}, {"span": 4}, {"select": "sample"}],
    ids=str,
)
def test_the_picture_frames_what_one_score_alone_would_keep(options: dict[str, Any]):
    torch.manual_seed(0)
    model = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.2, **options)
    model(**batch(37, 2, 40, labels="completion"))
    tokens = tokens_of(fxseek.report(model), numbered(37))
    for row in range(2):
        for scale in tokens.scales[:2]:
            framed = _alone(tokens, scale, row)
            assert len(framed) == int(tokens.selected[row].sum())
            if tokens.spans is None and tokens.labelled is not None:
                best = set(scale.exact[row].topk(len(framed)).indices.tolist())
                # a row without a kept label would learn nothing: one takes the last one's place
                assert len(framed - best) <= 1


def test_scores_that_differ_in_a_late_digit_are_told_apart():
    context = 1.0 + torch.arange(64).flip(0)[None] * 1e-6
    found = report(rows(1, 64), 8, parts={"context": context}, scores=context, score="context")
    tokens = tokens_of(found, numbered(64))
    chosen = set(tokens.selected[0].nonzero().flatten().tolist())
    assert _alone(tokens, tokens.scales[0], 0) == chosen


def test_each_line_of_a_picture_runs_in_its_own_direction():
    assert _leftwards(" שלום, hello") and not _leftwards("1. hello שלום")


def test_the_picture_of_a_long_row_is_a_part_of_it(tmp_path: Path):
    pytest.importorskip("matplotlib")
    found = report(rows(1, 2000), parts={"context": torch.rand(1, 2000)}, score="context")
    found.plot(numbered(2000), tmp_path / "row.svg", first=1990)
    drawn = (tmp_path / "row.svg").read_text()
    assert "tokens 1990 to 1999 of 2000" in drawn
    assert "selected by gradient" not in drawn


def test_the_text_is_no_markup():
    text = report(rows(1, len(NASTY)), 3).to_markdown(Words(NASTY))
    assert set(re.findall(r"<[^>]*>", text)) == {"<strong>", "</strong>"}
    assert text.count("<strong>") == 3
    assert "| combined |" in text


def test_padding_is_not_shown_as_selected():
    """Though a step that comes to ratio 1.0 keeps all positions."""
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    given = {**batch(37, 2, 11), "attention_mask": mask}
    model = fxseek.compile(tiny_llama(num_hidden_layers=1), lambda step: 1.0, score="context")
    model(**given)
    text = fxseek.report(model).to_markdown(numbered(37))
    assert "19 tokens selected" in text


# ---- what a step carries -------------------------------------------------------------------------


def test_a_step_carries_its_ids_and_labels():
    given = batch(37, 2, 11, padding="left", labels="completion")
    model = fxseek.compile(tiny_llama(num_hidden_layers=1), 0.3)
    model(**given)
    found = fxseek.report(model)
    wanted = given["input_ids"].clone()
    given["input_ids"].zero_()  # a loop may fill the same tensors again
    given["labels"].zero_()
    assert found.input_ids is not None
    assert torch.equal(found.input_ids, wanted)
    assert found.labels is not None
    assert found.supervised is not None
    assert torch.equal(found.labels[:, :-1][found.supervised[:, :-1]],
                       wanted[:, 1:][found.supervised[:, :-1]])  # fmt: skip
    assert found.score == "tokenseek"
    page = found.to_html(numbered(37))
    fxseek.uncompile(model)
    del model
    assert found.to_html(numbered(37)) == page  # of a model that is gone
    data = data_of(page)
    assert data["next"]
    assert data["kept"][1] == int((found.supervised & found.valid).sum())
    assert math.isclose(data["loss"], float(found.full_loss or 0), rel_tol=1e-6)


def test_virtual_tokens_and_embeddings():
    from peft import PromptTuningConfig, get_peft_model

    base: Any = tiny_llama(num_hidden_layers=1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)  # type: ignore[arg-type]
    model: Any = fxseek.compile(get_peft_model(base, config).train(), 0.3, score="context")
    given = batch(37, 2, 11)
    model(**given)
    found = fxseek.report(model)
    assert found.valid.shape == (2, 14)
    # PEFT embeds the tokens by itself, so that the model is given embeddings
    ids = torch.nn.functional.pad(given["input_ids"], (3, 0), value=-1)
    ids = None if found.input_ids is not None else ids
    (row, _) = data_of(found.to_html(numbered(37), input_ids=ids))["rows"]
    data = data_of(found.to_html(numbered(37), input_ids=ids))
    assert [data["texts"][i] for i in row["text"][:3]] == ["⟨virtual⟩"] * 3
    assert data["texts"][row["text"][3]] == f" w{int(given['input_ids'][0, 0])}"


def test_a_released_model_has_no_report():
    model = fxseek.compile(tiny_llama(num_hidden_layers=1).train(), score="context")
    model(**batch(37))
    found = fxseek.report()
    del model
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(fxseek.InputError, match=r"model or compiled function .* is gone"):
        fxseek.report()
    assert "{{" not in found.to_html(numbered(37))


def test_a_released_function_has_no_report():
    compiled: Any = torch.compile(
        tiny_llama(num_hidden_layers=1),
        backend="fxseek",
        dynamic=True,
        fullgraph=True,
        options={"score": "context"},
    )
    compiled(**batch(37))
    found = fxseek.report()
    assert found.score == "context"
    del compiled
    torch._dynamo.reset()
    with pytest.raises(fxseek.InputError, match="is gone, and its report with it"):
        fxseek.report()
    assert "{{" not in found.to_html(numbered(37))
