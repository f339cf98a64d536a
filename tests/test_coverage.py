"""docs/coverage.md is current: a part of it is made again."""

from __future__ import annotations

import re

import coverage_table
import pytest
from families import FAMILIES
from tuners import TUNERS


@pytest.fixture(scope="module")
def page() -> str:
    return coverage_table.PAGE.read_text(encoding="utf-8")


def test_it_has_every_family_attention_and_tuner(page):
    for name, family in FAMILIES.items():
        for attention in family.attentions:
            assert f"\n| {name} | {attention} | " in page
    for name in TUNERS:
        assert f"\n| {name} | " in page


def test_dense_decoders_are_exact_without_the_general_path(page):
    for name, family in FAMILIES.items():
        for row in re.findall(rf"^\| {name} \| \w+ \|(.*)\|$", page, re.MULTILINE):
            cells = [cell.strip() for cell in row.split("|")]
            if family.dense:
                assert cells == ["exact"] * 3, name


def test_families_are_exact_or_known_to_be_refused(page):
    """Where weights are quantised, transformers itself may fail in some."""
    for name, family in FAMILIES.items():
        for row in re.findall(rf"^\| {name} \| \w+ \|(.*)\|$", page, re.MULTILINE):
            cells = [cell.strip() for cell in row.split("|")]
            if family.refused:
                assert all(cell.startswith("refused") for cell in cells), name
            else:
                assert all(cell.startswith("exact") for cell in cells[:2]), name


def test_every_refusal_has_its_reason(page):
    numbers = {int(n) for n in re.findall(r"(?:refused|not made) \((\d+)\)", page)}
    listed = {int(n) for n in re.findall(r"^(\d+)\. `\w+`", page, re.MULTILINE)}
    assert numbers == listed


@pytest.mark.filterwarnings("ignore")
def test_a_part_of_it_made_again(page):
    cells = [coverage_table.family_cell("llama", "sdpa", tuning) for tuning in ("LoRA", "QLoRA")]
    assert f"| llama | sdpa | exact | {' | '.join(cells)} |" in page
    assert f"| ia3 | {coverage_table.tuner_cell('ia3')} |" in page


@pytest.mark.filterwarnings("ignore")
def test_tuners_on_quantised_weights():
    """DoRA reads the weight itself; PEFT fails on int8 from the second step on, without fxseek."""
    assert coverage_table.quantised_cell("dora", "NF4") == "exact"
    assert coverage_table.quantised_cell("lora", "int8") == "exact"
    assert coverage_table.quantised_cell("bat", "NF4") == "exact"
