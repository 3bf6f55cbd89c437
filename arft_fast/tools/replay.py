"""A search that writes down what it found, or repeats what another wrote down, without a network.

One JSON line an answer: ``{"query": .., "top_k": .., "passages": [{"title": .., "text": ..}]}``. Queries that differ in
case and whitespace only are the same. A query has one answer: while recording, a second call gets that of the first, so
a run and its replay see the same. Faults are not recorded. Several processes may record into one file; of two answers
to a query the first counts.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from arft_fast.tools.search import Passage, SearchBackend, normalise
from arft_fast.tools.tool import InfraFault

Mode = Literal["record", "replay"]
_Asked = tuple[str, int]


class RecordedSearch:
    """``backend`` with a recording in ``file``. Owns the backend: ``close`` closes it.

    Args:
        backend: not needed, and never called, in a replay.
        mode: ``record`` adds to the file, which is made when it is not there; ``replay`` only reads it.

    Raises:
        ValueError: no backend to record, no file to replay, or a line of it is broken.
    """

    def __init__(self, backend: SearchBackend | None, file: str | Path, *, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if mode == "record" and backend is None:
            raise ValueError("backend is None; a recording needs one")
        self._file = Path(file).absolute()
        self._backend = None if mode == "replay" else backend
        self.name = f"{mode} {self._file.name}" if backend is None else f"{backend.name} ({mode})"
        self.paid = self._backend is not None and self._backend.paid
        self._hits = 0
        try:
            with _locked(self._file, "rb" if mode == "replay" else "a+b") as stream:
                self._answers, whole_bytes = _read(self._file, stream)
                if mode == "record":
                    stream.truncate(whole_bytes)  # a line that a killed process left half written
        except OSError as error:
            raise ValueError(f"recording {self._file} cannot be opened ({error}); check the path") from error
        self._flights: dict[_Asked, asyncio.Lock] = {}

    @property
    def identity(self) -> str:
        return f"replay:{self._file.name}" if self._backend is None else self._backend.identity

    async def search(self, query: str, top_k: int) -> list[Passage]:
        """See ``SearchBackend.search``.

        Raises:
            InfraFault: a query that was not recorded; the backend failed; the file cannot be written.
        """
        asked = (normalise(query), top_k)
        if self._backend is None and asked not in self._answers:
            shown = ascii(" ".join(query.split())[:100])
            raise InfraFault(f"{self._file.name} holds no answer to {shown} with top_k = {top_k}; record it first")
        if asked in self._answers:
            self._hits += 1
        elif self._backend is not None:
            try:
                async with self._flights.setdefault(asked, asyncio.Lock()):
                    if asked not in self._answers:
                        passages = await self._backend.search(query, top_k)
                        await asyncio.to_thread(self._keep, query, top_k, passages)
            finally:
                self._flights.pop(asked, None)
        return list(self._answers[asked])

    async def start(self) -> str:
        """Start the backend, in a replay nothing.

        Raises:
            InfraFault: see the backend's ``start``.
        """
        known = f"{len(self._answers)} answers in {self._file.name}"
        return f"replay of {known}" if self._backend is None else f"{await self._backend.start()}, recorded, {known}"

    async def close(self) -> None:
        if self._backend is not None:
            await self._backend.close()

    def counters(self) -> Mapping[str, int]:
        """``replayed`` answers, and what the backend counts."""
        return {"replayed": self._hits, **({} if self._backend is None else self._backend.counters())}

    def _keep(self, query: str, top_k: int, passages: list[Passage]) -> None:
        row = {"query": query, "top_k": top_k, "passages": [passage._asdict() for passage in passages]}
        try:
            with _locked(self._file, "ab") as stream:
                stream.write(json.dumps(row).encode("ascii") + b"\n")
        except OSError as error:
            raise InfraFault(f"recording {self._file} cannot be written: {error}") from error
        self._answers.setdefault((normalise(query), top_k), passages)  # here: a cancelled caller must not ask again


@contextmanager
def _locked(path: Path, mode: Literal["rb", "ab", "a+b"]) -> Iterator[BinaryIO]:
    """The open file, alone among processes that write it."""
    with open(path, mode) as stream:
        fcntl.flock(stream, fcntl.LOCK_SH if mode == "rb" else fcntl.LOCK_EX)
        yield stream  # closing flushes first and unlocks then


def _read(path: Path, stream: BinaryIO) -> tuple[dict[_Asked, list[Passage]], int]:
    """Answers, the first of each query, and the bytes up to the last whole line."""
    answers: dict[_Asked, list[Passage]] = {}
    stream.seek(0)
    whole_bytes = 0
    for number, line in enumerate(stream, start=1):
        if not line.endswith(b"\n"):
            break
        whole_bytes += len(line)
        try:
            row = json.loads(line)
            passages = [Passage(str(passage["title"]), str(passage["text"])) for passage in row["passages"]]
            answers.setdefault((normalise(row["query"]), int(row["top_k"])), passages)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"recording {path}, line {number}: no recorded answer ({problem}); remove it") from error
    return answers, whole_bytes
