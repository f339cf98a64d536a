"""`make reproduce` on a tiny random model: its runs, what it leaves out, its task and its page."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer, save_tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import common
import fxseek
from common import ExampleError, Row
from reproduce import __main__ as program
from reproduce import methods, page, paper, tasks, train
from reproduce.methods import Way

pytestmark = pytest.mark.filterwarnings(
    # peft's and transformers' own
    "ignore:.*:UserWarning",
    "ignore:.*:FutureWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer("<s>", "</s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model and some text."""
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(path, tokenizer, 64)
    lines = [
        {"instruction": f"Count from {i}.", "output": " ".join(map(str, range(i, i + 45)))}
        for i in range(3, 30)
    ]
    (path / "counting.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def given(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--preset", "small", "--model", str(folder), "--data", str(folder / "counting.jsonl")),
        *("--tokens", "96", "--steps", "2", "--held-out", "5", "--tasks", "none"),
        *("--device", "cpu", "--out", str(out / "runs"), "--page", str(out / "page.md"), *more),
    ]


def run_of(text: str, memory: float, loss: float, seed: int = 0, **options: Any) -> page.Run:
    way = methods.way_of(text)
    if options:
        way = Way(way.tuner, way.selection, {**(way.options or {}), **options})
    return {
        "setting": {"model": "m", "data": "d", "steps": 3, "tasks": "one,two", "device": "cpu"},
        "way": vars(way),
        "seed": seed,
        "rate": paper.RATES[way.tuner],
        "found": {
            "memory": {"average": memory, "maximal": 1.25 * memory, "steps": 3},
            "losses": [[0, 3.0], [3, loss]],
            "scores": {"one": 50.0, "two": 20.0 + memory},
            "machine": "M",
        },
    }


def never(job: train.Job) -> dict[str, Any]:
    raise AssertionError


def slow_but_for_full(job: train.Job) -> dict[str, Any]:
    """A child's run, which passes over Ctrl-C."""
    if job.way.tuner != "full":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGINT)
    return run_of("full", 40.0, 2.0)["found"]


def killed_but_for_full(job: train.Job) -> dict[str, Any]:
    if job.way.tuner != "full":
        os.kill(os.getpid(), signal.SIGKILL)
    return train.run(job)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process."""
    monkeypatch.setattr(program, "apart", train.run)
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_runs_are_kept_and_not_run_again(
    folder: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(folder, tmp_path, "--methods", "full,lora", "--seeds", "2")
    assert program.main(given(folder, tmp_path, "--methods", "full", "--seeds", "1")) == 0
    (first,) = (tmp_path / "runs").glob("*.json")
    assert program.main(arguments) == 0
    runs = [*page.read(tmp_path / "runs").values()]
    assert sorted((run["way"]["tuner"], run["seed"]) for run in runs) == [
        ("full", 0), ("full", 1), ("lora", 0), ("lora", 1),
    ]  # fmt: skip
    assert first.exists()
    for run in runs:
        memory, losses = run["found"]["memory"], run["found"]["losses"]
        weights = 4 * LlamaForCausalLM.from_pretrained(folder).num_parameters()
        assert weights < memory["average"] <= memory["maximal"]
        assert losses[0][0] == 0 and losses[1][0] == 2
    text = (tmp_path / "page.md").read_text()
    assert re.search(r"\| Full parameter +\| +2 \| +100\.0 ± \S+ % \|", text)
    assert "held out 5" in text

    monkeypatch.setattr(program, "apart", never)
    (tmp_path / "runs" / "cut-short.part").write_text("{")  # of a call that was killed
    assert program.main(arguments) == 0


def test_ctrl_c_ends_the_children_and_keeps_what_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", slow_but_for_full)
    monkeypatch.setattr(page, "write", interrupt)  # which the first run's end calls
    arguments = given(folder, tmp_path, "--methods", "full,lora,loha,ia3", "--workers", "2")
    start = time.monotonic()
    assert program.main(arguments) == 130
    assert time.monotonic() - start < 300
    assert multiprocessing.active_children() == []
    assert "stopped; the same call goes on from here" in capsys.readouterr().err
    runs = page.read(tmp_path / "runs").values()
    assert [run["way"]["tuner"] for run in runs] == ["full"]


def test_a_run_is_written_though_nobody_waits_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()

    def interrupt(*_: object) -> None:
        stopped.set()
        raise KeyboardInterrupt

    def run(job: train.Job) -> dict[str, Any]:
        if job.way.tuner != "full":
            assert stopped.wait(60)
            time.sleep(0.5)
        return run_of("full", 40.0, 2.0)["found"]

    monkeypatch.setattr(program, "apart", run)
    monkeypatch.setattr(page, "write", interrupt)
    arguments = given(folder, tmp_path, "--methods", "full,lora,ia3,loha", "--workers", "2")
    assert program.main(arguments) == 130
    tuners = {run["way"]["tuner"] for run in page.read(tmp_path / "runs").values()}
    assert tuners - {"ia3"} == {"full", "lora"}  # and of those that waited at most one more


def test_a_killed_run_is_named_and_run_by_the_next_call(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = given(folder, tmp_path, "--methods", "full,lora", "--workers", "2")
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", killed_but_for_full)
        assert program.main(arguments) == 1
    assert "LoRA: its process was killed" in capsys.readouterr().err
    assert len(page.read(tmp_path / "runs")) == 1
    assert program.main(arguments) == 0
    tuners = [run["way"]["tuner"] for run in page.read(tmp_path / "runs").values()]
    assert tuners == ["full", "lora"]


def test_an_evaluation_that_fails_keeps_what_was_trained(
    folder: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: object) -> Any:
        raise ConnectionError("no network")

    arguments = given(folder, tmp_path, "--methods", "full", "--tasks", "mmlu")
    monkeypatch.setattr(tasks, "lacking", lambda: None)
    monkeypatch.setattr(tasks, "unusable", lambda names: {})
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "build", fail)
        patch.setattr(methods, "load", never)  # nothing is trained before there are tasks
        assert program.main(arguments) == 1
    assert "Full parameter: ConnectionError: no network" in capsys.readouterr().err
    monkeypatch.setattr(tasks, "build", lambda *_: ("manager", {}))
    monkeypatch.setattr(tasks, "evaluate", fail)
    for _ in range(2):
        assert program.main(arguments) == 1
        (file,) = (tmp_path / "runs").glob("*.json")
        printed = capsys.readouterr().err
        assert f"no score (ConnectionError: no network): delete {file}" in printed
        monkeypatch.setattr(program, "apart", never)  # it is not trained again


def test_tasks_without_a_score_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def task(*metrics: str) -> Any:
        return types.SimpleNamespace(aggregation=lambda: dict.fromkeys(metrics))

    def group(*metrics: str) -> Any:
        some = [types.SimpleNamespace(metric=metric) for metric in metrics]
        return types.SimpleNamespace(aggregate_metric_list=some)

    known = {
        "arc": ({"arc": task("acc", "acc_norm")}, {}),
        "gsm8k": ({"gsm8k": task("exact_match")}, {}),
        "wikitext": ({"wikitext": task("word_perplexity")}, {}),
        "mmlu": ({"a": task("acc")}, {"mmlu": group("acc")}),
        "loose": ({"a": task("acc")}, {"loose": group()}), "tag": ({"a": task("acc")}, {}),
    }  # fmt: skip

    class Manager:
        all_tasks = (*known, "gone")

        def load(self, names: list[str]) -> dict[str, Any]:
            if names == ["gone"]:
                raise ConnectionError("no network\nand a long story")
            return dict(zip(("tasks", "groups"), known[names[0]], strict=True))

    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.tasks"], "TaskManager", Manager, raising=False)
    found = tasks.unusable([*known])
    assert {*found} == {"wikitext", "loose", "tag"}
    assert tasks.unusable(["gone", "arc"]) == {"gone": "its data can't be had (no network)"}
    assert "none of acc_norm, acc, exact_match: leave it out of --tasks" in found["wikitext"]
    assert "name its tasks in --tasks" in found["tag"]
    results = {"alias": "gsm8k", "exact_match,flexible-extract": 0.1}
    assert tasks.score(results) == 10.0
    assert tasks.score({**results, "exact_match,strict-match": 0.5}) == 50.0
    assert tasks.score({**results, "acc,none": 0.25, "acc_stderr,none": 0.5}) == 25.0


def test_what_is_missing_is_named_and_the_rest_goes_on(
    folder: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = methods.importlib.util.find_spec
    hidden = {"bitsandbytes", "lm_eval"}
    monkeypatch.setattr(
        methods.importlib.util, "find_spec", lambda name: None if name in hidden else found(name)
    )
    arguments = given(folder, tmp_path, "--methods", "full,qlora", "--tasks", "mmlu")
    assert program.main(arguments) == 1
    printed = capsys.readouterr().err
    assert 'QLoRA: bitsandbytes is not installed: pip install "fxseek[peft]"' in printed
    assert "task mmlu: lm_eval is not installed" in printed
    assert [run["way"]["tuner"] for run in page.read(tmp_path / "runs").values()] == ["full"]
    monkeypatch.setattr(train, "available", lambda device: 0)
    assert program.main(given(folder, tmp_path, "--methods", "full,lora")) == 1
    assert "LoRA: Lacking: a step needs" in capsys.readouterr().err
    assert "Full parameter" in (tmp_path / "page.md").read_text()


def test_a_tuner_that_peft_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    assert methods.lacking(methods.way_of("bone")) is None
    monkeypatch.delattr(peft, "MissConfig")
    assert methods.lacking(methods.way_of("bone")) == "this peft has no MissConfig: upgrade peft"


def test_without_an_estimate_a_run_is_tried(
    folder: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise fxseek.GraphError("no rule for it")

    monkeypatch.setattr(fxseek, "estimate", fail)
    assert program.main(given(folder, tmp_path, "--methods", "full")) == 0
    assert "Full parameter: no estimate of its memory (no rule for it)" in capsys.readouterr().out


def test_bad_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--methods", "lore"], "there is no method 'lore'"),
        (["--also", "every"], "--also has every"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--held-out", "0"], "--held-out must be at least 1"),
        (["--steps", "-1"], "--steps must be at least 0"),
        (["--what", ""], "--what is empty: give some of table, ablations"),
        (["--device", "gpu"], "--device is gpu; there are cpu"),
        (["--device", "cuda:99"], "--device is cuda:99; there are cpu"),
        (["--questions", "0"], "--questions must be at least 1 for continuation"),
        (["--rate", "0"], "--rate must be above 0"),
        (["--rate", "inf"], "--rate must be above 0 and finite"),
        (["--decay", "inf"], "--decay must be finite"),
        (["--decay", "nan"], "--decay must be"),
        (["--schedule", "cosin"], "--schedule cosin can't be used"),
        (["--schedule", "reduce_lr_on_plateau"], "can't be used"),
        (["--methods", ""], "there is no method ''"),
        (["--methods", "full", "--also", "parts"], "name all that are to run in --methods"),
        (["--methods", "full", "--what", "ablations"], "--methods needs the table"),
        (["--also", "parts", "--what", "ablations"], "--also needs the table"),
        (["--ablate", "lora", "--what", "table"], "--ablate needs the ablations"),
    ):
        with pytest.raises(SystemExit):
            program.parse(arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert program.main([*given(folder, tmp_path), "--data", str(tmp_path / "bad.jsonl")]) == 2
    assert "has no 'instruction'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "'setting'"),
        ('{"way": ', "JSONDecodeError"),
        ({"way": {"tuner": "lore", "selection": "", "options": None}}, "no method lore"),
        ({"way": {"tuner": "full", "selection": "some", "options": None}}, r"no method full\+some"),
        ({"rate": None}, "None in it is no number"),
        ({"found": {"memory": {"average": 1}, "machine": "M"}}, "'maximal'"),
        ("[" * 100_000, "RecursionError"),
        ({"origin": "x"}, "TypeError"),
        ({"origin": {}}, "'rows'"),
        ({"rate": math.nan}, "not finite"),
        (
            {
                "found": {
                    **run_of("full", 1.0, 2.0)["found"],
                    "memory": {"average": 0, "maximal": 0},
                }
            },
            "takes no memory",
        ),
    ],
)
def test_what_is_no_run_is_said_before_the_first_run(
    text: str | dict[str, Any], reason: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(program, "apart", never)
    file = tmp_path / "runs" / "x.json"
    file.parent.mkdir()
    file.write_text(
        text if isinstance(text, str) else json.dumps({**run_of("full", 1.0, 2.0), **text})
    )
    assert program.main(given(folder, tmp_path)) == 2
    printed = capsys.readouterr().err
    assert re.search(rf"x\.json is no run .*{reason}.*delete it.* or give another --out", printed)
    assert "did not run" not in printed


def test_a_folder_is_no_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "runs" / "x.json").mkdir(parents=True)
    assert program.main(given(folder, tmp_path)) == 2
    assert "x.json is no run (IsADirectoryError" in capsys.readouterr().err


def test_where_nothing_can_be_written_nothing_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(program, "apart", never)
    (tmp_path / "file").write_text("in the way of a folder")
    (tmp_path / "folder.md").mkdir()
    for option, place in (
        ("--out", tmp_path / "file"),
        ("--page", tmp_path / "file" / "page.md"),
        ("--page", tmp_path / "folder.md"),
    ):
        assert program.main([*given(folder, tmp_path), option, str(place)]) == 2
        assert re.search(rf"{option} {place}.*cannot be written", capsys.readouterr().err)


def test_a_page_that_fails_stops_no_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(program, "apart", lambda job: run_of(job.way.tuner, 40.0, 2.0)["found"])
    monkeypatch.setattr(page, "write", full)
    assert program.main(given(folder, tmp_path, "--methods", "full,lora")) == 2
    assert len(page.read(tmp_path / "runs")) == 2
    assert "page.md cannot be written: No space left" in capsys.readouterr().err


def test_a_run_that_diverges_is_none(
    folder: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(common, "held_out_loss", lambda *_: math.nan)
    assert program.main(given(folder, tmp_path, "--methods", "full", "--seeds", "1")) == 1
    assert not page.read(tmp_path / "runs")
    assert "it diverged, the held-out loss is nan: lower --rate" in capsys.readouterr().err


def test_what_did_not_run_is_said_even_if_the_page_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(job: train.Job) -> dict[str, Any]:
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / "x.json").write_text("{}")
        raise RuntimeError("of this run")

    monkeypatch.setattr(program, "apart", fail)
    assert program.main(given(folder, tmp_path, "--methods", "full")) == 2
    printed = capsys.readouterr().err
    assert "x.json is no run" in printed
    assert "Full parameter: RuntimeError: of this run" in printed


def test_other_rows_or_another_model_of_the_same_name_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    arguments = given(copy, tmp_path, "--methods", "full")
    monkeypatch.setattr(program, "apart", lambda job: run_of("full", 40.0, 2.0)["found"])
    assert program.main(arguments) == 0
    (file,) = (tmp_path / "runs").glob("*.json")
    monkeypatch.setattr(program, "apart", never)
    assert program.main(arguments) == 0
    weights, data = copy / "model.safetensors", copy / "counting.jsonl"
    for changed, option in ((weights, "a --model"), (data, "other rows: a --data")):
        before = changed.read_bytes()
        changed.write_bytes(before.replace(b"Count", b"Sum up") + b"\n")
        for methods_ in ("full", "lora"):  # a row of its own would be in the same table
            assert program.main([*arguments, "--methods", methods_]) == 2
            assert re.search(
                rf"{file.name} was run with {option} .* give another --out, or delete",
                capsys.readouterr().err,
            )
        changed.write_bytes(before)
    data.write_text(data.read_text().replace("Count", "Sum up"))
    run = json.loads(file.read_text())
    del run["origin"]  # a file of before there were any
    file.write_text(json.dumps(run))
    assert program.main(arguments) == 0


def test_names_of_data_keep_what_is_no_suffix() -> None:
    names = [None, "some/set-v1.5", "here/my.jsonl", "my.v2.json", "hub/Open-Platypus"]
    assert [*map(program.data_name, names)] == [
        "documentation", "set-v1.5", "my", "my.v2", "Open-Platypus",
    ]  # fmt: skip


def test_nothing_is_written_into_the_documentation_unasked() -> None:
    build = program.BUILD / "reproduction"
    for given, out in ([], build), (["--out", "here/set-v1.5"], Path("here/set-v1.5")):
        options = program.parse(given)
        assert options.out == out
        assert options.page == Path(f"{out.resolve()}.md")


def test_data_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    lines = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "data_source": "MATH"},
        {"instruction": "Greet.", "input": "", "output": "Hello", "data_source": "airoboros"},
        {"instruction": "Greet.", "input": None, "output": "Bye", "data_source": "ARB"},
        {"instruction": "Be silent.", "input": "", "output": "", "data_source": "ARB"},
    ]
    asked: list[str] = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append(f"{name} {split}")
        if name != "some/data":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list(lines)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert program.read("some/data") == [
        common.Pair("Add.\n\n1 2", "3"), common.Pair("Greet.", "Bye"),
    ]  # fmt: skip
    assert asked == ["some/data train"]
    with pytest.raises(ExampleError, match="can't load --data other/data: no network"):
        program.read("other/data")
    lines[0]["answer"] = lines[0].pop("output")
    lines[:] = lines[:1]
    with pytest.raises(ExampleError, match="has no output"):
        program.read("some/data")


def test_the_papers_settings_are_the_defaults_with_a_model() -> None:
    options = program.parse(["--model", "meta-llama/Llama-3.2-1B"])
    assert options.data == "garage-bAInd/Open-Platypus"
    assert options.tasks == ["mmlu", "arc_challenge", "hellaswag", "truthfulqa_mc2", "winogrande"]
    assert [paper.FEWSHOT[task] for task in options.tasks] == [5, 25, 10, 0, 0]
    names = "batch", "accumulate", "tokens", "steps", "rate", "schedule", "decay", "dtype"
    wanted = [1, 32, 2048, 0, 4e-4, "cosine", 0.01, "bfloat16"]
    assert [getattr(options, name) for name in names] == wanted
    assert {page.way_of(program.line_of(options, "m", *one)).tuner
            for one in program.planned(options)} == set(methods.TUNERS)  # fmt: skip
    assert {program.line_of(options, "m", *one)["rate"] for one in program.planned(options)} == {
        4e-4
    }
    ablated = [way.options or {} for way, _ in program.planned(options) if way.tuner == "qlora"]
    shares = {x["ratio"] for x in ablated if x.keys() == {"ratio"}}
    assert shares == {0.1, 0.2, 0.3, 0.4, 0.5}


def test_the_plan_of_the_offline_preset() -> None:
    options = program.parse([])
    assert options.tasks == [tasks.LOCAL]
    assert set(paper.RATES) == set(methods.TUNERS)
    planned = [*program.planned(options)]
    assert [seed for _, seed in planned] == [0] * 28 + [1] * 28 + [2] * 28
    selections = ("tokentune", "tokenseek", "recommended", "parts")
    table = [way for way, seed in planned if way.is_named and seed == 0]
    assert {(way.tuner, way.selection) for way in table} == {
        *((tuner, "") for tuner in methods.TUNERS),
        *((tuner, selection) for tuner in ("full", "loha", "qlora") for selection in selections),
    }
    ablated = [way.options for way, seed in planned if not way.is_named and seed == 0]
    assert all(ablated) and len(table) == 20
    pairs = {(x["alpha"], x["beta"]) for x in ablated if x and "alpha" in x}
    assert pairs == {(1, 0), (0, 1), (5, 1), (1, 5)}  # equal ones are the table's
    assert [x["ratio"] for x in ablated if x and "alpha" not in x] == [0.2, 0.3, 0.4, 0.5]
    alone = [*program.planned(program.parse(["--seeds", "1", "--also", "none"]))]
    assert len(alone) == 14 + 4 + 4  # each setting of an ablation is run once


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--steps 48 --held-out 9 --context 0",
        "--rate 0.5",
        "--rate 2e-5",
        "--preset small",
        "--tasks none",
    ],
)
def test_the_command_of_a_table_gives_its_runs_again(arguments: str) -> None:
    def lines(arguments: list[str]) -> list[page.Run]:
        options = program.parse(arguments)
        planned = [*program.planned(options)]
        return [program.line_of(options, paper.OFFLINE, *one) for one in planned]

    own = lines([*arguments.split(), "--device", "cpu"])
    command = page.command(own).strip("`\n").split()
    assert command[:2] == ["python", "examples/reproduce"]
    assert lines(command[2:])[: len(own)] == own
    own[0]["setting"]["data"] = "my"
    assert page.command(own) == ""


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 48])
def test_the_step_with_the_longest_row_is_measured_and_does_not_bias_the_mean(steps: int) -> None:
    rows = [Row([1] * (9 if i == 2 * steps - 1 else 4), [1] * 4) for i in range(2 * steps)]
    job = types.SimpleNamespace(device="cpu", steps=steps, batch=2, accumulate=1, train=rows)
    averaged, measured = train.measured_steps(job)  # type: ignore[arg-type]
    assert averaged and measured == averaged | {steps - 1}
    assert len(averaged) <= train.MEASURED and measured <= {*range(steps)}
    assert steps == 1 or 0 not in averaged
    assert max(averaged) >= 2 / 3 * (steps - 1)  # they are spread to the end
    job.device = "cuda"
    assert train.measured_steps(job) == ({*range(steps)}, {*range(steps)})  # type: ignore[arg-type]


def test_runs_at_a_time_share_the_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[train.Job] = []

    def took(job: train.Job) -> dict[str, Any]:
        jobs.append(job)
        return run_of("full", 40.0, 2.0)["found"]

    monkeypatch.setattr(program, "apart", took)
    monkeypatch.setattr(train, "available", lambda device: 10 * train.GIB)
    arguments = given(folder, tmp_path, "--methods", "full,ia3,lora,lokr", "--workers", "2")
    assert program.main(arguments) == 0
    assert {job.room for job in jobs} == {5 * train.GIB}
    assert {job.place for job in jobs} <= {1, 2}
    monkeypatch.setattr(train, "estimated", lambda *_, **__: 6 * train.GIB)
    with pytest.raises(train.Lacking, match=r"needs 6.0 GiB .* 5.0 GiB are free for a run: lower"):
        train.refuse_what_does_not_fit(jobs[0], torch.float32)
    monkeypatch.setattr(train, "available", lambda device: 4 * train.GIB)
    with pytest.raises(train.Lacking, match=r"4.0 GiB are free"):
        train.refuse_what_does_not_fit(jobs[0], torch.float32)


def test_questions_are_about_what_was_held_out(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [[f"{name}{i}" for i in range(40)] for name in "abcdef"]
    rows = []
    for some in words:
        prompt = tokenizer("Say:")["input_ids"]
        answer = tokenizer(" " + " ".join(some) + "</s>")["input_ids"]
        rows.append(Row([*prompt, *answer], [common.IGNORED] * len(prompt) + answer))
    found = tasks.documents(rows, tokenizer, 20)
    assert found == tasks.documents(rows, tokenizer, 20)
    assert len(found) == 20
    assert len({line["answer"] for line in found}) == tasks.CHOICES
    for line in found:
        start = line["question"].removeprefix("Say:").split()
        follows = line["choices"][line["answer"]].split()
        row = next(some for some in words if some[0] == start[0])
        assert start + follows == row[: len(start) + tasks.WORDS]
        others = [x.split() for i, x in enumerate(line["choices"]) if i != line["answer"]]
        behind = row[len(start) + tasks.WORDS :]
        assert all(x == behind[behind.index(x[0]) :][: tasks.WORDS] for x in others)
        assert len({tuple(x) for x in others}) == tasks.CHOICES - 1
    short = tasks.documents(rows, tokenizer, 20, context=tasks.WORDS)
    assert all(len(line["question"].split()) == 1 + tasks.WORDS for line in short)
    assert tasks.documents([Row([1, 2], [common.IGNORED, 2])], tokenizer, 20) == []


def test_lm_eval_asks_them(folder: Path, tmp_path: Path, here: None) -> None:
    arguments = given(folder, tmp_path, "--methods", "full", "--tasks", "continuation")
    assert program.main([*arguments, "--questions", "8", "--tokens", "256"]) == 0
    (run,) = page.read(tmp_path / "runs").values()
    assert 0 <= run["found"]["scores"]["continuation"] <= 100
    assert tasks.unusable(["continuation", "no-such-task"]) == {
        "no-such-task": "lm-eval has no such task"
    }


@pytest.mark.sweep
@pytest.mark.parametrize("text", [*methods.TABLE, "full+recommended", "loha+parts"])
def test_every_method_runs(text: str, folder: Path, tmp_path: Path, here: None) -> None:
    torch._dynamo.reset()
    assert program.main(given(folder, tmp_path, "--methods", text)) == 0
    (run,) = page.read(tmp_path / "runs").values()
    assert run["found"]["trained"] > 0


def test_another_rate_is_a_row_of_its_own() -> None:
    own, other = run_of("full", 40.0, 2.0), run_of("full", 40.0, 2.2)
    other["rate"] = 0.01
    rows = ["Full parameter, rate 2e-05", "Full parameter, rate 0.01"]
    assert [*page.grouped([other, own])] == rows
    own["rate"] = other["rate"]
    assert [*page.grouped([other, own])] == ["Full parameter"]


def test_memory_is_a_share_of_the_same_seeds() -> None:
    main = [run_of("full", 40.0, 2.0), run_of("full", 60.0, 2.0, seed=1)]
    some = [run_of("lora", 30.0, 2.0, seed=seed) for seed in range(3)]
    assert page.shares(some, main, "average") == [75.0, 50.0]
    assert page.shares(main, main, "maximal") == [100.0, 100.0]
    assert page.shares(some, some, "average") == []


def test_two_processes_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, run, replace = tmp_path / "a.json", run_of("full", 40.0, 2.0), os.replace

    def meanwhile(*names: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        page.write_run(file, run)
        replace(*names)

    monkeypatch.setattr(os, "replace", meanwhile)
    page.write_run(file, run)
    assert [*tmp_path.iterdir()] == [file]


def test_a_new_setting_renames_no_picture(tmp_path: Path) -> None:
    run = run_of("full", 40.0, 2.0)
    page.write_run(tmp_path / "runs" / "b.json", run)
    page.write(tmp_path / "page.md", tmp_path / "runs")
    (picture,) = tmp_path.glob("*.svg")
    run["setting"]["model"] = "another"
    page.write_run(tmp_path / "runs" / "a.json", run)
    page.write(tmp_path / "page.md", tmp_path / "runs")
    another, first = re.findall(r"\]\((\S+\.svg)\)", (tmp_path / "page.md").read_text())
    assert first == picture.name
    assert {file.name for file in tmp_path.glob("*.svg")} == {another, first}


def test_the_page_says_what_is_known() -> None:
    text = page.beside([])
    assert "two cores" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["QLoRA + TokenSeek", "14.8 % / 14.3 %, 52.6"] in rows
    assert ["QLoRA + TokenTune (random)", "14.8 % / –, 49.2"] in rows
    assert "52.61 at 10 %, 51.80 at 20 %" in text
    assert "48.45 with (1, 0), 46.39 with (0, 1)" in text
    assert "LoHa, r 8, alpha 16;" in text
    assert "boft_block_size 4" in text
    assert "IA3 scales k_proj, v_proj, down_proj" in text


def test_the_papers_figures_are_beside_those_of_the_runs() -> None:
    runs = [
        run_of("full", 40.0, 2.0), run_of("full", 60.0, 2.0, seed=1),
        run_of("qlora+tokenseek", 5.0, 2.0), run_of("full+tokenseek", 9.0, 2.0, ratio=0.5),
    ]  # fmt: skip
    without = [run_of("lora", 5.0, 2.0)]  # has no full-parameter training to be a share of
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in page.figures([runs, without]).splitlines()]  # fmt: skip
    assert rows[0] == ["method", "the paper", "m, cpu"]
    assert ["Full parameter", "100.0 % / 100.0 %, 40.8", "100.0 % / 100.0 %, 60.0"] in rows
    # of a seed's own rows
    assert ["QLoRA + TokenSeek", "14.8 % / 14.3 %, 52.6", "12.5 % / 12.5 %, 37.5"] in rows
    assert ["Full parameter + TokenSeek", "64.6 % / 34.3 %, 41.1", "–"] in rows
    assert len(rows) == 2 + len(paper.FIGURES)
    runs.append({**run_of("qlora+tokenseek", 5.0, 3.0), "rate": 1.0})
    (row,) = [x for x in page.figures([runs]).splitlines() if x.startswith("| QLoRA + TokenSeek")]
    assert row.split("|")[-2].strip() == "at several rates"


def test_the_page_says_how_uncertain_few_questions_leave_a_score() -> None:
    run = run_of("full", 40.0, 2.0)
    assert page.uncertainty([run]) == ""
    run["setting"] |= {"tasks": "continuation", "questions": 100}
    run["found"]["scores"] = {"continuation": 80.0}
    assert "a standard error of 4.0 points: rows whose scores differ by less" in page.uncertainty(
        [run]
    )


def test_the_page_has_the_papers_columns_the_ablations_and_pictures(tmp_path: Path) -> None:
    runs = [
        run_of("full", 40.0, 2.0), run_of("full", 40.0, 2.2, seed=1),
        run_of("loha+tokenseek", 10.0, 2.5),
        run_of("full+tokenseek", 20.0, 2.4),
        run_of("full+tokenseek", 20.0, 2.3, alpha=0.0, beta=1.0),
        run_of("full+tokenseek", 30.0, 2.3, ratio=0.5),
    ]  # fmt: skip
    for number, run in enumerate(reversed(runs)):
        page.write_run(tmp_path / "runs" / f"{number}.json", run)
    page.write(tmp_path / "page.md", tmp_path / "runs")
    text = (tmp_path / "page.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    head = ["method", "seeds", "average memory", "maximal memory", "one", "two", "average score",
            "held-out loss"]  # fmt: skip
    assert rows.count(head) == 3
    deviation = statistics.stdev([2.0, 2.2])
    full = ["Full parameter", "2", "100.0 ± 0.0 %", "100.0 ± 0.0 %", "50.0 ± 0.0", "60.0 ± 0.0",
            "55.0 ± 0.0", f"2.100 ± {deviation:.3f}"]  # fmt: skip
    loha = ["LoHa + TokenSeek", "1", "25.0 %", "25.0 %", "50.0", "30.0", "40.0", "2.500"]
    assert rows.index(full) < rows.index(loha)
    names = [row[0] for row in rows if row]
    assert names.count("Full parameter + TokenSeek") == 4  # ablations, and beside the paper
    assert "Full parameter + TokenSeek, alpha 0.0, beta 1.0" in names
    assert "Full parameter + TokenSeek, ratio 0.5" in names
    pictures = re.findall(r"\]\((page-\S+\.svg)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in pictures)
    assert "not known" in text
