"""TRL's DPOTrainer with fxseek: python examples/trl_dpo.py (--help for options).

The rejected answer is that of another question.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import trl_ways
from trl_ways import Given


def trainer(given: Given) -> Any:
    """Preferences, with the adapters switched off (or a copy of the model) as the reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # lazily

    rows = []
    for pair, other in zip(given.pairs, given.pairs[1:] + given.pairs[:1], strict=True):
        prompt, chosen = trl_ways.chat(pair)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": trl_ways.chat(other)[1]})
    return DPOTrainer(
        given.model,  # type: ignore[arg-type]
        args=DPOConfig(**given.settings, max_length=given.options.tokens),
        train_dataset=Dataset.from_list(rows),
        processing_class=given.tokenizer,
        peft_config=trl_ways.adapters(given.options),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return trl_ways.main("trl_dpo.py", trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
