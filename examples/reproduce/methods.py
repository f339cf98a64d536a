"""The rows of the table: a tuner, and which tokens are selected."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import common
from common import ExampleError, ModelSource

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOW_RANK = {"r": 8, "target_modules": LAYERS}
# The name of a tuner, and the class and the options of its configuration in peft.
TUNERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("Full parameter", "", {}),
    "ia3": (
        "IA3", "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"],
         "feedforward_modules": ["down_proj"]},
    ),
    "lora": ("LoRA", "LoraConfig", {**LOW_RANK, "lora_alpha": 16, "lora_dropout": 0.05}),
    "lokr": ("LoKr", "LoKrConfig", {**LOW_RANK, "alpha": 16}),
    "boft": (
        "BOFT", "BOFTConfig",
        {"target_modules": LAYERS, "boft_block_size": 4, "boft_n_butterfly_factor": 1},
    ),
    "bone": ("Bone (MiSS)", "MissConfig", {"target_modules": LAYERS, "r": 8}),
    "loha": ("LoHa", "LoHaConfig", {**LOW_RANK, "alpha": 16}),
    "qlora": ("QLoRA", "LoraConfig", {**LOW_RANK, "lora_alpha": 16, "lora_dropout": 0.05}),
}  # fmt: skip
# The name of a selection, and options of fxseek.compile; "" trains on every token without fxseek.
SELECTIONS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "": ("", None),
    "tokentune": ("TokenTune (random)", {"ratio": 0.1, "score": "random"}),
    "tokenseek": ("TokenSeek", {"ratio": 0.1}),
    "recommended": ("sampled, 25 %", {"ratio": 0.25, "score": "gradient", "select": "sample"}),
    "parts": ("every token, in parts of 128", {"ratio": 1.0, "learn_chunk": 128}),
}
SELECTED = ("full", "loha", "qlora")
"""Tuners that are also run with selected tokens."""

TABLE = [*TUNERS, *(f"{tuner}+{way}" for tuner in SELECTED for way in ("tokentune", "tokenseek"))]
FACTORS = ((1.0, 0.0), (0.0, 1.0), (5.0, 1.0), (1.0, 5.0))
"""Alpha and beta of {0, 1, 5}, beside equal ones; other pairs rank tokens as one of these does."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Way:
    """One row: a tuner and options of `fxseek.compile`, or None for training without it."""

    tuner: str
    selection: str
    options: dict[str, Any] | None = field(hash=False)

    @property
    def is_named(self) -> bool:
        """Whether its options are those of its selection."""
        return self.options == SELECTIONS[self.selection][1]

    @property
    def name(self) -> str:
        """For a table."""
        name, options = self.selection, self.options or {}
        known, default = SELECTIONS[name]
        changed = [f"{key} {value}" for key, value in options.items()
                   if default is None or default.get(key) != value]  # fmt: skip
        parts = [TUNERS[self.tuner][0], *([known] if known else [])]
        return ", ".join([" + ".join(parts), *changed])

    @property
    def slug(self) -> str:
        """For a file's name."""
        changed = None if self.is_named else self.options
        some = [f"{key}-{value}" for key, value in (changed or {}).items()]
        return "-".join(filter(None, [self.tuner, self.selection, *some]))


def way_of(text: str) -> Way:
    """``"loha+tokenseek"`` as a way.

    Raises:
        ExampleError: there is no such tuner or selection.
    """
    tuner, _, selection = text.partition("+")
    if tuner not in TUNERS or selection not in SELECTIONS:
        raise ExampleError(
            f"there is no method {text!r}: a method is a tuner ({', '.join(TUNERS)}), alone or "
            f"with +{', +'.join(filter(None, SELECTIONS))}"
        )
    return Way(tuner, selection, SELECTIONS[selection][1])


def ablations(tuner: str) -> dict[str, list[Way]]:
    """TokenSeek with other factors of its two scores, and at other shares of the tokens."""
    own = SELECTIONS["tokenseek"][1]
    assert own is not None
    return {
        "factors": [
            Way(tuner, "tokenseek", own),
            *(Way(tuner, "tokenseek", {**own, "alpha": a, "beta": b}) for a, b in FACTORS),
        ],
        "shares": [Way(tuner, "tokenseek", {**own, "ratio": share}) for share in SHARES],
    }


def lacking(way: Way) -> str | None:
    """Which package a way needs that is not installed; None where there is none."""
    needed = {"full": (), "qlora": ("peft", "bitsandbytes")}.get(way.tuner, ("peft",))
    for package in needed:
        if importlib.util.find_spec(package) is None:
            return f'{package} is not installed: pip install "fxseek[peft]"'
    if needed:
        import peft

        if not hasattr(peft, TUNERS[way.tuner][1]):
            return f"this peft has no {TUNERS[way.tuner][1]}: upgrade peft"
    return None


def load(way: Way, source: ModelSource, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with its tuner; adapters are drawn from torch's generator."""
    if way.tuner != "qlora":
        model: nn.Module = common.load_model(source, dtype)
        return nn.Module.to(adapted(way, model), device)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        source.location, dtype=dtype, quantization_config=quantised, device_map={"": device}
    )
    layers: Any = model.modules()
    for layer in layers:
        # On some CPUs an evaluation would pack the weights, and training go on without gradient.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return adapted(way, model.requires_grad_(False))


def adapted(way: Way, model: nn.Module) -> nn.Module:
    """The model with adapters, or as it is."""
    _, name, options = TUNERS[way.tuner]
    if not name:
        return model
    import peft

    config = getattr(peft, name)(**options, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]  # narrower than it takes
