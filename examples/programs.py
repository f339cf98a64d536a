"""Checks of the arguments that the programs share."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from common import ExampleError


def check_writable(name: str, file: Path) -> None:
    """Make the file's folder, before anything is trained whose results go there.

    Raises:
        ExampleError: the file of the option `name` cannot be written.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ExampleError(f"{name} {file} cannot be written: {error}") from error


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
