"""What a call leaves behind, taken in bounded amounts: output through a pipe, files from its directory.

Imports the standard library only: the zygote loads it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Sequence
from typing import Literal

FILE_BYTES = 8 << 20
"""Largest file that is handed back."""


class Capture:
    """A pipe whose reader keeps a bounded part: the first bytes, or the last."""

    def __init__(self, limit: int, keep: Literal["head", "tail"] = "head") -> None:
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        self.kept = bytearray()
        self._limit, self._keep, self._writable = limit, keep, True

    def pump(self) -> bool:
        """Read what is there; True at the end of the stream."""
        for _ in range(16):  # then look at the clock again: a writer may be as fast as this reader
            try:
                data = os.read(self.read_fd, 1 << 16)
            except BlockingIOError:
                return False
            if not data:
                return True
            if self._keep == "head":
                self.kept += data[: self._limit - len(self.kept)]
            else:
                self.kept = (self.kept + data)[-self._limit :]
        return False

    def close_write(self) -> None:
        if self._writable:
            os.close(self.write_fd)
            self._writable = False

    def close(self) -> None:
        self.close_write()
        os.close(self.read_fd)


def collect(home: int, names: Sequence[str]) -> tuple[dict[str, bytes], str]:
    """Read regular files of bounded size; returns them and why one was refused. A missing file is just missing.

    A link is not followed and a FIFO does not block.
    """
    files = {}
    refused = ""
    for name in names:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=home)
        except FileNotFoundError:
            continue
        except OSError as error:  # a link (ELOOP), a socket (ENXIO), no permission
            refused = f"{name} cannot be read: {error.strerror}"
            continue
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            refused = f"{name} is not a regular file"
        elif info.st_size > FILE_BYTES:
            refused = f"{name} has {info.st_size} bytes, more than {FILE_BYTES}"
        else:
            with open(fd, "rb", closefd=False) as file:
                files[name] = file.read(FILE_BYTES)
        os.close(fd)
    return files, refused


def clear_directory(top: str) -> None:
    """Empty ``top``, whatever was left in it: no link is followed, no depth is too deep, no mode protects.

    A nested directory's entries move up to ``top`` until nothing is nested, so a path never grows. No process may
    still write there. ``top`` itself stays.
    """
    while entries := list(os.scandir(top)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, stat.S_IRWXU)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, stat.S_IRWXU)  # moving a directory rewrites its ".."
                    os.rename(inner.path, os.path.join(top, secrets.token_hex(16)))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
