"""Training loops that people use: transformers' Trainer, TRL, accelerate with DDP, one's own."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp
import pytest
import torch
from models import batch, tiny_llama, tiny_lora
from reports import Words
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import fxseek
from fxseek.inspect.compare import compare
from fxseek.inspect.reference import masked_backprop

VOCABULARY = 37


class Rows(Dataset[dict[str, Any]]):
    """Rows of one padded batch, with a column that no model takes."""

    def __init__(self, rows: int, tokens: int = 11, **options: Any) -> None:
        self.batch = batch(VOCABULARY, rows, tokens, padding="right", labels="some", **options)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[index] for name, value in self.batch.items()} | {"title": "a row"}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(settings | options))


def small() -> Any:
    """One layer, for what is not about gradients: captured in half the time."""
    return tiny_llama(num_hidden_layers=1)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compiled(model: nn.Module, ratio: float | str = 0.3, **options: Any) -> Any:
    return fxseek.compile(model, ratio, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Watch(TrainerCallback):
    """Notes each step's gradients and what was selected in each forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: list[dict[str, Tensor]] = []
        self.reports: list[fxseek.StepReport] = []
        self.batches: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients.append(gradients(self.model))


class Watched(Trainer):
    """A Trainer that notes each forward's arguments and report in its `Watch`."""

    watch: Watch

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model is not None and self.model.training:
            self.watch.batches.append(dict(inputs))
            self.watch.reports.append(fxseek.report(self.watch.model))
        return result


def watched(model: nn.Module, args: TrainingArguments, **options: Any) -> tuple[Watched, Watch]:
    watch = Watch(model)
    callbacks = [watch, *options.pop("callbacks", [])]
    trainer = Watched(model, args, callbacks=callbacks, **options)  # type: ignore[arg-type]
    trainer.watch = watch
    return trainer, watch


# ---- transformers' Trainer -----------------------------------------------------------------------


def accumulated(model: nn.Module, watch: Watch, batches: slice) -> dict[str, Tensor]:
    """Masked full backprop of several micro-batches, normalised as Trainer does: by all labels."""
    pairs = list(zip(watch.batches[batches], watch.reports[batches], strict=True))
    total = sum(int((given["labels"][:, 1:] != -100).sum()) for given, _ in pairs)
    result: dict[str, Tensor] = {}
    for given, report in pairs:
        own = int((given["labels"][:, 1:] != -100).sum())
        found = masked_backprop(model, given, report.selected, weights=report.weights).gradients
        for name, gradient in found.items():
            result[name] = result.get(name, 0) + gradient * (own / total)
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"score": "tokenseek"},
        pytest.param({"score": "random"}, marks=pytest.mark.sweep),
        {"score": "random", "learn_chunk": 2},
    ],
    ids=str,
)
def test_accumulated_gradients_are_those_of_masked_backprop(options, tmp_path):
    model = compiled(tiny_llama(), **options)
    start = copy.deepcopy(model)
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0)
    trainer, watch = watched(model, args, train_dataset=Rows(8))
    trainer.train()
    assert len(watch.reports) == 2
    assert [report.step for report in watch.reports] == [0, 1]
    wanted = accumulated(start, watch, slice(0, 2))
    assert compare(watch.gradients[0], wanted).error <= 1e-5


def test_autocast_trains_all_parameters(tmp_path):
    model = compiled(tiny_llama())
    start = copy.deepcopy(model)
    args = arguments(tmp_path, bf16=True, max_steps=1, max_grad_norm=0)
    trainer, watch = watched(model, args, train_dataset=Rows(8))
    trainer.train()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = accumulated(start, watch, slice(0, 1))
    assert set(watch.gradients[0]) == {name for name, _ in model.named_parameters()}
    assert compare(watch.gradients[0], wanted).error <= 0.05


def test_evaluation_uses_the_original_forward(tmp_path):
    model, rows = compiled(small()), Rows(4)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(model, args, train_dataset=Rows(8), eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert fxseek.report(model).step == 1
    trained = trainer.evaluate()["eval_loss"]
    evaluated = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    assert evaluated[-1] == pytest.approx(trained)
    assert trained != before
    fxseek.uncompile(model).eval()
    with torch.no_grad():
        assert model(**rows.batch).loss.item() == pytest.approx(trained, rel=1e-5)


def test_unused_columns_are_removed(tmp_path):
    trainer, watch = watched(compiled(small()), arguments(tmp_path), train_dataset=Rows(8))
    trainer.train()
    assert set(watch.batches[0]) == {"input_ids", "attention_mask", "labels"}


def test_torch_compile_around_the_model_leaves_the_step_alone(tmp_path):
    plain = Trainer(compiled(small()), arguments(tmp_path), train_dataset=Rows(8))
    plain.train()
    model = compiled(small())
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer = Trainer(model, args, train_dataset=Rows(8))
    trainer.train()
    assert fxseek.report(model).step == 1
    assert losses(trainer) == pytest.approx(losses(plain))


# ---- save and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"score": "random", "ratio": "0.2->0.6"},
        pytest.param({"select": "sample", "span": 3}, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(options, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}

    def trainer() -> tuple[Watched, Watch]:
        args = arguments(tmp_path, max_steps=4, **saving)
        model = compiled(small(), **options)
        callbacks = [fxseek.SeekCallback()]
        return watched(model, args, train_dataset=Rows(20), callbacks=callbacks)

    whole, watched_whole = trainer()
    whole.train()
    resumed, watched_resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [report.step for report in watched_resumed.reports] == [4, 5, 6, 7]
    for a, b in zip(watched_whole.reports[4:], watched_resumed.reports, strict=True):
        assert torch.equal(a.selected, b.selected)
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(a, b)


@pytest.mark.parametrize("told", [False, True])
def test_resuming_from_a_checkpoint_without_the_callback(told, tmp_path, caplog):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    Trainer(compiled(small()), args, train_dataset=Rows(8)).train()
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    model = compiled(small())
    if told:
        fxseek.resume(model, 7)
    trainer = Trainer(model, args, train_dataset=Rows(8), callbacks=[fxseek.SeekCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fxseek.report(model).step == (7 if told else 0)
    assert ("call fxseek.resume" in caplog.text) is not told


def test_resuming_from_a_checkpoint_with_two_callbacks(tmp_path):
    def trainer(steps: int) -> Trainer:
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        both: list[TrainerCallback] = [fxseek.SeekCallback(), fxseek.SeekCallback()]
        return Trainer(compiled(small()), args, train_dataset=Rows(8), callbacks=both)

    trainer(2).train()
    again = trainer(3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fxseek.report(again.model).step == 2


def test_resume_in_a_loop_of_ones_own():
    given = batch(VOCABULARY, 2, 17)
    model = compiled(small(), score="random")
    selected = []
    for _ in range(3):
        model(**given)
        selected.append(fxseek.report(model).selected)
    again = compiled(small(), score="random")
    fxseek.resume(again, 2)
    again(**given)
    assert torch.equal(fxseek.report(again).selected, selected[2])
    assert not torch.equal(selected[0], selected[2])
    with pytest.raises(fxseek.InputError, match="integer of at least 0"):
        fxseek.resume(again, -1)
    with pytest.raises(fxseek.InputError, match="not compiled"):
        fxseek.resume(tiny_llama(), 1)


# ---- the callback --------------------------------------------------------------------------------


def test_a_share_is_one_where_all_tokens_are_kept(tmp_path):
    """Padding counts neither among the selected nor among all."""
    model = fxseek.compile(tiny_llama(), 1.0, learn_chunk=5)
    trainer, watch = watched(
        model, arguments(tmp_path, logging_steps=1), train_dataset=Rows(8),
        callbacks=[fxseek.SeekCallback()],
    )  # fmt: skip
    trainer.train()
    assert any((given["attention_mask"] == 0).any() for given in watch.batches)
    shares = [x["fxseek/selected"] for x in trainer.state.log_history if "fxseek/selected" in x]
    assert shares == [1.0] * len(watch.batches)


class Reporter(TrainerCallback):
    """What TensorBoard and others see: `logs` as they are when it is their turn."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def test_the_callback_logs_through_reporters(tmp_path):
    model, reporter = compiled(small()), Reporter()
    args = arguments(tmp_path, gradient_accumulation_steps=2, logging_steps=2)
    trainer, watch = watched(model, args, train_dataset=Rows(8), callbacks=[reporter])
    assert fxseek.SeekCallback().attach(trainer).timings
    trainer.train()
    seen = reporter.logs[0]
    valid = [int(given["attention_mask"].sum()) for given in watch.batches]
    shares = [int((r.selected >= 0).sum()) / n for r, n in zip(watch.reports, valid, strict=True)]
    assert len(shares) == 4
    assert seen["fxseek/selected"] == pytest.approx(sum(shares) / 4, abs=1e-6)
    full = [float(r.full_loss) for r in watch.reports if r.full_loss is not None]
    assert seen["fxseek/full_loss"] == pytest.approx(sum(full) / 4, abs=1e-5)
    saved = sum(r.saved_bytes for r in watch.reports) / 4
    assert seen["fxseek/saved_mib"] == pytest.approx(saved / 2**20, abs=1e-5)
    stages = {key.rsplit("/")[-1] for key in seen if key.startswith("fxseek/seconds/")}
    assert stages == {"prefill", "score", "select", "gather", "learn"}
    assert all(seen[f"fxseek/seconds/{stage}"] > 0 for stage in stages)
    assert seen["fxseek/peak_mib"] > 1
    history = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert history["fxseek/selected"] == seen["fxseek/selected"]
    assert not any("fxseek" in key for key in reporter.logs[-1])  # the summary of the run
    model(**batch(VOCABULARY))
    assert fxseek.report(model).timings is None


def test_the_callback_knows_how_long_a_schedule_is(tmp_path):
    model, reporter = compiled(small(), ratio="0.2->0.8"), Reporter()
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, logging_steps=1)
    trainer, watch = watched(model, args, train_dataset=Rows(8), callbacks=[reporter])
    fxseek.SeekCallback().attach(trainer)
    trainer.train()
    assert [report.ratio for report in watch.reports] == pytest.approx([0.2, 0.2, 0.8, 0.8])
    seen = [logs["fxseek/ratio"] for logs in reporter.logs if "fxseek/ratio" in logs]
    assert seen == pytest.approx([0.2, 0.8])


def test_the_callback_counts_tokens_by_the_mask(tmp_path):
    def score(given: fxseek.ScoreInputs) -> torch.Tensor:
        rising = torch.arange(given.valid.shape[1]).expand(given.valid.shape)
        return torch.where(rising < 5, -torch.inf, rising.float())  # valid tokens, the last choice

    for kind in ("random", score):
        model, reporter = compiled(small(), score=kind), Reporter()
        trainer, watch = watched(model, arguments(tmp_path), train_dataset=Rows(8))
        fxseek.SeekCallback(timings=False).attach(trainer)
        trainer.add_callback(reporter)
        trainer.train()
        valid = [int(given["attention_mask"].sum()) for given in watch.batches]
        padded = [given["attention_mask"].numel() for given in watch.batches]
        assert valid != padded
        shares = [
            int((r.selected >= 0).sum()) / n for r, n in zip(watch.reports, valid, strict=True)
        ]
        seen = [logs["fxseek/selected"] for logs in reporter.logs if "fxseek/selected" in logs]
        assert sum(seen) == pytest.approx(sum(shares), abs=1e-5)
        for report in watch.reports:
            assert torch.equal(report.valid, report.scores > -torch.inf) == (kind == "random")


def test_the_callback_as_trainer_takes_callbacks(tmp_path):
    model = compiled(small(), score="random")
    callback = fxseek.SeekCallback(timings=False)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows(8), callbacks=[callback])
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry if "fxseek" in key}
    assert keys == {"fxseek/selected", "fxseek/saved_mib", "fxseek/peak_mib"}


class WandbCallback(TrainerCallback):
    """A reporter with a library that takes pages, as wandb's and trackio's are."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self._wandb = SimpleNamespace(
            Html=lambda path, inject: (path, inject), log=self.logs.append
        )


class TrackioCallback(WandbCallback):
    def __init__(self) -> None:
        super().__init__()
        self._trackio = self.__dict__.pop("_wandb")


class TensorBoardCallback(TrainerCallback):
    def __init__(self) -> None:
        self.texts: list[tuple[str, str, int]] = []
        self.tb_writer = SimpleNamespace(add_text=lambda *given: self.texts.append(given))


def test_the_callback_writes_token_pages(tmp_path):
    model, wandb, board = compiled(small()), WandbCallback(), TensorBoardCallback()
    trackio = TrackioCallback()
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2)
    words = Words([f" w{i}" for i in range(VOCABULARY)])
    reporters = [wandb, trackio, board]
    trainer, watch = watched(model, args, train_dataset=Rows(16), callbacks=reporters)
    fxseek.SeekCallback(html_every=2, tokenizer=words).attach(trainer)
    trainer.train()
    written = sorted(path.name for path in (tmp_path / "fxseek").iterdir())
    assert written == ["tokens-2.html", "tokens-4.html"]
    assert len(watch.reports) == 8
    for step in (2, 4):
        page = (tmp_path / "fxseek" / f"tokens-{step}.html").read_text()
        assert page == watch.reports[2 * step - 1].to_html(
            words
        )  # the last micro-batch of the step
    assert [entry["train/global_step"] for entry in wandb.logs] == [2, 4]
    assert wandb.logs[0]["fxseek/tokens"] == (str(tmp_path / "fxseek" / "tokens-2.html"), False)
    assert trackio.logs == wandb.logs
    assert [(name, step) for name, _, step in board.texts] == [("fxseek/tokens", x) for x in (2, 4)]
    assert "<strong>" in board.texts[0][1]


def test_token_pages_never_stop_a_run(tmp_path, caplog):
    (tmp_path / "fxseek").write_text("in the way of a folder")
    callback = fxseek.SeekCallback(html_every=1, tokenizer=Words([" w"] * VOCABULARY))
    trainer = Trainer(
        compiled(small()), arguments(tmp_path), train_dataset=Rows(8), callbacks=[callback]
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert sum("no token page" in message for message in caplog.messages) == 1


def test_a_reporter_that_fails_never_stops_a_run(tmp_path, caplog):
    def fail(logs: Any) -> None:
        raise ConnectionError("the service is down")

    for library in (
        SimpleNamespace(log=fail, Html=lambda path, inject: path),
        SimpleNamespace(log=lambda logs: None),  # it has no Html
    ):
        caplog.clear()
        reporter = WandbCallback()
        reporter._wandb = library  # type: ignore[assignment]
        trainer = Trainer(
            compiled(small()), arguments(tmp_path), train_dataset=Rows(8), callbacks=[reporter]
        )
        words = Words([f" w{i}" for i in range(VOCABULARY)])
        fxseek.SeekCallback(html_every=1, tokenizer=words).attach(trainer)
        trainer.train()
        assert trainer.state.global_step == 2
        told = [message for message in caplog.messages if "no token page for" in message]
        assert len(told) == 1 and "WandbCallback" in told[0]
        assert (tmp_path / "fxseek" / "tokens-2.html").exists()


def test_each_failure_is_told_once(tmp_path, caplog):
    """One of a reporter does not silence those of the files that follow."""

    def fail(logs: Any) -> None:
        if not (tmp_path / "fxseek").is_file():
            shutil.rmtree(tmp_path / "fxseek")
            (tmp_path / "fxseek").write_text("in the way of a folder")
        raise ConnectionError("the service is down")

    reporter = WandbCallback()
    reporter._wandb = SimpleNamespace(log=fail, Html=lambda path, inject: path)
    trainer = Trainer(
        compiled(small()), arguments(tmp_path, max_steps=3), train_dataset=Rows(16),
        callbacks=[reporter],
    )  # fmt: skip
    words = Words([f" w{i}" for i in range(VOCABULARY)])
    fxseek.SeekCallback(html_every=1, tokenizer=words).attach(trainer)
    trainer.train()
    told = [message for message in caplog.messages if "no token page" in message]
    assert len(told) == 2
    assert "for WandbCallback" in told[0] and "of step 2" in told[1]


def test_after_training_nothing_is_known_of_its_progress(tmp_path):
    model = compiled(small(), ratio="0.2->0.8")
    Trainer(
        model, arguments(tmp_path), train_dataset=Rows(8), callbacks=[fxseek.SeekCallback()]
    ).train()
    with pytest.raises(fxseek.ConfigError, match="ratio_steps="):
        model.train()(**batch(VOCABULARY))


def test_after_a_run_that_was_cut_short_nothing_is_known_of_it(tmp_path):
    class Stops(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = compiled(small(), ratio="0.2->0.8")
    callback = fxseek.SeekCallback()

    def trainer(steps: int, *others: TrainerCallback) -> Trainer:
        args = arguments(tmp_path, max_steps=steps)
        callbacks = [*others, callback]
        return Trainer(model, args, train_dataset=Rows(8), callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        trainer(4, Stops()).train()
    with pytest.raises(fxseek.ConfigError, match="ratio_steps="):
        model.train()(**batch(VOCABULARY))
    again = trainer(1)
    again.train()  # its means are of its own forwards
    (told,) = [line for line in again.state.log_history if "fxseek/ratio" in line]
    assert told["fxseek/ratio"] == pytest.approx(0.2)


def test_attached_twice_it_is_there_once(tmp_path):
    callback = fxseek.SeekCallback()
    trainer = Trainer(
        compiled(small()), arguments(tmp_path), train_dataset=Rows(8), callbacks=[callback]
    )
    assert callback.attach(trainer).attach(trainer) is callback
    assert trainer.callback_handler.callbacks[0] is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    for wrong in (None, trainer.model):
        with pytest.raises(fxseek.InputError, match="pass the Trainer"):
            callback.attach(wrong)


def test_a_callback_that_the_trainer_makes_anew_says_so(tmp_path):
    """Without its place before the reporters and its tokenizer it would be silent."""
    words = Words([f" w{i}" for i in range(VOCABULARY)])
    for restored in (False, True):
        options = {"restore_callback_states_from_checkpoint": restored}
        folder = tmp_path / str(restored)
        for steps in (2, 4):
            args = arguments(
                folder, max_steps=steps, save_strategy="steps", save_steps=2, **options
            )
            trainer = Trainer(compiled(small()), args, train_dataset=Rows(16))
            fxseek.SeekCallback(html_every=1, tokenizer=words).attach(trainer)
            last = str(folder / "checkpoint-2") if steps > 2 else None
            if restored and last:
                with pytest.raises(
                    fxseek.InputError, match=r"restore_callback_states.*Leave it out"
                ):
                    trainer.train(resume_from_checkpoint=last)
            else:
                trainer.train(resume_from_checkpoint=last)
                assert trainer.state.global_step == steps


def test_a_callback_that_was_not_attached_is_made_anew_by_the_checkpoint(tmp_path, caplog):
    """What it is given has no effect: that is said, and an error where pages would have none."""
    words = Words([f" w{i}" for i in range(VOCABULARY)])

    def train(steps: int, folder: str, **options: Any) -> None:
        args = arguments(
            tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=2,
            restore_callback_states_from_checkpoint=steps > 2,
        )  # fmt: skip
        callbacks: list[TrainerCallback] = [fxseek.SeekCallback(**options)]
        trainer = Trainer(compiled(small()), args, train_dataset=Rows(16), callbacks=callbacks)
        last = str(tmp_path / folder / "checkpoint-2") if steps > 2 else None
        trainer.train(resume_from_checkpoint=last)

    train(2, "plain")
    assert "anew" not in caplog.text
    train(3, "plain", html_every=1, tokenizer=words)
    assert "the one given has no effect" in caplog.text
    train(2, "pages", html_every=1, tokenizer=words)
    with pytest.raises(fxseek.InputError, match=r"without its tokenizer .*Leave it out"):
        train(3, "pages", html_every=1, tokenizer=words)


def test_what_token_pages_need_is_said_before_a_run(tmp_path):
    words = Words([" w"] * VOCABULARY)
    measured = "the model is compiled to measure none"
    cases: list[tuple[Any, Any, str]] = [
        ({}, None, "pass tokenizer=, or give the Trainer a processing_class"),
        ({"score": "random"}, words, measured),
        ({"ratio": "labelled"}, words, measured),
        ({}, "gpt2", "tokenizer= is needed to show tokens as text, and got str"),
    ]
    for options, tokenizer, told in cases:
        callback = fxseek.SeekCallback(html_every=1, tokenizer=tokenizer)
        model = compiled(small(), **options)
        trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows(8), callbacks=[callback])
        with pytest.raises(fxseek.InputError, match=told):
            trainer.train()
    for every in (0, -1, True, 1.5):
        with pytest.raises(fxseek.InputError, match="must be a number of steps"):
            fxseek.SeekCallback(html_every=every)  # type: ignore[arg-type]


def test_the_callback_tells_that_the_model_is_not_compiled(tmp_path):
    trainer = Trainer(
        tiny_llama(),  # type: ignore[arg-type]
        arguments(tmp_path),
        train_dataset=Rows(8),
        callbacks=[fxseek.SeekCallback()],
    )
    with pytest.raises(fxseek.InputError, match=r"not compiled.*fxseek\.compile\(trainer\.model\)"):
        trainer.train()


def test_the_callback_refuses_copies_on_several_devices(tmp_path):
    given = arguments(tmp_path)
    _ = given.n_gpu  # which sets it up
    given._n_gpu = 2
    model: Any = fxseek.compile(tiny_llama())
    trainer = Trainer(model, given, train_dataset=Rows(8), callbacks=[fxseek.SeekCallback()])
    with pytest.raises(fxseek.InputError, match=r"2 GPUs.*torchrun.*CUDA_VISIBLE_DEVICES"):
        trainer.train()


def test_fxseek_does_not_import_transformers():
    code = "import sys, fxseek; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no_such_name"):
        fxseek.no_such_name  # type: ignore[attr-defined]  # noqa: B018


# ---- a plain loop --------------------------------------------------------------------------------


def test_a_plain_loop_learns_a_batch():
    model = compiled(small(), 0.5, supervised_only=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = last = None
    for step in range(30):
        given = batch(VOCABULARY, 2, 11 + step % 2)
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()
        last = fxseek.report(model).full_loss
        first = last if first is None else first
    assert first is not None
    assert last is not None
    assert last < 0.6 * first


# ---- after training ------------------------------------------------------------------------------


def train(model: Any, steps: int = 3) -> Any:
    """A few steps of ordinary gradient descent."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(VOCABULARY, 2, 11, seed=step)).loss.backward()
        optimizer.step()
    return model


def generate(model: Any) -> Tensor:
    ids = torch.arange(3, 10)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )


def test_saving_reloading_and_generating_after_training(tmp_path):
    model = train(compiled(tiny_llama()))
    model.eval()
    written = generate(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    fxseek.uncompile(model)
    assert torch.equal(generate(model), written)
    assert torch.equal(generate(loaded), written)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_generating_in_training_mode():
    model = train(compiled(tiny_llama()))
    written = generate(model)
    assert torch.equal(generate(fxseek.uncompile(model)), written)


def test_an_adapter_is_saved_reloaded_and_merged(tmp_path):
    from peft import PeftModel

    base = tiny_llama()
    model = train(compiled(tiny_lora(copy.deepcopy(base))))
    model.save_pretrained(tmp_path)
    given: Any = batch(VOCABULARY)
    plain: Any = fxseek.uncompile(copy.deepcopy(model)).eval()
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = plain(**given).logits
        assert torch.equal(model.eval()(**given).logits, wanted)
        assert torch.equal(loaded(**given).logits, wanted)
    merged = model.merge_and_unload()
    wanted = plain.merge_and_unload()
    assert torch.equal(generate(merged), generate(wanted))
    for a, b in zip(merged.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)
    merged.train().requires_grad_(True)  # a model of its own again, which may be compiled
    assert fxseek.check_gradients(compiled(merged), **given).error <= 1e-4


# ---- accelerate and DDP --------------------------------------------------------------------------


def test_ddp_on_two_processes(tmp_path):
    outcomes = ddp.run(ddp.worker, tmp_path)
    single = fxseek.compile(tiny_llama(), **ddp.OPTIONS)
    single(**ddp.rows(0, 4)).loss.backward()
    wanted = gradients(single)
    for found in outcomes:
        for way in ("gradients", "in_parts"):
            assert compare(found[way], wanted).error <= 1e-5, way
        assert "learned in parts of 2 tokens" in found["explained"]
        assert "compile the inner module before wrapping" in found["compile_ddp"]
        for way in ("compile_fsdp", "fsdp_after"):
            assert "the first FSDP" in found[way], (way, found[way])
            assert "FSDP2" in found[way]
