"""The demo and the benchmark on a tiny random model: their text, their meters and their tables."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import os
import re
import runpy
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer, save_tiny_llama
from tokenizers import processors
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import benchmark
import benchmark_page
import benchmark_plots
import common
import demo
import gpu
import gpu_page
import peak
import processes
import quality
import quality_page
import trl_dpo
import trl_grpo
import trl_sft
import trl_ways
import ways
from benchmark_page import Measured
from common import ExampleError, Pair

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def collected() -> None:
    """The programs collect garbage often: what other tests have left is looked through once."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer("<s>", "</s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(path, tokenizer, 32)
    return path


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    lines = [
        {"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i + 1)))}
        for i in range(3, 20)
    ]
    path = tmp_path / "counting.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


# --------------------------------------------------------------------------------------- the text


def test_docstrings_make_pairs_in_a_fixed_order() -> None:
    pairs = common.docstring_pairs(("json", "torch.nn.functional", "no_such_module"))
    assert pairs == common.docstring_pairs(("json", "torch.nn.functional"))
    silu = next(p for p in pairs if p.instruction == "Explain torch.nn.functional.silu.")
    assert "Sigmoid Linear Unit" in silu.answer
    assert len({pair.answer for pair in pairs}) == len(pairs)
    assert all(len(pair.answer) >= 200 for pair in pairs)


def test_only_the_answer_and_its_end_carry_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    row = common.tokenise(Pair("Who?", "Me."), tokenizer, tokens=1000)
    assert tokenizer.decode(row.ids) == "<s>user: Who?</s><s>assistant: Me.</s>"
    labelled = [i for i, label in zip(row.ids, row.labels, strict=True) if label == i]
    assert tokenizer.decode(labelled) == "Me.</s>"
    assert row.labels.count(common.IGNORED) == len(row.ids) - len(labelled)


def test_a_tokeniser_without_a_chat_form_gets_alpacas(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    text = "### Instruction:\nWho?\n\n### Response:\nMe.</s>"
    try:
        row = common.tokenise(Pair("Who?", "Me."), tokenizer, tokens=1000)
        assert tokenizer.decode(row.ids) == text
        begins = copy.deepcopy(tokenizer)  # as Llama's do
        begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", begins.convert_tokens_to_ids("<s>"))]
        )
        begins.bos_token = "<s>"
        row = common.tokenise(Pair("Who?", "Me."), begins, tokens=1000)
        assert tokenizer.decode(row.ids) == f"<s>{text}"
    finally:
        tokenizer.chat_template = kept
    labelled = [label for label in row.labels if label != common.IGNORED]
    assert tokenizer.decode(labelled) == "Me.</s>"


def test_a_row_is_the_same_on_every_day(tokenizer: PreTrainedTokenizerFast) -> None:
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}: " + CHAT
    row = common.tokenise(Pair("Who?", "Me."), dated, tokens=1000)
    assert str(tokenizer.decode(row.ids)).startswith("26 Jul 2024: <s>user: Who?")


def test_no_pair_is_both_learned_and_held_out(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [Pair(f"Say {i}.", f"It is {i}.") for i in range(20)]
    train, held_out = common.split_rows(pairs, tokenizer, 100, train=12, held_out=5, seed=3)
    assert (len(train), len(held_out)) == (12, 5)
    texts = {tuple(row.ids) for row in train} | {tuple(row.ids) for row in held_out}
    assert len(texts) == 17
    again, _ = common.split_rows(pairs, tokenizer, 100, train=12, held_out=5, seed=3)
    assert again == train


def test_pairs_whose_answer_is_cut_away_are_passed_over(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [Pair("x" * 200, "never seen"), Pair("Say 1.", "1"), Pair("Say 2.", "2")]
    train, held_out = common.split_rows(pairs, tokenizer, 60, train=5, held_out=1, seed=0)
    assert len(train) == len(held_out) == 1


def test_too_little_text_says_how_much_there_is(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ExampleError, match=r"gives 1 usable examples .* 4 are to be held out"):
        common.split_rows([Pair("Who?", "Me.")], tokenizer, 100, train=3, held_out=4, seed=0)


def test_rows_are_padded_to_the_longest() -> None:
    rows = [common.Row([5, 6, 7], [common.IGNORED, 6, 7]), common.Row([8], [8])]
    batch = common.collate(rows, pad_id=1, device="cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_the_held_out_loss_is_a_mean_over_tokens_and_keeps_no_graph() -> None:
    class Model(nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            assert not self.training and not torch.is_grad_enabled()
            return SimpleNamespace(loss=input_ids.float().mean())

    rows = [common.Row([1, 2, 3], [common.IGNORED, 2, 3]), common.Row([8, 8], [8, 8])]
    model = Model().train()
    assert common.held_out_loss(model, rows, pad_id=0, device="cpu") == (2.0 * 2 + 8.0) / 3
    assert model.training


def test_alpaca_lines_become_pairs(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"instruction": "Add.", "input": "1 2", "output": "3"}\n'
        "\n"
        '{"instruction": "Greet.", "output": "Hello", "source": "me"}\n'
        '{"instruction": "Part.", "input": null, "output": "Bye"}\n'
    )
    assert common.read_alpaca(path) == [
        Pair("Add.\n\n1 2", "3"),
        Pair("Greet.", "Hello"),
        Pair("Part.", "Bye"),
    ]


BAD_LINES = {
    "{": "not JSON",
    "[1]": "a JSON list, not an object",
    '{"prompt": "x", "output": "y"}': r"has no 'instruction', only \['output', 'prompt'\]",
    '{"instruction": "x"}': "has no 'output'",
    '{"instruction": "x", "output": 3}': "'output' is a int, not a string",
    '{"instruction": "x", "input": [1], "output": "y"}': "'input' is a list",
    '{"instruction": " ", "output": "y"}': "'instruction' is empty",
    '{"instruction": "x", "output": "y \\ud800"}': "'output' has a lone surrogate",
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.items())
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "x", "output": "y"}\n' + line + "\n")
    with pytest.raises(ExampleError, match=rf"data\.jsonl, line 2: {problem}"):
        common.read_alpaca(path)


def test_ten_bad_lines_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("nonsense\n" * 13)
    with pytest.raises(ExampleError) as caught:
        common.read_alpaca(path)
    message = str(caught.value)
    assert message.count("not JSON") == 10
    assert "and 3 more lines" in message
    assert "mend or delete these lines" in message


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ExampleError, match="can't read --data"):
        common.read_alpaca(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "array.json").write_text('[{"instruction": "x", "output": "y"}]')
    with pytest.raises(ExampleError, match="is a JSON array: --data takes an object per line"):
        common.read_alpaca(tmp_path / "array.json")
    with pytest.raises(ExampleError, match="holds no lines"):
        common.read_alpaca(tmp_path / "empty.jsonl")


# -------------------------------------------------------------------------------------- the model


def test_a_folder_with_only_a_gguf_file_is_read_as_one(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "small.gguf").touch()
    source = common.find_model(str(tmp_path))
    assert (source.name, source.gguf_file) == ("small", "small.gguf")
    assert common.find_model(str(tmp_path / "small.gguf")) == source
    assert common.find_model(str(folder)).gguf_file is None


def test_a_model_that_is_nowhere_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    source = common.find_model(str(tmp_path / "nothing"))
    with pytest.raises(ExampleError, match="--model"):
        common.load_model(source, torch.float32)


def test_adapters_are_the_same_for_the_same_seed(folder: Path) -> None:
    source = common.find_model(str(folder))
    one, two = (common.add_lora(common.load_model(source, torch.float32), 7) for _ in range(2))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == ("lora_" in name)


@pytest.mark.model
@pytest.mark.sweep
def test_the_real_model_is_loaded_dense_and_can_be_saved(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    model = common.load_model(common.find_model(str(smollm2_folder)), torch.float32)
    assert model.num_parameters() == 134_515_008
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


# ------------------------------------------------------------------------------------- the meters


class TwoProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).exp() @ self.weight


def test_saved_bytes_leave_out_parameters_and_count_an_alias_once() -> None:
    model = TwoProducts()
    x = torch.randn(11, 7)
    with common.SavedBytes(model) as saved:
        y = model(x)
        # x for the first product, and exp's result, which exp and the second product both keep.
        assert saved.bytes() == 2 * 11 * 7 * 4
    y.sum().backward()
    assert model.weight.grad is not None


def test_saved_bytes_forget_what_is_finished() -> None:
    model = TwoProducts()
    with common.SavedBytes(model) as saved:
        torch.autograd.grad(model(torch.randn(11, 7)).sum(), model.weight)
        assert saved.bytes() == 0


def test_saved_bytes_see_the_inputs_of_checkpointed_blocks() -> None:
    model = TwoProducts()
    x = torch.randn(11, 7, requires_grad=True)
    with common.SavedBytes(model) as saved:
        y = checkpoint(model, x, use_reentrant=False)
        assert saved.bytes() == 11 * 7 * 4
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("sampled", [False, True], ids=["high-water", "sampled"])
def test_the_peak_is_seen_after_the_memory_is_given_back(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr(common, "_reset_high_water", lambda: False)
    size = 96 * common.MIB
    with common.PeakBytes(torch.device("cpu")) as peak:
        block = torch.ones(size // 4)
        for _ in range(3):  # a while, for the sampler
            block.mul_(1.0)
        del block
    assert 0.9 * size <= peak.bytes <= 2 * size


def test_the_peak_of_a_step_is_that_of_its_tensors() -> None:
    weight = nn.Parameter(torch.randn(300, 200))
    x = torch.randn(500, 300)
    unit = 500 * 200 * 4  # of a product and of all that has its shape

    def step() -> None:
        y = (x @ weight).exp()  # the product is freed, the result is kept
        z = y.exp()
        z.sum().backward()

    # y and z live until the step returns, and backward holds the gradients at y and at the product
    # while it computes the latter. What comes on top is numbers, and the weight's gradient, which
    # takes 60% of a unit while one of those two is alive still, doesn't count.
    got = peak.step_peak(step, [weight], torch.device("cpu"))
    assert 4 * unit <= got <= 4 * unit + 256
    assert weight.grad is not None


def test_a_gradient_is_no_part_of_the_peak_but_what_is_added_to_it_is() -> None:
    big = nn.Parameter(torch.randn(1000, 1000))

    def once() -> None:
        (torch.ones(1, 1000) @ big).sum().backward()

    def twice() -> None:
        ones = torch.ones(1, 1000)
        ((ones @ big).sum() + (ones @ big).sum()).backward()

    size = big.numel() * 4
    device = torch.device("cpu")
    assert peak.step_peak(once, [big], device) < 0.05 * size
    assert size <= peak.step_peak(twice, [big], device) <= 2.05 * size
    # Nor does a gradient that was there before, which is dropped.
    assert peak.step_peak(once, [big], device) < 0.05 * size


def test_a_peak_is_the_largest_sum_of_a_trace() -> None:
    def event(time: float, size: int, address: int, device: int = 0) -> dict[str, Any]:
        return {
            "name": "[memory]",
            "ts": time,
            "args": {"Bytes": size, "Addr": address, "Device Type": device},
        }

    events = [
        event(4, -30, 3),
        event(1, 20, 1),
        event(3, 30, 3),
        event(2, 500, 2, device=1),
        {"name": "aten::mm", "ts": 0},
        event(5, 7, 1000),
        event(6, -20, 1),
        event(7, 40, 1),
    ]
    assert peak.peak_of(events) == 50
    assert peak.peak_of(events, {1}) == 50  # the second one at that address: the first is no grad
    assert peak.peak_of(events, {1000}) == 50
    assert peak.peak_of([*events, event(8, 60, 5)], {1000}) == 100
    assert peak.peak_of([*events, event(8, 60, 5)], {1000, 1}) == 60


# ------------------------------------------------------------------------------------ the programs


def test_the_demo_trains_and_prints_its_table(
    folder: Path, alpaca: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--model {folder} --data {alpaca} --methods ordinary --steps 3 --tokens 64"
    code = demo.main([*arguments.split(), "--held-out", "2", "--rate", "0.01", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert code == 0
    (row,) = re.findall(r"^\| ordinary .*$", printed, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("| ").split("|")[1:]]
    saved, peak, first, _, after, *at_time = cells
    (before,) = re.findall(r"3 steps, from (\S+):", printed)
    assert float(saved) >= 0
    assert float(peak) >= 0
    assert float(first) >= 0
    assert float(after) < float(before)
    assert at_time == ["-", "-"]  # nothing sets the pace


class InThisProcess:
    """In the place of a process pool: more imports of torch show nothing new."""

    def __init__(self, workers: int, mp_context: Any, initializer: Any) -> None:
        pass

    def shutdown(self, *, cancel_futures: bool) -> None:
        pass

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_the_ways_of_the_demo_learn_and_fxseek_saves_less(
    folder: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    page = tmp_path / "new" / "tokens.html"
    arguments = (
        f"--model {folder} --data {alpaca} --steps 3 --tokens 128 --held-out 2 --page {page}"
    )
    results = demo.compare(demo.parse([*arguments.split(), "--device", "cpu"]))
    assert [result.method for result in results] == list(demo.METHODS)
    ordinary, pace, *ours = results
    assert all(0 < result.saved_bytes < ordinary.saved_bytes for result in (pace, *ours))
    (before,) = (result.loss_before for result in results if result.loss_before is not None)
    assert all(result.loss_after_steps != before for result in results)
    for way in (pace, ours[0]):  # these learn what ordinary training learns
        assert way.loss_after_steps == pytest.approx(ordinary.loss_after_steps, abs=1e-4)
    assert (pace.steps_at_time, pace.loss_at_time) == (3, pace.loss_after_steps)
    assert "<html" in page.read_text(encoding="utf-8")
    assert demo._steps_in([9, 9, 2, 2, 2], 11) == 5
    assert demo._steps_in([9, 9, 2], None) == math.inf


def test_the_demo_says_what_is_wrong_and_stops(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    assert demo.main(["--model", str(folder), "--data", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl, line 1: not JSON" in capsys.readouterr().err
    page = tmp_path / "bad.jsonl" / "tokens.html"
    assert demo.main(["--model", str(folder), "--page", str(page)]) == 2
    assert f"--page {page} cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.parse(["--methods", "ordinary,tokenseak"])
    assert "tokenseak; the ways are ordinary" in capsys.readouterr().err
    for option, value in (("--rate", "0"), ("--rate", "nan"), ("--device", "gpu")):
        with pytest.raises(SystemExit):
            demo.parse([option, value])
        assert f"{option} " in capsys.readouterr().err


def test_tokenizers_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    source = common.ModelSource("none", str(tmp_path))
    with pytest.raises(ExampleError, match="can't load"):
        common.load_tokenizer(source)
    byte_tokenizer("<s>", "</s>").save_pretrained(tmp_path)
    with pytest.raises(ExampleError, match="neither a padding nor an end token"):
        common.load_tokenizer(source)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ExampleError, match="can't load"):
        common.load_tokenizer(source)


def run_benchmark(
    monkeypatch: pytest.MonkeyPatch, folder: Path, page: Path, *arguments: str
) -> str:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    always = ["--model", str(folder), "--repeats", "1", "--output", str(page)]
    assert benchmark.main([*always, *arguments]) == 0
    return page.read_text()


def test_the_benchmark_writes_its_tables_between_its_markers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Measured\n")
    arguments = ["--tokens", "64", "--methods", "ordinary,tokenseek"]
    first = run_benchmark(monkeypatch, folder, page, *arguments)
    assert first.startswith("# Measured\n\n<!-- measured: ")
    for part in ("**Full-parameter, 64 tokens**", "**LoRA", "| fxseek, tokenseek"):
        assert part in first
    assert "svg" not in first  # one length makes no line
    row = next(line for line in first.splitlines() if line.startswith("| ordinary"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert [cells[i] for i in (2, 5, 7, 8)] == ["1.00×", "100.0%", "100.0%", ""]
    assert float(cells[1]) >= 0 and float(cells[3]) > 0
    arguments = ["--tokens", "64", "--methods", "ordinary"]
    second = run_benchmark(monkeypatch, folder, page, *arguments)
    assert second.count("<!-- measured: ") == 1
    assert "fxseek, tokenseek" not in second
    third = run_benchmark(monkeypatch, folder, page, *arguments, "--tunings", "full")
    assert third.startswith(second.rstrip())
    assert third.count("<!-- measured: ") == 2
    assert third.count("LoRA") == second.count("LoRA")


def test_long_rows_are_captured_by_a_short_one_and_timed_as_they_are_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = benchmark.parse(["--methods", "parts"])
    assert options.tokens == [1024, 2048, 4096, 8192]
    assert [benchmark.repeats(tokens, options) for tokens in options.tokens] == [5, 3, 1, 1]
    counted = [benchmark.count_is_timed(tokens, options) for tokens in options.tokens]
    assert counted == [False, False, True, True]
    monkeypatch.setattr(benchmark, "SHORT", 16)
    monkeypatch.setattr(benchmark, "count_is_timed", lambda tokens, options: True)
    (page := tmp_path / "page.md").write_text("")
    arguments = ["--tokens", "64", "--methods", "ordinary,random", "--tunings", "full"]
    text = run_benchmark(monkeypatch, folder, page, *arguments)
    assert "one step each" in text
    row = next(line for line in text.splitlines() if line.startswith("| fxseek, random"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert float(cells[3]) > 0 and float(cells[8]) >= 0


@pytest.mark.sweep
def test_several_lengths_give_plots_and_growth(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("")
    arguments = ["--tokens", "64,32", "--methods", "ordinary,tokentune", "--tunings", "full"]
    text = run_benchmark(monkeypatch, folder, page, *arguments)
    assert "peak KiB / token at 64" in text
    plots = sorted(tmp_path.glob("*.svg"))
    assert [f"]({plot.name})" in text for plot in plots] == [True, True]
    assert all("-full-tokens-32-64-" in plot.name for plot in plots)
    before = [plot.read_bytes() for plot in plots]
    assert all(b"TokenTune as published" in content for content in before)
    assert all(b"date" not in content and len(content) < 60_000 for content in before)


def test_a_plot_of_the_same_numbers_is_the_same_file(tmp_path: Path) -> None:
    parts = {
        (tuning, tokens): {
            way: Measured(seconds=[tokens / 100 + i], peak_bytes=tokens * common.MIB)
            for i, way in enumerate(ways.WAYS)
        }
        for tuning in ("full", "lora")
        for tokens in (512, 1024)
    }
    assert benchmark_plots.LINES.keys() == set(ways.WAYS) - set(ways.PARTS)
    options = benchmark.parse(["--output", "-"])
    contents = []
    for name in ("a", "b"):
        benchmark_plots.write(tmp_path, name, parts, options)
        contents.append((tmp_path / f"{name}-time.svg").read_text())
    assert contents[0] == contents[1]


@pytest.mark.sweep
def test_kept_results_are_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, keep = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text("")
    arguments = ["--methods", "ordinary", "--tunings", "full", "--keep", str(keep)]
    run_benchmark(monkeypatch, folder, page, "--tokens", "32", *arguments)
    first = json.loads(keep.read_text())
    run_benchmark(monkeypatch, folder, page, "--tokens", "32,48", *arguments)
    second = json.loads(keep.read_text())
    assert len(second) == 2
    assert second.items() >= first.items()


class OutOfMemory(InThisProcess):
    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool())
        return future


def test_a_killed_process_is_a_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", OutOfMemory)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    page = tmp_path / "page.md"
    page.write_text("")
    assert benchmark.main(["--model", str(folder), "--tokens", "32", "--output", str(page)]) == 0
    assert "ordinary: its process was killed, as a machine with too little" in page.read_text()


def test_a_killed_process_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The next call measures it; one file serves machines, versions and models of one name."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    keep = tmp_path / "new" / "kept.json"
    given = ["--model", str(folder), "--tokens", "32", "--methods", "ordinary", "--tunings", "full"]
    given += ["--output", "-", "--keep", str(keep)]
    monkeypatch.setattr(processes, "ProcessPoolExecutor", OutOfMemory)
    assert benchmark.main(given) == 0
    assert not keep.exists()
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(benchmark, "measure", lambda *_: {"ordinary": Measured(seconds=[1.0])})
    for version in ("5.1", "5.2", "5.2"):
        monkeypatch.setattr("transformers.__version__", version)
        assert benchmark.main(given) == 0
    assert len(json.loads(keep.read_text())) == 2
    assert [path.name for path in keep.parent.iterdir()] == [keep.name]
    keep.write_text("{")
    assert benchmark.main(given) == 2
    assert f"--keep {keep} holds no results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "options"),
    [(demo, "--methods ordinary,every"), (trl_dpo, "--ways trl,every")],
    ids=["demo", "trl"],
)
def test_a_killed_way_is_named_and_the_others_are_shown(
    program: Any, options: str, folder: Path, alpaca: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made: list[InThisProcess] = []

    def pool(*args: Any, **kwargs: Any) -> InThisProcess:
        made.append(InThisProcess(1, None, None) if made else OutOfMemory(1, None, None))
        return made[-1]

    monkeypatch.setattr(processes, "ProcessPoolExecutor", pool)
    result = SimpleNamespace(
        method="every", way="every", saved_bytes=1, peak_bytes=1, first_bytes=1, step_seconds=1.0,
        seconds=1.0, loss=1.0, loss_before=1.0, loss_after_steps=1.0, steps_at_time=None,
        loss_at_time=None,
    )  # fmt: skip
    monkeypatch.setattr(demo, "run", lambda job: result)
    monkeypatch.setattr(trl_ways, "run", lambda job: result)
    always = f"--model {folder} --data {alpaca} --device cpu".split()
    assert program.main([*always, *options.split()]) == 2
    said = capsys.readouterr()
    assert "its process was killed, as by too little memory: lower --tokens or --batch" in said.err
    assert "| fxseek, every token" in said.out
    monkeypatch.setattr(processes, "ProcessPoolExecutor", OutOfMemory)
    assert program.main([*always, *options.split()]) == 2
    assert "no way has a result" in capsys.readouterr().err


def test_what_a_way_cannot_do_is_its_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(model: nn.Module, **options: Any) -> None:
        raise RuntimeError("backend='inductor' raised:\nno compiler found\nmore")

    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    monkeypatch.setattr(LlamaForCausalLM, "forward", unknown)
    monkeypatch.setitem(ways.WAYS, "random-lean", {"name": "lean", "fxseek": {"frugal": True}})
    arguments = f"--model {folder} --tokens 32 --repeats 1 --methods inductor,random-lean"
    part = benchmark.measure("full", 32, benchmark.parse([*arguments.split(), "--output", "-"]))
    assert part["inductor"].failed == (
        "failed with RuntimeError: backend='inductor' raised: no compiler found"
    )
    assert part["random-lean"].failed == "this fxseek has no frugal="
    table = benchmark_page.section("full", 32, part, benchmark.parse(["--output", "-"]))
    assert "lean: this fxseek has no frugal=." in table


def test_targets_are_judged_as_they_are() -> None:
    part = {
        "ordinary": Measured(first=9.0, seconds=[10.0], saved_bytes=1000, peak_bytes=2000),
        "random": Measured(first=5.0, seconds=[3.8], saved_bytes=100, peak_bytes=302),
    }
    options = benchmark.parse(["--output", "-", "--tunings", "full"])
    longer = {"random": Measured(seconds=[1.0], saved_bytes=404, peak_bytes=2000)}
    said = benchmark_page.targets({("full", 1024): part, ("full", 4096): longer}, options)
    assert said is not None
    cells = dict(line.strip("| ").split(" | ", 1) for line in said.splitlines()[2:])
    cells = {name.strip(): cell.strip() for name, cell in cells.items()}
    assert cells["fxseek, random: step ≤ 0.38× of ordinary"] == "0.38×: yes"
    assert cells["fxseek, random: peak ≤ 15.0% of ordinary"] == "15.1%: **no**"
    assert cells["fxseek, tokenseek: step ≤ 0.45× of gradient checkpointing"] == "not measured"
    growth = "fxseek, each way: {} bytes per token constant or falling with length"
    assert cells[growth.format("saved")] == "1.01×: yes"
    assert cells[growth.format("peak")] == "1.66×: **no**"
    other = benchmark.parse(["--output", "-", "--ratio", "0.2"])
    assert benchmark_page.targets({("full", 1024): part}, other) is None


def test_targets_of_parts_are_judged_as_they_are() -> None:
    part = {
        "ordinary": Measured(seconds=[10.0], peak_bytes=4000),
        "checkpointing": Measured(seconds=[12.0], peak_bytes=1000),
        "parts-1.0-256": Measured(seconds=[12.6], peak_bytes=351),
        "parts-0.5-256": Measured(seconds=[9.9], peak_bytes=351),
    }
    options = benchmark.parse(["--output", "-", "--methods", "parts"])
    said = benchmark_page.part_targets({("lora", 2048): part, ("lora", 1024): part}, options)
    assert said is not None
    assert "1024 tokens" not in said
    (row,) = [line for line in said.splitlines() if "parts of 256" in line]
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert cells[1:] == ["0.35×: **no**", "1.05×: yes", "0.99×: yes", "1.00×: yes"]
    assert benchmark_page.part_targets({("full", 2048): part}, options) is None


def test_tables_line_up() -> None:
    lines = common.table(["", "MiB"], [["a", "1"], ["longer", "12345"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ------ | ----: |"


def test_the_quality_runs_go_on_where_they_stopped(
    folder: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    out, page = tmp_path / "runs.jsonl", tmp_path / "quality.md"
    always = f"--model {folder} --data {alpaca} --tunings full --steps 4 --every 2 --batch 2"
    always = [*always.split(), "--held-out", "2", "--out", str(out), "--page", str(page)]
    assert quality.main([*always, "--arms", "ordinary", "--seeds", "1"]) == 0
    first = out.read_text()
    some = "ordinary,checkpointing,every,labelled,spans-0.5,growing"
    assert quality.main([*always, "--arms", some, "--seeds", "2"]) == 0
    assert out.read_text().startswith(first)
    lines = quality_page.read(out)
    assert len({quality_page.key(line) for line in lines}) == len(lines) == 18
    runs = [line for line in lines if line["seed"] is not None]
    timings = {line["arm"]: line["seconds"] for line in lines if line["seed"] is None}
    assert set(timings) == set(some.split(",")) and min(timings.values()) > 0
    saved = {line["arm"]: line["saved"] for line in lines if line["seed"] is None}
    assert saved["checkpointing"][0] == saved["checkpointing"][1] < saved["ordinary"][0]
    assert all(line["lengths"] and 0 < line["labelled"] < 1 for line in runs)
    of_first = [run for run in runs if run["seed"] == 0]
    assert all([step for step, _ in run["losses"]] == [0, 2, 4] for run in runs)
    assert len({run["losses"][0][1] for run in of_first}) == 1
    end = {run["arm"]: run["losses"][-1][1] for run in of_first}
    for arm in ("checkpointing", "every"):
        assert end[arm] == pytest.approx(end["ordinary"], abs=1e-6)
    assert len(set(end.values())) >= 4
    text = page.read_text()
    assert "## counting, full" in text
    assert "sampled spans of 8, 50 %" in text
    assert "| gain of labelled tokens" in text and "≥ 98 %" in text
    told = f"--data counting.jsonl --model {folder.name} --tunings full --tokens 768 --batch 2"
    assert f"`python examples/quality.py {told} --steps 4 --every 2 --held-out 2 --seeds 2`" in text
    assert (tmp_path / "quality-0.svg").exists()


def test_a_line_that_is_no_quality_run_is_named(tmp_path: Path) -> None:
    """By the number that an editor shows; what else there is stays."""
    known: dict[str, Any] = dict.fromkeys(quality_page.SETTING, 1)
    known |= {"arm": "ordinary", "seed": 0, "losses": [[0, 2.0]]}
    out, text = tmp_path / "runs.jsonl", f"{json.dumps(known)}\n\n{json.dumps(known)}\n"
    out.write_text(text)
    assert len(quality_page.read(out)) == 2
    for line in ("{}", "[]", "null", "{", json.dumps({**known, "losses": [[0, math.nan]]})):
        out.write_text(f"{text}{line}\n")
        with pytest.raises(ExampleError, match=r"line 4 of .* is no run"):
            quality_page.read(out)


def test_a_quality_run_that_diverges_is_named_with_the_page_s_error(
    folder: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(common, "held_out_loss", lambda *args: math.nan)
    out, page = tmp_path / "runs.jsonl", tmp_path / "page.md"
    given = f"--model {folder} --data {alpaca} --tunings lora --what runs --seeds 1 --steps 1"
    given = [*given.split(), "--held-out", "2", "--out", str(out), "--page", str(page)]
    assert quality.main([*given, "--arms", "ordinary"]) == 2
    assert "ordinary, lora: it diverged" in capsys.readouterr().err
    assert not out.exists()

    def fail(*args: Any) -> None:
        raise ExampleError("no page")

    monkeypatch.setattr(quality, "write_page", fail)
    assert quality.main([*given, "--arms", "ordinary"]) == 2
    said = capsys.readouterr().err
    assert "it diverged" in said and "no page" in said


def test_a_result_begins_a_line(tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    common.append_line(out, {"a": 1})
    out.write_text(out.read_text().rstrip("\n"))  # as an editor may leave it
    common.append_line(out, {"a": 2})
    common.append_line(out, {"a": 3})
    assert out.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    with pytest.raises(ExampleError, match=r"--out .* cannot be written"):
        common.append_line(tmp_path, {})


def test_timings_of_a_table_are_of_one_machine() -> None:
    setting = dict.fromkeys(quality_page.SETTING, 1)
    runs = [{**setting, "steps": 32, "device": "cuda"}]

    def timing(arm: str, device: str, steps: int, seconds: float) -> dict[str, Any]:
        return {**setting, "arm": arm, "machine": device, "device": device, "steps": steps,
                "seconds": seconds}  # fmt: skip

    cpu = [timing(arm, "cpu", 64, 9.0) for arm in ("every", "labelled")]
    cuda = [timing("every", "cuda", steps, seconds) for steps, seconds in ((32, 1.0), (64, 2.0))]
    for timings in ([*cpu, *cuda], [*cuda, *cpu]):
        found = {line["arm"]: line["seconds"] for line in quality_page.timings_of(runs, timings)}
        assert found == {"every": 1.0}
    assert quality_page.timings_of(runs, cpu) == cpu
    assert quality_page.timings_of([{**runs[0], "tokens": 2}], cpu) == []


def test_a_quality_run_of_other_data_of_the_same_name_is_refused(
    folder: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    out, other = tmp_path / "runs.jsonl", tmp_path / "other" / alpaca.name
    other.parent.mkdir()
    given = f"--model {folder} --tunings lora --what runs --seeds 1 --steps 1 --arms ordinary"
    given = [*given.split(), "--held-out", "2", "--out", str(out)]
    assert quality.main([*given, "--data", str(alpaca)]) == 0
    assert (tmp_path / "runs.md").exists()
    before = out.read_text()
    other.write_text(alpaca.read_text().replace("1", "one"))
    in_one_table = (["--arms", "ordinary"], ["--arms", "labelled"], ["--first-seed", "1"])
    for options in in_one_table:
        assert quality.main([*given, "--data", str(other), *options]) == 2
        assert "a --data of the same name and other content" in capsys.readouterr().err
    assert quality.main([*given, "--data", str(alpaca)]) == 0
    assert out.read_text() == before


def test_a_killed_quality_run_is_named(
    folder: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(processes, "ProcessPoolExecutor", OutOfMemory)
    given = ["--model", str(folder), "--data", str(alpaca), "--out", str(tmp_path / "runs.jsonl")]
    given += ["--held-out", "2", "--tunings", "lora", "--arms", "ordinary", "--what", "runs"]
    assert quality.main(given) == 2
    assert "ordinary, lora: a process was killed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--held-out 0", "--held-out must be at least 1"),
        ("--first-seed -1", "--first-seed must be at least 0"),
        ("--data my.jsonl --least 300", "--least is for docstrings"),
    ],
)
def test_bad_arguments_of_quality(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(arguments.split())
    assert said in capsys.readouterr().err


def test_a_quality_run_that_fails_is_named_and_the_others_are_kept(
    folder: Path, alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    run = quality.run

    def fail(job: quality.Job) -> dict[str, Any]:
        if job.arm == "labelled":
            raise RuntimeError("out of memory")
        return run(job)

    monkeypatch.setattr(quality, "run", fail)
    out, page = tmp_path / "runs.jsonl", tmp_path / "quality.md"
    arguments = f"--model {folder} --data {alpaca} --tunings lora --what runs --seeds 1 --steps 2"
    given = [*arguments.split(), "--held-out", "2", "--out", str(out), "--page", str(page)]
    assert quality.main([*given, "--arms", "labelled,sampled-0.5,windows-0.25"]) == 2
    assert "these did not run:\nlabelled, lora: out of memory" in capsys.readouterr().err
    kept = {line["arm"] for line in quality_page.read(out)}
    assert kept == {"sampled-0.5", "windows-0.25"}


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning",
    "ignore:.*:DeprecationWarning:(trl|datasets|multiprocess|dill|pyarrow|pandas)",
    "ignore:.*:UserWarning:(trl|transformers|peft)",
)
@pytest.mark.parametrize(
    "program",
    [
        trl_dpo,
        pytest.param(trl_sft, marks=pytest.mark.sweep),
        pytest.param(trl_grpo, marks=pytest.mark.sweep),
    ],
    ids=lambda program: program.__name__,
)
def test_trl_beside_itself(
    program: Any, folder: Path, alpaca: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("trl")
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    always = f"--model {folder} --data {alpaca} --steps 3 --tokens 48 --learn-chunk 8"
    assert program.main([*always.split(), "--device", "cpu"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [x for x, _ in trl_ways.WAYS.values()]
    losses = [float(row.split("|")[-2]) for row in rows[2:]]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert program.main([*always.split(), "--ways", "trl", "--data", "nowhere.jsonl"]) == 2


def test_gain_is_read_between_evaluations() -> None:
    """Along the logarithm of the steps; what was before the first evaluation is not known."""
    run = {"losses": [[0, 3.0], [10, 2.0], [40, 1.5]]}
    assert quality_page.gain(run) == 1.5
    gains = [quality_page.gain(run, at) for at in (0, 10, 20, 40, 99)]
    assert gains == pytest.approx([0, 1.0, 1.25, 1.5, 1.5])
    with pytest.raises(ValueError, match=r"5 steps are before the first evaluation, after 10"):
        quality_page.gain(run, 5)
    quicker = {"arm": "labelled", "seed": 0, "device": "cpu", "steps": 40, **run}
    ordinary = {**quicker, "arm": "ordinary"}
    assert quality_page.in_time([quicker], [ordinary], 0.5) == pytest.approx([1.5 / 1.25])
    for pace in (0.2, 1.1, None):
        assert quality_page.in_time([quicker], [ordinary], pace) == []
    worse = {**ordinary, "losses": [[0, 3.0], [10, 3.1], [40, 1.5]]}
    assert quality_page.in_time([quicker], [worse], 0.25) == []
    assert quality_page.spread([1.0, 3.0], "{:.1f}", " %") == "2.0 ± 1.4 %"
    assert quality_page.spread([1.0], "{:.1f}") == "1.0"


def test_the_targets_of_the_quality_page() -> None:
    """The best way of a share is above what it is to reach, and above both published ways."""

    def run_of(arm: str, end: float) -> dict[str, Any]:
        losses = [[0, 3.0], [5, (3 + end) / 2], [10, end]]
        name = quality.ARMS[arm][0]
        return {"arm": arm, "name": name, "seed": 0, "device": "cpu", "steps": 10, "losses": losses}

    ends = {"ordinary": 2.0, "labelled": 2.03, "sampled-0.5": 2.02, "spans-0.5": 2.2}
    ends |= {"tokenseek-0.5": 2.01, "sampled-0.25": 2.06, "tokentune-0.25": 2.3}
    runs = [run_of(*item) for item in ends.items()]
    runs += [{**run_of("tokentune-0.5", 1.0), "seed": 1}]  # without ordinary training's
    text = quality_page.targets(runs, {"sampled-0.5": 0.5})
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:]]
    assert rows == [
        ["gain of labelled tokens", "97.0 %", "≥ 98 %", "**no**"],
        ["gain of sampled tokens, 50 %", "98.0 %",
         "≥ 97 %, above TokenSeek as published 99.0 %", "**no**"],
        ["gain of sampled tokens, 25 %", "94.0 %",
         "≥ 93 %, above TokenTune as published 70.0 %", "yes; TokenSeek has no figure"],
        ["gain at equal time of sampled tokens, 50 %", "196.0 %", "≥ 100 %", "yes"],
    ]  # fmt: skip
    assert "%" not in quality_page.targets(runs[1:], {})


def test_the_pace_of_a_way_is_the_median_of_its_turns() -> None:
    line = {"arm": "every", "seconds": 9.0, "checkpointing": 10.0}
    assert quality_page.paced(line) == "0.90×"
    line |= {"pairs": [[8.0, 10.0], [5.0, 10.0], [14.0, 20.0]]}
    assert quality_page.paced(line) == "0.70× (0.50–0.80)"
    assert quality_page.paces([line]) == {"every": 0.7}


def test_gain_is_a_share_of_what_the_same_kind_of_device_gained_on_the_same_text() -> None:
    def run_of(arm: str, seed: int, device: str, end: float) -> dict[str, Any]:
        losses = [[0, 3.0], [10, end]]
        machine = {"cuda": "a GPU", "cpu": "2 threads"}[device]
        return {"arm": arm, "seed": seed, "device": device, "machine": machine, "losses": losses}

    ordinary = [run_of("ordinary", 0, "cuda", 2.0), run_of("ordinary", 1, "cpu", 1.0)]
    other = [run_of("every", seed, "cpu", 2.0) for seed in (0, 1)]
    assert quality_page.gained(other, [*ordinary, *other]) == [0.5]
    of_another_text = {**other[1], "losses": [[0, 3.1], [10, 2.0]]}
    assert quality_page.gained([of_another_text], ordinary) == []
    for end in (3.0, 4.0):  # ordinary training has gained nothing: there is no share of it
        assert quality_page.gained(other, [run_of("ordinary", 1, "cpu", end)]) == []
    named = quality_page.machines_of([*ordinary, *other])
    assert named == "a GPU (seed 0) and 2 threads (seeds 0, 1)"
    assert quality_page.machines_of(other) == "2 threads"


def test_the_gpu_benchmark_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on where it stopped, and its page shows what it measured beside the estimates."""
    out, page = tmp_path / "points.jsonl", tmp_path / "gpu.md"
    sizes = ["--tokens", "16", "--most", "32", "--learn-chunk", "8", "--prefill-chunk", "16"]
    always = ["--device", "cpu", "--models", "tiny lora", "--out", str(out), *sizes]
    for some in ("ordinary,1.0", "ordinary,checkpointing,1.0"):
        assert gpu.main([*always, "--ways", some]) == 0
    points = gpu_page.read(out)
    assert [(point.way, point.tokens) for point in points] == [
        (way, tokens) for way in ("ordinary", "1.0", "checkpointing") for tokens in (16, 32)
    ]
    gpu_page.rewrite(out, points[:3])
    assert gpu.main(["--out", str(out), "--estimate"]) == 0
    points = gpu_page.read(out)
    assert all(point.estimate > 0 for point in points)
    full = dataclasses.replace(points[0], tokens=64, seconds=None)
    gpu_page.write(out, full)
    assert gpu.main(["--out", str(out), "--page", str(page)]) == 0
    (row,) = re.findall(r"^\| ordinary .*$", page.read_text(), re.MULTILINE)
    assert row.endswith("| out of memory |")
    assert list(tmp_path.glob("gpu-cpu-*-tiny-lora.svg"))
    capsys.readouterr()
    assert gpu.main(["--out", str(tmp_path / "none.jsonl"), "--page", str(page)]) == 2
    out.write_text("{}\n")
    assert gpu.main(["--out", str(out), "--page", str(page)]) == 2
    assert "line 1 is no point" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.parse(["--ways", "2.0"])


@pytest.mark.sweep
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_every_way_of_the_gpu_benchmark(tuning: str, tmp_path: Path) -> None:
    out = tmp_path / "points.jsonl"
    sizes = ["--tokens", "16", "--most", "16", "--learn-chunk", "8", "--prefill-chunk", "8"]
    always = ["--device", "cpu", "--models", f"tiny {tuning}", "--out", str(out), *sizes]
    for _ in range(2):  # the second finds all points in the file
        assert gpu.main([*always, "--ways", ",".join(gpu.WAYS)]) == 0
    points = gpu_page.read(out)
    assert [point.way for point in points] == list(gpu.WAYS)
    assert all(point.seconds for point in points)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quickstart", ["kept 26 of 256 tokens", "prefill", "GradientCheck(error="]),
        ("torch_compile_backend", ["step 4: loss", "kept 23 of 90"]),
    ],
)
def test_the_short_examples_run(
    name: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(Path(demo.__file__).with_name(f"{name}.py")), run_name="__main__")
    printed = capsys.readouterr().out
    assert [part for part in said if part not in printed] == []
