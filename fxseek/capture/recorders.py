"""The hooks by which transformers records what a call asks for, beside its loss.

``output_hidden_states=True`` and its siblings are served by forward hooks, which the first call
that asks for them installs under a lock. Dynamo cannot capture a lock, so they are installed here.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["install_recorders"]

_MODULE = "transformers.utils.output_capturing"
_INSTALL = "maybe_install_capturing_hooks"
_INSTALLED = "_output_capturing_hooks_installed"


def install_recorders(model: nn.Module, error: Exception) -> bool:
    """Install the hooks of a call whose capture ended where transformers installs them.

    As transformers does it: a model installs those of the models in it too, so outer ones come
    first. One that has a model in it with hooks already would install these again, and waits
    until there is no other.

    Args:
        model: what was to be captured.
        error: the exception of the capture, with Dynamo's `real_stack`.

    Returns:
        Whether hooks were installed, so that another capture goes further than this one.
    """
    recording = sys.modules.get(_MODULE)
    install: Any = getattr(recording, _INSTALL, None)
    stack = getattr(error, "real_stack", None) or ()
    if recording is None or install is None or not any(_in(install, frame) for frame in stack):
        return False
    without = [m for m in model.modules() if not _has_hooks(m) and _records(m, recording)]
    first = [m for m in without if not any(_has_hooks(inner) for inner in m.modules())]
    for module in first or without:
        install(module)  # nothing is done where an outer one has been there
    return bool(without)


def _in(function: Any, frame: Any) -> bool:
    """Whether a frame of Dynamo's stack is one of this function."""
    code = function.__code__
    return frame.filename == code.co_filename and frame.name == code.co_name


def _has_hooks(module: nn.Module) -> bool:
    return bool(getattr(module, _INSTALLED, False))


def _records(module: nn.Module, recording: ModuleType) -> bool:
    """Whether the forward of a module is wrapped by a function of that module of transformers."""
    forward: Any = type(module).forward
    while (wrapped := getattr(forward, "__wrapped__", None)) is not None:
        if getattr(forward, "__globals__", None) is vars(recording):
            return True
        forward = wrapped
    return False
