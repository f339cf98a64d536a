"""Functions in processes of their own, which give all of their memory back.

A process ends with the program that started it, also where that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from tqdm import tqdm

KILLED = "its process was killed, as by too little memory: lower --tokens or --batch"
"""What a program says of a way whose process ended so (`BrokenProcessPool`)."""

P = ParamSpec("P")
T = TypeVar("T")


def apart(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a fresh process."""
    with pool(1) as processes:
        return processes.submit(call, *args, **kwargs).result()


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Some processes. Ctrl-C stops what they are at, and drops what waits for them."""
    spawn = multiprocessing.get_context("spawn")
    processes = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent)
    try:
        yield processes
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        processes.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end when the one that started it is killed, whatever it is at.

    Ctrl-C reaches both: what is done then, is the parent's to say.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
