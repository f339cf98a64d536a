"""What is known of the paper's settings, each with its source, and what runs here take instead.

The paper is arXiv 2601.19739. What its abstract doesn't say, and what nothing else that was read
says of it, is "not known" here; no value is guessed to be the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ABSTRACT = "abstract of arXiv 2601.19739"
METHOD = "arXiv 2601.19739, section 3 (docs/scoring.md)"
UNCHECKED = "said of the paper, not checked against it"
INDEX = "an index of the paper's benchmarks (wizwand.com)"
SCRIPT = "TokenTune's script"
"""Defaults of the training script published with TokenTune, from a public copy: TokenSeek's own
are not known."""
UNKNOWN = "not known"

FIGURE = "14.8 % of the memory of ordinary training, on Llama-3.2-1B"
"""arXiv's abstract's figure; which of the paper's rows and columns it is of, is not known."""

FIGURE_ICLR = "2.8 GB"
"""The same in bytes, which the abstract of the ICLR version has and arXiv's has not."""

FEWSHOT = {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "winogrande": 0}
"""Examples in a prompt, by task; another task has its own number. Source: INDEX."""


@dataclass(frozen=True)
class Setting:
    """A setting: what the paper has, where that is from, and what offline runs take instead."""

    name: str
    paper: str
    source: str
    offline: str


SETTINGS = (
    Setting("model", "Llama-3.2-1B, and others", ABSTRACT,
            "SmolLM2-135M-Instruct: there is no hub"),
    Setting("data", "Open-Platypus", UNCHECKED, "installed documentation: there is no hub"),
    Setting("tasks", "MMLU, ARC, HellaSwag, TruthfulQA, WinoGrande", INDEX,
            "which of four pieces of a held-out text comes next"),
    Setting("examples in prompts", "5, 25, 10, 0, 0", INDEX, "none"),
    Setting("share of tokens", "10 %", UNCHECKED, "10 %"),
    Setting("selection", "top-k, among all tokens", METHOD, "the same"),
    Setting("alpha, beta", "equal", METHOD, "the same"),
    Setting("gradient score", "sum of magnitudes", METHOD, "the same"),
    Setting("rows of a step", UNKNOWN, f"{SCRIPT}: 128", "4; small: 2"),
    Setting("longest row", UNKNOWN, f"{SCRIPT}: 1024", "512; small: 192"),
    Setting("steps", UNKNOWN, f"{SCRIPT}: one epoch", "12 (by the H100: 48); small: 4"),
    Setting("learning rate", UNKNOWN, f"{SCRIPT}: 1.5e-4, cosine", "by tuner, constant"),
    Setting("weight decay", UNKNOWN, f"{SCRIPT}: 0.01", "0"),
    Setting("adapters", UNKNOWN, f"{SCRIPT}: rank 8, alpha 16, dropout 0.05",
            "LoRA, QLoRA: the script's; others: below"),
    Setting("memory of a run", UNKNOWN, f"{SCRIPT}: reserved by the allocator",
            "all that tensors take"),
)  # fmt: skip

RATES = {
    "full": 2e-5, "ia3": 5e-3, "lora": 5e-4, "lokr": 1e-3, "boft": 1e-3, "bone": 5e-4,
    "loha": 1e-3, "qlora": 5e-4,
}  # fmt: skip
"""Learning rates by tuner. Source: ours, chosen without a search; the paper's are not known."""

PRESETS: dict[str, dict[str, Any]] = {
    # Sources: model, data, tasks as above; batch, tokens, schedule and decay: SCRIPT.
    "paper": {
        "model": "meta-llama/Llama-3.2-1B", "data": "garage-bAInd/Open-Platypus",
        "tasks": ",".join(FEWSHOT), "seeds": 1, "steps": 0, "batch": 4, "accumulate": 32,
        "tokens": 1024, "held_out": 256, "questions": 0, "context": 0, "schedule": "cosine",
        "decay": 0.01, "dtype": "bfloat16", "what": "table,ablations", "also": "",
    },
    # On two cores: hours.
    "offline": {
        "model": None, "data": None, "tasks": "continuation", "seeds": 3, "steps": 12, "batch": 4,
        "accumulate": 1, "tokens": 512, "held_out": 12, "questions": 32, "context": 48,
        "schedule": "constant", "decay": 0.0, "dtype": "float32", "what": "table,ablations",
        "also": "recommended,parts",
    },
    # On two cores: 16 minutes.
    "small": {
        "model": None, "data": None, "tasks": "continuation", "seeds": 1, "steps": 4, "batch": 2,
        "accumulate": 1, "tokens": 192, "held_out": 6, "questions": 8, "context": 48,
        "schedule": "constant", "decay": 0.0, "dtype": "float32", "what": "table", "also": "",
    },
}  # fmt: skip
"""Defaults of the arguments. `steps` of 0 are one epoch."""
