"""Models that FSDP2 has sharded over processes, against one process that has all rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsdp_cases as fsdp
import pytest
import torch
from fsdp_cases import Case
from tuners import TUNERS

from fxseek.inspect.compare import compare

CASES = {
    "a quarter, uneven": Case({"ratio": 0.25}, uneven=True, compile_first=True),
    "in parts, uneven": Case({"ratio": 0.6, "learn_chunk": 2}, uneven=True, ahead=True),
}
SWEPT = {
    "all": Case({"ratio": 1.0}),
    "all, in parts": Case({"ratio": 1.0, "learn_chunk": 3, "prefill_chunk": 4}),
    "root only": Case({"ratio": 1.0}, root_only=True),
    "lora": Case({"ratio": 0.5}, model="lora"),
    "tied": Case({"ratio": 0.5}, model="tied"),
    "sampled": Case({"ratio": 0.5, "score": "gradient", "select": "sample"}, uneven=True),
    "offloaded": Case(
        {"ratio": 1.0, "learn_chunk": 4, "kv": "offload", "recompute": "block"}, uneven=True
    ),
    "spans": Case({"ratio": 0.5, "span": 2, "score": "gradient"}),
    "labelled": Case({"ratio": "labelled"}, uneven=True),
    "kept whole": Case({"ratio": 0.5}, shard={"reshard_after_forward": False}),
}


def agree(
    cases: dict[str, Case],
    folder: Path,
    work: Any = fsdp.run_cases,
    processes: int = 2,
    **more: Any,
) -> dict[str, Any]:
    """Run the cases on processes and alone, and compare; what the first process has found."""
    wait = fsdp.spawn(work, processes, folder, cases, *more.values())
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


def test_sharded_models(tmp_path):
    found = agree(CASES, tmp_path, fsdp.run_all)
    for name, case in CASES.items():
        assert found[name]["kinds"] == {"DTensor"}
        model: Any = case.made()
        blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
        root = sum(p.nbytes for p in model.parameters()) - sum(blocks)
        *alive, after = found[name]["alive"]
        # as it is received, with shards of one length
        received = sum(
            (len(p) + len(p) % 2) * p[0].nbytes for p in model.model.layers[0].parameters()
        )
        most = 2 * received if case.ahead else blocks[0] + root
        assert max(alive) <= most < sum(blocks) + root
        assert after == 0
    assert_begun_ahead(found["in parts, uneven"]["order"])
    # Each part gathers what it learns once for its forward, once for its backward.
    one, parts = (found[name]["bytes"] for name in CASES)
    assert parts["gathered"] > 2 * one["gathered"]
    assert parts["reduced"] > 2 * one["reduced"]
    for rank in range(2):
        loops_do(torch.load(tmp_path / f"use-{rank}.pt"), rank)


def assert_begun_ahead(order: list[str]) -> None:
    """Each block's gather begins ahead of the work of the one that is run before it."""
    first, second = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
    embedding = "model.embed_tokens.weight"
    forward = [f"begin {embedding}", f"wait {embedding}", f"begin {first}", f"wait {first}",
               f"begin {second}", "attend", f"wait {second}"]  # fmt: skip
    backward = [f"begin {second}", f"wait {second}", f"begin {first}", "attend", f"wait {first}",
                f"begin {embedding}", "attend", f"wait {embedding}"]  # fmt: skip
    assert order[: len(forward)] == forward  # the prefill, and the body of each part again
    assert order[-len(backward) :] == backward


def loops_do(found: dict[str, Any], rank: int) -> None:
    """What loops do works as with FSDP2 alone, and what can't be done is said."""
    for what in ("accumulated", "clipped", "stepped", "evaluated", "trained again", "state"):
        plain, ours = found[what]
        assert set(plain) == set(ours)
        worst = compare(ours, plain)
        assert worst.error <= 1e-9, (what, worst)
    alone, with_fxseek = found["bytes"]
    assert with_fxseek["reduced"] == alone["reduced"]
    assert alone["gathered"] < with_fxseek["gathered"] < 1.5 * alone["gathered"]
    told = found["bad rows in one"]
    assert told.startswith("InputError: ")
    assert "the batch is empty" in told
    assert ("process 1 could not begin its step" in told) == (rank == 0)
    assert found["classes"] == {"DTensor"}
    assert not any(".layers.0." in name for name in found["trained"])
    assert any(".layers.1." in name for name in found["trained"])
    assert 0 <= found["check"] <= 1e-9
    assert "set_requires_gradient_sync(True)" in found["check without reduction"]
    assert found["mismatch"].startswith("GradientMismatch: ")
    assert "ConfigError" in found["inductor"]
    assert 'Use backend="eager"' in found["inductor"]
    assert "context parallelism is on" in found["context parallel"]
    assert "tensor, sequence or expert parallelism" in found["tensor parallel"]


@pytest.mark.sweep
def test_a_mesh_of_replicas_and_shards(tmp_path):
    case = Case({"ratio": 0.6, "learn_chunk": 2}, model="lora", uneven=True)
    agree({"replicated": case}, tmp_path, processes=4, mesh=(2, 2))


@pytest.mark.parametrize("at", ["forward", "backward", "parts"])
@pytest.mark.sweep
def test_an_error_in_one_process_ends_the_others_with_it(at, tmp_path):
    ended = fsdp.spawn(fsdp.failing, 2, tmp_path, at)(raises=False)
    assert all(code not in (0, None) for code in ended)
    when, own = (tmp_path / "error-1").read_text().split(": ", 1)
    then, told = (tmp_path / "error-0").read_text().split(": ", 1)
    assert float(then) - float(when) < fsdp.TIMEOUT / 2
    assert own.startswith("IndexError: " if at == "forward" else "OutOfMemoryError: ")
    assert told == f"FxseekError: process 1 failed in its step: {own}"


@pytest.mark.sweep
def test_an_error_under_torchrun(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch.distributed as dist\n"
        "import fsdp_cases\n"
        "dist.init_process_group('gloo')\n"
        "fsdp_cases.failing(dist.get_rank(), 2, Path(sys.argv[1]), 'forward')\n"
    )
    ended = run("torch.distributed.run", "--standalone", "--nproc-per-node=2", program, tmp_path)
    assert ended.returncode != 0
    assert "IndexError: index out of range" in ended.stderr


@pytest.mark.sweep
def test_accelerate_launch(tmp_path):
    """With the configuration that the page shows, but for the types and the number of GPUs."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    shown = page.split("```yaml\n")[1].split("```")[0]
    config = tmp_path / "accelerate.yaml"
    config.write_text(shown.replace("bf16", '"no"').replace("num_processes: 8", "num_processes: 2"))
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import fsdp_cases\n"
        "fsdp_cases.launched(Path(sys.argv[1]))\n"
    )
    options = ["--config_file", config, "--main_process_port", "0"]
    ended = run("accelerate.commands.launch", *options, program, tmp_path)
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        found = torch.load(tmp_path / f"launched-{rank}.pt")
        assert found["plain"]["kinds"] == found["ours"]["kinds"] == {"DTensor"}
        worst = compare(found["ours"]["weights"], found["plain"]["weights"])
        assert worst.error <= 1e-9, worst


def run(launcher: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a launcher of processes, which find what the tests find."""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", launcher, *arguments], env=paths, timeout=480,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.sweep
def test_a_run_that_has_lost_a_process_is_resumed(tmp_path):
    options = {"ratio": 0.5, "score": "gradient", "select": "sample", "learn_chunk": 2}
    case = Case(options, uneven=True)
    ended = fsdp.spawn(fsdp.drill, 2, tmp_path, case, True)(raises=False)
    assert ended[1] == -signal.SIGKILL
    assert ended[0] not in (0, None)
    seconds, _, told = (tmp_path / "survivor").read_text().partition(": ")
    assert float(seconds) < fsdp.TIMEOUT
    assert "by peer" in told  # its connection was closed, or reset
    fsdp.spawn(fsdp.drill, 2, tmp_path, case, False)()
    wanted = fsdp.alone(case, 2)["weights"]
    for rank in range(2):
        assert compare(torch.load(tmp_path / f"weights-{rank}.pt"), wanted).error <= 1e-9


@pytest.mark.sweep
def test_tuners(tmp_path):
    # AdaLoRA's penalty reads adapters outside of FSDP2's hooks: FSDP2 alone does not train it.
    names = [name for name in TUNERS if name != "adalora"]
    fsdp.spawn(fsdp.tuners, 2, tmp_path, names, seconds=900)()
    for rank in range(2):
        for name, (plain, ours) in torch.load(tmp_path / f"tuners-{rank}.pt").items():
            assert not isinstance(plain, str) and not isinstance(ours, str), (name, plain, ours)
            worst = compare(ours, plain)
            # peft makes FourierFT's weights in float32, so that each part's gradient is rounded
            assert worst.error <= (1e-5 if name == "fourierft" else 1e-9), (name, worst)


@pytest.mark.sweep
def test_mixed_precision_and_quantised_weights(tmp_path):
    fsdp.spawn(fsdp.precisions, 2, tmp_path)()
    for rank in range(2):
        found = torch.load(tmp_path / f"precisions-{rank}.pt")
        for name, most in (("mixed", 1e-6), ("quantised", 1e-4), ("packed", 1e-4)):
            plain, ours = found[name]
            assert {k: x.dtype for k, x in plain.items()} == {k: x.dtype for k, x in ours.items()}
            if name == "mixed":  # this loss is in bfloat16, and an ulp apart on some machines
                losses = ours.pop("loss"), plain.pop("loss")
                torch.testing.assert_close(*losses, rtol=2**-7, atol=0)
            worst = compare(ours, plain)
            assert worst.error <= most, (name, worst)
        assert "holds packed numbers of 4 bits as torch.float32" in found["rounded"]


@pytest.mark.sweep
@pytest.mark.parametrize("loads_first", [False, True])
def test_trainer_of_transformers(loads_first, tmp_path):
    fsdp.spawn(fsdp.in_trainer, 2, tmp_path, loads_first)()
    found = torch.load(tmp_path / "trainer-0.pt")
    worst = compare(found["ours"], found["plain"])
    assert worst.error <= 1e-4, worst


@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "tuner"), [("dpo", "full"), ("dpo", "lora"), ("sft", "lora")])
def test_trainers_of_trl(kind, tuner, tmp_path):
    pytest.importorskip("trl")
    fsdp.spawn(fsdp.in_trl, 2, tmp_path, kind, tuner)()
    found = torch.load(tmp_path / "trl-0.pt")
    worst = compare(found["ours"], found["plain"])
    assert worst.error <= 1e-4, worst


@pytest.mark.sweep
@pytest.mark.parametrize("name", SWEPT)
def test_gradients_and_weights_of_other_settings(name, tmp_path):
    agree({name: SWEPT[name]}, tmp_path)
