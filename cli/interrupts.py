"""Ctrl-C and SIGTERM: answered within a second, whatever the program is doing."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

from fastplastic.cli.launch import is_first

TEXT = "fastplastic: error: interrupted"
# How long what is half done may take to be taken away.
_SECONDS = 0.8


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the program as Ctrl-C does, with another exit code."""


def terminate(number: int, frame: object) -> NoReturn:
    """Handle SIGTERM."""
    raise Terminated


class SignalWatch:
    """Ends the process when a signal was not answered in time.

    Libraries swallow Ctrl-C, and code that is not Python's does not see it. A thread is woken by
    the signal itself. Only for the main thread of a process of our own.

    Attributes:
        received: Number of the last signal; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        signal.signal(signal.SIGTERM, terminate)
        if os.name != "posix":
            return  # there only sockets can be woken
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._wait, daemon=True).start()

    def leave(self, code: int) -> NoReturn:
        """End the process; after a signal at once, as other threads may still be busy."""
        if not (code and self.received):
            sys.exit(code)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        self._end()

    def _wait(self) -> None:
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            number = os.read(self._read, 1)[0]
        self.received = number
        time.sleep(_SECONDS)
        if atomic := sys.modules.get("fastplastic.files.atomic"):
            atomic.remove_unfinished()
        # Not by print: another thread may be in the middle of one. A bar has hidden the cursor.
        shown = "\x1b[?25h" * os.isatty(2)
        if is_first():
            with suppress(OSError):
                os.write(2, f"{shown}{TEXT}\n".encode())
        self._end()

    def _end(self) -> NoReturn:
        if multiprocessing := sys.modules.get("multiprocessing"):
            for child in multiprocessing.active_children():
                child.kill()
        os._exit(128 + self.received)


def _forget() -> None:
    """Leave signals alone in processes that load data: they are not the program."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
