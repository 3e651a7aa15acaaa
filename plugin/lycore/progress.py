"""Watching and stopping long calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_void_p, sizeof
from typing import Any

from ._binding import lycore_progress, lycore_progress_callback
from ._library import Library, Owned

ProgressCallback = Callable[[int, int], Any]
"""Called with (done, total) after each step.

Returning False, and only False, stops the call; an exception does too and is raised.
"""


class Cancel:
    """A flag that stops the calls that watch it. Any thread may raise it, at any time."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may raise the flag while this thread holds it.
        self._lock = threading.RLock()
        self._flags: dict[Library, Owned] = {}
        self._requested = False

    def request(self) -> None:
        """Stops the calls that watch this flag at their next step; they raise Cancelled."""
        with self._lock:
            self._requested = True
            for library, flag in self._flags.items():
                library.functions.lycore_cancel_request(flag)

    def reset(self) -> None:
        """Lowers the flag, so that it can serve another call."""
        with self._lock:
            self._requested = False
            for library, flag in self._flags.items():
                library.functions.lycore_cancel_reset(flag)

    @property
    def requested(self) -> bool:
        """Whether the flag is up."""
        return self._requested

    def _handle(self, library: Library) -> c_void_p:
        """The flag as `library` knows it; valid as long as this object lives."""
        with self._lock:
            if library not in self._flags:
                flag = library.new("lycore_cancel_new", "lycore_cancel_free")
                if self._requested:
                    library.functions.lycore_cancel_request(flag)
                self._flags[library] = flag
            return self._flags[library]._as_parameter_


@contextmanager
def watched(library: Library, callback: ProgressCallback | None, cancel: Cancel | None) -> Iterator[Any]:
    """The `lycore_progress *` of one call. What the callback raises is raised in place of Cancelled."""
    if callback is None and cancel is None:
        yield None
        return
    raised: list[BaseException] = []

    def step(_: int | None, done: int, total: int) -> bool:
        try:
            return callback is None or callback(done, total) is not False
        except BaseException as problem:  # also KeyboardInterrupt: nothing may pass through C
            raised.append(problem)
            return False

    progress = lycore_progress(struct_size=sizeof(lycore_progress), callback=lycore_progress_callback(step))
    if cancel is not None:
        progress.cancel = cancel._handle(library)
    try:
        yield byref(progress)
    except Exception:
        if raised:
            raise raised[0] from None
        raise
