"""One HTTP request that can be broken off from another thread, with a body that is bounded while it arrives.

``requests`` bounds the wait for each packet, not the whole answer: a server that sends one byte a second holds a thread
for as long as it likes. So every connection of a ``Worker`` tells the try under way which socket it uses, and
``Try.abort`` shuts that socket down: whatever waits on it in the worker's thread ends at once.
"""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
from requests.adapters import HTTPAdapter

_CHUNK_BYTES = 64 * 1024
_HEADERS = {"Accept": "application/json", "Accept-Encoding": "gzip"}


class BodyRefused(Exception):
    """The body is too large, or packed in a way that was not asked for or is broken."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    """Names in any case."""
    body: bytes
    """Decompressed."""


class Try:
    """One request under way. ``abort`` may come from any thread, at any time, more than once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.aborted = False
        self._socket: socket.socket | None = None

    def uses(self, connected: socket.socket | None) -> None:
        """The request is on this socket; None: it is over, and the socket may serve another."""
        with self._lock:
            self._socket = connected
            if self.aborted:
                self._break()

    def abort(self) -> None:
        """Break the request off; it ends with an error in its own thread."""
        with self._lock:
            self.aborted = True
            self._break()

    def _break(self) -> None:
        if self._socket is None:
            return
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # past TLS, which is not safe from two threads
        except (OSError, TypeError):
            return  # closed already; or TLS through a TLS proxy, which has no socket of its own and ends by timeout


class Worker:
    """The connections of one thread, kept open between requests; it makes one request at a time.

    Proxies and certificate bundles are taken from the environment, passwords (netrc) and cookies are not.
    """

    def __init__(self) -> None:
        self._try: Try | None = None
        self._session = requests.Session()
        self._session.auth = _no_auth
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        adapter = _Adapter(self._on_socket)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def post(
        self,
        under_way: Try,
        url: str,
        payload: object,
        headers: Mapping[str, str],
        *,
        timeout_s: tuple[float, float],
        max_body_bytes: int,
    ) -> Reply:
        """POST ``payload`` as JSON. Redirects are not followed; the body of an error is cut, not refused.

        Args:
            timeout_s: to connect, and between packets.

        Raises:
            BodyRefused: see there.
            OSError, requests.exceptions.BaseHTTPError: the network.
        """
        self._try = under_way
        try:
            if under_way.aborted:
                raise ConnectionAbortedError("the request was given up before it began")
            with self._session.post(
                url,
                json=payload,
                headers={**_HEADERS, **headers},
                timeout=timeout_s,
                stream=True,
                allow_redirects=False,
            ) as response:
                body = _bounded_body(response, max_body_bytes)
                return Reply(status=response.status_code, headers=response.headers, body=body)
        finally:
            under_way.uses(None)
            self._try = None

    def close(self) -> None:
        self._session.close()

    def _on_socket(self, connected: socket.socket) -> None:
        if self._try is not None:
            self._try.uses(connected)


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Without any, requests would look a password up in ~/.netrc."""
    return request


def _bounded_body(response: requests.Response, limit: int) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise BodyRefused(f"a body in the encoding {encoding[:40]!r}")
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS) if "gzip" in encoding else None
    body = bytearray()
    for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
        if inflate is None:
            body += chunk
        else:
            body += _inflated(inflate, chunk, limit + 1 - len(body))
        if len(body) > limit:
            if response.status_code == 200:
                raise BodyRefused(f"more than {limit / 2**20:g} MiB")
            break
    if inflate is not None and response.status_code == 200 and not inflate.eof:
        raise BodyRefused("gzip data that end early")
    return bytes(body[:limit])


def _inflated(inflate: zlib._Decompress, chunk: bytes, limit: int) -> bytes:
    try:
        return inflate.decompress(chunk, limit)
    except zlib.error as error:
        raise BodyRefused(f"broken gzip data ({error})") from error


class _Adapter(HTTPAdapter):
    """Makes connections that tell ``on_socket`` what they are about to read from."""

    def __init__(self, on_socket: Callable[[socket.socket], None]) -> None:
        self._on_socket = on_socket
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, proxy: Any, **kwargs: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not known:
            self._watch(manager)
        return manager

    def _watch(self, manager: Any) -> None:
        classes = manager.pool_classes_by_scheme.items()
        manager.pool_classes_by_scheme = {scheme: _watched(pool, self._on_socket) for scheme, pool in classes}


def _watched(pool: Any, on_socket: Callable[[socket.socket], None]) -> Any:
    """The class ``pool`` of connections, each of which tells of its socket before it waits for an answer."""

    class Connection(pool.ConnectionCls):
        def getresponse(self) -> Any:
            on_socket(self.sock)
            return super().getresponse()

    class Pool(pool):
        ConnectionCls = Connection

    return Pool
