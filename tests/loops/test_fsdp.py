"""Models that FSDP2 has sharded over processes, against one process that has all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp
import pytest
import torch
from fsdp import Case

from fxseek.inspect.compare import compare

CASES = {
    "a quarter, uneven": Case({"ratio": 0.25}, uneven=True, compile_first=True),
    "in parts, uneven": Case({"ratio": 0.6, "learn_chunk": 2}, uneven=True),
}
SWEPT = {
    "all": Case({"ratio": 1.0}),
    "all, in parts": Case({"ratio": 1.0, "learn_chunk": 3, "prefill_chunk": 4}),
    "root only": Case({"ratio": 1.0}, root_only=True),
    "lora": Case({"ratio": 0.5}, model="lora"),
    "tied": Case({"ratio": 0.5}, model="tied"),
    "sampled": Case({"ratio": 0.5, "score": "gradient", "select": "sample"}, uneven=True),
    "spans": Case({"ratio": 0.5, "span": 2, "score": "gradient"}),
    "labelled": Case({"ratio": "labelled"}, uneven=True),
}


def agree(
    cases: dict[str, Case], folder: Path, processes: int = 2, mesh: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Run the cases on processes and alone, and compare; what the first process has found."""
    wait = fsdp.spawn(fsdp.run_cases, processes, folder, cases, mesh)
    wanted = {name: fsdp.alone(case, processes) for name, case in cases.items()}
    wait()
    first: dict[str, Any] = {}
    for name in cases:
        for rank in range(processes):
            found = torch.load(folder / f"{name}-{rank}.pt")
            for what, reference in wanted[name].items():
                worst = compare(found[what], reference)
                assert worst.error <= 1e-9, (name, rank, what, worst)
            first.setdefault(name, found)
    return first


def test_gradients_and_weights_are_those_of_one_process(tmp_path):
    found = agree(CASES, tmp_path)
    for name, case in CASES.items():
        assert found[name]["kinds"] == {"DTensor"}
        model = case.made()
        blocks = [sum(p.nbytes for p in x.parameters()) for x in model.model.layers]  # type: ignore[union-attr]
        root = sum(p.nbytes for p in model.parameters()) - sum(blocks)
        *alive, after = found[name]["alive"]
        assert max(alive) <= blocks[0] + root < sum(blocks) + root
        assert after == 0


def test_what_loops_do_with_a_model_that_fsdp_has_sharded(tmp_path):
    fsdp.spawn(fsdp.use, 2, tmp_path)()
    for rank in range(2):
        found = torch.load(tmp_path / f"use-{rank}.pt")
        for what in ("accumulated", "clipped", "evaluated", "stepped", "state"):
            plain, ours = found[what]
            assert set(plain) == set(ours)
            worst = compare(ours, plain)
            assert worst.error <= 1e-9, (what, worst)
        told = found["bad rows in one"]
        assert told.startswith("InputError: ")
        assert "the batch is empty" in told
        assert ("process 1 could not begin its step" in told) == (rank == 0)
        assert found["classes"] == {"DTensor"}
        assert not any(".layers.0." in name for name in found["trained"])
        assert any(".layers.1." in name for name in found["trained"])
        assert "check_gradients" in found["check"]
        assert "ConfigError" in found["inductor"] or "InputError" in found["inductor"]
        assert 'Use backend="eager"' in found["inductor"]
        assert "tensor, sequence or expert parallelism" in found["tensor parallel"]


@pytest.mark.sweep
def test_a_mesh_of_replicas_and_shards(tmp_path):
    case = Case({"ratio": 0.6, "learn_chunk": 2}, model="lora", uneven=True)
    agree({"replicated": case}, tmp_path, 4, (2, 2))


@pytest.mark.sweep
@pytest.mark.parametrize("name", SWEPT)
def test_gradients_and_weights_of_other_settings(name, tmp_path):
    agree({name: SWEPT[name]}, tmp_path)
