"""SGLang behind URLs: requests to servers that are others' and stay up.

Images travel as PNG and a server preprocesses them itself: start it with the policy's own image processor settings.
Each image gets a name of its own for each weight version (``mm_hashes``): the cache of image embeddings goes by that
name, and neither ``flush_cache`` nor a weight update empties it (sglang 0.5.21).

``sglang_http`` holds a single exchange, ``sglang_weights`` the way of the weights.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.rollout.engine import EngineDied, EngineError, WeightUpdateError
from arft_fast.rollout.sglang_backend import SglangBackend, SglangRequest
from arft_fast.rollout.sglang_http import (
    POLL_S,
    PROBE_S,
    Control,
    Fault,
    PngCache,
    Server,
    exchange,
    gather_all,
    servers_behind,
    words,
)
from arft_fast.rollout.sglang_weights import Transfer, WeightSender

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0  # upper bounds of the random pauses between attempts
_CLOSE_S = 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attempt:
    """A request that a server may be working on."""

    request: str
    """Its name in this process; ``rid`` is the one that the server knows."""
    rid: str
    replica: str
    answer: asyncio.Future[tuple[int, Any]]


class SglangServers(SglangBackend):
    """See the module's text. Made by ``connect``; one event loop for life."""

    def __init__(
        self,
        replicas: Mapping[str, Sequence[Server]],
        control: Control,
        weights: WeightSender,
        *,
        ranks: Ranks,
        concurrency: int,
        timeout_s: float,
    ) -> None:
        """Use ``connect``."""
        self._replicas = replicas
        self._control = control
        self._weights = weights
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(concurrency)
        self._generating = ThreadPoolExecutor(concurrency, thread_name_prefix="sglang generate")
        self._attempts: set[_Attempt] = set()
        self._pngs = PngCache()
        self._version: int | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(
        cls,
        policy: Policy,
        urls: Sequence[str],
        *,
        transfer: Transfer,
        folder: Path | None,
        ranks: Ranks,
        concurrency: int,
        timeout_s: float,
    ) -> SglangServers:
        """Ask every server what it serves. The environment's SGLANG_API_KEY is sent to them as their ``--api-key``.

        Args:
            urls: one a replica; or the one of an SGLang router, whose workers are then asked and given the weights.
            transfer: how weights travel. ``tensor``: in the request, 4/3 of their bytes for each server and each of its
                tensor-parallel ranks. ``disk``: through ``folder``, which the servers see under the same path.
                ``nccl``: broadcast from the policy's device, over gloo where that is a CPU.
            ranks: all of them generate, rank 0 alone sends weights; ``load_weights`` is a collective call.
            concurrency: requests of this process in flight at a time, over all servers; further ones wait.
            timeout_s: for each request in flight, retries included, and for each exchange of a weight update.

        Raises:
            ValueError: no URL, or ``disk`` without a folder.
            EngineError: a server cannot be reached, wants another key, or serves what cannot be used.
        """
        if not urls:
            raise ValueError("urls: none given; give one http://HOST:PORT for each replica")
        if transfer == "disk" and folder is None:
            raise ValueError("folder: none given; weights by disk need one that all servers see")
        control = Control(timeout_s)
        try:
            names = [url.rstrip("/") for url in urls]
            model_type, data_parallel = policy.model.config.model_type, transfer == "disk"
            behind = await gather_all(
                servers_behind(control, name, model_type=model_type, data_parallel=data_parallel) for name in names
            )
            replicas = dict(zip(names, behind, strict=True))
            servers = [server for found in behind for server in found]
            if twice := [server.url for server in set(servers) if servers.count(server) > 1]:
                raise EngineError(f"{twice[0]} is reached by two of rollout.urls; give each server or its router once")
        except BaseException:
            control.close()
            raise
        weights = WeightSender(policy, servers, control, transfer=transfer, folder=folder, timeout_s=timeout_s)
        return cls(replicas, control, weights, ranks=ranks, concurrency=concurrency, timeout_s=timeout_s)

    async def generate(self, request: SglangRequest) -> dict[str, Any]:
        """SGLang's reply; see ``SglangBackend``. A group stays on one replica.

        A connection that fails and the answers 429 and 5xx are met by another attempt, until ``timeout_s`` are over.
        A cancelled call leaves the server working until ``abort``.
        """
        clock = asyncio.get_running_loop().time
        replica = _pick(list(self._replicas), request.group or request.rid)
        async with self._free:
            deadline, number = clock() + self._timeout_s, 0
            while True:
                try:
                    status, reply = await self._attempt(request, replica, number, deadline - clock())
                    return self._checked(request, replica, status, reply)
                except Fault as fault:
                    pause_s = random.uniform(0, min(_FIRST_PAUSE_S * 2**number, _LONGEST_PAUSE_S))
                    number += 1
                    if clock() + pause_s >= deadline:
                        raise EngineDied(
                            f"{replica}: {fault}; given up after {number} attempts in {self._timeout_s:g} s; "
                            "look into the server's log, start it again and resume the run"
                        ) from fault
                    await asyncio.sleep(pause_s)

    async def _attempt(self, request: SglangRequest, replica: str, number: int, left_s: float) -> tuple[int, Any]:
        self._check_open()
        rid = f"{request.rid}-{number}" if number else request.rid  # SGLang refuses a name that it still works on
        thread = self._generating.submit(
            lambda: exchange("POST", f"{replica}/generate", self._body(request, rid), left_s)
        )
        attempt = _Attempt(request=request.rid, rid=rid, replica=replica, answer=asyncio.wrap_future(thread))
        self._attempts.add(attempt)
        attempt.answer.add_done_callback(lambda _: self._over(attempt))
        try:
            either: set[asyncio.Future[Any]] = {attempt.answer, self._closed}
            await asyncio.wait(either, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            thread.cancel()  # in case it has not begun
            raise
        self._check_open()
        if not attempt.answer.done():
            raise Fault("no answer in time")
        status, reply = attempt.answer.result()
        if status == 429 or status >= 500:
            raise Fault(f"/generate answered {status} ({words(reply)})")
        return status, reply

    def _over(self, attempt: _Attempt) -> None:
        self._attempts.discard(attempt)
        if not attempt.answer.cancelled():
            attempt.answer.exception()  # that of a call which was cancelled is nobody's

    def _body(self, request: SglangRequest, rid: str) -> dict[str, Any]:
        names = [hashlib.sha256(f"{request.cache_salt} {image.key}".encode()) for image in request.images]
        images = {
            "image_data": [self._pngs.data_url(image) for image in request.images],
            "mm_hashes": [name.hexdigest()[:16] for name in names],
        }
        return {
            "rid": rid,
            "input_ids": request.input_ids,
            "sampling_params": request.sampling_params,
            "cache_salt": request.cache_salt,
            "return_logprob": True,
            "return_prompt_token_ids": True,
            **(images if request.images else {}),
        }

    def _checked(self, request: SglangRequest, replica: str, status: int, reply: Any) -> dict[str, Any]:
        if status != 200:
            raise EngineError(f"{replica} refused request {request.rid} with {status}: {words(reply)}")
        if not isinstance(reply, dict) or not isinstance(reply.get("meta_info"), dict):
            raise EngineError(f"{replica}/generate gave no answer of SGLang's ({words(reply)}); check rollout.urls")
        served = reply["meta_info"].get("weight_version")
        if self._version is not None and served != str(self._version):
            raise EngineDied(
                f"{replica} generated with weights {served!r}, not with version {self._version}: it was started again, "
                "or somebody else sends it weights too; resume the run, which sends its own"
            )
        return reply

    async def abort(self, rid: str) -> None:
        """End a request and wait for the server's answer to it. See ``SglangBackend``."""
        for attempt in [attempt for attempt in self._attempts if attempt.request == rid]:
            while not attempt.answer.done():
                # Not once only: an abort that overtakes its request finds nothing to end.
                for server in self._replicas[attempt.replica]:
                    await self._control.ask(server, "/abort_request", {"rid": attempt.rid}, timeout_s=PROBE_S)
                await asyncio.wait({attempt.answer}, timeout=POLL_S)

    async def sleep(self) -> None:
        """Nothing to do: a server's memory is its own. See ``SglangBackend``."""
        self._check_open()

    async def load_weights(self, version: int) -> None:
        """Rank 0 sends the weights to all servers; the ranks return or raise together. See ``SglangBackend``."""
        self._check_open()
        self._ranks.barrier()  # every rank's requests are over
        problem = "interrupted"
        try:
            if self._ranks.main:
                await self._weights.send(version)
            problem = ""
        except Exception as error:
            problem = str(error) or repr(error)
            raise
        finally:  # whatever happened, the others wait to hear of it
            problems = self._ranks.gather([problem])
        if problems[0]:
            raise WeightUpdateError(f"rank 0 could not send the weights: {problems[0]}")
        self._version = version

    def _check_open(self) -> None:
        if self._closed.done():
            raise EngineDied("the connection to the SGLang servers is closed")

    async def close(self) -> None:
        """End what runs and the threads; a thread that waits for a server that hangs ends with its request's time."""
        if self._closed.done():
            return
        self._closed.set_result(None)
        leaving = [asyncio.ensure_future(self.abort(attempt.request)) for attempt in self._attempts]
        leaving += [asyncio.ensure_future(work) for work in self._weights.leaving()]
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)  # a server that is gone has nothing to release
        for attempt in list(self._attempts):
            attempt.answer.cancel()
        self._generating.shutdown(wait=False, cancel_futures=True)
        self._control.close()


def _pick(replicas: Sequence[str], name: str) -> str:
    """The same replica for the same name, in every process."""
    return replicas[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % len(replicas)]
