"""The C library for what Python's standard library lacks, errors as ``OSError``. Standard library only."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """``result`` of a call made through ``libc``.

    Raises:
        OSError: it is negative; ``what`` names the call.
    """
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
