"""What can go wrong, one class per group of `lycore_status`."""

from __future__ import annotations

import re
from typing import ClassVar

from ._binding import lycore_status


class LycoreError(Exception):
    """A call failed. `str()` is the message, and the hint when there is one.

    Attributes: `status` (number of `lycore_status`), `message` (one sentence with file, tensor and numbers), `hint`
    (what to do about it), `key` (the tensor, module or key concerned), `file`; the texts are "" when there is nothing
    to say.
    """

    default_status: ClassVar[int] = lycore_status.LYCORE_PANIC

    def __init__(self, message: str, *, hint: str = "", key: str = "", file: str = "", status: int | None = None):
        super().__init__(message)
        self.status = self.default_status if status is None else status
        self.message = message
        self.hint = hint
        self.key = key
        self.file = file

    def __str__(self) -> str:
        return f"{self.message} Hint: {self.hint}" if self.hint else self.message


class LibraryError(LycoreError):
    """No build of the shared library fits this process."""

    default_status = lycore_status.LYCORE_UNSUPPORTED


class ArgumentError(LycoreError, ValueError):
    """A value that the call cannot take."""

    default_status = lycore_status.LYCORE_BAD_ARGUMENT


class HandleError(LycoreError):
    """The object was closed."""

    default_status = lycore_status.LYCORE_BAD_HANDLE


class BusyError(LycoreError):
    """Another thread is inside a call on the same object."""

    default_status = lycore_status.LYCORE_BUSY


class Cancelled(LycoreError):
    """A progress callback or a `Cancel` stopped the call; nothing was left half done."""

    default_status = lycore_status.LYCORE_CANCELLED


class UnsupportedError(LycoreError):
    """This build or version cannot do it."""

    default_status = lycore_status.LYCORE_UNSUPPORTED


class BackendError(LycoreError):
    """libtorch or the operating system failed underneath."""

    default_status = lycore_status.LYCORE_BACKEND


class InternalError(LycoreError):
    """A defect of the library. Please report it."""

    default_status = lycore_status.LYCORE_PANIC


class FileError(LycoreError):
    """A file cannot be read or written, or lies about its content."""

    default_status = lycore_status.LYCORE_FILE


class AdapterKeyError(LycoreError):
    """A key of a file or the name of a weight does not fit."""

    default_status = lycore_status.LYCORE_KEY


class ShapeError(LycoreError):
    """Shapes that must agree do not."""

    default_status = lycore_status.LYCORE_SHAPE


class DtypeError(LycoreError):
    """A dtype that the call does not take."""

    default_status = lycore_status.LYCORE_DTYPE


class DeviceError(LycoreError):
    """A device that is not there or that this build cannot use."""

    default_status = lycore_status.LYCORE_DEVICE


class TrainError(LycoreError):
    """Training cannot go on."""

    default_status = lycore_status.LYCORE_TRAIN


_BY_STATUS: dict[int, type[LycoreError]] = {
    lycore_status.LYCORE_NULL_ARGUMENT: ArgumentError,
    lycore_status.LYCORE_BAD_ARGUMENT: ArgumentError,
    lycore_status.LYCORE_BAD_HANDLE: HandleError,
    lycore_status.LYCORE_BUSY: BusyError,
    lycore_status.LYCORE_CANCELLED: Cancelled,
    lycore_status.LYCORE_UNSUPPORTED: UnsupportedError,
    lycore_status.LYCORE_BACKEND: BackendError,
    lycore_status.LYCORE_PANIC: InternalError,
    lycore_status.LYCORE_SHAPE: ShapeError,
    lycore_status.LYCORE_DTYPE: DtypeError,
}
# Statuses come in hundreds, so a number that a newer library adds still finds its group.
_BY_HUNDRED: dict[int, type[LycoreError]] = {
    1: FileError,
    2: AdapterKeyError,
    3: ShapeError,
    4: DeviceError,
    5: TrainError,
}


def class_of(status: int) -> type[LycoreError]:
    """The exception class of a status."""
    return _BY_STATUS.get(status) or _BY_HUNDRED.get(status // 100) or LycoreError


_TEXT = re.compile(r"LyCore: (?P<message>.*) \[hint: (?P<hint>.*)\] \[status (?P<status>\d+)\]", re.DOTALL)


def of_text(failure: RuntimeError) -> Exception:
    """The LycoreError that torch handed on as a text, or what it was where it is none of ours."""
    found = _TEXT.search(str(failure))
    if found is None:
        return failure
    status = int(found["status"])
    return class_of(status)(found["message"], hint=found["hint"], status=status)
