"""Quantised weights (bitsandbytes, on the CPU), and the autograd functions that they run in.

What decides whether a function is per-token is tested on functions of a few lines in float64;
QLoRA as users write it is compared with masked full backprop in its own precision.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import batch, tiny_llama
from oracle import WIDTH, Model, assert_exact, inputs_of, model_of
from sweeps import sampled
from torch import Tensor, nn
from torch.nn import functional as F

import fxseek
from fxseek.capture.step import step_of
from fxseek.passes.parts import Parts
from fxseek.run.saved import SavedBytes

# ---- which functions are per-token ---------------------------------------------------------------


class Frozen(torch.autograd.Function):
    """A linear layer without gradient for its weight; rows are packed on the way, as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        slope = slope.reshape(-1, slope.shape[-1]).contiguous()
        return (slope @ ctx.weight).view(ctx.shape), None


class WeightGradient(torch.autograd.Function):
    """A linear layer whose backward makes the gradient of its weight too: a sum over tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return slope @ weight, slope.flatten(0, 1).T @ x.flatten(0, 1)


class Halved(torch.autograd.Function):
    """Pointwise, with a backward that is not the derivative: it shows that it is the one used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        y = x * gate.sigmoid()
        ctx.save_for_backward(y, gate)
        return y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        y, gate = ctx.saved_tensors
        return slope * gate.sigmoid() / 2, slope * y * 3 + 1


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.transpose(1, 2).cos()

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return one * x.cos() - other.transpose(1, 2) * x.sin()


class Doubles(torch.autograd.Function):
    """What the functions below have in common, each with a forward or a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope * 2


class BackwardMixes(Doubles):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope - slope.mean(1, keepdim=True)


class BackwardReadsAll(torch.autograd.Function):
    """The gradient is per-token; what it is scaled by is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return slope * x.mean(1, keepdim=True)


class SavedMixes(torch.autograd.Function):
    """What forward returns is per-token; what it saves is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.cumsum(1))
        return x * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        (total,) = ctx.saved_tensors
        return slope * total


class ForwardMixes(Doubles):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)


class CountsTokens(torch.autograd.Function):
    """A value scaled by the number of tokens: that of the selected ones would be another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.tokens = x.shape[1]
        return x / x.shape[1]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope / ctx.tokens


class CountsInBackward(Doubles):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope * slope.shape[1]


class OtherOrder(Doubles):
    """The gradient comes back with the tokens in another order."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope.flip(1)


class Squeezes(torch.autograd.Function):
    """Where one token is selected, its dimension would be dropped as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x[:, None].squeeze() * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope * 3


class AttendsInside(Doubles):
    """Attention has a plan, but not one that the graph as it stands would follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


# The mode that marks results in the oracle does not see those of functions; it does those of sums.
PER_TOKEN: dict[str, Callable[[Model, Tensor], Any]] = {
    "frozen linear": lambda m, x: Frozen.apply(x, m.first.weight.detach()) + 1,  # type: ignore[operator]
    "frozen linear, packed": lambda m, x: (
        Frozen.apply(x.reshape(-1, WIDTH), m.first.weight.detach()).view(x.shape) + 1  # type: ignore[union-attr]
    ),
    "weight gradient that nothing needs": lambda m, x: (
        WeightGradient.apply(x, m.first.weight.detach()) + 1  # type: ignore[operator]
    ),
    "pointwise": lambda m, x: Halved.apply(x, x * m.scale) + 1,  # type: ignore[operator]
    "a constant with tokens": lambda m, x: Halved.apply(x, x.detach().cos()) + 1,  # type: ignore[operator]
    "two results": lambda m, x: (lambda a, b: a + b.mT * m.scale)(*TwoResults.apply(x)),  # type: ignore[misc]
    "one of two results": lambda m, x: TwoResults.apply(x)[1].mT * m.scale,  # type: ignore[index]
    "one after the other": lambda m, x: (
        Halved.apply(Frozen.apply(x, m.first.weight.detach()) + 1, x) + 1  # type: ignore[operator]
    ),
}
GENERAL: dict[str, Callable[[Model, Tensor], Any]] = {
    "backward mixes": lambda m, x: BackwardMixes.apply(x) + 1,  # type: ignore[operator]
    "backward reads all": lambda m, x: BackwardReadsAll.apply(x) + 1,  # type: ignore[operator]
    "backward reorders": lambda m, x: OtherOrder.apply(x) + 1,  # type: ignore[operator]
    "what is saved mixes": lambda m, x: SavedMixes.apply(x) + 1,  # type: ignore[operator]
    "forward mixes": lambda m, x: ForwardMixes.apply(x) + 1,  # type: ignore[operator]
    "weight gradient": lambda m, x: WeightGradient.apply(x, m.first.weight) + 1,  # type: ignore[operator]
    "gradient of a broadcast operand": lambda m, x: Halved.apply(x, m.scale.expand_as(x)) + 1,  # type: ignore[operator]
    "counts tokens": lambda m, x: CountsTokens.apply(x) + 1,  # type: ignore[operator]
    "counts tokens in backward": lambda m, x: CountsInBackward.apply(x) + 1,  # type: ignore[operator]
    "squeeze": lambda m, x: Squeezes.apply(x) + 1,  # type: ignore[operator]
    "attention": lambda m, x: AttendsInside.apply(x) + 1,  # type: ignore[operator]
}


def in_general(model: nn.Module) -> list[str]:
    """The operations on the general path, by all the lists that name them."""
    step = step_of(model)
    assert step is not None
    names = [
        str(node.target)
        for program in (each.program for each in step.recorder.steps)
        for node in (*program.facts.general, *program.learn.general)
    ]
    return names


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_function_that_is_per_token(name):
    model = model_of(PER_TOKEN[name])
    assert_exact(model)
    assert "autograd_function_apply" not in in_general(model)


@pytest.mark.parametrize("name", [name for name in GENERAL if "broadcast" not in name])
def test_a_function_that_is_not(name):
    model = model_of(GENERAL[name])
    assert_exact(model)
    assert "autograd_function_apply" in in_general(model)


def test_a_broadcast_operand():
    assert_exact(model_of(GENERAL["gradient of a broadcast operand"]))


@pytest.mark.parametrize("name", ["frozen linear, packed", "two results"])
def test_a_batch_of_one(name):
    model = model_of(PER_TOKEN[name])
    assert_exact(model, batch=1)
    assert "autograd_function_apply" not in in_general(model)


@pytest.mark.parametrize("body", [PER_TOKEN["frozen linear"], GENERAL["squeeze"]])
def test_one_token(body):
    model = fxseek.compile(model_of(body), 0.01, score="random")
    model(**inputs_of())["loss"].backward()
    assert fxseek.report(model).selected.shape[1] == 1


class Signs(torch.autograd.Function):
    """One of the results has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        signs = x.sign()
        ctx.mark_non_differentiable(signs)
        return x.square(), signs

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor | None) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * slope * x


def test_a_result_without_gradient():
    for backend in ("eager", "aot_eager"):
        model = model_of(lambda m, x: (lambda a, b: a * b)(*Signs.apply(x)))  # type: ignore[misc]
        assert_exact(model, backend=backend)


LOWERED = ("one after the other", "two results", "squeeze")


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        pytest.param(name, recompute, marks=() if name in LOWERED else pytest.mark.sweep)
        for name in (*PER_TOKEN, *GENERAL)
        for recompute in ("selective", "block")
    ],
)
def test_lowered(name, recompute):
    model = model_of((PER_TOKEN | GENERAL)[name])
    assert_exact(model, backend="aot_eager", recompute=recompute)


class WritesToItsArgument(Doubles):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mul_(2) + 1


def test_a_function_that_writes_to_its_argument_is_refused():
    model = model_of(lambda m, x: WritesToItsArgument.apply(x.clone()))  # type: ignore[arg-type, return-value]
    fxseek.compile(model, 0.4, score="random")
    with pytest.raises(fxseek.GraphError, match=r"writes to one of its arguments.*Write to a copy"):
        model(**inputs_of())


class Clips(torch.autograd.Function):
    """Writes to a value of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, (weight * 2).clamp_(-0.3, 0.3))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return (slope @ ctx.weight).mul_(2), None


def test_a_function_that_writes_to_a_value_of_its_own():
    model = model_of(lambda m, x: Clips.apply(x, m.first.weight.detach()) + 1)  # type: ignore[operator]
    assert_exact(model)
    assert "autograd_function_apply" not in in_general(model)


# ---- QLoRA as users write it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder with a tiny random model, by family; widths are multiples of the 4-bit block."""
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            _tiny(family).save_pretrained(made[family])
        return made[family]

    return folder


def _tiny(family: str) -> Any:
    if family == "llama":
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        return tiny_llama(**sizes)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=37, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def _quantised(folder: str, kind: str, compute: torch.dtype) -> Any:
    """What `from_pretrained` gives for a `BitsAndBytesConfig`; "nf4+" quantises the scales too."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind.rstrip("+"),
            bnb_4bit_use_double_quant=kind.endswith("+"),
            bnb_4bit_compute_dtype=compute,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=compute
        )


def _qlora(
    folder: str, kind: str, compute: torch.dtype, *, checkpointing: bool = True
) -> nn.Module:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = _quantised(folder, kind, compute)
    with warnings.catch_warnings():  # names that transformers deprecated
        warnings.simplefilter("ignore")
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
KINDS = ("nf4", "nf4+", "fp4", "fp4+", "int8")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # transformers asks for a name of its own that it deprecated
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


FEW = (("nf4", torch.float32), ("fp4+", torch.bfloat16), ("int8", torch.float32))


def _cells() -> Iterator[Any]:
    for kind in KINDS:
        for compute in TOLERANCES:
            marks = () if (kind, compute) in FEW else (pytest.mark.sweep,)
            yield pytest.param(kind, compute, marks=marks)


@pytest.mark.parametrize(("kind", "compute"), list(_cells()))
def test_qlora(saved, kind, compute):
    model = fxseek.compile(_qlora(saved("llama"), kind, compute), 0.4, score="random")
    inputs = batch(37, batch=3, tokens=13, padding="right", labels="completion")
    found = fxseek.check_gradients(model, tolerance=TOLERANCES[compute], **inputs)
    assert found.error <= TOLERANCES[compute]
    assert not in_general(model)
    model(**inputs).loss.backward()
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("kind", sampled(["nf4+", "int8"], ["nf4+"]))
def test_qlora_in_parts(saved, kind):
    inputs = batch(37, batch=3, tokens=13, padding="right")
    model = _qlora(saved("llama"), kind, torch.float32)
    fxseek.compile(model, 0.6, score="random", learn_chunk=3)
    assert fxseek.check_gradients(model, tolerance=1e-5, **inputs).error <= 1e-5
    step = step_of(model)
    assert step is not None and step.recorder.latest is not None
    assert isinstance(step.recorder.latest.program.parts, Parts)


@pytest.mark.parametrize("kind", ["nf4+", pytest.param("int8", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("recompute", sampled(["selective", "block"], ["block"]))
def test_qlora_lowered(saved, kind, recompute):
    model = _qlora(saved("llama"), kind, torch.float32)
    fxseek.compile(model, 0.4, score="random", backend="aot_eager", recompute=recompute)
    fxseek.check_gradients(model, tolerance=1e-5, **batch(37, batch=3, tokens=13, padding="right"))


@pytest.mark.parametrize("kind", sampled(["nf4+", "int8"], ["nf4+"]))
def test_a_dequantised_weight_is_not_kept_for_backward(saved, kind):
    model = _qlora(saved("llama"), kind, torch.float32)
    plain = _tiny("llama")
    sizes = {p.numel() for n, p in plain.named_parameters() if "proj" in n}
    inputs = batch(37, batch=3, tokens=13)
    known = {p.data_ptr() for p in model.parameters()}
    fxseek.compile(model, 0.4, score="random")
    model(**inputs).loss.backward()  # what the capture leaves behind is not the step's
    before = {id(x) for x in _floats(sizes)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = model(**inputs).loss
    weights = [x for x in kept if x.is_floating_point() and x.numel() in sizes]
    assert not [x.shape for x in weights if x.data_ptr() not in known]
    gc.collect()  # a function may also hold values by other means than autograd's
    assert not [x.shape for x in _floats(sizes) if id(x) not in before and x is not loss]
    loss.backward()


def _floats(sizes: set[int]) -> list[Tensor]:
    """Live floating-point tensors with one of these numbers of elements."""
    return [
        x
        for x in gc.get_objects()
        if type(x) is Tensor and x.is_floating_point() and x.numel() in sizes
    ]


def test_that_the_check_sees_a_weight_that_is_kept():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.wide = weight.to(torch.float32) * 2
            return x @ ctx.wide

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
            return slope @ ctx.wide.T, None

    x = torch.ones(2, 61, requires_grad=True)
    held = Keeps.apply(x, torch.ones(61, 67, dtype=torch.int8))
    assert [tuple(found.shape) for found in _floats({61 * 67})] == [(61, 67)]
    del held


def test_preparing_switches_checkpointing_on_and_compiling_off(saved, caplog):
    model = _qlora(saved("llama"), "nf4", torch.float32)
    inner = model.get_base_model()  # type: ignore[operator]
    assert inner.is_gradient_checkpointing
    assert inner.get_input_embeddings()._forward_hooks
    with caplog.at_level(logging.INFO):
        fxseek.compile(model, 0.4, score="random")
        fxseek.check_gradients(model, tolerance=1e-5, **batch(37))
    assert "gradient checkpointing is switched off" in caplog.text
    assert "input-require-grads hook is removed" in caplog.text
    assert not in_general(model)


def test_steps_of_training(saved):
    """Adapters learn, quantised weights stay what they are, and nothing is captured anew."""
    model = fxseek.compile(_qlora(saved("llama"), "nf4+", torch.float32), 0.5)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses: list[float] = []
    for step in range(8):
        loss = model(**batch(37, tokens=11 + step % 3)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], before) for name, before in frozen.items())
    step_ = step_of(model)
    assert step_ is not None
    assert len(step_.recorder.steps) == 1


@pytest.mark.sweep
def test_8_bit_layers_settle_after_a_step(saved):
    """They rename their state in the first call: a second capture is needed, not a third."""
    model = fxseek.compile(_qlora(saved("llama"), "int8", torch.float32), 0.5)
    for step in range(4):
        model(**batch(37, tokens=11 + step)).loss.backward()
    fxseek.check_gradients(model, tolerance=1e-5, **batch(37))
    step_ = step_of(model)
    assert step_ is not None
    assert len(step_.recorder.steps) <= 2


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.sweep)])
def test_biases(saved, kind):
    """Layers with biases convert them in their first call, which Dynamo cannot capture."""
    model = _qlora(saved("qwen2"), kind, torch.bfloat16, checkpointing=False)
    inputs = batch(37, batch=3, tokens=13)
    with torch.no_grad():
        model(**inputs)
    fxseek.compile(model, 0.4, score="random")
    fxseek.check_gradients(model, tolerance=TOLERANCES[torch.bfloat16], **inputs)
    assert not in_general(model)


@pytest.mark.parametrize("kind", ["nf4+", pytest.param("int8", marks=pytest.mark.sweep)])
def test_evaluation_between_steps(saved, kind):
    """On some CPUs bitsandbytes packs 4-bit weights in it, whose products have no gradient."""
    model = _qlora(saved("llama"), kind, torch.float32)
    layers = _four_bits(model)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    fxseek.compile(model, 0.4, score="random")
    inputs = batch(37)
    model(**inputs).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        model(**inputs)
    model.train()
    step_ = step_of(model)
    assert step_ is not None
    step_.recorder.step = 0
    model(**inputs).loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert not in_general(model)
    fxseek.check_gradients(model, tolerance=1e-5, **inputs)
    fxseek.uncompile(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)


def test_weights_that_are_packed_for_inference_are_refused(saved):
    model = _qlora(saved("llama"), "nf4+", torch.float32)
    state = _four_bits(model)[0].weight.quant_state
    state.packing_format_for_cpu = True
    said = r"4-bit weight of 'base_model.*q_proj.base_layer' .* Load the model again, and compile"
    with pytest.raises(fxseek.ConfigError, match=said):
        fxseek.compile(model, 0.4)
    state.packing_format_for_cpu = False
    fxseek.compile(model, 0.4, score="random")
    state.packing_format_for_cpu = True
    with pytest.raises(fxseek.InputError, match=said):
        model(**batch(37))
    model.eval()(**batch(37))  # an evaluation has nothing to lose


def _four_bits(model: nn.Module) -> list[Any]:
    from bitsandbytes.nn.modules import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


# ---- a real model --------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.model
def test_smollm2(tmp_path):
    """A step of QLoRA on SmolLM2-135M saves less for backward than the ordinary one."""
    common = pytest.importorskip("common")
    source = common.find_model()
    common.load_model(source, torch.float32).save_pretrained(tmp_path)
    model = _qlora(str(tmp_path), "nf4+", torch.float32, checkpointing=False)
    model.config.use_cache = False  # type: ignore[union-attr]
    inputs = batch(1000, batch=1, tokens=512)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        with SavedBytes(exclude=[*model.parameters(), *model.buffers()]) as saved_bytes:
            loss = model(**inputs).loss
        mib = saved_bytes.total / 2**20
        loss.backward()
        return time.perf_counter() - start, mib

    run()
    ordinary, ordinary_mib = run()
    fxseek.compile(model, 0.1)
    fxseek.check_gradients(model, tolerance=1e-4, **inputs)
    run()
    selected, selected_mib = run()
    assert not in_general(model)
    print(f"ordinary {ordinary:.2f} s, {ordinary_mib:.0f} MiB")  # read with pytest -s
    print(f"selected {selected:.2f} s, {selected_mib:.0f} MiB")
    assert selected_mib < 0.4 * ordinary_mib
