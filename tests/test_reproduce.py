"""`make reproduce` on a tiny random model: its runs, what it leaves out, its task and its page."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer, save_tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import common
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
        {"instruction": f"Count from {i}.", "output": " ".join(map(str, range(i, i + 30)))}
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
    runs = page.read(tmp_path / "runs")
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

    def never(job: train.Job) -> dict[str, Any]:
        raise AssertionError

    monkeypatch.setattr(program, "apart", never)
    (tmp_path / "runs" / "cut-short.part").write_text("{")  # of a call that was killed
    assert program.main(arguments) == 0


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
    assert [run["way"]["tuner"] for run in page.read(tmp_path / "runs")] == ["full"]
    monkeypatch.setattr(train, "available", lambda device: 0)
    assert program.main(given(folder, tmp_path, "--methods", "full,lora")) == 1
    assert "LoRA: Lacking: a step needs" in capsys.readouterr().err
    assert "Full parameter" in (tmp_path / "page.md").read_text()


def test_bad_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--methods", "lore"], "there is no method 'lore'"),
        (["--also", "every"], "--also has every"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            program.parse(arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert program.main([*given(folder, tmp_path), "--data", str(tmp_path / "bad.jsonl")]) == 2
    assert "has no 'instruction'" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_text("{}")
    with pytest.raises(ExampleError, match=r"x\.json is no run .* delete it"):
        page.read(tmp_path / "runs")


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
    assert len(options.ways) == 14 and options.steps == 0
    assert program.parse([]).tasks == [tasks.LOCAL]
    assert set(paper.RATES) == set(methods.TUNERS)
    planned = [*program.planned(program.parse(["--seeds", "1", "--also", "none"]))]
    assert len(planned) == 14 + 4 + 4  # each setting of an ablation is run once


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
    assert tasks.documents([Row([1, 2], [common.IGNORED, 2])], tokenizer, 20) == []


@pytest.mark.sweep
def test_lm_eval_asks_them(folder: Path, tmp_path: Path, here: None) -> None:
    pytest.importorskip("lm_eval")
    arguments = given(folder, tmp_path, "--methods", "full", "--tasks", "continuation")
    assert program.main([*arguments, "--questions", "8", "--tokens", "160"]) == 0
    (run,) = page.read(tmp_path / "runs")
    assert 0 <= run["found"]["scores"]["continuation"] <= 100
    assert tasks.unusable(["continuation", "no-such-task"]) == {
        "no-such-task": "lm-eval has no such task"
    }


@pytest.mark.sweep
@pytest.mark.parametrize("text", [*methods.TABLE, "full+recommended", "loha+parts"])
def test_every_method_runs(text: str, folder: Path, tmp_path: Path, here: None) -> None:
    torch._dynamo.reset()
    assert program.main(given(folder, tmp_path, "--methods", text)) == 0
    (run,) = page.read(tmp_path / "runs")
    assert run["found"]["trained"] > 0


def run_of(text: str, memory: float, loss: float, seed: int = 0, **options: Any) -> page.Run:
    way = methods.way_of(text)
    if options:
        way = Way(way.tuner, way.selection, {**(way.options or {}), **options})
    return {
        "setting": {"model": "m", "data": "d", "steps": 3, "tasks": "one,two"},
        "way": vars(way),
        "seed": seed,
        "rate": 1e-4,
        "found": {
            "memory": {"average": memory, "maximal": 1.25 * memory, "steps": 3},
            "losses": [[0, 3.0], [3, loss]],
            "scores": {"one": 50.0, "two": 20.0 + memory},
            "machine": "M",
        },
    }


def test_the_page_says_how_uncertain_few_questions_leave_a_score() -> None:
    run = run_of("full", 40.0, 2.0)
    assert page.uncertainty([run]) == ""
    run["setting"] |= {"tasks": "continuation", "questions": 100}
    run["found"]["scores"] = {"continuation": 80.0}
    assert page.uncertainty([run]).endswith("a standard error of 4.0 points.")


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
    assert names.count("Full parameter + TokenSeek") == 3  # the table's, and in both ablations
    assert "Full parameter + TokenSeek, alpha 0.0, beta 1.0" in names
    assert "Full parameter + TokenSeek, ratio 0.5" in names
    pictures = re.findall(r"\]\((page-\S+\.svg)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in pictures)
    assert "not known" in text
