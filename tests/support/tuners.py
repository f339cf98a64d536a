"""The tuners of peft, each made by its public API on a tiny Llama.

A tuner is a configuration class and its options. Many of them start out equal to the base model,
with a zero in front of every path to their parameters: `spread` gives all that is trained values
that are not zero, or gradients would be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from models import tiny_llama, without_casts
from torch import nn

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VIRTUAL = 4
SQUARE = {"hidden_size": 24, "head_dim": 6, "intermediate_size": 40}
"""Widths with common factors, for tuners that cut weights into blocks."""


@dataclass(frozen=True)
class Tuner:
    """How peft makes a tuner: the name of its configuration class, and its options.

    `base`: changes of the tiny Llama's sizes. `finish`: what is done after `get_peft_model`.
    `general`: the operations that take the general path; none where it is empty.
    `unfinished`: why it does not work yet.
    """

    name: str
    config: str = ""
    options: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    finish: Callable[[nn.Module], None] | None = None
    general: tuple[str, ...] = ()
    unfinished: str = ""

    def make(self, attention: str = "sdpa", *, double: bool = True) -> nn.Module:
        """The tuned model in training mode, everything that is trained spread over numbers."""
        base = tiny_llama(attention, **(self.base or {}))
        model = self.tune(without_casts(base) if double else base)
        spread(model)
        return (model.double() if double else model).train()

    def tune(self, base: nn.Module) -> nn.Module:
        """`base` with this tuner; full-parameter training is the base itself."""
        if not self.config:
            return base
        config = getattr(peft, self.config)(task_type="CAUSAL_LM", **(self.options or {}))
        with warnings.catch_warnings():  # peft remarks on settings that are meant here
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base, config)  # type: ignore[arg-type]
            if self.finish is not None:
                self.finish(model)
        return model


def tuned(config: str, **options: Any) -> nn.Module:
    """A tiny Llama with a tuner that is not in the table."""
    return Tuner(config, config, options).make()


def spread(model: nn.Module, scale: float = 0.2) -> None:
    """Add noise to every parameter that is trained (a base model's weights have theirs)."""
    if not isinstance(model, peft.PeftModel):
        return
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter))


def _second_adapter(model: nn.Module) -> None:
    assert isinstance(model, peft.PeftModel)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator]


_LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
_SMALL: dict[str, Any] = {"r": 3, "target_modules": LINEAR}

TUNERS: dict[str, Tuner] = {
    tuner.name: tuner
    for tuner in (
        Tuner("full"),
        Tuner("lora", "LoraConfig", _LORA),
        Tuner("lora_modules_to_save", "LoraConfig", {**_LORA, "modules_to_save": ["lm_head"]}),
        Tuner("lora_embedding", "LoraConfig",
              {**_LORA, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        Tuner("lora_bias", "LoraConfig", {**_LORA, "bias": "all", "lora_bias": True},
              base={"attention_bias": True, "mlp_bias": True}),
        Tuner("lora_several", "LoraConfig", _LORA, finish=_second_adapter),
        Tuner("lora_tokens", "LoraConfig",
              {**_LORA, "trainable_token_indices": list(range(0, 37, 2))}),
        Tuner("rslora", "LoraConfig", {**_LORA, "use_rslora": True}),
        Tuner("dora", "LoraConfig", {**_LORA, "use_dora": True}),
        Tuner("loha", "LoHaConfig", {**_SMALL, "alpha": 5}),
        Tuner("lokr", "LoKrConfig", {**_SMALL, "alpha": 5}),
        Tuner("ia3", "IA3Config",
              {"target_modules": ["k_proj", "v_proj", "down_proj"],
               "feedforward_modules": ["down_proj"]}),
        Tuner("boft", "BOFTConfig",
              {"boft_block_size": 4, "boft_n_butterfly_factor": 1,
               "target_modules": ["q_proj", "v_proj", "down_proj"]}, base=SQUARE),
        Tuner("oft", "OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEAR},
              base=SQUARE),
        Tuner("miss", "MissConfig", {"r": 4, "target_modules": LINEAR}, base=SQUARE),
        Tuner("bat", "MissConfig", {"r": 4, "target_modules": LINEAR, "init_weights": "bat"},
              base=SQUARE),
        Tuner("adalora", "AdaLoraConfig",
              {"init_r": 3, "target_r": 2, "lora_alpha": 5, "target_modules": LINEAR,
               "total_step": 10}),
        Tuner("vera", "VeraConfig", {"r": 5, "target_modules": ["q_proj", "v_proj", "o_proj"]}),
        Tuner("fourierft", "FourierFTConfig", {"n_frequency": 7, "target_modules": LINEAR}),
        Tuner("hra", "HRAConfig", {"r": 4, "target_modules": LINEAR}),
        Tuner("prompt", "PromptTuningConfig", {"num_virtual_tokens": VIRTUAL}, general=("cat",)),
        Tuner("prefix", "PrefixTuningConfig", {"num_virtual_tokens": VIRTUAL},
              general=("cat",)),
        Tuner("prefix_projected", "PrefixTuningConfig",
              {"num_virtual_tokens": VIRTUAL, "prefix_projection": True, "encoder_hidden_size": 13},
              general=("cat",)),
        Tuner("ptuning", "PromptEncoderConfig",
              {"num_virtual_tokens": VIRTUAL, "encoder_hidden_size": 13}, general=("cat",)),
    )
}  # fmt: skip
