"""A process for each input, with limits of time and memory, and what came of it."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from com_lightning import MergeError

_EXECUTES = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn"}


class Outcome(NamedTuple):
    """``kind`` is "right", "told", "foreign" (a traceback that is not ours), "hangs or dies" or "executed"."""

    kind: str
    text: str


def limited(work: Callable[[], Any], seconds: float = 30, memory: int = 2 * 2**30) -> Outcome:
    """Do the work in a fork of this process, which must have started no threads.

    Args:
        work: what is done; what it returns counts as right, a MergeError and the command line's own exit as told.
        seconds: time after which it is killed.
        memory: bytes of address space that it may take in addition.
    """
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        try:
            os.write(write, pickle.dumps(tuple(_outcome(work, seconds, memory)))[:60_000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        data = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(*pickle.loads(data)) if data else Outcome("hangs or dies", f"status {status}")


def _outcome(work: Callable[[], Any], seconds: float, memory: int) -> Outcome:
    executed: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EXECUTES:
            executed.append(f"{event} {arguments}")

    sys.addaudithook(watch)
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (now + memory,) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    try:
        outcome = Outcome("right", str(work())[:1000])
    except MergeError as error:
        outcome = Outcome("told" if str(error).strip() else "foreign", str(error)[:3000])
    except SystemExit as stop:
        outcome = Outcome("told" if stop.code else "right", str(stop.code)[:3000])
    except BaseException as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-4:])
        outcome = Outcome("foreign", f"{type(error).__name__}: {str(error)[:300]}\n{where}")
    return Outcome("executed", "; ".join(executed)[:3000]) if executed else outcome
