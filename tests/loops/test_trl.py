"""TRL's trainers, unmodified: losses outside the model, from per-token log-probabilities."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import ddp
import pytest
import torch
import torch.nn.functional as F
from models import batch, double_throughout, tiny_llama, tiny_lora
from torch import Tensor

import fxseek
from fxseek.capture.step import step_of
from fxseek.ops import log_probs
from fxseek.ops.log_probs import IGNORED, STATISTICS, times_weights, token_statistics
from fxseek.passes.parts import Parts
from fxseek.passes.rules import operation
from fxseek.selecting import select_sample

trl = pytest.importorskip("trl")

from trainers import VOCABULARY, base_of, generate_by_vllm, trainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

QUIET = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning",  # TRL calls what transformers deprecates
    "ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning",
    "ignore:`compute_loss_func` is deprecated:FutureWarning",
    "ignore:.*:DeprecationWarning:(trl|datasets|multiprocess|dill|pyarrow|pandas)",
    "ignore:.*:UserWarning:(trl|transformers|peft)",
)


def lora(kind: str) -> Any:
    from peft import LoraConfig

    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    return LoraConfig(
        r=3, target_modules="all-linear", task_type=task, init_lora_weights=False
    )  # fmt: skip


def in_four_bits(folder: str) -> Any:
    """A model of `folder` in NF4."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for module in model.modules():  # packed in an evaluation, a weight has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def outcome(
    kind: str, folder: Path, options: dict[str, Any], compiled: dict[str, Any] | None
) -> tuple[list[dict[str, float]], dict[str, Tensor], Any]:
    """The logs of some steps, and the trained weights; `compiled`: options of fxseek.compile.

    In float64, which 4-bit weights have none of, and by SGD, which doesn't magnify an error.
    """
    options = {"optim": "sgd", "learning_rate": 0.1} | options
    torch.manual_seed(0)
    base: Any = base_of(kind)
    quantised = options.pop("quantised", False)
    if quantised:
        base = in_four_bits(base.name_or_path)
    else:
        base.double().save_pretrained(base.name_or_path)
    if options.pop("lora", False):
        options["peft_config"] = lora(kind)
    with contextlib.nullcontext() if quantised else double_throughout():
        made = trainer(kind, folder, base, **options)
        made.model.to(torch.float32 if quantised else torch.float64)
        if compiled is not None:
            fxseek.compile(made.model, **compiled)
        torch.manual_seed(3)
        made.train()
        if kind == "sft":
            made.evaluate()
    logs = [
        {name: x for name, x in entry.items() if isinstance(x, float) and not _timed(name)}
        for entry in made.state.log_history
    ]
    weights = {
        name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad
    }
    return logs, weights, made


def _timed(name: str) -> bool:
    return any(part in name for part in ("runtime", "per_second", "step_time", "flos"))


def mean_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the caller's, for SFT's `compute_loss_func`."""
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


SWEEP = pytest.mark.sweep
CASES = [
    ("sft", {"packing": True, "max_length": 24, "lora": True}),
    ("dpo", {"lora": True, "ld_alpha": 0.5}),
    ("grpo", {"lora": True, "beta": 0.1, "num_iterations": 2}),
    ("reward", {}),
    pytest.param("sft", {}, marks=SWEEP),
    pytest.param("sft", {"completion_only_loss": False}, marks=SWEEP),
    pytest.param("sft", {"padding_free": True, "max_length": None}, marks=SWEEP),
    pytest.param("sft", {"packing": True, "packing_strategy": "wrapped"}, marks=SWEEP),
    pytest.param("sft", {"compute_loss_func": mean_of}, marks=SWEEP),
    pytest.param("sft", {"quantised": True, "lora": True}, marks=SWEEP),
    pytest.param("dpo", {"quantised": True, "lora": True}, marks=SWEEP),
    pytest.param("sft", {"loss_type": "dft"}, marks=SWEEP),
    pytest.param("sft", {"gradient_accumulation_steps": 2}, marks=SWEEP),
    pytest.param("sft", {"label_smoothing_factor": 0.1}, marks=SWEEP),
    pytest.param("dpo", {"precompute_ref_log_probs": True}, marks=SWEEP),
    pytest.param("dpo", {"use_weighting": True}, marks=SWEEP),
    pytest.param("kto", {}, marks=SWEEP),
    pytest.param("kto", {"lora": True}, marks=SWEEP),
    pytest.param("grpo", {"loss_type": "dr_grpo", "entropy_coef": 0.01}, marks=SWEEP),
    pytest.param("rloo", {}, marks=SWEEP),
]


@QUIET
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_ratio_one_is_trl_itself(kind, options, tmp_path):
    """Losses, metrics and trained weights."""
    logs, weights, _ = outcome(kind, tmp_path / "alone", options, None)
    found, own, _ = outcome(kind, tmp_path / "compiled", options, {"ratio": 1.0})
    error = 1e-4 if "quantised" in options else 1e-9
    assert len(found) == len(logs) >= 3
    for entry, wanted in zip(found, logs, strict=True):
        assert entry == pytest.approx(wanted, rel=error, abs=error / 10)
    for name, weight in weights.items():
        torch.testing.assert_close(own[name], weight, rtol=error, atol=error)


VLLM: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate"}
GENERATED = [
    ("grpo", {"lora": True, "num_iterations": 2}),
    pytest.param("grpo", {"vllm_importance_sampling_mode": "token_mask"}, marks=SWEEP),
    pytest.param("grpo", {"vllm_importance_sampling_correction": False}, marks=SWEEP),
    pytest.param("rloo", {"lora": True}, marks=SWEEP),
]


@QUIET
@pytest.mark.parametrize(("kind", "options"), GENERATED)
def test_completions_of_vllm(kind, options, tmp_path, monkeypatch):
    """vLLM gets the same weights under the same names, and its importance ratios are TRL's."""
    synchronised = generate_by_vllm(monkeypatch)
    logs, weights, _ = outcome(kind, tmp_path / "alone", VLLM | options, None)
    wanted = list(synchronised)
    synchronised.clear()
    found, own, _ = outcome(kind, tmp_path / "compiled", VLLM | options, {"ratio": 1.0})
    corrected = kind == "grpo" and options.get("vllm_importance_sampling_correction", True)
    assert any("importance_sampling_ratio" in name for name in logs[0]) == corrected
    for entry, one in zip(found, logs, strict=True):
        assert entry == pytest.approx(one, rel=1e-9, abs=1e-10)
    assert len(synchronised) == len(wanted) >= 1
    for pushed, one in zip([*synchronised, own], [*wanted, weights], strict=True):
        assert list(pushed) == list(one)
        for name, weight in one.items():
            torch.testing.assert_close(pushed[name], weight, rtol=1e-9, atol=1e-9)


@QUIET
@pytest.mark.parametrize("kind", ["sft", pytest.param("kto", marks=SWEEP)])
def test_values_are_those_of_all_tokens(kind, tmp_path):
    """At any ratio the first step's losses and metrics are TRL's; only gradients are selected."""
    options = {"max_steps": 1}
    logs, _, _ = outcome(kind, tmp_path / "alone", options, None)
    found, _, made = outcome(kind, tmp_path / "compiled", options, {"ratio": 0.3})
    report = fxseek.report(made.model)
    assert report.selected.shape[1] < report.tokens
    first, wanted = found[0], logs[0]
    assert first.pop("grad_norm") != wanted.pop("grad_norm")
    assert first == pytest.approx(wanted, rel=1e-9, abs=1e-10)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_ratio_one_is_trl_itself_under_ddp(kind, tmp_path):
    for found in ddp.run(ddp.trl_worker, tmp_path, kind):
        for name, weight in found["alone"].items():
            torch.testing.assert_close(found["compiled"][name], weight, rtol=1e-3, atol=1e-4)


# ---- gradients, in float64 -----------------------------------------------------------------------


def preference(outputs: Any, given: Any) -> Tensor:
    """A loss of whole rows, and a bonus of entropy."""
    chosen, rejected = outputs.log_probs.sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean() - 0.05 * outputs.entropy.sum()


def fused(tuner: str = "full", **options: Any) -> Any:
    model: Any = tiny_llama().double()
    add_fused_lm_head(model, **{"temperature": 0.8, "outputs": ("log_probs", "entropy"), **options})
    if tuner == "lora":
        model = tiny_lora(model).double()
    return model.train()


EXACT = [
    {"ratio": 0.3},
    {"ratio": 0.4, "select": "sample"},
    pytest.param(
        {"ratio": 0.3, "prefill_chunk": 4, "chunk_bytes": 300, "recompute": "block"}, marks=SWEEP
    ),
    {"ratio": 1.0, "learn_chunk": 4},
    pytest.param(
        {"ratio": 0.4, "select": "sample", "learn_chunk": 2, "recompute": "block", "kv": "offload"},
        marks=SWEEP,
    ),
    pytest.param({"ratio": "labelled", "learn_chunk": 5}, marks=SWEEP),
    pytest.param({"ratio": 0.3, "span": 3, "supervised_only": True}, marks=SWEEP),
    pytest.param({"ratio": "labelled"}, marks=SWEEP),
    pytest.param({"ratio": 1.0}, marks=SWEEP),
    pytest.param({"ratio": "mass:0.5", "score": "gradient"}, marks=SWEEP),
    pytest.param({"ratio": 0.3, "backend": "aot_eager"}, marks=SWEEP),
    pytest.param({"ratio": 0.3, "recompute": "block", "kv": "offload"}, marks=SWEEP),
]


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("options", EXACT)
def test_gradients_are_those_of_masked_backprop(options, tuner):
    with double_throughout():
        model = fused(tuner)
        given: dict[str, Any] = batch(VOCABULARY, 4, 19, padding="right", labels="some")
        fxseek.compile(model, **options)
        for loss in (None, preference, lambda outputs, _: outputs.loss):
            fxseek.check_gradients(model, loss=loss, fused_lm_head=True, **given)
    step: Any = step_of(model)
    assert isinstance(step.recorder.latest.program.parts, Parts) == ("learn_chunk" in options)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_wrong_gradient_is_noticed(tuner, monkeypatch):
    with double_throughout():
        model = fused(tuner)
        given: dict[str, Any] = batch(VOCABULARY, 4, 19, labels="some")
        fxseek.compile(model, 0.3)
        real = log_probs._Scaled.backward
        monkeypatch.setattr(
            log_probs._Scaled,
            "backward",
            staticmethod(lambda ctx, g: (real(ctx, g)[0] * 1.01, None)),
        )
        with pytest.raises(fxseek.GradientMismatch):
            fxseek.check_gradients(model, loss=preference, fused_lm_head=True, **given)


def test_padding_on_the_left_and_float16_weights_of_a_head_in_float32():
    model = fused(cast_lm_head_to_fp32=True).to(torch.bfloat16)
    fxseek.compile(model, 0.3)
    given = batch(VOCABULARY, 4, 19, padding="left", labels="some")
    outputs = model(fused_lm_head=True, **given)
    assert outputs.log_probs.dtype == torch.float32
    outputs.log_probs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- the statistics ------------------------------------------------------------------------------


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float,
    softcap: float | None, scale: float,
) -> Tensor:  # fmt: skip
    """The definition, with the logits of all tokens."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logs = (logits / temperature).log_softmax(-1)
    shares = logs.exp()
    columns = {
        "log_probs": logs.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1),
        "entropy": -(shares * logs).sum(-1),
        "log_sum_sq_probs": shares.square().sum(-1).log().detach(),
        "mean_logits": (logits / temperature).mean(-1).detach(),
        "is_top1": (logits.argmax(-1) == labels).double(),
    }
    found = torch.stack([columns[name] for name in STATISTICS], -1)
    return found.masked_fill((labels == IGNORED).unsqueeze(-1), 0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_bytes", [2**26, 200])
@pytest.mark.parametrize("with_bias", [False, True])
def test_statistics_and_their_gradients(softcap, chunk_bytes, with_bias):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight = make(2, 7, 5).requires_grad_(), make(11, 5).requires_grad_()
    bias = make(11).requires_grad_() if with_bias else None
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[0, :3] = IGNORED
    how = (0.7, softcap, 1.3)
    trained = [x for x in (hidden, weight, bias) if x is not None]
    found = token_statistics(hidden, weight, bias, labels, *how, STATISTICS, chunk_bytes)
    wanted = plain(hidden, weight, bias, labels, *how)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    slope = make(*found.shape)
    for one, other in zip(
        torch.autograd.grad(found, trained, slope),
        torch.autograd.grad(wanted, trained, slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_known_statistics_have_the_same_gradients(backend):
    """Where it is compiled, too: there a view of an input without gradient would have none."""
    hidden, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 7, 5), (11, 5)))
    labels = torch.arange(14).reshape(2, 7) % 11
    known = token_statistics(hidden, weight, None, labels)
    slope = torch.randn(2, 7, 5, dtype=torch.float64)

    @torch.compile(backend=backend, fullgraph=True)
    def run(hidden, weight, known):
        return token_statistics(hidden, weight, None, labels, known=known)

    trained = [hidden.requires_grad_(), weight.requires_grad_()]
    found, wanted = run(hidden, weight, known), run(hidden, weight, None)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, trained, slope),
        torch.autograd.grad(wanted, trained, slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_statistics_are_those_of_trl():
    """In float32: TRL's own kernel computes no better."""
    model = fused("full", outputs=STATISTICS).float()
    given = batch(VOCABULARY, 3, 19, padding="right", labels="some")
    alone = model(fused_lm_head=True, **given)
    fxseek.compile(model, 0.3)
    found = model(fused_lm_head=True, **given)
    for name in (*STATISTICS, "loss", "label_mask"):
        own, wanted = getattr(found, name), getattr(alone, name)
        assert own.dtype == wanted.dtype and own.shape == wanted.shape, name
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    needs = {name: getattr(found, name).requires_grad for name in STATISTICS}
    assert needs == {name: name in ("log_probs", "entropy") for name in STATISTICS}
    other = fxseek.compile(fused(outputs=()), 0.3)(fused_lm_head=True, **given)
    assert other.entropy is None and other.is_top1 is None


def test_the_path_of_cuda_is_not_captured(monkeypatch):
    """There TRL picks the labelled tokens by a mask, for whose count the host waits."""
    import trl.trainer.utils as utils

    asked: list[Any] = []
    monkeypatch.setattr(utils, "_use_triton", lambda device: not asked.append(device))
    given: dict[str, Any] = batch(VOCABULARY, 4, 19, padding="right", labels="some")
    with double_throughout():
        model = fused()
        found: list[list[Tensor]] = []
        for compiled in (False, True):
            if compiled:
                fxseek.compile(model, 1.0)
            loss = preference(model(fused_lm_head=True, **given), given)
            found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
            assert len(asked) == 1  # by TRL alone
    for alone, own in zip(*found, strict=True):
        torch.testing.assert_close(own, alone, rtol=1e-9, atol=1e-10)


def test_no_stage_has_the_logits_of_all_tokens(monkeypatch):
    """Statistics make those of a chunk; the score's head has its own test."""
    rows: list[int] = []
    of = log_probs._Logits.of

    def noted(self: Any, hidden: Tensor, *rest: Any) -> Tensor:
        if isinstance(hidden.shape[0], int):  # not while it is captured
            rows.append(len(hidden))
        return of(self, hidden, *rest)

    monkeypatch.setattr(log_probs._Logits, "of", noted)
    model = fxseek.compile(fused(), 0.3, chunk_bytes=8 * VOCABULARY * 5)
    given = batch(VOCABULARY, 4, 19, labels="some")
    model(fused_lm_head=True, **given).log_probs.sum().backward()
    # those of labelled tokens for their values, those of kept ones for their gradients
    labelled = F.pad(given["labels"][:, 1:] != IGNORED, (0, 1))
    kept = labelled.gather(1, fxseek.report(model).selected)
    assert 0 < kept.sum() < kept.numel()
    assert max(rows) == 5 and sum(rows) == labelled.sum() + kept.sum()
    step: Any = step_of(model)
    program = step.recorder.latest.program
    for piece in (program.prefill, program.learn):
        weights = [x for x in piece.graph.nodes if x.op == "placeholder" and "lm_head" in x.name]
        assert {operation(user) for x in weights for user in x.users} == {"token_statistics"}


def test_values_of_a_model_that_draws_are_those_of_its_gradient():
    """Dropout draws anew for kept tokens: their values are not the prefill's."""
    for drops in (0.0, 0.5):
        model: Any = tiny_llama()
        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs",))
        model = tiny_lora(model, lora_dropout=drops).train()
        fxseek.compile(model, 0.4)
        given: dict[str, Any] = batch(VOCABULARY, 2, 9)
        model(fused_lm_head=True, **given).log_probs.sum().backward()
        step: Any = step_of(model)
        learn = step.recorder.latest.program.learn
        (made,) = (x for x in learn.graph.nodes if operation(x) == "token_statistics")
        assert (made.kwargs.get("known") is None) == (drops > 0)


def test_sampled_gradients_are_unbiased():
    """The mean over draws of a linear loss's gradient is that of all tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens, kept = 2, 12, 5
    valid = torch.ones(rows, tokens, dtype=torch.bool)
    labels = torch.randint(0, 5, (rows, tokens), generator=generator)
    labels[0, :4] = IGNORED
    mass = torch.rand(rows, tokens, generator=generator)
    slope = torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    draws = []
    for _ in range(3000):
        chosen = select_sample(
            mass, kept, valid=valid, supervised=labels != IGNORED, generator=generator
        )
        x = torch.zeros(rows, kept, dtype=torch.float64, requires_grad=True)
        weighed = times_weights(x, chosen.weights, labels.gather(1, chosen.kept), labels)
        weighed = weighed.masked_fill(labels.gather(1, chosen.kept) == IGNORED, 0)
        (found,) = torch.autograd.grad((weighed * slope.gather(1, chosen.kept)).sum(), x)
        draws.append(torch.zeros(rows, tokens, dtype=torch.float64).scatter(1, chosen.kept, found))
    every = torch.stack(draws)
    wanted = slope.masked_fill(labels == IGNORED, 0)
    error = (every.mean(0) - wanted).abs() / (every.std(0) / len(draws) ** 0.5).clamp_min(1e-12)
    assert error[labels != IGNORED].max() < 4.5


def test_a_masked_vocabulary_has_finite_gradients():
    """A logit of -inf has no probability, and nothing but its own gradient is touched by it."""
    hidden = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(11, dtype=torch.float64)
    bias[7] = -torch.inf
    weight = torch.randn(11, 5, dtype=torch.float64)
    found = token_statistics(hidden, weight, bias, torch.tensor([1, 2, 3]))
    assert found[:, :2].isfinite().all()
    found[:, :2].sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_estimates_and_budgets_of_a_fused_head():
    """TRL's function holds the model's own forward: a copy's calls the copy."""
    model = fused().float()
    assert fxseek.estimate(model, tokens=64).peak_bytes > 0
    fxseek.compile(model, 0.3, memory_budget_bytes="1GiB")
    given: dict[str, Any] = batch(VOCABULARY, 2, 9)
    model(fused_lm_head=True, **given).loss.backward()


def test_calls_without_labels_have_values_of_all_tokens_and_a_gradient_check(caplog):
    """Also of a mixture of experts, which returns a loss of its router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    given: dict[str, Any] = {"input_ids": batch(VOCABULARY, 2, 9)["input_ids"]}

    def squares(outputs: Any, _: Any) -> Tensor:
        return outputs.logits.square().mean()

    with double_throughout():
        model = fxseek.compile(tiny_llama().double().train(), 0.4, score="context")
        fxseek.check_gradients(model, loss=squares, **given)
    assert "computed outside the model, from values of all tokens" in caplog.text
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = fxseek.compile(MixtralForCausalLM(config).train(), 0.4, score="random")
    outputs = model(output_router_logits=True, **given)
    assert outputs.logits.shape[:2] == (2, 9)
    fxseek.uncompile(model)
    fxseek.compile(model, 0.4)
    with pytest.raises(fxseek.GraphError, match="Pass labels"):
        model(output_router_logits=True, **given)


def test_rewards_are_scored_by_their_own_gradient_and_logits_of_classes_are_not():
    from transformers import LlamaForSequenceClassification

    config: Any = tiny_llama().config
    config.pad_token_id = 0
    given: dict[str, Any] = batch(VOCABULARY, 2, 9, padding="right")
    del given["labels"]
    for classes in (1, 5):
        config.num_labels = classes
        model: Any = LlamaForSequenceClassification(config).train()
        fxseek.compile(model, 0.4)
        if classes == 1:
            model(**given).logits.sum().backward()
            report = fxseek.report(model)
            assert report.gradient is not None and report.full_loss is None
        else:
            with pytest.raises(fxseek.GraphError, match="needs the gradient of the loss"):
                model(**given)


# ---- what is refused -----------------------------------------------------------------------------


@QUIET
def test_neftune_is_refused_and_the_trainer_stays_usable(tmp_path):
    made = trainer("sft", tmp_path, neftune_noise_alpha=5, max_steps=1)
    fxseek.compile(made.model, 0.3)
    with pytest.raises(fxseek.InputError, match=r"NEFTune.*neftune_noise_alpha"):
        made.train()
    fxseek.uncompile(made.model)
    made.train()


@QUIET
def test_liger_is_refused_and_the_trainer_stays_usable(tmp_path):
    """Its kernels are put into the modules when training starts."""
    made = trainer("sft", tmp_path, max_steps=1)
    fxseek.compile(made.model, 0.3)
    norm = made.model.model.norm

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return type(self).forward(self, hidden)

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    norm.forward = types.MethodType(forward, norm)
    with pytest.raises(fxseek.InputError, match=r"'model\.norm' runs Liger.*use_liger_kernel"):
        made.train()
    fxseek.uncompile(made.model)
    made.train()


def test_log_probs_of_other_tokens_are_refused():
    model = fused()
    own = model.forward

    def reversed_rows(**given: Any) -> Any:
        return own(**given, shift_labels=given["input_ids"])

    model.forward = reversed_rows
    fxseek.compile(model, 0.3)
    given = batch(VOCABULARY, 2, 9)
    with pytest.raises(fxseek.GraphError, match=r"hidden\[:, :-1\] for labels\[:, 1:\]"):
        model(fused_lm_head=True, **given)


def test_another_trl_is_told_apart(monkeypatch):
    import trl.trainer.utils as utils

    model = fxseek.compile(fused(), 0.3)
    monkeypatch.delattr(utils, "_use_triton")
    with pytest.raises(fxseek.InputError, match=r"has no _use_triton.*TRL 1\.16"):
        model(fused_lm_head=True, **batch(VOCABULARY, 2, 9))


def test_a_sample_needs_the_loss():
    model = fxseek.compile(tiny_llama(), 0.3, select="sample", score="context")
    with pytest.raises(fxseek.GraphError, match="select='sample' weighs"):
        model(input_ids=batch(VOCABULARY, 2, 9)["input_ids"])


def test_loss_is_for_calls_without_one():
    model = fxseek.compile(tiny_llama(), 0.3)
    given: dict[str, Any] = batch(VOCABULARY, 2, 9)
    with pytest.raises(fxseek.InputError, match="fused_lm_head=True"):
        fxseek.check_gradients(model, loss=preference, **given)
