"""The token page in a browser: its switch, its numbers, its keys; nothing in a token runs."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import Words, report
from test_page import NASTY, numbered, rows

import fxseek

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that is installed, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path)
        except api.Error:
            pytest.skip("needs Chromium (apt install chromium, or playwright install chromium)")
        yield started
        started.close()


@pytest.fixture
def seen() -> list[str]:
    """What a page says, asks and fetches."""
    return []


@pytest.fixture
def visit(browser: Any, seen: list[str], tmp_path: Path) -> Iterator[Open]:
    """Open a report's page; at the end nothing went wrong in it and nothing was fetched."""
    pages: list[Any] = []

    def fetched(url: str, page: Path) -> None:
        if url != page.as_uri():
            seen.append(url)

    def visit(found: fxseek.StepReport, tokenizer: Any, **options: Any) -> Any:
        path = tmp_path / "tokens.html"
        found.to_html(tokenizer, path)
        page = browser.new_page(viewport={"width": 900, "height": 700}, **options)
        pages.append(page)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("console", lambda message: seen.append(message.text))
        page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: fetched(request.url, path))
        page.goto(path.as_uri())
        page.wait_for_selector(".row .t")
        return page

    yield visit
    assert seen == []
    for page in pages:
        page.close()


def colours(page: Any) -> list[str]:
    script = "all => all.map(x => getComputedStyle(x).backgroundColor)"
    return page.eval_on_selector_all(".row .t", script)


def tip(page: Any) -> dict[str, str]:
    assert page.is_visible("#tip")
    names, values = page.locator("#tip dt"), page.locator("#tip dd")
    return dict(zip(names.all_text_contents(), values.all_text_contents(), strict=True))


def test_the_switch_changes_colours_and_numbers(visit: Open):
    found = report(rows(2, 30), 5)
    page = visit(found, numbered(30))
    assert page.is_checked("input[value=combined]")
    shown: dict[str, tuple[list[str], str]] = {}
    for name in ("combined", "context", "gradient"):
        page.check(f"input[value={name}]")
        shown[name] = (colours(page), page.inner_text("#bands"))
    assert len({tuple(found) for found, _ in shown.values()}) == 3
    falling, rising = shown["context"][0][:30], shown["gradient"][0][:30]
    assert len(set(falling)) == len(set(rising)) == 7
    assert falling[0] != falling[-1]
    assert "0.03333 to 0.2: 12 tokens, 0 selected" in shown["context"][1]
    page.focus("input[value=gradient]")
    page.keyboard.press("ArrowLeft")
    assert colours(page) == shown["context"][0]
    marked = page.eval_on_selector_all(
        ".row .t.selected", "all => all.map(x => x.getAttribute('aria-selected'))"
    )
    assert marked == ["true"] * 10
    assert "10 of 60 tokens selected (16.7 %)" in page.inner_text("#kept")


def test_pointing_at_a_token_shows_its_numbers(visit: Open):
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[0, 10:] = False
    spans = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]])
    found = report(rows(1, 12), 4, valid=valid, spans=spans)
    supervised = found.supervised
    assert supervised is not None
    supervised[0, 5] = False
    page = visit(found, numbered(12))
    page.hover(".row .t >> nth=3")
    told = tip(page)
    assert told["token"] == " w3"
    assert told["position"] == "3 of 12"
    assert told["next token to predict"] == " w4"
    assert told["context"] == "0.75, rank 4 of 10"
    assert told["gradient"] == "0.25, rank 7 of 10"
    assert told["combined"] == f"{float(found.scores[0, 3]):.4g}".replace("-", "−") + (
        ", rank 4 of 10"
    )
    assert told["weight"] == "1, selected"
    assert told["span"] == "0, positions 0 to 3"
    page.hover(".row .t >> nth=5")
    told = tip(page)
    assert told["next token to predict"] == "none"
    assert told["weight"] == "not selected"
    page.hover(".row .t >> nth=11")
    assert tip(page)["state"] == "padding"
    page.hover("h1")
    assert page.is_hidden("#tip")
    kinds = page.eval_on_selector_all(".row .t", "all => all.map(x => x.className)")
    assert ["selected" in kind for kind in kinds] == [True] * 4 + [False] * 8
    assert ["unlabelled" in kind for kind in kinds] == [i == 5 for i in range(12)]
    assert ["padding" in kind for kind in kinds] == [i > 9 for i in range(12)]
    assert ["starts" in kind for kind in kinds] == [i in (0, 4, 8) for i in range(12)]


def test_keys_go_from_token_to_token(visit: Open):
    page = visit(report(rows(2, 600), 5), numbered(600))
    page.focus("input[value=combined]")
    for _ in range(2):  # the heading of the row, then the row
        page.keyboard.press("Tab")
    for key, position in (
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("ArrowDown", 1),
        ("ArrowUp", 0),
        ("End", 599),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        page.wait_for_timeout(50)  # it scrolls
        assert tip(page)["position"] == f"{position} of 600", key
        active = page.evaluate("document.activeElement.getAttribute('aria-activedescendant')")
        assert active == f"t0-{position}"
        assert page.get_attribute(f"#{active}", "aria-describedby") == "tip"
        box, shown = (page.locator(x).bounding_box() for x in (f"#{active}", "#tip"))
        below = shown["y"] - box["y"] - box["height"]
        above = box["y"] - shown["y"] - shown["height"]
        assert min(abs(below), abs(above)) < 12
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")


def test_keys_pass_the_ends_of_lines(visit: Open):
    """There a token's space is in one line and its word in the next."""
    words = [f" w{i}" if i % 40 else "\n\n" for i in range(120)]
    page = visit(report(rows(1, 120), 5), Words(words))
    lines = page.eval_on_selector_all(
        ".row .t", "all => new Set(all.map(x => [...x.getClientRects()].at(-1).top)).size"
    )
    assert lines > 6
    page.locator(".row .t").nth(1).click()
    for key, positions in (("ArrowRight", range(2, 120)), ("ArrowLeft", range(118, -1, -1))):
        for position in positions:
            page.keyboard.press(key)
            assert tip(page)["position"] == f"{position} of 120", key


def test_nothing_in_a_token_runs(visit: Open, seen: list[str]):
    page = visit(report(rows(1, len(NASTY)), score="<img src=x onerror=alert(2)>"), Words(NASTY))
    shown = page.locator(".row .t").all_text_contents()
    assert shown[: len(NASTY) - 4] == NASTY[:-4]
    assert page.locator("script").count() == 2
    assert page.locator("img, iframe, b").count() == 0
    page.hover(".row .t >> nth=2")
    assert tip(page)["token"] == NASTY[2]
    assert "<img" in page.inner_text("#about")
    assert seen == []
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(3)>')")
    page.wait_for_timeout(100)
    assert any("violates the following Content Security Policy" in told for told in seen)
    assert not {"1", "2", "3"} & set(seen)  # what a dialog would have said
    seen.clear()


def test_text_runs_in_its_own_direction(visit: Open):
    words = ["שלום", " עולם", " טוב", "\n", "left", " to", " right"]
    page = visit(report(rows(1, 7)), Words(words))
    x = [page.locator(".row .t").nth(i).bounding_box()["x"] for i in range(7)]
    assert x[0] > x[1] > x[2]
    assert x[4] < x[5] < x[6]
    page.locator(".row .t").nth(1).click()
    for key, position in (("ArrowLeft", 2), ("ArrowRight", 1), ("ArrowRight", 0)):
        page.keyboard.press(key)
        assert tip(page)["position"] == f"{position} of 7", key
    page.locator(".row .t").nth(5).click()
    for key, position in (("ArrowRight", 6), ("ArrowLeft", 5), ("ArrowLeft", 4)):
        page.keyboard.press(key)
        assert tip(page)["position"] == f"{position} of 7", key


def test_a_row_of_32768_tokens_opens_at_once(visit: Open):
    tokens = 32768
    words = [f" w{i}" if i % 50 else "\n" for i in range(5000)]
    found = report(torch.arange(tokens)[None] % 5000, tokens // 10)
    start = time.perf_counter()
    page = visit(found, Words(words))
    seconds = time.perf_counter() - start
    assert page.locator(".row .t").count() < 3000
    text = page.text_content(".row")
    assert len(re.findall(r"w\d+", text)) == sum(i % 5000 % 50 > 0 for i in range(tokens))
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_selector(".block:last-child .t", state="attached")
    start = time.perf_counter()
    page.check("input[value=context]")
    assert time.perf_counter() - start < 2
    assert seconds < 10


RATIO = """
all => all.map(x => {
  const parts = (c) => {
    const n = c.match(/[\\d.]+/g).map(Number);
    return c.startsWith("color(") ? n : n.map((v, i) => i < 3 ? v / 255 : v);
  };
  const light = (c) => parts(c).slice(0, 3)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let ground = x;
  while (parts(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const [a, b] = [light(getComputedStyle(x).color),
                  light(getComputedStyle(ground).backgroundColor)].sort((p, q) => q - p);
  return (a + 0.05) / (b + 0.05);
})
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(scheme: str, visit: Open):
    valid = torch.ones(1, 60, dtype=torch.bool)
    valid[0, 55:] = False
    page = visit(report(rows(1, 60), 6, valid=valid), numbered(60), color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    assert dark == (scheme == "dark")
    for name in ("context", "gradient", "combined"):
        page.check(f"input[value={name}]")
        assert len(set(colours(page))) >= 7
        readable = page.eval_on_selector_all(".row .t, #bands .swatch, p, .faint", RATIO)
        assert min(readable) >= 4.5
