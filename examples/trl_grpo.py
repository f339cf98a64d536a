"""TRL's GRPOTrainer with fxseek: python examples/trl_grpo.py (--help for options).

A completion is rewarded for words of the documentation that it is asked for. Completions are
generated once for all steps, and trained on several times, so that the steps that are timed
generate nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import trl_ways
from trl_ways import Given


def overlap(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The share of a completion's words that the answer has."""
    found = []
    for completion, wanted in zip(completions, answer, strict=True):
        words, own = completion[0]["content"].split(), set(wanted.split())
        found.append(sum(word in own for word in words) / max(1, len(words)))
    return found


def trainer(given: Given) -> Any:
    """Rewards of completions that the model makes itself."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]  # lazily

    options = given.options
    rows = [{"prompt": trl_ways.chat(pair)[0], "answer": pair.answer} for pair in given.pairs]
    config = GRPOConfig(
        **given.settings,
        num_generations=options.batch,
        max_completion_length=options.tokens,
        num_iterations=options.steps,
        beta=options.beta,
        mask_truncated_completions=False,
    )
    return GRPOTrainer(
        given.model,  # type: ignore[arg-type]
        overlap,  # type: ignore[arg-type]  # may take columns by name
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=given.tokenizer,
        peft_config=trl_ways.adapters(options),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return trl_ways.main("trl_grpo.py", trainer, arguments, batch=4, tokens=256, beta=0.04)


if __name__ == "__main__":
    sys.exit(main())
