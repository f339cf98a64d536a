"""Make docs/coverage.md: what works with what, cell by cell, each by a run.

    python tests/coverage_table.py            # every cell, into docs/coverage.md
    python tests/coverage_table.py --only llama,lora

A cell compiles a tiny random model with ``score="tokenseek"``, trains one step on a padded batch
and compares each parameter's gradient with masked full backprop: in float64 to 1e-9, and in
float32 to 1e-4 where weights are quantised.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
TUNINGS = ("full", "LoRA", "QLoRA")
BEYOND_HOOKS = {"mamba2": "all of the mixer"}
"""Their layers mix tokens outside of modules, where the reference's hooks cannot cut; they are
checked operation by operation. What takes the general path is named as a whole."""
NOTES = """
Mixtures of experts: `all-linear` adapts the experts' stacked weights too (peft's
`target_parameters`); not Llama 4's router, whose result is a tuple, to which peft adds a tensor.

State-space models, delta rules and short convolutions mix tokens by other means than attention: all
operations of these mixers may take the general path, and the table names the module. Attention,
MLPs and experts around them run on selected tokens alone. As these mixers use parameters outside of
modules, gradients are compared operation by operation. peft refuses the `out_proj` of some of them.

Models of images and text learn from rows of text alone (`_text`) and from rows with images
(`_images`), their encoders of images too, of which Qwen's run ahead of the step. To put features
among embeddings (`masked_scatter`) takes the general path. Where an encoder reads words (T5, BART),
speech (Whisper) or an image (a ViT in front of TrOCR's decoder), the tokens that are selected are
the decoder's. Those of vision transformers are patches; what reads the class token, or the mean
over patches, takes the general path.
"""

HEAD = """# Coverage

    make coverage

runs every cell below and writes this page; the tests run a part of it again. A cell is a tiny
random model of the family, compiled by `fxseek.compile(model, 0.3)` (gemma3n and mamba2 with
`score="random"`: they have no residual stream, or no attention, for TokenSeek's scores), a padded
batch, and one step whose gradients are compared with [masked full backprop](masked-backprop.md):
**exact** is to 1e-9 in float64, and to 1e-4 in float32 where weights are quantised. Operations on
the [general path](architecture.md) are exact too and cost an activation of all tokens each; they
are named. LoRA is on all linear layers, or on those that are listed below the table.
"""


def family_cell(name: str, attention: str, tuning: str) -> str:
    """One family, attention implementation and tuning: what happened."""
    _quiet()
    import torch
    from families import FAMILIES
    from models import double_throughout

    family = FAMILIES[name]

    def make() -> Any:
        model = family.make(attention)
        if tuning == "QLoRA":
            return _quantised(model, family)
        model = model.double()
        return model if tuning == "full" else _with_lora(model, family).double()

    rows = 5 if name in BEYOND_HOOKS else 2
    dtype = torch.float32 if tuning == "QLoRA" else torch.float64
    batch = family.batch(rows, dtype=dtype)
    with contextlib.nullcontext() if tuning == "QLoRA" else double_throughout():
        tolerance = 1e-4 if tuning == "QLoRA" else 1e-9
        return _checked(make, batch, tolerance, family.score, family.mixer)


def tuner_cell(name: str) -> str:
    """One tuner of peft on a tiny Llama."""
    _quiet()
    from models import batch
    from tuners import TUNERS

    return _checked(lambda: TUNERS[name].make(), batch(37, padding="left"), 1e-9)


QUANTISATIONS = ("NF4", "int8")


def quantised_cell(name: str, kind: str) -> str:
    """One tuner of peft on a tiny Llama whose linear layers are quantised."""
    _quiet()
    import torch
    from models import batch, tiny_llama
    from tuners import TUNERS, spread

    arguments = batch(37, padding="left")

    def make() -> Any:
        sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
        model = _with_bits(tiny_llama(**sizes), kind)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        torch.manual_seed(0)
        tuned = TUNERS[name].tune(model).train()
        spread(tuned)
        tuned(**arguments).loss.backward()  # not all that peft makes can be trained
        tuned.zero_grad()
        return tuned

    return _checked(make, arguments, 1e-4)


def _with_bits(model: Any, kind: str) -> Any:
    """A model with the linear layers of bitsandbytes in the place of its own, but for the head."""
    import bitsandbytes
    import torch

    bits: Any = bitsandbytes.nn
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        sizes, weight = (module.in_features, module.out_features), module.weight.data
        if kind == "NF4":
            layer = bits.Linear4bit(*sizes, bias=False, quant_type="nf4")
            made = bits.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            layer = bits.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            made = bits.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.weight = made
        model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "NF4", kind == "int8"
    return model


def _checked(
    make: Any, batch: dict[str, Any], tolerance: float, score: str = "tokenseek", mixer: str = ""
) -> str:
    import torch
    from oracle import assert_exact_causal

    import fxseek
    from fxseek.capture.step import step_of
    from fxseek.passes.facts import module_path

    torch._dynamo.reset()
    try:
        model = make().train()
    except Exception as error:
        return f"not made: {_reason(error)}"
    try:
        fxseek.compile(model, 0.3, score=score)
        if mixer:
            assert_exact_causal(model, batch, tolerance=tolerance)
        else:
            fxseek.check_gradients(model, tolerance, **batch)
    except Exception as error:
        return f"refused: {_reason(error)}"
    step = step_of(model)
    assert step is not None
    learn = step.recorder.steps[0].program.learn
    assert learn is not None
    general = {
        f"in `{mixer}`"
        if mixer and mixer in module_path(node).split(".")
        else f"`{getattr(node.target, '__name__', node.target)}`": None
        for node in learn.general
    }
    return f"exact; general: {', '.join(general)}" if general else "exact"


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]).replace("|", "\\|").replace(str(Path.cwd()), "")
    return f"`{type(error).__name__}` {text[:150]} …"


def _with_lora(model: Any, family: Any) -> Any:
    import peft
    from tuners import spread

    targets: Any = list(family.lora) or "all-linear"
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.0)
    tuned = peft.get_peft_model(model, config)
    spread(tuned)
    return tuned


def _quantised(model: Any, family: Any) -> Any:
    import peft
    import torch
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        attention = model.config._attn_implementation
        again = type(model).from_pretrained(
            folder,
            quantization_config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            experts_implementation=getattr(model.config, "_experts_implementation", None),
        )
    for module in again.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    again = peft.prepare_model_for_kbit_training(again, use_gradient_checkpointing=False)
    return _with_lora(again, family)


def _quiet() -> None:
    import bitsandbytes  # noqa: F401 - read their dtypes before a cell changes torch.float32
    import peft  # noqa: F401
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def family_rows(names: Sequence[str], pool: Any = None) -> list[str]:
    """The lines of the table of families."""
    from families import FAMILIES

    cells = [
        (name, attention, tuning)
        for name in names
        for attention in FAMILIES[name].attentions
        for tuning in TUNINGS
    ]
    run = map if pool is None else pool.map
    found: dict[tuple[str, str, str], str] = {}
    for cell, result in zip(cells, run(family_cell, *zip(*cells, strict=True)), strict=True):
        found[cell] = result
        if pool is not None:
            print(*cell, result, file=sys.stderr, flush=True)
    return [
        f"| {name} | {attention} | "
        + " | ".join(found[name, attention, tuning] for tuning in TUNINGS)
        + " |"
        for name in names
        for attention in FAMILIES[name].attentions
    ]


def adapted(names: Sequence[str]) -> str:
    """What LoRA is on, in families where it is not on all linear layers."""
    from families import FAMILIES

    by_layers: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if FAMILIES[name].lora:
            by_layers.setdefault(FAMILIES[name].lora, []).append(name)
    listed = [
        f"{', '.join(families)} on {', '.join(f'`{layer}`' for layer in layers)}"
        for layers, families in by_layers.items()
    ]
    return f"\nLoRA is on all linear layers, but for {'; '.join(listed)}." if listed else ""


def tuner_rows(names: Sequence[str], pool: Any = None) -> list[str]:
    """The lines of the table of tuners."""
    run = map if pool is None else pool.map
    return [
        f"| {name} | {cell} |" for name, cell in zip(names, run(tuner_cell, names), strict=True)
    ]


def quantised_rows(names: Sequence[str], pool: Any = None) -> list[str]:
    """The lines of the table of tuners on quantised weights."""
    run = map if pool is None else pool.map
    cells = [(name, kind) for name in names for kind in QUANTISATIONS]
    found = dict(zip(cells, run(quantised_cell, *zip(*cells, strict=True)), strict=True))
    return [
        f"| {name} | " + " | ".join(found[name, kind] for kind in QUANTISATIONS) + " |"
        for name in names
    ]


LOOPS = (
    ("HF Trainer, gradient accumulation with `num_items_in_batch`",
     "test_accumulated_gradients_are_those_of_masked_backprop", "exact (float32)"),
    ("HF Trainer, bf16 autocast", "test_autocast_trains_all_parameters", "works"),
    ("HF Trainer, evaluation", "test_evaluation_uses_the_original_forward",
     "the original forward"),
    ("HF Trainer, `remove_unused_columns`", "test_unused_columns_are_removed", "works"),
    ("HF Trainer, `torch_compile=True`",
     "test_torch_compile_around_the_model_leaves_the_step_alone", "the fxseek step, as without"),
    ("HF Trainer, save and resume", "test_a_resumed_run_is_the_uninterrupted_one",
     "the uninterrupted run, bit for bit, with `SeekCallback`"),
    ("`SeekCallback`", "test_the_callback_logs_through_reporters", "logs by every reporter"),
    ("TRL: SFT, DPO, KTO, GRPO, RLOO and reward trainers, unmodified; QLoRA in SFT and DPO",
     "test_ratio_one_is_trl_itself",
     "TRL's own losses, metrics and weights at ratio 1.0"),
    ("TRL: completions of vLLM in GRPO and RLOO, a stand-in for its engine",
     "test_completions_of_vllm",
     "TRL's own losses, metrics and weights at ratio 1.0; vLLM gets the same weights"),
    ("TRL: DDP on two processes (gloo)", "test_ratio_one_is_trl_itself_under_ddp",
     "the weights of TRL alone at ratio 1.0 (float32)"),
    ("TRL: losses of log-probabilities at smaller ratios",
     "test_gradients_are_those_of_masked_backprop", "exact"),
    ("TRL: NEFTune", "test_neftune_is_refused_and_the_trainer_stays_usable",
     "refused: its noise is drawn between bounds that are tensors"),
    ("TRL, HF Trainer: Liger's kernels", "test_liger_is_refused_and_the_trainer_stays_usable",
     "refused: they take all tokens of a row"),
    ("accelerate, DDP on two processes (gloo)", "test_ddp_on_two_processes",
     "the gradients of one process (float32)"),
    ("a plain loop", "test_a_plain_loop_learns_a_batch", "works"),
    ("saving, reloading, generating", "test_saving_reloading_and_generating_after_training",
     "as without fxseek"),
    ("saving, reloading, merging an adapter", "test_an_adapter_is_saved_reloaded_and_merged",
     "as without fxseek"),
)  # fmt: skip
"""Loops, the test that runs each, and what it shows."""


def loop_rows() -> list[str]:
    """The lines of the table of training loops, by a run of their tests."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        tests = Path(__file__).parent / "loops"
        command = [sys.executable, "-m", "pytest", "-q", str(tests), "-m", "sweep or not sweep"]
        subprocess.run([*command, f"--junitxml={found}"], stdout=sys.stderr, check=False)
        cases = list(ElementTree.parse(found).iter("testcase"))
    rows = []
    for loop, test, shown in LOOPS:
        mine = [case for case in cases if (case.get("name") or "").split("[")[0] == test]
        passed = mine and all(case.find("failure") is None for case in mine)
        skipped = any(case.find("skipped") is not None for case in mine)
        rows.append(f"| {loop} | {shown if passed and not skipped else 'not shown'} |")
    return rows


def page(
    families: Sequence[str], tuners: Sequence[str], pool: Any = None, *, loops: bool = False
) -> str:
    """The whole page."""
    from families import FAMILIES

    parts = [HEAD, "## Families of transformers\n"]
    parts += ["| family | attention | full | LoRA | QLoRA (NF4) |", "|---|---|---|---|---|"]
    parts += family_rows(families, pool)
    dense = ", ".join(name for name in families if FAMILIES[name].dense)
    parts += [f"\nDense decoders, where no operation may take the general path: {dense}."]
    parts += [adapted(families), NOTES]
    parts += ["## Tuners of peft, on a tiny Llama\n", "| tuner | |", "|---|---|"]
    parts += tuner_rows(tuners, pool)
    parts += ["\n## Tuners of peft on quantised weights (bitsandbytes)\n"]
    parts += ["| tuner | NF4 | int8 |", "|---|---|---|"]
    parts += quantised_rows([name for name in tuners if name != "full"], pool)
    if loops:
        parts += ["\n## Training loops\n", "| loop | |", "|---|---|", *loop_rows()]
    return _with_footnotes("\n".join(parts)) + "\n"


def _with_footnotes(text: str) -> str:
    """Reasons of refusals once each, below the tables."""
    reasons = list(dict.fromkeys(re.findall(r"(?:refused|not made): (`.*? …)", text)))
    for number, reason in enumerate(reasons, 1):
        text = text.replace(f": {reason}", f" ({number})")
    listed = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{text}\n\n## Why not\n\n{listed}" if reasons else text


def main() -> None:
    from families import FAMILIES
    from tuners import TUNERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="families and tuners, printed instead of written")
    only = parser.parse_args().only
    families, tuners = list(FAMILIES), list(TUNERS)
    if only:
        names = only.split(",")
        families = [name for name in families if name in names]
        tuners = [name for name in tuners if name in names]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        text = page(families, tuners, pool, loops=not only)
    if only:
        print(text)
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "support"))
    main()
