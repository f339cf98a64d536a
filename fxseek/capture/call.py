"""A call of a model: its arguments by name, what they must be, and which dimensions are dynamic."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxseek import _torch
from fxseek.capture.counted import Counted
from fxseek.capture.limits import uses_cache
from fxseek.config import SeekConfig
from fxseek.errors import InputError
from fxseek.ops.autocast import autocast_dtype
from fxseek.ops.masks import read_tokens
from fxseek.passes.facts import DECODER_INPUTS, POSITIONS, PRIMARY_INPUTS
from fxseek.passes.sizes import may_batch, may_count

__all__ = ["Calls"]

_LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
"""As models of transformers call them, and its Trainer; the last ones are an answer's bounds."""
_CACHES = ("past_key_values", "cache_params", "past_buckets_states")


class Calls:
    """Reads the calls of one model. `tell` logs a message, once for each model."""

    def __init__(
        self,
        model: nn.Module,
        config: SeekConfig,
        counted: Counted,
        tell: Callable[[str], None],
    ) -> None:
        self.model = model
        self.config = config
        self.counted = counted
        self.tell = tell
        self.signature = inspect.signature(model.forward)
        parameters = self.signature.parameters
        self._takes_use_cache = "use_cache" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._seen_documents = False

    @property
    def token_inputs(self) -> tuple[str, ...] | None:
        """The arguments that count tokens, None for all that are long enough."""
        if self.counted.place is not None:
            return (POSITIONS,)
        return DECODER_INPUTS if self.seq2seq else None

    def padding_mask(self, batch: dict[str, Any]) -> Tensor | None:
        """Which tokens of the batch are no padding, Bool[batch or 1, tokens]; None without a mask.

        A mask is [batch, tokens], or one of tokens × tokens, or some of these in a dictionary.
        """
        mask = batch.get("decoder_attention_mask" if self.seq2seq else "attention_mask")
        parts = [
            part
            for part in (mask.values() if isinstance(mask, dict) else (mask,))
            if isinstance(part, Tensor) and part.dim() in (2, 4)
        ]
        if not parts or any(part.is_meta for part in parts):
            return None
        return functools.reduce(torch.logical_or, map(read_tokens, parts))

    def in_autocast(self, batch: dict[str, Any]) -> bool:
        """Whether autocast is on where the batch is."""
        primary = [batch[name] for name in self.primary_names(batch)[:1]]
        return any(autocast_dtype(x.device.type) is not None for x in primary)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name (positional ones get the names of the signature)."""
        names = [
            name
            for name, parameter in self.signature.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        if len(args) > len(names):
            raise InputError(
                f"{type(self.model).__name__}.forward takes {len(names)} positional arguments "
                f"and was given {len(args)}: pass tensors by name"
            )
        positional = dict(zip(names, args, strict=False))
        if twice := positional.keys() & kwargs.keys():
            raise InputError(f"argument {min(twice)!r} was given twice")
        return positional | kwargs

    def has_labels(self, batch: dict[str, Any]) -> bool:
        """Whether a call has labels."""
        return any(
            isinstance(value, Tensor) and (name in _LABELS or name.endswith(("_labels", "_label")))
            for name, value in batch.items()
        )

    def refuse_cache(self, batch: dict[str, Any]) -> None:
        """A step has no place for keys and values of earlier tokens."""
        cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())
        for name, value in batch.items():
            if (name in _CACHES and value is not None) or isinstance(value, cache):
                raise InputError(
                    f"{name} was given: a training step reads the tokens that it is given, and no "
                    "keys, values or states of earlier ones. Leave it out and pass all tokens of "
                    "a row, or call the model in eval mode."
                )

    def without_cache(self, batch: dict[str, Any]) -> None:
        """A training step makes no cache, and computes what the model computes with it.

        Models of transformers take position ids that start again for the documents of a packed row,
        and keep these apart, but only where they make no cache and are given no mask. A mask of
        ones says for a model with a cache that its rows are one document.
        """
        own = uses_cache(self.model)
        if own is None or not self._takes_use_cache:
            return
        cached = batch.get("use_cache")
        if cached is None:
            cached = own
        elif cached:
            self.tell("use_cache=True is ignored: a training step returns no cache")
        batch["use_cache"] = False
        positions, names = batch.get("position_ids"), self.primary_names(batch)
        primary = batch[names[0]] if names else None
        if (
            not cached
            or self.seq2seq
            or not isinstance(positions, Tensor)
            or not isinstance(primary, Tensor)
            or primary.dim() < 2
            or batch.get("attention_mask") is not None
            or "attention_mask" not in self.signature.parameters
        ):
            return
        batch["attention_mask"] = primary.new_ones(primary.shape[:2], dtype=torch.int64)
        if self._seen_documents or positions.is_meta:
            return
        if bool((positions.diff(dim=-1) != 1).any()):
            self._seen_documents = True
            self.tell(
                "position_ids start again within a row. As in ordinary training, the documents of "
                "such a row see each other, since the model's use_cache is on: pass "
                "use_cache=False, or set it in the model's config, to keep them apart"
            )

    def primary_names(self, batch: dict[str, Any]) -> list[str]:
        """Arguments that may count the tokens, the likeliest first."""
        names = [name for name in PRIMARY_INPUTS if isinstance(batch.get(name), Tensor)]
        dim = self.config.token_dim
        return names or [k for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > dim]

    def marked(self, batch: dict[str, Any], *, any_device: bool) -> dict[str, Any]:
        """The batch with dynamic token and batch dimensions, on aliases of its tensors."""
        dim = self.config.token_dim
        names = self.primary_names(batch)
        if not names:
            given = ", ".join(sorted(batch)) or "nothing"
            raise InputError(
                f"no tensor argument has a token dimension (dimension {dim}); got {given}. Pass "
                "token_dim= to fxseek.compile if tokens are elsewhere."
            )
        primary = batch[names[0]]
        if primary.dim() <= dim:
            raise InputError(
                f"{names[0]} has the shape {list(primary.shape)}; its dimension {dim} must "
                "count tokens"
            )
        rows, tokens = primary.shape[0], primary.shape[dim]
        self._check_extent(primary, names[0], any_device=any_device)
        self._check_lengths(batch, names[0], rows, tokens)
        decoder = [batch.get(name) for name in self.token_inputs or ()]
        lengths = {x.shape[dim] for x in decoder if isinstance(x, Tensor) and x.dim() > dim}
        lengths = {tokens, *lengths} - {1} if self.counted.place is None else set()
        aliases: dict[int, Tensor] = {}

        def alias(value: Any) -> Any:
            if type(value) is dict:
                return {key: alias(part) for key, part in value.items()}
            if type(value) in (list, tuple):
                return type(value)(alias(part) for part in value)
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            if id(value) in aliases:
                return aliases[id(value)]
            view = value.view_as(value)
            for at, size in enumerate(value.shape):
                if (size in lengths and may_count(value, at, dim)) or (
                    size == rows > 1 and dim > 0 and may_batch(value, at)
                ):
                    _torch.mark_dynamic(view, at)
            aliases[id(value)] = view
            return view

        return {name: alias(value) for name, value in batch.items()}

    def _check_extent(self, primary: Tensor, name: str, *, any_device: bool) -> None:
        """There must be rows, values, and tokens to choose from."""
        if primary.is_meta and not any_device:
            raise InputError(
                f"{name} is on the meta device, which has no values: load the model's weights and "
                "move both to a real device"
            )
        if primary.numel() == 0:
            raise InputError(
                f"{name} has the shape {list(primary.shape)}: the batch is empty. Skip it."
            )
        image = primary.is_floating_point() and primary.dim() > 3
        if primary.shape[self.config.token_dim] == 1 and not image:
            raise InputError(
                f"{name} has the shape {list(primary.shape)}: with one token in a row there is "
                "nothing to select. Skip the batch, pad it to two tokens (attention_mask 0), or "
                "train without fxseek.compile."
            )

    def _check_lengths(self, batch: dict[str, Any], primary: str, rows: int, tokens: int) -> None:
        """Integer [batch, tokens] arguments must be as long as the tokens are."""
        if self.config.token_dim != 1 or self.seq2seq:
            return
        for name in ("labels", "attention_mask", "position_ids"):
            other = batch.get(name)
            if not isinstance(other, Tensor) or other.dim() != 2:
                continue
            if other.is_floating_point() and name == "labels":
                continue
            if other.shape[0] not in (1, rows) or other.shape[1] != tokens:
                raise InputError(
                    f"{name} has the shape {list(other.shape)}, {primary} has {rows} rows of "
                    f"{tokens} tokens: both must be [batch, tokens]"
                )
