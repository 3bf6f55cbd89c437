"""The search tool: one tool over any backend (a local index, a web service, a cache, a recording).

What a backend finds is untrusted text that ends up inside the policy's prompt. ``Search.render`` bounds it and takes
away its voice: whitespace becomes one space, control and direction characters go, and every ``<`` that could open a
tag or a special token is pulled off what follows (``< /information>``, ``< |im_end|>``). So a passage can neither close
the block that it stands in nor pose as a turn. What it says in plain words stays: a policy has to learn to doubt it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

from arft_fast.tools.tool import InfraFault, ToolResult

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_QUERY_CHARACTERS = 4096
TITLE_LIMIT = 200
"""Characters of a title in the readable form."""
Form = Literal["paper", "readable"]

_WORD = re.compile(r"\w")
# Control characters, lone surrogates, direction overrides and the invisible "tag" letters. Joiners stay: scripts need
# them. Whitespace is not here: it has become spaces before.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
_OPENS_TAG = re.compile(r"<(?=[/|!A-Za-z])")


class Passage(NamedTuple):
    """One thing that was found."""

    title: str
    """Empty when there is none."""
    text: str


class SearchBackend(Protocol):
    """Where passages come from. Its methods may run many times at once; ``start`` and ``close`` may be repeated."""

    @property
    def name(self) -> str:
        """Short, for messages."""
        ...

    @property
    def identity(self) -> str:
        """What the answers depend on beside query and ``top_k``; a cache keeps answers apart by it. Holds no secret."""
        ...

    @property
    def paid(self) -> bool:
        """Whether a call costs money."""
        ...

    async def search(self, query: str, top_k: int) -> list[Passage]:
        """At most ``top_k`` passages for any text, best first; none is an answer too.

        Raises:
            InfraFault: the search failed, and nothing else is raised.
        """
        ...

    async def start(self) -> str:
        """Check what can be checked before a run; returns a line that says what runs.

        Raises:
            InfraFault: it cannot work as it is set up; the text says what to change.
        """
        ...

    async def close(self) -> None: ...

    def counters(self) -> Mapping[str, int]:
        """What happened so far, for metrics."""
        ...


class Search:
    """The tool ``search``. Owns ``backend``: ``close`` closes it.

    Args:
        top_k: passages of one answer.
        timeout_s: bound on one call; a backend has shorter ones of its own.
        passage_limit: characters of one passage's text.
        form: ``paper`` is ``1. Content:<text> 2. Content:<text>``, the form of Visual-ARFT's scaffold without the tags
            around it; ``readable`` is a line ``1. <title>: <text>`` for each passage.
    """

    name = "search"

    def __init__(
        self,
        backend: SearchBackend,
        *,
        top_k: int = 3,
        timeout_s: float = 45.0,
        passage_limit: int = 2000,
        form: Form = "paper",
    ) -> None:
        if not 1 <= top_k <= 100:
            raise ValueError(f"top_k must be in 1..100, got {top_k}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if passage_limit < 1:
            raise ValueError(f"passage_limit must be at least 1, got {passage_limit}")
        if form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
        self._backend = backend
        self._top_k = top_k
        self._timeout_s = timeout_s
        self._passage_limit = passage_limit
        self._form: Form = form

    async def call(self, argument: str, image: Image | None = None) -> ToolResult:
        """Search for ``argument``; ``image`` plays no part. A query without a word is the model's error.

        Raises:
            InfraFault: the search failed or took longer than ``timeout_s``.
        """
        started = time.perf_counter()
        query = argument[:MAX_QUERY_CHARACTERS]
        if not _WORD.search(query):
            return ToolResult(error="the query holds no word", seconds=time.perf_counter() - started)
        try:
            async with asyncio.timeout(self._timeout_s):
                passages = await self._backend.search(query, self._top_k)
        except InfraFault:
            raise
        except TimeoutError as error:
            late = f"search by {self._backend.name} took longer than timeout_s = {self._timeout_s:g}"
            raise InfraFault(late) from error
        except Exception as error:  # a backend with a fault of its own must not end the rollout
            raise InfraFault(f"search by {self._backend.name} broke: {type(error).__name__}: {error}") from error
        return ToolResult(text=self.render(passages), seconds=time.perf_counter() - started)

    def render(self, passages: Sequence[Passage]) -> str:
        """The observation: at most ``top_k`` passages, each bounded and without a voice of its own."""
        shown = [(clean(title, TITLE_LIMIT), clean(text, self._passage_limit)) for title, text in passages]
        lines = [self._line(number, *passage) for number, passage in enumerate(shown[: self._top_k], start=1)]
        return (" " if self._form == "paper" else "\n").join(lines) or "No results."

    def _line(self, number: int, title: str, text: str) -> str:
        if self._form == "paper":
            return f"{number}. Content:{text}"
        return f"{number}. {title}: {text}" if title else f"{number}. {text}"

    def counters(self) -> Mapping[str, int]:
        return self._backend.counters()

    async def start(self) -> str:
        return f"{self.name}: {await self._backend.start()}, top {self._top_k}"

    async def close(self) -> None:
        await self._backend.close()


def clean(text: str, limit: int) -> str:
    """At most ``limit`` characters of untrusted ``text``, on one line, that cannot be read as a tag."""
    head = text[: 8 * limit + 64]  # a passage of many megabytes is not worth a pass over all of it
    words = _UNPRINTABLE.sub("", " ".join(head.split()))
    return _OPENS_TAG.sub("< ", words)[:limit]


def normalise(query: str) -> str:
    """Queries that are equal after this are one query to caches and recordings: case and whitespace do not count."""
    return " ".join(query.casefold().split())
