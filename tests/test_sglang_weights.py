"""Weights on their way to SGLang servers: by tensor, disk and broadcast, whole or not at all, with every rank told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from arft_fast.policy.model import Policy
from arft_fast.rollout import sglang_weights
from arft_fast.rollout.engine import EngineError, Generation, WeightUpdateError
from tests.fake_sglang import FakeServer, FakeSglang, shallow
from tests.sglang_support import GREEDY, Serve, change, connected, prompt, run, serving, truth

METHODS = {
    "tensor": ["begin_weight_update", "update_weights_from_tensor", "end_weight_update", "update_weight_version"],
    "disk": ["update_weights_from_disk", "continue_generation", "pause_generation"],
    "nccl": ["init_weights_update_group", "update_weights_from_distributed"],
}


@pytest.fixture
def policy(policy: Policy) -> Policy:
    return shallow(policy)


@pytest.fixture
def serve(policy: Policy) -> Iterator[Serve]:
    with serving(policy) as start:
        yield start


def broadcast_to(monkeypatch: pytest.MonkeyPatch, *servers: FakeServer) -> list[Any]:
    """Servers that get what is broadcast, in place of a process group; returns how groups were joined and left."""
    seen: list[Any] = []

    def join(*arguments: Any) -> Any:
        seen.append(arguments)
        return servers

    def broadcast(flat: torch.Tensor, group: tuple[FakeServer, ...]) -> None:
        for server in group:
            server.core.inbox.put(flat.clone())

    monkeypatch.setattr(sglang_weights, "_join_group", join)
    monkeypatch.setattr(sglang_weights, "_broadcast", broadcast)
    monkeypatch.setattr(sglang_weights.dist, "destroy_process_group", seen.append)
    return seen


@pytest.mark.parametrize("transfer", ["tensor", "disk", "nccl"])
def test_new_weights_arrive_whole_and_nothing_old_is_reused(
    policy: Policy, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: Any
) -> None:
    server = serve(FakeSglang(policy, vision_cache=True))
    broadcast_to(monkeypatch, server)
    monkeypatch.setattr(sglang_weights, "_BUCKET_BYTES", 2**20)  # several buckets
    folder = tmp_path if transfer == "disk" else None

    async def work() -> list[Generation]:
        async with connected(policy, server, transfer=transfer, folder=folder) as engine:
            await engine.load_weights(0)
            old = await engine.generate(*prompt(policy), GREEDY)
            await engine.sleep()
            change(policy)
            await engine.load_weights(1)
            return [old, await engine.generate(*prompt(policy), GREEDY)]

    before = truth(policy, *prompt(policy))
    old, new = run(work())
    after = truth(policy, *prompt(policy))
    assert (old.weight_version, new.weight_version, new.cached_tokens) == (0, 1, 0)
    assert old.token_ids == before[0] and new.token_ids == after[0]
    torch.testing.assert_close(torch.tensor(new.logprobs), torch.tensor(after[1]), atol=1e-4, rtol=0)
    assert (torch.tensor(old.logprobs) - torch.tensor(after[1])).abs().max() > 1e-2  # the old ones would not pass


@pytest.mark.parametrize(("transfer", "method"), [(t, m) for t, methods in METHODS.items() for m in methods])
def test_every_failed_flag_is_an_error_that_names_the_replica(
    policy: Policy, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: Any, method: str
) -> None:
    good, bad = serve(), serve()
    broadcast_to(monkeypatch, good, bad)

    async def work() -> None:
        folder = tmp_path if transfer == "disk" else None
        async with connected(policy, good, bad, transfer=transfer, folder=folder) as engine:
            bad.core.refusals[method] = 100
            with pytest.raises(WeightUpdateError, match=f"{bad.url}/{method}.*told to fail"):
                await engine.load_weights(1)
            with pytest.raises(EngineError, match="load_weights"):
                await engine.generate(*prompt(policy), GREEDY)  # nothing is sampled with doubtful weights

    run(work())
    assert not good.core.session and not good.core.paused  # others can go on


def test_a_flush_that_is_refused_at_first_is_repeated(policy: Policy, serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            server.core.refusals["flush_cache"] = 2
            await engine.load_weights(1)

    run(work())
    assert server.core.calls.count("flush_cache") == 4


def test_a_flush_that_is_refused_for_ever_is_an_error(policy: Policy, serve: Serve) -> None:
    server = serve()
    server.core.refusals["flush_cache"] = 10**6

    async def work() -> None:
        async with connected(policy, server, timeout_s=0.5) as engine:
            with pytest.raises(WeightUpdateError, match="flush_cache"):
                await engine.load_weights(0)

    run(work())


def test_a_session_that_a_dead_run_left_open_is_closed_first(policy: Policy, serve: Serve) -> None:
    server = serve(FakeSglang(policy, session=True, paused=True))

    async def work() -> Generation:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            return await engine.generate(*prompt(policy), GREEDY)

    assert run(work()).weight_version == 0


def test_a_server_from_before_sessions_is_updated_without_one(policy: Policy, serve: Serve) -> None:
    server = serve(FakeSglang(policy, session=True))
    server.absent = {"/begin_weight_update", "/end_weight_update"}

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(3)

    run(work())
    assert server.core.weight_version == "3" and not server.core.paused


def test_each_tensor_parallel_rank_gets_a_payload(policy: Policy, serve: Serve) -> None:
    server = serve(FakeSglang(policy, tp_size=2))

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)

    run(work())
    assert {len(b["serialized_named_tensors"]) for b in server.asked("/update_weights_from_tensor")} == {2}


def test_one_process_group_takes_in_all_servers_for_the_whole_run(
    policy: Policy, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [serve(FakeSglang(policy, tp_size=2)), serve()]
    seen = broadcast_to(monkeypatch, *servers)

    async def work() -> None:
        async with connected(policy, *servers, transfer="nccl") as engine:
            await engine.load_weights(0)
            await engine.load_weights(1)

    run(work())
    joined, left = seen
    assert joined[2] == 4 and left == tuple(servers)
    offsets = [[body["rank_offset"] for body in s.asked("/init_weights_update_group")] for s in servers]
    assert offsets == [[1], [3]]
    assert all(len(s.asked("/destroy_weights_update_group")) == 1 for s in servers)


def test_only_the_newest_version_stays_on_the_disk(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    server = serve()
    mine = tmp_path / "v0-of-somebody"
    mine.mkdir()

    async def work() -> None:
        async with connected(policy, server, transfer="disk", folder=tmp_path) as engine:
            for version in range(3):
                await engine.load_weights(version)

    run(work())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v0-of-somebody", "v2"]


def test_a_folder_that_cannot_be_written_is_an_error_with_the_remedy(
    policy: Policy, serve: Serve, tmp_path: Path
) -> None:
    server = serve()
    (tmp_path / "file").write_text("")

    async def work() -> None:
        async with connected(policy, server, transfer="disk", folder=tmp_path / "file") as engine:
            with pytest.raises(WeightUpdateError, match=r"cannot hold the weights.*give a folder"):
                await engine.load_weights(0)

    run(work())


def test_a_routers_workers_get_the_weights_and_the_router_the_requests(policy: Policy, serve: Serve) -> None:
    worker = serve()
    router = serve(worker.core)
    router.workers = [worker.url]

    async def work() -> None:
        async with connected(policy, router) as engine:
            await engine.load_weights(0)
            await engine.generate(*prompt(policy), GREEDY)

    run(work())
    assert {path for path, _ in router.requests} == {"/workers", "/generate"}
    assert worker.asked("/update_weights_from_tensor") and not worker.asked("/generate")


@dataclass
class OtherRank:
    """Rank 1, whose rank 0 reports ``problem``."""

    problem: str
    main: bool = False

    def barrier(self) -> None:
        """Rank 0 is there."""

    def gather(self, items: list[str]) -> list[str]:
        return [self.problem, *items]


def test_other_ranks_send_no_weights_and_share_rank_zeros_failure(policy: Policy, serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with connected(policy, server, ranks=OtherRank("")) as engine:
            await engine.load_weights(0)
        async with connected(policy, server, ranks=OtherRank("the disk is full")) as engine:
            with pytest.raises(WeightUpdateError, match=r"rank 0 .* the disk is full"):
                await engine.load_weights(0)

    run(work())
    assert not server.core.calls


class CountingRanks(OtherRank):
    """Rank 0, and what it told the others."""

    told: list[str] = []  # noqa: RUF012

    def gather(self, items: list[str]) -> list[str]:
        self.told = items
        return items


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_the_other_ranks_hear_of_an_update_that_does_not_end_well(policy: Policy, serve: Serve, how: str) -> None:
    server = serve()
    ranks = CountingRanks("", main=True)

    async def work() -> None:
        async with connected(policy, server, ranks=ranks, timeout_s=2.0) as engine:
            if how == "fails":
                server.core.refusals["update_weights_from_tensor"] = 1
                with pytest.raises(WeightUpdateError):
                    await engine.load_weights(0)
                assert "told to fail" in ranks.told[0]
            else:
                server.plan("/pause_generation", "hang")
                update = asyncio.ensure_future(engine.load_weights(0))
                await asyncio.sleep(0.1)
                update.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await update
                assert ranks.told == ["interrupted"]

    run(work())
    assert not server.core.paused
