"""Checks of the arguments that the programs share."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from common import ExampleError


def check_writable(name: str, path: Path, *, is_folder: bool = False) -> None:
    """Make the folder of a file, or of files, before anything is trained whose results go there.

    Raises:
        ExampleError: the option `name` names what cannot be written.
    """
    try:
        if not is_folder and path.exists():
            path.open("a").close()  # or it is a folder, or not ours
        folder = path if is_folder else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ExampleError(f"{name} {path} cannot be written: {error}") from error


def check_rate(parser: argparse.ArgumentParser, rate: float | None) -> None:
    """End the program where --rate is given and no learning rate."""
    if rate is not None and not 0 < rate < math.inf:
        parser.error("--rate must be above 0 and finite; without it there is a default")


def device_of(parser: argparse.ArgumentParser, device: str | None) -> str:
    """The device of --device, or the default; ends the program where there is none such."""
    cards = range(torch.cuda.device_count())
    known = ["cpu", *(["cuda"] if cards else []), *(f"cuda:{card}" for card in cards)]
    device = device or ("cuda" if cards else "cpu")
    if device not in known:
        parser.error(f"--device is {device}; there are {', '.join(known)} here")
    return device
