"""How this process talks to SGLang servers: one exchange, what went wrong in it, and who stands behind a URL."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import requests

from arft_fast.policy.images import EncodedImage
from arft_fast.rollout.engine import EngineDied, EngineError, WeightUpdateError

T = TypeVar("T")

PROBE_S = 30.0  # for an exchange that only asks or ends something
POLL_S = 0.2  # between two attempts at what a server cannot do yet

_PNGS = 256
_CONTROL_THREADS = 256  # made when needed; servers that join a process group keep one each, all at the same time


class Fault(Exception):
    """No answer, or one that a later attempt need not get."""


class Refused(WeightUpdateError):
    """A server answered that it will not, with this ``status``."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Server:
    """One that holds weights."""

    url: str
    tp_size: int


class Control:
    """Exchanges that steer servers, and other work that would block the event loop, in threads of their own."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_CONTROL_THREADS, thread_name_prefix="sglang control")

    async def ask(
        self, server: Server, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """What a server answers: GET without a body.

        Raises:
            Refused: it refused, or did not succeed.
            EngineDied: it did not answer.
        """
        try:
            status, reply = await self.call(server.url + path, body, timeout_s or self._timeout_s)
        except Fault as fault:
            raise EngineDied(f"{server.url}{path}: {fault}; look into the server's log") from fault
        if status != 200 or (isinstance(reply, dict) and reply.get("success") is False):
            raise Refused(f"{server.url}{path} failed with {status}: {words(reply)}", status)
        return reply

    async def ask_all(self, servers: Sequence[Server], path: str, body: Mapping[str, Any]) -> None:
        """The same of every server."""
        await gather_all(self.ask(server, path, body) for server in servers)

    async def call(self, url: str, body: Mapping[str, Any] | None, timeout_s: float) -> tuple[int, Any]:
        """One ``exchange``: GET without a body.

        Raises:
            Fault: no whole answer came.
        """
        thread = asyncio.get_running_loop().run_in_executor(
            self._threads, exchange, "GET" if body is None else "POST", url, body, timeout_s
        )
        try:
            return await asyncio.wait_for(thread, timeout_s)
        except TimeoutError as error:
            raise Fault(f"no answer within {timeout_s:g} s") from error

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """``work(*arguments)``; when this is cancelled, its thread goes on to the end."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def close(self) -> None:
        """Begin nothing more. A thread that waits for a server that hangs ends with its exchange's time."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class PngCache:
    """Images as data URLs, each made once; for several threads."""

    def __init__(self) -> None:
        self._urls: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def data_url(self, image: EncodedImage) -> str:
        """``data:image/png;base64,...``

        Raises:
            ValueError: the image has no pixels.
        """
        with self._lock:
            if image.key not in self._urls:
                if image.image is None:
                    raise ValueError("images: one has no pixels (EncodedImage.image), which are what a server is sent")
                png = io.BytesIO()
                image.image.save(png, "PNG", compress_level=1)
                self._urls[image.key] = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            self._urls.move_to_end(image.key)
            if len(self._urls) > _PNGS:
                self._urls.popitem(last=False)
            return self._urls[image.key]


async def servers_behind(control: Control, url: str, *, model_type: str, data_parallel: bool) -> tuple[Server, ...]:
    """The servers behind a URL: itself, or the workers of a router.

    Args:
        model_type: what they have to serve.
        data_parallel: whether a server may run with a ``--dp-size``.

    Raises:
        EngineError: one cannot be reached, wants another key, or serves what cannot be used.
    """

    async def get(address: str, path: str) -> Any:
        try:
            status, reply = await control.call(address + path, None, PROBE_S)
        except Fault as fault:
            raise EngineError(
                f"{address} cannot be reached ({fault}); start it there (python -m sglang.launch_server) or correct "
                "rollout.urls"
            ) from fault
        if status in (401, 403):
            raise EngineError(f"{address} wants a key ({status}); put its --api-key into SGLANG_API_KEY")
        if status == 404 and path == "/workers":
            return {}
        if status != 200 or not isinstance(reply, dict):
            raise EngineError(f"{address}{path} answered {status} ({words(reply)}); is SGLang there, and ready?")
        return reply

    async def inspect(address: str) -> Server:
        model, server = await get(address, "/model_info"), await get(address, "/server_info")
        if model.get("model_type") != model_type:
            raise EngineError(
                f"{address} serves a model of type {model.get('model_type')!r}, the policy is {model_type!r}; start it "
                "with the policy's model"
            )
        if not data_parallel and server.get("dp_size", 1) != 1:
            raise EngineError(f"{address} runs with --dp-size {server['dp_size']}; give one URL a replica instead")
        return Server(url=address, tp_size=int(server.get("tp_size", 1)))

    workers = (await get(url, "/workers")).get("workers", [{"url": url}])
    return tuple(await gather_all(inspect(worker["url"].rstrip("/")) for worker in workers))


def exchange(method: str, url: str, body: Mapping[str, Any] | None, timeout_s: float) -> tuple[int, Any]:
    """Status and content, JSON decoded where it is JSON. Blocks.

    Raises:
        Fault: no whole answer came.
    """
    headers = {"Connection": "close"}  # a kept connection may be closed by the server just when it is used again
    if key := os.environ.get("SGLANG_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        response = requests.request(method, url, json=body, headers=headers, timeout=max(timeout_s, 0.01))
    except requests.RequestException as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # the system's own words are the innermost
            cause = cause.__context__
        raise Fault(f"{type(cause).__name__}: {words(cause)}") from error
    try:
        return response.status_code, response.json()
    except requests.JSONDecodeError:
        return response.status_code, response.text


def words(reply: Any) -> str:
    """What a server says went wrong, on one line of bounded length."""
    if isinstance(reply, dict):
        error = reply.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        reply = inner or reply.get("message") or reply.get("detail") or reply
    return " ".join(str(reply).split())[:300]


async def gather_all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """All results, or the first failure in order once none of them runs any more."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done
