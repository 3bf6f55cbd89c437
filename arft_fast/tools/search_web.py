"""Searches over HTTP: Google's results by Serper, and any retrieval server in the style of Search-R1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from arft_fast.tools.corpus import split_contents
from arft_fast.tools.http_client import HttpClient, HttpFault, Secret, check_url
from arft_fast.tools.search import MAX_QUERY_CHARACTERS, Passage, clean
from arft_fast.tools.tool import InfraFault

SERPER_URL = "https://google.serper.dev/search"
_MAX_TEXT = 100_000
"""Characters of a passage as it is kept; ``Search`` shows fewer."""
_REFUSED = (401, 403)


class Serper:
    """Google's organic results, by https://serper.dev: titles and snippets. Each call is paid for.

    The key is read from the environment once. It shows nowhere: not in messages, not in ``repr``, and a server that
    sends it back finds it replaced by ``***``.

    Args:
        key_variable: environment variable that holds the key.
        deadline_s: bound on one call, tries included.
        concurrency: calls at the same time.
        client: with other settings than these two; owned.

    Raises:
        ValueError: the variable is not set or holds no key; a bad ``url``.
    """

    name = "serper"
    paid = True

    def __init__(
        self,
        *,
        key_variable: str = "SERPER_API_KEY",
        url: str = SERPER_URL,
        deadline_s: float = 30.0,
        concurrency: int = 16,
        client: HttpClient | None = None,
    ) -> None:
        key = _key(key_variable)
        self._key_variable = key_variable
        self._url = check_url(url)
        self._client = client or HttpClient(deadline_s=deadline_s, concurrency=concurrency)
        self._client.keep_secret(key)
        self._headers = {"X-API-KEY": key}

    @property
    def identity(self) -> str:
        return f"serper:{self._url}"

    async def search(self, query: str, top_k: int) -> list[Passage]:
        """See ``SearchBackend.search``."""
        payload = {"q": _sendable(query), "num": top_k}
        try:
            value = await self._client.post_json(self._url, payload, self._headers)
        except HttpFault as fault:
            if fault.status in _REFUSED:
                advice = f"check the key in the environment variable {self._key_variable}"
                raise InfraFault(f"serper refuses the key (HTTP {fault.status}); {advice}") from fault
            raise
        return _organic(value)[:top_k]

    async def start(self) -> str:
        """Ask one question, which is paid for: a wrong key or an empty account must show before the run.

        Raises:
            InfraFault: no usable answer; a refused key is said with the name of its variable.
        """
        await self.search("weather", 1)
        return f"Google by serper, key from {self._key_variable}"

    async def close(self) -> None:
        await self._client.close()

    def counters(self) -> Mapping[str, int]:
        return {"retries": self._client.retries}


class RetrievalServer:
    """A server that answers ``{"queries": [..], "topk": k, "return_scores": true}``, as Search-R1's does.

    Its ``result`` holds for each query a list of ``{"document": D, "score": s}`` or of plain ``D``; a ``D`` is text, or
    an object with ``contents`` (title, line break, text) or ``text``, and perhaps ``title``.

    Args:
        url: the endpoint, such as http://HOST:8000/retrieve; a private address is fine, it is the user's own.
        deadline_s: bound on one call, tries included.
        concurrency: calls at the same time.
        client: with other settings than these two; owned.

    Raises:
        ValueError: a bad ``url``.
    """

    paid = False

    def __init__(
        self, url: str, *, deadline_s: float = 30.0, concurrency: int = 16, client: HttpClient | None = None
    ) -> None:
        self._url = check_url(url)
        self.name = f"retrieval server {urlsplit(url).netloc}"
        self._client = client or HttpClient(deadline_s=deadline_s, concurrency=concurrency)

    @property
    def identity(self) -> str:
        return f"retrieve:{self._url}"

    async def search(self, query: str, top_k: int) -> list[Passage]:
        """See ``SearchBackend.search``."""
        payload = {"queries": [_sendable(query)], "topk": top_k, "return_scores": True}
        return _retrieved(await self._client.post_json(self._url, payload))[:top_k]

    async def start(self) -> str:
        """Ask one question.

        Raises:
            InfraFault: no usable answer.
        """
        await self.search("weather", 1)
        return self.name

    async def close(self) -> None:
        await self._client.close()

    def counters(self) -> Mapping[str, int]:
        return {"retries": self._client.retries}


def _key(variable: str) -> Secret:
    key = Secret(os.environ.get(variable, "").strip())
    if not key:
        raise ValueError(f"the environment variable {variable} is not set; export the key of the search service in it")
    if not (key.isascii() and key.isprintable() and " " not in key and len(key) >= 8):
        raise ValueError(f"the environment variable {variable} holds no key: letters, digits and signs, 8 or more")
    return key


def _sendable(query: str) -> str:
    return query[:MAX_QUERY_CHARACTERS].encode("utf-8", "replace").decode()  # a model may write half a character


def _organic(value: object) -> list[Passage]:
    """Results without a snippet are left out; an answer that only echoes the search found nothing."""
    if not isinstance(value, dict) or not ("organic" in value or "searchParameters" in value):
        raise InfraFault(f"serper's answer has no organic results but {_shape(value)}")
    found = value.get("organic", [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InfraFault(f"serper's organic results are {_shape(found)}, not a list of objects")
    passages = [_passage(each.get("title"), each.get("snippet")) for each in found]
    return [passage for passage in passages if passage.text]


def _retrieved(value: object) -> list[Passage]:
    results = value.get("result") if isinstance(value, dict) else None
    if not isinstance(results, list) or len(results) != 1 or not isinstance(results[0], list):
        raise InfraFault(f"the retrieval server's answer is {_shape(value)}, without a list of one list in result")
    passages = [_document(each.get("document", each) if isinstance(each, dict) else each) for each in results[0]]
    return [passage for passage in passages if passage.text]


def _document(document: object) -> Passage:
    if isinstance(document, str):
        return _passage("", document)
    if not isinstance(document, dict) or not any(isinstance(document.get(key), str) for key in ("contents", "text")):
        raise InfraFault(f"the retrieval server's document is {_shape(document)}, without contents or text")
    if isinstance(document.get("text"), str):
        return _passage(document.get("title"), document["text"])
    title, text = split_contents(document["contents"][:_MAX_TEXT])
    return _passage(document.get("title") or title, text)


def _passage(title: object, text: object) -> Passage:
    kept = [field[:_MAX_TEXT] if isinstance(field, str) else "" for field in (title, text)]
    return Passage(*(field.encode("utf-8", "replace").decode().strip() for field in kept))


def _shape(value: object) -> str:
    """What ``value`` is, in a few words that quote nothing but keys."""
    if isinstance(value, dict):
        keys = [clean(str(key), 20) for key in list(value)[:6]]
        return f"an object with {', '.join(keys) or 'no keys'}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
