"""Processes of the examples: none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import processes

EXAMPLES = Path(processes.__file__).parent
PROGRAM = """
import os, signal, sys, time
import processes

def wait(file):
    with open(file + ".part", "w") as opened:
        opened.write(str(os.getpid()))
    os.replace(file + ".part", file)
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with processes.pool(1) as pool:
        waiting = [pool.submit(wait, sys.argv[1]) for _ in range(3)]
        waiting[0].result()
"""


def test_a_call_apart_is_in_another_process() -> None:
    assert processes.apart(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        processes.apart(divmod, 1, 0)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_they_end_with_the_program(sent: signal.Signals, tmp_path: Path) -> None:
    program, file = tmp_path / "program.py", tmp_path / "child"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, str(program), str(file)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as parent:
        until(file.exists)
        child = int(file.read_text())
        parent.send_signal(sent)
        assert parent.wait(30) != 0
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)
