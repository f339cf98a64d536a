"""`fxseek.explain`: what the passes made of a model, before a step is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxseek import _torch
from fxseek.capture.backend import Made
from fxseek.capture.step import SeekStep, compiled_step
from fxseek.errors import InputError
from fxseek.passes.facts import example, module_path, numel, tensors_of, where
from fxseek.passes.ir import Gathered
from fxseek.passes.parts import Parts
from fxseek.passes.rules import called
from fxseek.passes.score_plan import EndsInLoss
from fxseek.program import Program
from fxseek.ratios import Labelled
from fxseek.run.assemble import Step
from fxseek.run.parts import ONE_PART
from fxseek.run.saved import SavedBytes
from fxseek.run.stages import LEAST_SPANS, least_kept
from fxseek.selecting import Selection, count_kept

__all__ = ["Captured", "Explanation", "Fallback", "capture", "explain"]


@dataclass(frozen=True)
class Fallback:
    """An operation on the general path: exact, but at the cost of a full-size activation.

    `operation` as it was called; `reason` why no rule took it; `module` and `line` where it
    is in the user's code; `cost_bytes` the size of its operands and result for all tokens.
    """

    operation: str
    reason: str
    module: str
    line: str
    cost_bytes: int


@dataclass(frozen=True)
class Explanation:
    """What a training step of a compiled model consists of; print it.

    `stages`: operations of each stage by name. `fallbacks`: operations on the general path.
    `predicted_saved_bytes` and `ordinary_saved_bytes`: what autograd would keep for this
    batch, with and without fxseek (parameters excluded). `whole_bytes`: of all tokens' values that
    others read, above all keys and values. `program`: the step as a GraphModule.
    `kept`: tokens of a row that are selected. Where the ratio varies, from `fewest_kept` to `kept`,
    for which the bytes are predicted: with ``"mass:0.9"`` the scores will tell, and with
    ``"labelled"`` the rows of this batch have so many labels (a causal model, which shifts them,
    may keep one less), beside the sinks; a sample of spans may fall short of its ratio by less
    than a span. `tokens` of each of `batch` rows; `attentions`: how many there are;
    `block_input`: where the gradient score is taken; `notes`: what else is to be known.
    """

    tokens: int
    kept: int
    fewest_kept: int
    batch: int
    stages: dict[str, Counter[str]]
    fallbacks: tuple[Fallback, ...]
    attentions: int
    block_input: str
    notes: tuple[str, ...]
    predicted_saved_bytes: int
    ordinary_saved_bytes: int
    whole_bytes: int
    program: fx.GraphModule

    def __str__(self) -> str:
        """A page for a person."""
        fewest = "" if self.fewest_kept == self.kept else f"{self.fewest_kept} to "
        lines = [
            f"fxseek: {fewest}{self.kept} of {self.tokens} tokens in each of {self.batch} rows",
            "",
            "  prefill → score → select → gather → learn",
        ]
        for name, counts in self.stages.items():
            common = ", ".join(f"{op} {n}" for op, n in counts.most_common(5))
            lines.append(f"  {name:8} {sum(counts.values()):5} operations: {common}")
        lines += [
            "",
            f"  attentions: {self.attentions}; input of the last block: {self.block_input}",
            f"  saved for backward: {self._remains()}",
        ]
        lines += [f"  {note}" for note in self.notes]
        if not self.fallbacks:
            lines.append("  general path (scatter → op → gather): none")
        else:
            lines.append("  general path (scatter → op → gather), exact but full-size:")
        for item in self.fallbacks:
            lines.append(f"    {item.operation} in {item.module or 'the model'}: {item.reason}")
            lines.append(f"      {item.line}; {_mib(item.cost_bytes)}")
        return "\n".join(lines)

    def _remains(self) -> str:
        """What share of the ordinary activations is kept, and of what it consists."""
        kept, ordinary = self.predicted_saved_bytes, self.ordinary_saved_bytes
        share = f"{kept / max(1, ordinary):.1%} of ordinary training's"
        consists = [f"activations of {self.kept / self.tokens:.0%} of the tokens"]
        if self.whole_bytes:
            consists.append(f"keys, values and the like of all ({_mib(self.whole_bytes)})")
        if self.fallbacks:
            consists.append(f"{len(self.fallbacks)} operations on all tokens, listed below")
        return f"{share} ({_mib(kept)} of {_mib(ordinary)}): {', '.join(consists)}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


class Captured(NamedTuple):
    """A captured step, its inputs, and what makes the step again for another configuration."""

    step: Step
    inputs: Sequence[Any]
    made: Made

    @property
    def graph(self) -> fx.Graph:
        """What Dynamo has captured, of which the step is made."""
        made: Any = self.made
        return made.args[0]


class _Found(BaseException):
    """Carries what was captured out of the call that captured it; nothing is run.

    An exception, since values returned in its place would go on: what the model does behind the
    graph would write them into its attributes.
    """


def explain(model: nn.Module, /, **batch: Any) -> Explanation:
    """Capture a training step for this batch and say what it would do; no step is run.

    Args:
        model: a model compiled by `fxseek.compile`.
        batch: the arguments of a training step; their shapes and dtypes matter, and the values of
            `labels` with ``ratio="labelled"``.

    Raises:
        InputError: the model is not compiled by fxseek, or the batch cannot be trained on.
        CaptureError, GraphError: as the training step would.
    """
    step, inputs, _ = capture(compiled_step(model), batch)
    program = step.program
    facts, score, structure = program.facts, program.score, program.structure
    gathered = {x for piece in program.learned for x in piece.inputs if isinstance(x, Gathered)}
    head = None if program.head is None else program.head.stage
    pieces = [] if score.gradient is None else score.gradient.pieces()
    stages = {
        "prefill": _counts(program.prefill.graph),
        "score": sum((_counts(x.graph) for x in pieces if x is not head), Counter()),
        "gather": Counter({"gather_rows": len(gathered)}),
        "learn": sum((_counts(piece.graph) for piece in program.learned), Counter()),
    }
    notes = []
    if score.gradient is not None and isinstance(score.gradient.end, EndsInLoss):
        notes.append(
            "score: head and loss are not per-token after the last attention, so their gradient "
            "is taken on all tokens at once, not in chunks"
        )
    if structure.pooled:
        notes.append("the model reads some positions by their place: these are always kept")
    parts = program.parts
    if isinstance(parts, Parts):
        looked = " where its attention masks show no later token" if parts.mixing.must_hide else ""
        notes.append(f"learned in parts of {program.config.learn_chunk} tokens{looked}")
    elif parts:
        notes.append(ONE_PART.format(reason=parts))
    if program.config.draws_spans:
        most = "a quarter of " if program.config.select == "sample" else ""
        notes.append(
            f"selected in spans of {program.config.span} tokens, at most {most}what a row keeps"
        )
    if program.config.sinks and program.config.ratio != 1.0:
        notes.append(f"the first tokens of each row are always kept ({program.config.sinks})")
    notes += [f"loss: {note}" for note in structure.notes()]
    fallbacks = tuple(
        Fallback(
            operation=called(node),
            reason=facts.general.get(node, "an operand has no known token row"),
            module=module_path(node),
            line=where(node),
            cost_bytes=_bytes_of(node),
        )
        for piece in program.learned
        for node in piece.general
    )
    return Explanation(
        **_predict(step, inputs),
        stages=stages,
        fallbacks=fallbacks,
        attentions=len(structure.attentions),
        block_input=_described(structure.block_input),
        notes=tuple(notes),
        ordinary_saved_bytes=_predict_ordinary(program, inputs),
        program=step.module,
    )


def capture(step: SeekStep, batch: dict[str, Any]) -> Captured:
    """The compiled training step for this batch; nothing is run."""

    def wrap(step: Step, made: Made) -> Callable[..., Any]:
        def stop(*inputs: Any) -> Any:
            raise _Found(Captured(step, inputs, made))

        return stop

    trial = SeekStep(step.model, step.config_for(batch), run=wrap)
    trial.switches = step.switches  # what was switched on since is switched on again in the end
    modes = {module: module.training for module in step.model.modules()}
    try:
        if not step.model.training:
            step.model.train()
        with torch.enable_grad():
            trial(**batch)
    except _Found as found:
        return found.args[0]
    finally:
        for module, mode in modes.items():
            module.training = mode
    raise InputError(
        "nothing to explain: the model's output does not depend on any parameter that requires "
        "grad, so a training step has nothing to do"
    )


def _counts(graph: fx.Graph) -> Counter[str]:
    return Counter(called(node) for node in graph.nodes if node.op.startswith("call_"))


def _described(node: fx.Node | None) -> str:
    if node is None:
        return "not found"
    return f"{node.name} (after {module_path(node) or 'the model'})"


def _bytes_of(node: fx.Node) -> int:
    nodes = [item for item in (node, *node.all_input_nodes) if item.op != "placeholder"]
    tensors = [tensor for item in nodes for tensor in tensors_of(example(item))]
    return sum(tensor.element_size() * numel(tensor) for tensor in tensors)


def _predict(step: Step, inputs: Sequence[Any]) -> dict[str, int]:
    """Of an `Explanation` the sizes, and the bytes of the step. Found on fake tensors."""
    config, counted = step.program.config, step.program.score.tokens
    mode, fakes = _torch.faked(inputs)
    env = step.env(fakes)
    primary = env.read(counted.primary)
    tokens = primary.shape[config.token_dim]
    batch = 1 if counted.batch_dim is None else primary.shape[counted.batch_dim]
    labels = _labels_of_rows(step.program, inputs)
    required = config.sinks + len(counted.required)
    if labels is None:
        targets = step.program.score.targets
        labelled = targets is not None and targets.target is not None
        least = least_kept(config, required, labelled=labelled)
        fewest, kept = (count_kept(x, tokens) if x else 1 for x in config.ratio_range)
        fewest, kept = (max(x, min(least, tokens)) for x in (fewest, kept))
        if config.draws_spans and config.select == "sample":  # which keeps whole ones
            fewest -= max(1, min(config.span, (fewest - required) // LEAST_SPANS)) - 1
    else:
        fewest, kept = map(int, labels.aminmax())
        fewest, kept = max(1, fewest, required), max(1, min(kept + required, tokens))
    tokens, fewest, kept = (x + counted.virtual for x in (tokens, fewest, kept))
    with mode:
        positions = torch.zeros(batch, kept, dtype=torch.int64, device=primary.device)
        weights = torch.ones(batch, kept, device=primary.device)
        every = range(tokens) if config.ratio == 1.0 else None
        selection = Selection(positions, weights, consecutive=every)
        step.module.get_submodule("prefill")(env)
        whole = sum(x.nbytes for node in step.program.whole for x in tensors_of(env.read(node)))
        step.module.get_submodule("gather")(env, selection)
        _, saved_bytes = step.module.get_submodule("learn")(env, selection)
    return {
        "tokens": tokens,
        "kept": kept,
        "fewest_kept": fewest,
        "batch": batch,
        "predicted_saved_bytes": saved_bytes,
        "whole_bytes": whole,
    }


def _labels_of_rows(program: Program, inputs: Sequence[Any]) -> torch.Tensor | None:
    """How many labels each row of the batch has, where that is what it keeps; Long[batch].

    A causal model, which shifts its labels, may keep one less. What is required may have one, too.
    """
    targets = program.score.targets
    by_labels = isinstance(program.config.parsed_ratio, Labelled)
    if not by_labels or targets is None or targets.target is None:
        return None
    for node, value in zip(program.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if _torch.source_name(node) == "labels" and not value.is_meta and value.dim() == 2:
            return (value != targets.ignore_index).sum(-1)
    return None


def _predict_ordinary(program: Program, inputs: Sequence[Any]) -> int:
    mode, fakes = _torch.faked(inputs)
    owner = program.graph.owning_module or nn.Module()  # holds bodies of autograd functions
    module = fx.GraphModule(owner, program.graph)
    with mode, torch.enable_grad(), SavedBytes(exclude=fakes) as saved:
        outputs = fx.Interpreter(module).run(*fakes)
        total = saved.total
    del outputs
    return total
