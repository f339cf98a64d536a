"""Tasks by lm-eval (EleutherAI's harness), and one made of the held-out text."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from common import IGNORED, Row, Tokenizer
from reproduce.paper import FEWSHOT

LOCAL = "continuation"
"""The task made of the held-out text: which of four pieces of an answer comes next in it."""

WORDS, CHOICES = 8, 4
METRICS = ("acc_norm", "acc", "exact_match")
"""What counts as a task's score: the first of these that it has, as leaderboards of lm-eval do."""


def documents(
    rows: Sequence[Row], tokenizer: Tokenizer, count: int, context: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Questions about held-out rows, at most `count`.

    Each is a prompt with the beginning of its answer, cut at a random word, `context` words at most
    (and `WORDS` at least; 0 for any number), and four pieces of `WORDS` words: what follows, and
    pieces from further behind in the same answer. Rows whose answer is too short are passed over.
    """
    draw = random.Random(seed)
    texts: list[tuple[str, list[str]]] = []
    for row in rows:
        prompt = [i for i, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
        answer = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORED]
        words = re.findall(r"\s*\S+", _text(tokenizer, answer, skip_special_tokens=True))
        if len(words) >= (CHOICES + 1) * WORDS:
            texts.append((_text(tokenizer, prompt), words))
    found: list[dict[str, Any]] = []
    while texts and len(found) < count:
        prompt, words = texts[len(found) % len(texts)]
        most = len(words) - CHOICES * WORDS
        at = draw.randint(WORDS, max(WORDS, min(most, context)) if context else most)
        pieces = ["".join(words[i : i + WORDS]) for i in range(at, len(words) - WORDS + 1, WORDS)]
        choices = draw.sample(pieces[1:], CHOICES - 1)
        right = draw.randrange(CHOICES)
        choices.insert(right, pieces[0])
        question = prompt + "".join(words[:at])
        found.append({"question": question, "choices": choices, "answer": right})
    return found


def _text(tokenizer: Tokenizer, ids: list[int], **options: Any) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options)
    assert isinstance(text, str)
    return text


def write(folder: Path, found: Sequence[dict[str, Any]]) -> None:
    """The local task, as lm-eval's --include_path takes it too."""
    data = folder / f"{LOCAL}.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in found), encoding="utf-8")
    task = {
        "task": LOCAL,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }
    (folder / f"{LOCAL}.yaml").write_text(json.dumps(task), encoding="utf-8")  # YAML too


def lacking() -> str | None:
    """What lm-eval needs that is not installed."""
    for package in ("lm_eval", "datasets"):
        if importlib.util.find_spec(package) is None:
            return f'{package} is not installed: pip install ".[reproduce]"'
    return None


def unusable(names: Sequence[str]) -> dict[str, str]:
    """Tasks that lm-eval doesn't know, whose data can't be had, or that have no score, and why.

    What data can be had is downloaded by this, before any run.
    """
    names = [name for name in names if name != LOCAL]
    if not names:
        return {}
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: dict[str, str] = {}
    known = TaskManager()
    for name in names:
        if name not in known.all_tasks:
            found[name] = "lm-eval has no such task"
            continue
        try:
            loaded = _load(known, name)
        except Exception as error:  # of the network, of the hub, of the data set
            reason = str(error).partition("\n")[0] or type(error).__name__
            found[name] = f"its data can't be had ({reason})"
            continue
        if loaded is None:
            found[name] = "it is a tag: name its tasks in --tasks instead"
        elif not {*METRICS} & _metrics(loaded):
            found[name] = f"it has none of {', '.join(METRICS)}: leave it out of --tasks"
    return found


def _load(known: Any, name: str) -> Any:
    """A task or a group with its data; None for a tag, which has no results of its own."""
    loaded = known.load([name])
    return {**loaded["tasks"], **loaded["groups"]}.get(name)


def _metrics(loaded: Any) -> set[str]:
    if hasattr(loaded, "aggregate_metric_list"):  # a group's
        return {some.metric for some in loaded.aggregate_metric_list or ()}
    return {*loaded.aggregation()}


def build(names: Sequence[str], folder: Path) -> tuple[Any, dict[str, Any]]:
    """lm-eval's manager and the tasks with their data, which may fail: so before training."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _silent():
        known = TaskManager(include_path=str(folder), include_defaults={*names} != {LOCAL})
        return known, {name: _load(known, name) for name in names}


def evaluate(
    model: nn.Module, tokenizer: Tokenizer, built: tuple[Any, dict[str, Any]], batch: int,
    place: int = 0,
) -> dict[str, float]:  # fmt: skip
    """The score in per cent of each task of `build`, of the ordinary model.

    `place` is the line of the progress bar.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    harness: Any = lm_eval  # pyright may not find it
    known, loaded = built
    model.eval()
    scores: dict[str, float] = {}
    # Made before lm-eval's own are silenced.
    bar = tqdm(loaded.items(), "evaluation", unit="task", leave=False, position=place)
    with _silent(), bar:
        language: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)  # type: ignore[arg-type]
        for name, task in bar:
            found: Any = harness.simple_evaluate(
                language, tasks=[task], num_fewshot=FEWSHOT.get(name), task_manager=known,
                bootstrap_iters=0, log_samples=False,
            )  # fmt: skip
            scores[name] = score({**found["results"], **found.get("groups", {})}[name])
    return scores


def score(results: dict[str, Any]) -> float:
    """In per cent. A metric's name has that of a filter of the answers: ``exact_match,none``."""

    def place(name: str) -> tuple[int, bool, str]:
        metric, _, kind = name.partition(",")
        return METRICS.index(metric), kind not in ("none", "strict-match"), name

    return 100 * float(results[min((x for x in results if x.split(",")[0] in METRICS), key=place)])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without lm-eval's remarks and progress bars."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
