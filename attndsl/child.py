"""Work in a child process: the only way to stop it, for while isl runs neither signals nor threads get in."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from attndsl.errors import AttnError, Diagnostic, fail

T = TypeVar("T")
Stage = Callable[[str, float | None], None]
"""Called by the work as it goes: what is being done now, and the seconds that it may take."""

QUIET = 1.0
"""Seconds before progress is shown."""
INTERNAL = 70
"""Exit code of a bug of ours, after its traceback."""


class TimeLimitError(AttnError):
    """A stage took longer than it may."""


def run(work: Callable[[Stage], T]) -> T:
    """What `work(stage)` returns; both that and the AttnError it may raise must be picklable.

    While it runs, a terminal on stderr shows the stage and its seconds. A stage past its limit is stopped
    and reported as TimeLimitError. Nothing survives Ctrl-C or SIGTERM. Call it from the main thread, before
    anything has started threads.
    """
    receiver, sender = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        receiver.close()
        os._exit(_child(work, sender))
    sender.close()
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        message = _wait(receiver)
    finally:
        if sys.exc_info()[0] is not None:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        signal.signal(signal.SIGTERM, previous)
    if message is None and os.WIFSIGNALED(status):
        raise fail(f"stopped by signal {os.WTERMSIG(status)}: out of memory?")
    if message is None:
        sys.exit(INTERNAL)
    kind, value = message
    if kind == "error":
        raise value
    result: T = value
    return result


def _child(work: Callable[[Stage], Any], sender: Connection) -> int:
    def stage(label: str, limit: float | None) -> None:
        sender.send(("stage", (label, limit)))

    try:
        try:
            message = ("result", work(stage))
        except AttnError as error:
            message = ("error", error)
        sender.send(message)
    except BaseException:  # the child must not return into its parent's stack
        sys.excepthook(*sys.exc_info())
        return INTERNAL
    return 0


def _wait(receiver: Connection) -> tuple[str, Any] | None:
    """The last message of the child, or None if it ended without one."""
    label, limit, since = "starting", None, time.monotonic()
    shown = False
    try:
        while True:
            spent = time.monotonic() - since
            if limit is not None and spent > limit:
                message = f"{label} took longer than {limit:g} s"
                raise TimeLimitError(Diagnostic(message, help="give it more with --time-limit"))
            if spent > QUIET and sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[K{label} ... {spent:.0f} s")
                sys.stderr.flush()
                shown = True
            if not receiver.poll(0.1):
                continue
            try:
                kind, value = receiver.recv()
            except EOFError:
                return None
            if kind != "stage":
                return kind, value
            (label, limit), since = value, time.monotonic()
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
