"""POST JSON, get JSON, on an untrusted network: whatever the server does ends in data or in an ``HttpFault``, in time.

- A call has one deadline for waiting, tries and pauses together, and it is held against slow drips too.
- Tries after a refused, reset or timed-out connection, a DNS failure, 408, 429 and 5xx are repeated, with pauses drawn
  from 0 to a doubling bound (full jitter), or as long as ``Retry-After`` says. Other faults are not: a bad key,
  certificate, redirect or body will not be better in a second, and an answer may have been paid for.
- Redirects are never followed: a search service has no reason to send one, and it could point into the private network.
- Bodies are bounded after decompression, while they arrive.
- A secret (``keep_secret``) is cut out of every message and every answer.
"""

from __future__ import annotations

import asyncio
import email.utils
import http.client
import json
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from random import Random
from urllib.parse import urlsplit

from requests.exceptions import BaseHTTPError, SSLError  # type: ignore[attr-defined] # the former is urllib3's

from arft_fast.tools.http_try import BodyRefused, Reply, Try, Worker
from arft_fast.tools.search import clean
from arft_fast.tools.tool import InfraFault

_PAUSE_LIMIT_S = 8.0
_MESSAGE_LIMIT = 200
"""Characters of a server's or library's own words in a message."""


class Secret(str):
    """Text that does not show when something that holds it is printed."""

    def __repr__(self) -> str:
        return "***"


class HttpFault(InfraFault):
    """A request without a usable answer.

    Attributes:
        status: HTTP status, None when there was no answer.
        transient: another try may do better.
        retry_after_s: pause that the server asks for.
    """

    def __init__(
        self, message: str, *, status: int | None = None, transient: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient
        self.retry_after_s = retry_after_s


class HttpClient:
    """A few threads that make requests; nothing blocks the event loop.

    Args:
        concurrency: requests at the same time; more wait, within their deadline.
        deadline_s: bound on one call, everything included.
        connect_timeout_s, read_timeout_s: for a connection, and between packets.
        attempts: tries of one call at most.
        pause_s: bound on the first pause between tries.
        max_body_mib: of one answer, decompressed.
    """

    def __init__(
        self,
        *,
        concurrency: int = 16,
        deadline_s: float = 30.0,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 15.0,
        attempts: int = 4,
        pause_s: float = 0.5,
        max_body_mib: float = 4.0,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, seconds in (
            ("deadline_s", deadline_s),
            ("connect_timeout_s", connect_timeout_s),
            ("read_timeout_s", read_timeout_s),
            ("pause_s", pause_s),
            ("max_body_mib", max_body_mib),
        ):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {seconds}")
        self._deadline_s = deadline_s
        self._timeout_s = (connect_timeout_s, read_timeout_s)
        self._attempts = attempts
        self._pause_s = pause_s
        self._max_body_bytes = int(max_body_mib * 2**20)
        self._secrets: set[Secret] = set()
        self._random = Random()  # of its own: pauses must not move the seeds of a run
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="http-client")
        self._local = threading.local()
        self._workers: list[Worker] = []
        self._under_way: set[Try] = set()
        self._closed = False
        self.retries = 0

    async def post_json(self, url: str, payload: object, headers: Mapping[str, str] | None = None) -> object:
        """The JSON value that the server answers to ``payload``.

        Raises:
            HttpFault: see the module; the message names the host and what went wrong, of the last try.
        """
        host = urlsplit(url).netloc
        deadline = time.monotonic() + self._deadline_s
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._try(url, payload, headers or {}, deadline)
            except HttpFault as fault:
                pause_s = self._pause(fault, attempt)
                tries = "1 try" if attempt == 1 else f"{attempt} tries"
                if not fault.transient or attempt == self._attempts:
                    raise HttpFault(f"{host}: {fault} ({tries})", status=fault.status) from fault
                if time.monotonic() + pause_s >= deadline:
                    late = f"no time is left of deadline_s = {self._deadline_s:g} for a pause of {pause_s:.1f} s"
                    raise HttpFault(f"{host}: {fault} ({tries}; {late})", status=fault.status) from fault
            self.retries += 1
            await asyncio.sleep(pause_s)

    def keep_secret(self, secret: Secret) -> None:
        """Replace ``secret`` by ``***`` in all that comes out of here from now on."""
        self._secrets.add(secret)

    async def close(self) -> None:
        """Break off what is under way and release threads and connections. Idempotent."""
        self._closed = True
        for under_way in self._under_way:
            under_way.abort()
        await asyncio.to_thread(self._threads.shutdown)
        while self._workers:
            self._workers.pop().close()

    async def _try(self, url: str, payload: object, headers: Mapping[str, str], deadline: float) -> object:
        if self._closed:
            raise HttpFault("the client is closed")
        under_way = Try()
        self._under_way.add(under_way)
        request = asyncio.get_running_loop().run_in_executor(
            self._threads, self._post, under_way, url, payload, headers, deadline
        )
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await request
        except TimeoutError as error:
            raise HttpFault(f"no whole answer within deadline_s = {self._deadline_s:g}") from error
        finally:
            under_way.abort()  # a deadline or a cancellation frees the thread; after an answer this does nothing
            self._under_way.remove(under_way)

    def _post(self, under_way: Try, url: str, payload: object, headers: Mapping[str, str], deadline: float) -> object:
        left_s = max(0.01, deadline - time.monotonic())
        connect_s, read_s = self._timeout_s
        try:
            reply = self._worker().post(
                under_way,
                url,
                payload,
                headers,
                timeout_s=(min(connect_s, left_s), min(read_s, left_s)),
                max_body_bytes=self._max_body_bytes,
            )
        except BodyRefused as refused:
            raise HttpFault(f"the answer has {refused}") from refused
        except Exception as error:
            raise self._network_fault(error) from error
        return self._value(reply)

    def _worker(self) -> Worker:
        worker: Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = Worker()
            self._workers.append(worker)
        return worker

    def _network_fault(self, error: Exception) -> HttpFault:
        words = self._short(f"{type(error).__name__}: {error}")
        if isinstance(error, SSLError):
            return HttpFault(f"no secure connection ({words})")
        if isinstance(error, BaseHTTPError | OSError) and not isinstance(error, ValueError):  # a ValueError: a bad URL
            return HttpFault(f"the connection failed ({words})", transient=True)
        return HttpFault(f"the request could not be made ({words})")

    def _value(self, reply: Reply) -> object:
        if reply.status != HTTPStatus.OK:
            raise self._status_fault(reply)
        kind = reply.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind and "json" not in kind and kind != "text/plain":
            raise HttpFault(f"the answer is {self._short(kind)}, not JSON", status=reply.status)
        text = reply.body.decode("utf-8", errors="replace")  # a broken byte in one result must not cost the others
        try:
            return json.loads(self._without_secrets(text))
        except (ValueError, RecursionError) as error:
            raise HttpFault(f"the answer is not JSON ({self._short(str(error))})", status=reply.status) from error

    def _status_fault(self, reply: Reply) -> HttpFault:
        status = reply.status
        words = self._short(reply.body[:4096].decode("utf-8", errors="replace"))
        message = f"HTTP {status} {http.client.responses.get(status, '')}".rstrip() + (f": {words}" if words else "")
        if 300 <= status < 400:
            return HttpFault(f"HTTP {status}: a redirect, which is never followed; give the final URL", status=status)
        transient = status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500
        return HttpFault(message, status=status, transient=transient, retry_after_s=_retry_after_s(reply.headers))

    def _pause(self, fault: HttpFault, attempt: int) -> float:
        if fault.retry_after_s is not None:
            return fault.retry_after_s
        return self._random.uniform(0.0, min(_PAUSE_LIMIT_S, self._pause_s * 2 ** (attempt - 1)))

    def _short(self, words: str) -> str:
        return clean(self._without_secrets(words), _MESSAGE_LIMIT)

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def check_url(url: str) -> str:
    """``url`` when a request can be sent to it.

    Raises:
        ValueError: not http or https, without a host, or with a password, which would show in messages.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url is {url!r}; give http://HOST[:PORT]/PATH or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"url for {parts.hostname} holds a user name or password; remove it")
    return url


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of ``Retry-After`` in either form; None without one that makes sense."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    when = _timestamp(value)
    if when is None:
        return None
    now = _timestamp(headers.get("Date", ""))  # the server's own clock, where it tells
    return max(0.0, when - (time.time() if now is None else now))


def _timestamp(value: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() if value else None
    except (ValueError, OverflowError, OSError):
        return None
