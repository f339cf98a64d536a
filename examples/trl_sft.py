"""TRL's SFTTrainer with fxseek: python examples/trl_sft.py (--help for options)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import trl_ways
from trl_ways import Given


def trainer(given: Given) -> Any:
    """Supervised fine-tuning on answers."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # lazily

    rows = [dict(zip(("prompt", "completion"), trl_ways.chat(x), strict=True)) for x in given.pairs]
    return SFTTrainer(
        given.model,  # type: ignore[arg-type]
        SFTConfig(**given.settings, max_length=given.options.tokens),
        train_dataset=Dataset.from_list(rows),
        processing_class=given.tokenizer,
        peft_config=trl_ways.adapters(given.options),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return trl_ways.main("trl_sft.py", trainer, arguments)


if __name__ == "__main__":
    sys.exit(main())
