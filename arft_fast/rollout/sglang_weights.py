"""A new version of the weights on its way to SGLang servers: by tensor, by disk, or by broadcast (NCCL, gloo).

Weights by ``tensor`` need no SGLang here: of what pickles may hold, its server takes a few plain types only, and these
payloads are made of them.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import pickle
import shutil
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from arft_fast.policy.checkpoint import replace_checkpoint
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import WeightUpdateError
from arft_fast.rollout.sglang_http import POLL_S, Control, Refused, Server, gather_all
from arft_fast.rollout.weight_export import buckets, checkpoint_tensors

Transfer = Literal["tensor", "disk", "nccl"]

_BUCKET_BYTES = 256 * 2**20  # a request body holds it as base64, once for each tensor-parallel rank
_FLUSH_S = 60.0


class WeightSender:
    """Carries the policy's weights to ``servers``. One process sends; none generates meanwhile."""

    def __init__(
        self,
        policy: Policy,
        servers: Sequence[Server],
        control: Control,
        *,
        transfer: Transfer,
        folder: Path | None,
        timeout_s: float,
    ) -> None:
        """Nothing is sent yet.

        Args:
            transfer: how; see ``SglangServers.connect``.
            folder: where the servers find weights by ``disk``.
            timeout_s: for a process group to come together, and for what a server refuses at first.
        """
        self._policy = policy
        self._servers = servers
        self._control = control
        self._transfer = transfer
        self._folder = folder
        self._timeout_s = timeout_s
        self._saved: Path | None = None
        self._collective: tuple[str, dist.ProcessGroup] | None = None

    async def send(self, version: int) -> None:
        """Give every server the weights of now as ``version`` and drop what it computed with others.

        Raises:
            WeightUpdateError: a server refused, or names another version afterwards.
            EngineDied: a server did not answer.
        """
        transfer = {"tensor": self._by_tensor, "disk": self._by_disk, "nccl": self._by_nccl}[self._transfer]
        try:
            await self._everywhere("/pause_generation", {"mode": "abort"})
            await transfer(version)
            await gather_all(self._flush(server) for server in self._servers)
            await self._everywhere("/update_weight_version", {"new_version": f"{version}", "abort_all_requests": False})
        finally:  # others' requests would wait for ever
            await self._everywhere("/continue_generation", {})
        for server in self._servers:
            served = (await self._control.ask(server, "/model_info")).get("weight_version")
            if served != str(version):
                raise WeightUpdateError(f"{server.url} says it has weights {served!r} after an update to {version}")

    def leaving(self) -> list[Coroutine[Any, Any, None]]:
        """What dissolves the process group, here and at the servers; to be awaited together. None was joined: nothing.

        Raises, when awaited:
            WeightUpdateError: a server refused.
            EngineDied: a server did not answer.
        """
        if self._collective is None:
            return []
        name, group = self._collective
        return [
            self._everywhere("/destroy_weights_update_group", {"group_name": name}),
            self._control.in_thread(dist.destroy_process_group, group),
        ]

    async def _by_disk(self, version: int) -> None:
        assert self._folder is not None
        path = self._folder.resolve() / f"v{version}"
        await self._on_disk(replace_checkpoint, self._policy, path)
        body = {"model_path": str(path), "load_format": "auto", "flush_cache": False}
        await self._everywhere("/update_weights_from_disk", body)
        if self._saved not in (None, path):
            await self._on_disk(shutil.rmtree, self._saved)
        self._saved = path

    async def _on_disk(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            await self._control.in_thread(work, *arguments)
        except OSError as error:
            raise WeightUpdateError(
                f"{self._folder} cannot hold the weights ({error}); give a folder that can"
            ) from error

    async def _by_tensor(self, version: int) -> None:
        async with self._session():
            for bucket in buckets(checkpoint_tensors(self._policy), _BUCKET_BYTES):
                payload = await self._control.in_thread(_payload, bucket)
                body = {"load_format": "flattened_bucket", "flush_cache": False}
                await gather_all(
                    self._control.ask(
                        server,
                        "/update_weights_from_tensor",
                        {**body, "serialized_named_tensors": [payload] * server.tp_size},
                    )
                    for server in self._servers
                )

    async def _by_nccl(self, version: int) -> None:
        if self._collective is None:
            self._collective = await self._join()
        name, group = self._collective
        async with self._session():
            for bucket in buckets(checkpoint_tensors(self._policy), _BUCKET_BYTES):
                body = {
                    "names": [name for name, _ in bucket],
                    "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                    "shapes": [list(tensor.shape) for _, tensor in bucket],
                    "group_name": name,
                    "load_format": "flattened_bucket",
                    "flush_cache": False,
                }
                # The first failure ends the wait: without the server that refused the broadcast only times out.
                await asyncio.gather(
                    *(self._control.ask(server, "/update_weights_from_distributed", body) for server in self._servers),
                    self._control.in_thread(_broadcast, _flatten(bucket), group),
                )

    async def _join(self) -> tuple[str, dist.ProcessGroup]:
        """A process group of this rank and all servers' tensor-parallel ranks."""
        name = f"arft_fast-{uuid.uuid4().hex[:8]}"  # a server keeps the groups of runs that died
        address, port = _own_address([server.url for server in self._servers])
        backend = "nccl" if self._policy.device.type == "cuda" else "gloo"
        first = list(itertools.accumulate((server.tp_size for server in self._servers), initial=1))
        body = {"master_address": address, "master_port": port, "world_size": first[-1], "group_name": name}
        group, *_ = await asyncio.gather(
            self._control.in_thread(_join_group, address, port, first[-1], name, backend, self._timeout_s),
            *(
                self._control.ask(
                    server, "/init_weights_update_group", {**body, "rank_offset": rank, "backend": backend}
                )
                for server, rank in zip(self._servers, first, strict=False)
            ),
        )
        return name, group

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        """Tensors are refused outside a weight-update session."""
        opened: list[Server] = []

        async def begin(server: Server) -> None:
            try:
                await self._control.ask(server, "/begin_weight_update", {})
            except Refused as refusal:
                if refusal.status == 404:
                    return  # there are none before 0.5.18
                try:  # a run before this one may have died in an update
                    await self._control.ask(server, "/end_weight_update", {})
                    await self._control.ask(server, "/begin_weight_update", {})
                except WeightUpdateError as error:
                    raise refusal from error
            opened.append(server)

        try:
            await gather_all(begin(server) for server in self._servers)
            yield
        finally:
            await self._control.ask_all(opened, "/end_weight_update", {})

    async def _flush(self, server: Server) -> None:
        """Drop all keys and values; right after a request SGLang refuses to, for a while."""
        deadline = asyncio.get_running_loop().time() + min(_FLUSH_S, self._timeout_s)
        while True:
            try:
                await self._control.ask(server, "/flush_cache", {})
                return
            except WeightUpdateError:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(POLL_S)

    async def _everywhere(self, path: str, body: Mapping[str, Any]) -> None:
        await self._control.ask_all(self._servers, path, body)


def _flatten(bucket: Sequence[tuple[str, Tensor]]) -> Tensor:
    """[bytes] uint8: the tensors' contents one behind the other."""
    return torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])


def _payload(bucket: Sequence[tuple[str, Tensor]]) -> str:
    """What ``update_weights_from_tensor`` takes as a ``flattened_bucket``: contents, not pointers to them."""
    metadata, start = [], 0
    for name, tensor in bucket:
        metadata.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype,
                start_idx=start, end_idx=start + tensor.nbytes, numel=tensor.nbytes,
            )
        )  # fmt: skip
        start += tensor.nbytes
    return base64.b64encode(pickle.dumps({"flattened_tensor": _flatten(bucket).cpu(), "metadata": metadata})).decode()


def _own_address(urls: Sequence[str]) -> tuple[str, int]:
    """This machine as the servers see it, and a free port."""
    addresses = []
    for url in urls:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: it only finds the route
            probe.connect((urlsplit(url).hostname, 9))
            addresses.append(probe.getsockname()[0])
    address = next((a for a in addresses if not a.startswith("127.")), addresses[0])
    with socket.socket() as listener:
        listener.bind((address, 0))
        return address, listener.getsockname()[1]


def _join_group(address: str, port: int, world: int, name: str, backend: str, timeout_s: float) -> dist.ProcessGroup:
    """Rank 0 of a process group beside torch's default one, found by the same keys as SGLang's side uses."""
    timeout = timedelta(seconds=timeout_s)
    store, _, _ = next(iter(distributed_c10d.rendezvous(f"tcp://{address}:{port}", 0, world, timeout=timeout)))
    store.set_timeout(timeout)
    group, _ = distributed_c10d._new_process_group_helper(
        world, 0, [], dist.Backend(backend), dist.PrefixStore(name, store), group_name=cast(Any, name), timeout=timeout
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _broadcast(flat: Tensor, group: dist.ProcessGroup) -> None:
    dist.broadcast(flat, src=0, group=group)
