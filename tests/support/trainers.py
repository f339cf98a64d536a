"""TRL's trainers on tiny models, as TRL has them: no subclass, no method overridden."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path
from typing import Any

from models import tiny_llama
from torch import nn

VOCABULARY = 37


def tokenizer() -> Any:
    """Words w3, w4, ... in a fast tokeniser that was made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(first: int, words: int) -> str:
    return " ".join(f"w{3 + (first * 7 + i * 5) % 34}" for i in range(words))


def rows(kind: str, count: int = 8) -> Any:
    """A dataset of the given kind: prompts of 5 to 7 words, answers of 4 to 8."""
    from datasets import Dataset

    made: list[dict[str, Any]] = []
    for row in range(count):
        prompt, answer = text(row, 5 + row % 3) + " ", text(row + 9, 4 + row % 5)
        if kind == "sft":
            made.append({"prompt": prompt, "completion": answer})
        elif kind == "kto":
            made.append({"prompt": prompt, "completion": answer, "label": row % 2 == 0})
        elif kind in ("dpo", "reward"):
            other = text(row + 20, 3 + row % 4)
            pair = {"chosen": answer, "rejected": other}
            made.append({"prompt": prompt, **pair} if kind == "dpo" else
                        {name: prompt + x for name, x in pair.items()})  # fmt: skip
        else:
            made.append({"prompt": prompt})
    return Dataset.from_list(made)


def reward(completions: list[str], **_: Any) -> list[float]:
    """How many different words a completion has."""
    return [float(len(set(completion.split()))) for completion in completions]


def base_of(kind: str, folder: Path | None = None) -> nn.Module:
    """A model that TRL can load once more, as its reference, from `folder` or a new one."""
    model: Any = tiny_llama()
    if kind == "reward":
        from transformers import LlamaForSequenceClassification

        model.config.num_labels, model.config.pad_token_id = 1, 0
        model = LlamaForSequenceClassification(model.config)
    saved = tempfile.mkdtemp() if folder is None else str(folder)
    model.save_pretrained(saved)
    model.config._name_or_path = model.name_or_path = saved
    return model


def trainer(kind: str, folder: Path, model: nn.Module | None = None, **options: Any) -> Any:
    """A trainer of TRL for `kind`: sft, dpo, kto, grpo, rloo, reward."""
    import trl

    model = tiny_llama() if model is None else model
    names = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO",
             "reward": "Reward"}  # fmt: skip
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if kind in ("grpo", "rloo"):
        settings |= {"num_generations": 2, "max_completion_length": 6}
    given = {name: options.pop(name) for name in ("peft_config", "callbacks", "ref_model",
             "compute_loss_func") if name in options}  # fmt: skip
    if kind in ("grpo", "rloo"):
        given["reward_funcs"] = reward
    config = getattr(trl, f"{names[kind]}Config")(str(folder), **(settings | options))
    return getattr(trl, f"{names[kind]}Trainer")(
        model=model,
        args=config,
        train_dataset=rows(kind),
        eval_dataset=rows(kind, 2),
        processing_class=tokenizer(),
        **given,
    )


def generate_by_vllm(monkeypatch: Any) -> list[dict[str, Any]]:
    """Stand in for vLLM behind TRL's own `VLLMGeneration`, for trainers made with `use_vllm=True`.

    What is handed over and in which order is TRL's. The completions are made of the prompts, their
    log-probabilities of the words. Returns a list that gets the weights of each synchronisation.
    """
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer import grpo_trainer, rloo_trainer

    synchronised: list[dict[str, Any]] = []

    class StandIn(VLLMGeneration):
        def _init_vllm(self) -> None:
            weights = types.SimpleNamespace(load_weights=self._load)
            worker = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=weights))
            executor = types.SimpleNamespace(driver_worker=worker)
            self.llm: Any = types.SimpleNamespace(
                llm_engine=types.SimpleNamespace(model_executor=executor),
                reset_prefix_cache=lambda: None,
            )

        def _load(self, pairs: list[tuple[str, Any]]) -> None:
            synchronised[-1].update((name, x.detach().clone()) for name, x in pairs)

        def sync_weights(self) -> None:
            synchronised.append({})
            super().sync_weights()

        def generate(
            self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
        ) -> tuple[Any, ...]:
            words = [
                [3 + (sum(prompt) + row * 5 + i * 7) % (VOCABULARY - 3) for i in range(4 + row % 3)]
                for row, prompt in enumerate(prompts)
            ]
            log_probs = [[[-2.0 - word / VOCABULARY] for word in row] for row in words]
            return prompts, words, log_probs, [[[word] for word in row] for row in words]

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", StandIn)
    monkeypatch.setattr(rloo_trainer, "VLLMGeneration", StandIn)
    return synchronised
