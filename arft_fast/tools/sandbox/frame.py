"""The format on the pipe between pool and zygote: never pickle.

    frame = length of header (4 bytes, big-endian) | header (JSON object) | blob 0 | blob 1 | ...

``header["sizes"]`` lists the blobs' lengths in bytes. Imports the standard library only: the zygote loads it too.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

LENGTH = struct.Struct(">I")


def encode(header: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """One frame. ``header`` must be JSON-able; its key ``sizes`` is set here."""
    body = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode("ascii")
    return b"".join([LENGTH.pack(len(body)), body, *blobs])


def read(fd: int) -> tuple[dict[str, Any], list[bytes]] | None:
    """Read one frame from a blocking ``fd``; None when the other side closed the pipe between frames.

    Raises:
        EOFError: the pipe was closed inside a frame.
    """
    first = os.read(fd, 1)
    if not first:
        return None
    (length,) = LENGTH.unpack(first + _exactly(fd, LENGTH.size - 1))
    header: dict[str, Any] = json.loads(_exactly(fd, length))
    return header, [_exactly(fd, size) for size in header["sizes"]]


def write(fd: int, data: bytes) -> None:
    """Write all of ``data`` to a blocking ``fd``."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the pipe was closed inside a frame")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
