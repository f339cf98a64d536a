"""What is known of the paper's settings and figures, each with its source, and what runs here take.

The paper is arXiv 2601.19739. Its text was not at hand: figures are those that published notes on
it quote, and what neither these nor its abstract say is "not known" here; no value is guessed to be
the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ABSTRACT = "abstract of arXiv 2601.19739"
METHOD = "arXiv 2601.19739, section 3 (docs/scoring.md)"
NOTES = "notes on the paper (github.com/zhaoyang97/Paper-Notes)"
INDEX = "an index of the paper's benchmarks (wizwand.com)"
COMMAND = "TokenTune's command"
"""For Open-Platypus, in the README of TokenTune's repository, which trains Llama-2-7B with LoRA."""
SCRIPT = "TokenTune's script"
"""What its command leaves to the script, `finetune.py`: TokenSeek's own is not published."""
UNKNOWN = "not known"

OFFLINE = "SmolLM2-135M-Instruct.Q4_1"
"""What the offline presets' model is called."""

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
    Setting("data", "Open-Platypus", NOTES, "installed documentation: there is no hub"),
    Setting("tasks", "MMLU, ARC, HellaSwag, TruthfulQA, WinoGrande", NOTES,
            "which of four pieces of a held-out text comes next"),
    Setting("examples in prompts", "5, 25, 10, 0, 0", INDEX, "none"),
    Setting("share of tokens", "10 %", NOTES, "10 %"),
    Setting("selection", "top-k, among all tokens", METHOD, "the same"),
    Setting("alpha, beta", "1, 1", NOTES, "the same"),
    Setting("gradient score", "sum of magnitudes", METHOD, "the same"),
    Setting("ablation of the share", "QLoRA", NOTES, "full parameter"),
    Setting("ablation of alpha, beta", UNKNOWN, "–", "full parameter"),
    Setting("rows of a step", UNKNOWN, f"{COMMAND}: 32, one at a time", "4; small: 2"),
    Setting("longest row", UNKNOWN, f"{COMMAND}: 2048", "512; small: 192"),
    Setting("steps", UNKNOWN, f"{COMMAND}: one epoch", "12 (by the H100: 48); small: 4"),
    Setting("learning rate", UNKNOWN, f"{COMMAND}: 4e-4, cosine, 100 steps of warm-up",
            "by tuner, constant"),
    Setting("weight decay", UNKNOWN, f"{COMMAND}: 0.01", "0"),
    Setting("optimiser", UNKNOWN, f"{SCRIPT}: AdamW, gradients clipped to a norm of 1",
            "AdamW, not clipped; with a model of the hub, too"),
    Setting("dtype", UNKNOWN, f"{COMMAND}: bfloat16", "float32"),
    Setting("quantisation", UNKNOWN, f"{SCRIPT}: NF4, quantised twice", "the same"),
    Setting("adapters", UNKNOWN, f"{SCRIPT}: rank 8, alpha 16, dropout 0.05, on the MLP's layers",
            "LoRA, QLoRA: the same, on all linear layers; others: below"),
    Setting("prompt", UNKNOWN, f"{COMMAND}: Alpaca's template",
            "the model's chat form; where it has none, Alpaca's headings"),
    Setting("memory of a run", UNKNOWN, f"{SCRIPT}: reserved by the allocator",
            "all that tensors take"),
)  # fmt: skip

Figures = tuple[float | None, float | None, float]
"""Average and maximal memory as per cent of full-parameter training on every token, and score."""

FIGURES: dict[str, Figures] = {
    "full": (100.0, 100.0, 40.82),
    "loha": (92.3, 99.4, 52.28),
    "qlora": (45.6, 34.8, 52.13),
    "full+tokentune": (64.6, None, 40.75),
    "full+tokenseek": (64.6, 34.3, 41.13),
    "loha+tokenseek": (45.9, 28.4, 52.58),
    "qlora+tokentune": (14.8, None, 49.22),
    "qlora+tokenseek": (14.8, 14.3, 52.61),
}
"""The paper's table for Llama-3.2-1B, as far as NOTES quote it; other rows were not seen."""

DIFFERENCES = """\
Shares of memory depend on how much of it activations take. Llama-3.2-1B has 1.24 G parameters:
weights, gradients and AdamW's state in bfloat16, as TokenTune's script has them, are 9.9 GB, a half
of the 18.9 GB that the abstract's 14.8 % and 2.8 GB make of full-parameter training. Those of
SmolLM2-135M in float32 are 2.2 GB, about a third of what it takes with 4 rows of 512 tokens. So
there QLoRA, which shrinks these alone, saves less than the paper's, and a selection, which shrinks
activations alone, saves more. For each adapter of LoRA and QLoRA, dropout keeps a mask and an input
of its own; on the CPU the mask is as large as the input, and with rows of 512 tokens SmolLM2-135M
then takes more than full-parameter training does. On the CPU a tenth of the tokens also takes a
little more than a fifth: autograd's first sum of a parameter's gradients is in memory of its own,
and that of the tied embedding comes last where the kept tokens' logits fit one chunk
(`chunk_bytes`), when all other gradients are there; with several chunks it comes first. It is not
known what the paper's average is over. Where tokens are selected it is far above the maximal, as it
would be for a text of mostly short rows. Scores of SmolLM2-135M and of the task made of held-out
text are not to be compared with the paper's. The paper's full-parameter rows score 26 % on
HellaSwag, where guessing scores 25 % and its QLoRA rows 63 to 66 %: they have lost what the model
knew, and that its QLoRA is better than its full-parameter training says little about other learning
rates.
"""

SHARE_SCORES = {10: 52.61, 20: 51.80, 30: 52.75, 40: 52.66, 50: 52.26}
"""Score of QLoRA + TokenSeek by the share of tokens in per cent. Source: NOTES."""

FACTOR_SCORES = {(1, 0): 48.45, (0, 1): 46.39, (5, 5): 48.65, (7, 3): 48.53}
"""Score by alpha and beta; of which model and tuner, is not known. Source: NOTES."""

RATES = {
    "full": 2e-5, "ia3": 5e-3, "lora": 5e-4, "lokr": 1e-3, "boft": 1e-3, "bone": 5e-4,
    "loha": 1e-3, "qlora": 5e-4,
}  # fmt: skip
"""Learning rates by tuner of the offline presets. Source: ours, chosen without a search."""

WARM_UP = 100
"""Steps of warm-up, where a schedule has one; a fifth of the steps, if that is less. Source:
COMMAND."""

PRESETS: dict[str, dict[str, Any]] = {
    # Sources: model, data, tasks and ablations as above; the rest but seeds and held_out: COMMAND.
    "paper": {
        "model": "meta-llama/Llama-3.2-1B", "data": "garage-bAInd/Open-Platypus",
        "tasks": ",".join(FEWSHOT), "seeds": 3, "steps": 0, "batch": 1, "accumulate": 32,
        "tokens": 2048, "held_out": 256, "questions": 0, "context": 0, "schedule": "cosine",
        "decay": 0.01, "dtype": "bfloat16", "what": "table,ablations", "also": "",
        "rate": 4e-4, "ablate": "qlora",
    },
    # On two cores: hours.
    "offline": {
        "model": None, "data": None, "tasks": "continuation", "seeds": 3, "steps": 12, "batch": 4,
        "accumulate": 1, "tokens": 512, "held_out": 12, "questions": 32, "context": 48,
        "schedule": "constant", "decay": 0.0, "dtype": "float32", "what": "table,ablations",
        "also": "recommended,parts", "ablate": "full",
    },
    # On two cores: 16 minutes.
    "small": {
        "model": None, "data": None, "tasks": "continuation", "seeds": 1, "steps": 4, "batch": 2,
        "accumulate": 1, "tokens": 192, "held_out": 6, "questions": 8, "context": 48,
        "schedule": "constant", "decay": 0.0, "dtype": "float32", "what": "table", "also": "",
        "ablate": "full",
    },
}  # fmt: skip
"""Defaults of the arguments. `steps` of 0 are one epoch."""
