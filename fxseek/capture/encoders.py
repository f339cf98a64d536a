"""Encoders of images, run outside the captured step.

Some encoders cut their input up by its values: Qwen2-VL's splits patches by the grid of each image,
and numbers tokens by a loop over them. Dynamo can't capture that. transformers' models take what
encoders give as `mm_encoder_outputs`, in the place of their inputs. So where a capture fails, they
run ahead of the step, as in ordinary training, and the step begins with what they give; gradients
go on into those that are trained.

Whether there are as many features as places for them is looked at ahead of the step too: where
Dynamo reads that check, the text of its message makes a constant of their number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxseek import _torch

__all__ = ["OUTSIDE", "Encoders"]

OUTSIDE = (
    "the encoder of images is run outside the captured step, since it cannot be captured: as in "
    "ordinary training, with activations of its own where it is trained, which "
    "report(model).saved_bytes does not count"
)

_OUTPUTS = "mm_encoder_outputs"
_POSITIONS = "compute_3d_position_ids"
_METHOD = "get_{}_features"
_MASK = "get_placeholder_mask"
_KINDS = ("image", "video", "audio")


class Encoders:
    """The encoders of a model, and what numbers its tokens by what they encode.

    `outside`: they run outside the captured step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.outside = False
        self._encode: dict[str, Callable[..., Any]] = {}
        self._number: Callable[..., Any] | None = None
        self._places: nn.Module | None = None
        for module in model.modules():
            found = [kind for kind in _KINDS if hasattr(type(module), _METHOD.format(kind))]
            if found and not self._encode and _OUTPUTS in _arguments(module.forward):
                self._encode = {kind: getattr(module, _METHOD.format(kind)) for kind in found}
            if self._number is None and hasattr(type(module), _POSITIONS):
                self._number = getattr(module, _POSITIONS)
            if self._places is None and _masks_alone(module):
                self._places = module

    def take_out(self, batch: dict[str, Any]) -> bool:
        """Let encoders run outside; False where this would be nothing new."""
        before, self.outside = self.outside, self.outside or self._reads(batch)
        return self.outside is not before

    def _reads(self, batch: dict[str, Any]) -> bool:
        """Whether a batch has inputs of an encoder that may be run outside."""
        return batch.get(_OUTPUTS) is None and any(
            isinstance(x := batch.get(_first(run)), Tensor) and not x.is_meta
            for run in self._encode.values()
        )

    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with what encoders give in the place of their inputs, if they run outside."""
        if not self.outside or not self._reads(batch):
            return batch
        made, outputs = dict(batch), {}
        for kind, run in self._encode.items():
            if batch.get(_first(run)) is not None:
                outputs[kind] = _run(run, {**batch, "return_dict": True})
                del made[_first(run)]
        self._check_places(batch, outputs)
        made[_OUTPUTS] = _of_any_size(outputs)
        if self._number is not None and batch.get("position_ids") is None:
            positions = _run(self._number, batch)
            if positions is not None:
                made["position_ids"] = positions
        return made

    @torch.no_grad()
    def _check_places(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Let the model count features and their places, and raise its own error."""
        ids, module = batch.get("input_ids"), self._places
        if module is None or not isinstance(ids, Tensor):
            return
        for kind, output in outputs.items():
            name, features = f"{kind}_features", getattr(output, "pooler_output", None)
            if isinstance(features, (list, tuple)):
                features = torch.cat(list(features), dim=0)
            if isinstance(features, Tensor) and name in _arguments(getattr(module, _MASK)):
                embedded = features.new_zeros(1).expand(*ids.shape, features.shape[-1])
                getattr(module, _MASK)(ids, inputs_embeds=embedded, **{name: features})

    @contextmanager
    def unchecked(self, batch: dict[str, Any]) -> Iterator[None]:
        """Meanwhile the model finds the places of features, and does not count them."""
        module = self._places if self.outside and _OUTPUTS in batch else None
        if (
            module is None
            or not isinstance(batch.get("input_ids"), Tensor)
            or _MASK in vars(module)
        ):
            yield
            return
        vars(module)[_MASK] = partial(_without_features, getattr(module, _MASK))
        try:
            yield
        finally:
            del vars(module)[_MASK]


def _without_features(mask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return mask(*args, **{n: x for n, x in kwargs.items() if not n.endswith("_features")})


def _arguments(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _masks_alone(module: nn.Module) -> bool:
    """Whether a model finds the places of features by a method that need not be given these."""
    method = getattr(type(module), _MASK, None)
    if method is None:
        return False
    features = [x for name, x in _arguments(method).items() if name.endswith("_features")]
    return bool(features) and all(x.default is None for x in features)


def _first(run: Callable[..., Any]) -> str:
    """The argument that an encoder reads: what it encodes."""
    return next(iter(_arguments(run)))


def _run(run: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The result of a method, with those of the arguments that it names; None for what it lacks."""
    named = _arguments(run)
    needed = [n for n, x in named.items() if x.default is x.empty and x.kind is not x.VAR_KEYWORD]
    passed = {name: given[name] for name in named if name in given}
    if any(x.kind is x.VAR_KEYWORD for x in named.values()) and "return_dict" in given:
        passed["return_dict"] = given["return_dict"]
    return run(**{**dict.fromkeys(needed), **passed})


def _of_any_size(value: Any) -> Any:
    """The same tensors, of which the first dimension is dynamic: each image has its own number."""
    if isinstance(value, Tensor):
        if value.dim() > 1:
            value = value.view_as(value)
            _torch.mark_dynamic(value, 0)
        return value
    if isinstance(value, dict):
        for name, part in value.items():
            value[name] = _of_any_size(part)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_of_any_size(part) for part in value)
    return value
