"""The documentation: its code runs, and what it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fxseek
import quality_page
from reproduce import page

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])


def blocks(page: Path) -> list[str]:
    """The Python code of a page, each block on the lines that it has there."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


def test_pages_of_runs_are_what_their_programs_write(tmp_path: Path) -> None:
    for name, write, runs in (
        ("quality.md", quality_page.write, "quality.jsonl"),
        ("reproduction.md", page.write, "reproduction"),
    ):
        write(tmp_path / name, ROOT / "docs" / runs)
        committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert (tmp_path / name).read_text(encoding="utf-8") == committed
        for picture in re.findall(r"\]\((\S+\.svg)\)", committed):
            assert (ROOT / "docs" / picture).exists()


def test_the_page_that_rebuilds_fxseek_runs() -> None:
    page = ROOT / "docs" / "all-of-fxseek.md"
    module = ModuleType("all_of_fxseek")
    dtype = torch.get_default_dtype()
    try:
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), vars(module))
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_python_and_names_what_there_is(page: Path) -> None:
    for block in blocks(page):
        names = [n for n in ast.walk(ast.parse(block, str(page))) if isinstance(n, ast.Attribute)]
        for node in names:
            if isinstance(node.value, ast.Name) and node.value.id == "fxseek":
                assert hasattr(fxseek, node.attr), f"{page.name}:{node.lineno}: {node.attr}"


def test_the_interface_page_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in fxseek.__all__ if f"`{name}" not in text]
    assert missing == []


def test_the_interface_page_has_the_fields_and_defaults_of_the_configuration() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in fxseek.SeekConfig().to_dict() if f"`{name}`" not in text]
    assert missing == []
