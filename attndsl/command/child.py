"""Work in a child process: the only way to stop it, for while isl runs neither signals nor threads get in."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import time
from collections.abc import Callable
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
    receiver, sender = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    pid = os.fork()
    if pid == 0:
        for end in ends:
            signal.signal(end, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        os.close(receiver)
        os._exit(_child(work, sender))
    os.close(sender)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        message = _wait(receiver)
    finally:
        if sys.exc_info()[0] is not None:
            os.kill(pid, signal.SIGKILL)
        os.close(receiver)
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


def _child(work: Callable[[Stage], Any], sender: int) -> int:
    def stage(label: str, limit: float | None) -> None:
        _send(sender, ("stage", (label, limit)))

    try:
        try:
            message = ("result", work(stage))
        except AttnError as error:
            message = ("error", error)
        _send(sender, message)
    except BaseException:  # the child must not return into its parent's stack
        sys.excepthook(*sys.exc_info())
        return INTERNAL
    return 0


def _wait(receiver: int) -> tuple[str, Any] | None:
    """The last message of the child, or None if it ended without one."""
    label, limit, since = "starting", None, time.monotonic()
    shown = False
    try:
        while True:
            spent = time.monotonic() - since
            if limit is not None and spent > limit:
                late = f"{label} took longer than {limit:g} s"
                raise TimeLimitError(Diagnostic(late, help="give it more with --time-limit"))
            if spent > QUIET and sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[K{label} ... {spent:.0f} s")
                sys.stderr.flush()
                shown = True
            if not select.select([receiver], [], [], 0.1)[0]:
                continue
            message = _receive(receiver)
            if message is None:
                return None
            kind, value = message
            if kind != "stage":
                return kind, value
            (label, limit), since = value, time.monotonic()
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _send(pipe: int, message: tuple[str, Any]) -> None:
    data = pickle.dumps(message)
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(pipe, data) :]


def _receive(pipe: int) -> tuple[str, Any] | None:
    """The next message, or None at the end."""
    size = _read(pipe, 8)
    body = _read(pipe, int.from_bytes(size, "big")) if size else b""
    message: tuple[str, Any] | None = pickle.loads(body) if body else None
    return message


def _read(pipe: int, size: int) -> bytes:
    """`size` bytes, or none if the pipe ends before."""
    parts = bytearray()
    while len(parts) < size:
        part = os.read(pipe, size - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)
