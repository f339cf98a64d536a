"""``SeekConfig``: every choice of a token-selective training step, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

from fxseek import checks
from fxseek.checks import listing, shown
from fxseek.errors import ConfigError
from fxseek.ratios import Fixed, Labelled, Linear, Mass, Ratio, problems_of, ratio_of
from fxseek.scores import NORMALISATIONS, SCORERS

__all__ = [
    "BACKENDS",
    "GRADIENT_NORMS",
    "KVS",
    "KV_GRAD_DTYPES",
    "NORMALISATIONS",
    "OUTPUTS",
    "RECOMPUTES",
    "SELECTS",
    "SeekConfig",
]

SELECTS = ("topk", "sample")
GRADIENT_NORMS = ("l1", "l2", "sum")
BACKENDS = ("eager", "aot_eager", "inductor")
RECOMPUTES = ("none", "selective", "block")
KVS = ("device", "offload")
KV_GRAD_DTYPES = ("float32", "model")
OUTPUTS = ("loss", "selected", "full")

_CALLABLES = ("ratio", "score", "loss")
_OPTIONAL = ("prefill_chunk", "learn_chunk", "memory_budget_bytes", "chunk_bytes", "ratio_steps")
_MAX_SEED = 2**63 - 1
CPU_CHUNK_BYTES, _CHUNK_BYTES = 64 << 20, 256 << 20  # small ones leave a GPU waiting for launches
_MAX_SPAN = 2**31 - 1


@dataclass(frozen=True)
class SeekConfig:
    """How tokens are scored and selected, and how the training step runs.

    All problems of a configuration are reported together, in one ``ConfigError``.

    Args:
        ratio: Share of each row's tokens that is trained on, in (0, 1]; a row of ``n`` tokens
            keeps ``ceil(ratio * n)``. 1.0 keeps every position, padding too, and, where it is
            fixed, computes no score. Or ``"mass:0.9"``: as few tokens as hold 90 % of the row's
            score mass, best first, within ``ratio_bounds`` (docs/scoring.md); rows then keep
            different numbers, and a step waits for the device to learn the largest. Not with
            ``score="random"``, which gives all tokens the same mass. Or ``"labelled"``: the
            positions that have a label and no others, without a score, for data where a part of
            each row is labelled, such as completions. Or a ratio that follows training:
            ``"0.1->0.5"``, linear over ``ratio_steps``, or a function of the step. Default 0.1,
            the paper's.
        score: What makes a token worth keeping: ``"tokenseek"`` (context and gradient combined),
            ``"context"`` (attention received in the last layer; no backward pass),
            ``"gradient"`` (of the loss, at the input of the last block), ``"random"``, or a
            callable from ``ScoreInputs`` to a float tensor ``[batch, tokens]``.
            Default ``"tokenseek"``.
        select: ``"topk"`` keeps the best-scoring tokens with weight 1; ``"sample"`` draws labelled
            tokens without replacement, weighted so that the expected loss is the full-token
            loss. Default ``"topk"``.
        alpha: Weight of the context score in ``"tokenseek"``; at least 0. Default 1.0.
        beta: Weight of the gradient score in ``"tokenseek"``; at least 0. Default 1.0. Only the
            ratio of alpha to beta changes the ranking.
        normalise: What puts the two scores of ``"tokenseek"`` on one scale, row by row:
            ``"minmax"``, the paper's (the logarithm of the context score, the gradient's from 0 to
            1); ``"rank"`` (each score's rank, from 0 to 1) or ``"zscore"`` (both with mean 0 and
            deviation 1), so that equal weights mean equal influence. Default ``"minmax"``.
        gradient_norm: How a token's gradient vector becomes one number: ``"l1"``, ``"l2"`` or
            ``"sum"`` (signed). Default ``"l1"``.
        supervised_only: Labelled positions first; others only fill a row that has too few.
            Default False.
        span: Tokens that are selected together: runs of so many consecutive ones, cut at a random
            place of each row and step. A span ends with its document (where ``position_ids`` don't
            go on by one), and where labels decide (``supervised_only``, ``select="sample"``) with
            its labelled stretch; it has at most what its row keeps, a sampled one a quarter of
            that. 1 selects tokens one by one. Unused where no token is scored. Default 1.
        sinks: First tokens of a row that are always kept, whatever their scores and labels. They
            count towards the ratio; with labels, a row keeps one more at least. All others attend
            to them, the very first above all, so that much of the gradient flows through their keys
            and values (docs/scoring.md). Default 0, as in the paper.
        uniform: Share of uniform probability mass mixed into the scores by ``select="sample"``,
            in (0, 1]. Default 0.5.
        seed: Seed of random scores, of samples and of where spans are cut, a non-negative integer.
            Default 0.
        backend: What runs the learn stage, and the head in learn and score: ``"eager"``,
            ``"aot_eager"`` or ``"inductor"``; the prefill and the rest of the score run eagerly.
            Default ``"eager"``.
        recompute: What backward makes again instead of keeping it: ``"none"``; ``"selective"``,
            what follows cheaply from products (norms, activations, rotations, casts), as the
            partitioner of the compiled backends does in any case; or ``"block"``, where only keys,
            values and the inputs of each block are kept. Default ``"selective"``.
        kv: Where keys and values of all tokens wait between their use: ``"device"``, or
            ``"offload"``, in (pinned) host memory; they come back block by block. Needs
            ``recompute="block"`` and ``backend="eager"``. Default ``"device"``.
        kv_grad_dtype: With ``learn_chunk``, the precision in which gradients of keys and values
            wait for the part that made them: ``"float32"``, where the model's is lower; or
            ``"model"``, that of the keys and values: in bfloat16 half the bytes, and one rounding
            for each later part. Default ``"float32"``.
        prefill_chunk: Tokens of a row for which the passes over all tokens compute what lies
            between two attentions at a time (norms, linear layers): the prefill, and the last block
            in the score stage, which computes it once more in its backward. None for all of them.
            Default None.
        learn_chunk: Tokens of a row that are learned at a time, for causal models: backward runs
            these parts, the last first, and only one part's activations exist at once. Gradients
            are those of one part. Where a model cannot be learned in parts, the log says why. None
            for one part. Default None.
        memory_budget_bytes: Peak bytes of a training step (weights, gradients and activations,
            without optimiser state), or such as ``"20GiB"``. To stay below it, fxseek picks
            ``learn_chunk``, ``prefill_chunk``, ``recompute``, ``kv`` and ``chunk_bytes``, those
            that are left at their default, and nothing that changes what is learned. Default None.
        outputs: What token-shaped outputs such as logits are in a training step: ``"loss"`` (None;
            where the loss is computed outside the model, the same as ``"full"``), ``"selected"``
            (``[batch, kept, ...]``), or ``"full"`` (all tokens, with gradients at the selected
            ones). Default ``"loss"``.
        chunk_bytes: Most bytes of logits, and of the attention maps that scores read, that exist
            at once. None for 64 MiB on the CPU and 256 MiB on other devices. Default None.
        loss: ``loss(outputs, batch) -> scalar tensor``, for models that are given no labels.
            Default None.
        token_dim: Which dimension of the model's inputs counts tokens. Default 1.
        ratio_bounds: Smallest and largest share of a row's own tokens that a ratio such as
            ``"mass:0.9"`` may come to, ``0 < low <= high <= 1``; a fixed ratio does not read it.
            Default (0.01, 0.5).
        ratio_steps: Steps over which a ratio such as ``"0.1->0.5"`` goes from one to the other:
            calls of the model in training, each micro-batch one. None for the optimiser's steps of
            a Trainer that has a `SeekCallback`; no other ratio reads it. Default None.

    Raises:
        ConfigError: A value is of the wrong type or out of range; the message names each
            argument, the value given, and what is accepted.
    """

    ratio: float | str | Callable[[int], float] = 0.1
    _: KW_ONLY
    score: str | Callable[..., Any] = "tokenseek"
    select: str = "topk"
    alpha: float = 1.0
    beta: float = 1.0
    normalise: str = "minmax"
    gradient_norm: str = "l1"
    supervised_only: bool = False
    span: int = 1
    sinks: int = 0
    uniform: float = 0.5
    seed: int = 0
    backend: str = "eager"
    recompute: str = "selective"
    kv: str = "device"
    kv_grad_dtype: str = "float32"
    prefill_chunk: int | None = None
    learn_chunk: int | None = None
    memory_budget_bytes: int | str | None = None
    outputs: str = "loss"
    chunk_bytes: int | None = None
    loss: Callable[..., Any] | None = None
    token_dim: int = 1
    ratio_bounds: tuple[float, float] = (0.01, 0.5)
    ratio_steps: int | None = None

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError(listing(problems))
        object.__setattr__(self, "memory_budget_bytes", self.budget)
        object.__setattr__(self, "ratio", self.parsed_ratio.plain())
        object.__setattr__(self, "ratio_bounds", tuple(map(float, self.ratio_bounds)))
        for name in ("alpha", "beta", "uniform"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("span", "sinks", "seed", "token_dim", *_OPTIONAL):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def budget(self) -> int | None:
        """``memory_budget_bytes`` as a number."""
        given = self.memory_budget_bytes
        return checks.bytes_of(given) if isinstance(given, str) else given

    def on(self, device: str) -> SeekConfig:
        """With what the device decides, such as ``"cpu"``: ``chunk_bytes``, where it is None."""
        if self.chunk_bytes is not None:
            return self
        return dataclasses.replace(
            self, chunk_bytes=CPU_CHUNK_BYTES if device == "cpu" else _CHUNK_BYTES
        )

    @property
    def most_chunk_bytes(self) -> int:
        """``chunk_bytes`` of a configuration `on` a device."""
        assert self.chunk_bytes is not None
        return self.chunk_bytes

    @cached_property
    def parsed_ratio(self) -> Ratio:
        """What ``ratio`` says."""
        found = ratio_of(self.ratio)
        assert found is not None
        return found

    @property
    def mass_share(self) -> float | None:
        """Share of the score mass that each row keeps: 0.9 of ``"mass:0.9"``; else None."""
        found = self.parsed_ratio
        return found.share if isinstance(found, Mass) else None

    @property
    def is_scored(self) -> bool:
        """Whether tokens are scored: not where all are kept, or all that have a label."""
        return not (self.ratio == 1.0 or isinstance(self.parsed_ratio, Labelled))

    @property
    def draws_spans(self) -> bool:
        """Whether spans are cut at random places."""
        return self.span > 1 and self.is_scored

    @property
    def ratio_range(self) -> tuple[float, float]:
        """The least and the largest share of a row's tokens that a step may keep; 0 to 1 if any."""
        match self.parsed_ratio:
            case Fixed(ratio):
                return ratio, ratio
            case Mass():
                return self.ratio_bounds
            case Linear(first, last):
                return min(first, last), max(first, last)
            case _:
                return 0.0, 1.0

    def ratio_at(self, step: int, progress: float | None = None) -> float | None:
        """The share that a step keeps; None where it follows from the rows.

        Args:
            step: how many calls of the model in training came before it.
            progress: the share of training that is done, where ``ratio_steps`` does not say.

        Raises:
            ConfigError: a function returned something else than a share, or nobody says how many
                steps there will be.
        """
        if self.ratio_steps is not None:
            progress = min(step / max(self.ratio_steps - 1, 1), 1.0)
        return self.parsed_ratio.at(step, progress)

    @classmethod
    def make(
        cls, ratio: float | str | Callable[[int], float] | SeekConfig = 0.1, **options: Any
    ) -> SeekConfig:
        """The configuration that ``fxseek.compile(model, ratio, **options)`` asks for.

        ``ratio`` may itself be a ``SeekConfig``; options then replace its fields.

        Raises:
            ConfigError: An option is unknown (the closest name is suggested) or has a bad value.
        """
        base = ratio._values() if isinstance(ratio, SeekConfig) else {"ratio": ratio}
        return cls._checked(base | options, "option")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON.

        Raises:
            ConfigError: ``ratio``, ``score`` or ``loss`` is a callable, which has no plain form.
        """
        values = self._values()
        callables = [name for name in _CALLABLES if callable(values[name])]
        if callables:
            raise ConfigError(
                listing(
                    [
                        f"{name}={shown(values[name])} is a callable and cannot be saved; save "
                        f"the configuration with {name}={getattr(SeekConfig, name)!r} and pass "
                        f"the callable again when you load it: "
                        f"dataclasses.replace(SeekConfig.from_dict(saved), {name}=your_callable)"
                        for name in callables
                    ],
                    what="SeekConfig cannot be turned into plain values",
                )
            )
        return values | {"ratio_bounds": list(self.ratio_bounds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SeekConfig:
        """The configuration that ``to_dict`` described; fields left out take their defaults.

        Raises:
            ConfigError: Not a mapping, an unknown key (the closest name is suggested), or a value
                that is not accepted.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"SeekConfig.from_dict needs a mapping of field names to values, "
                f"got {shown(values)}; pass what SeekConfig.to_dict() returned"
            )
        return cls._checked(values, "key")

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text.

        Raises:
            ConfigError: as ``to_dict``.
        """
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> SeekConfig:
        """The configuration that ``to_json`` wrote.

        Raises:
            ConfigError: The text is not a JSON object, or as ``from_dict``.
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"SeekConfig.from_json needs JSON text, got {shown(text)} ({error}); "
                f"pass what SeekConfig.to_json() returned"
            ) from error
        return cls.from_dict(values)

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def _checked(cls, values: Mapping[str, Any], kind: str) -> SeekConfig:
        """Builds a configuration; unknown names, of a `kind`, and bad values are in one error."""
        unknown = _unknown(values, kind)
        if not unknown:
            return cls(**values)
        probe = object.__new__(cls)  # whose other fields have their defaults, by the class
        vars(probe).update((x, values[x]) for x in cls.__dataclass_fields__ if x in values)
        raise ConfigError(listing(unknown + _problems(probe)))


def _unknown(values: Mapping[Any, Any], kind: str) -> list[str]:
    """One line for each name that is no field, with the closest field suggested."""
    names = [field.name for field in dataclasses.fields(SeekConfig)]
    lines = []
    for name in values:
        if name in names:
            continue
        close = difflib.get_close_matches(str(name), names, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        lines.append(f"unknown {kind} {name!r} (value {shown(values[name])}); {remedy}")
    return lines


def _problems(config: SeekConfig) -> list[str]:
    """Every reason why ``config`` cannot be used, one line each; empty when it can."""
    lines = [
        *checks.choice("score", config.score, tuple(SCORERS), callable_too=True),
        *checks.choice("select", config.select, SELECTS),
        *checks.choice("gradient_norm", config.gradient_norm, GRADIENT_NORMS),
        *checks.choice("backend", config.backend, BACKENDS),
        *checks.choice("recompute", config.recompute, RECOMPUTES),
        *checks.choice("kv", config.kv, KVS),
        *checks.choice("kv_grad_dtype", config.kv_grad_dtype, KV_GRAD_DTYPES),
        *checks.choice("outputs", config.outputs, OUTPUTS),
        *problems_of(config.ratio),
        *checks.bounds("ratio_bounds", config.ratio_bounds),
        *checks.share("uniform", config.uniform, "0.5 is half uniform, 1.0 ignores the scores"),
        *checks.weight("alpha", config.alpha),
        *checks.weight("beta", config.beta),
        *checks.choice("normalise", config.normalise, tuple(NORMALISATIONS)),
        *checks.integer("span", config.span, 1, _MAX_SPAN),
        *checks.integer("sinks", config.sinks, 0, _MAX_SPAN),
        *checks.integer("seed", config.seed, 0, _MAX_SEED),
        *checks.integer("token_dim", config.token_dim, 1, None),
    ]
    for name in _OPTIONAL:
        value = getattr(config, name)
        if name == "memory_budget_bytes" and isinstance(value, str):
            value = checks.bytes_of(value)
            if not value:
                lines.append(
                    f"{name}={shown(getattr(config, name))} is no number of bytes; pass an "
                    f"integer, or a number and one of {', '.join(checks.UNITS)}, such as '20GiB'"
                )
        elif value is not None:
            lines += checks.integer(name, value, 1, None)
    if config.kv == "offload" and (config.recompute, config.backend) != ("block", "eager"):
        lines.append(
            f"kv='offload' with recompute={shown(config.recompute)} and "
            f"backend={shown(config.backend)}: autograd would keep the copies on the device; "
            f"use recompute='block' and backend='eager'"
        )
    if not isinstance(config.supervised_only, bool):
        lines.append(
            f"supervised_only={shown(config.supervised_only)} is not a bool; pass True to select "
            f"positions that have a label first, or False"
        )
    if config.loss is not None and not callable(config.loss):
        lines.append(
            f"loss={shown(config.loss)} is not callable; pass a function "
            f"loss(outputs, batch) -> scalar tensor, or None to use the model's own loss"
        )
    if config.score == "tokenseek" and checks.is_zero(config.alpha) and checks.is_zero(config.beta):
        lines.append(
            f"alpha={shown(config.alpha)} and beta={shown(config.beta)} leave "
            f"score='tokenseek' nothing to rank by; make one of them positive, "
            f"or use score='random'"
        )
    if config.score == "random" and isinstance(ratio_of(config.ratio), Mass):
        lines.append(
            f"ratio={shown(config.ratio)} with score='random' keeps a fixed share, as random "
            f"scores have equal mass; pass that share as a number, such as 0.1, or another score"
        )
    return lines
