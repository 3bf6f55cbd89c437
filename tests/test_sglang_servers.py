"""Requests to SGLang servers: replicas, faults and attempts, cancelled calls, what is refused at the start."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from arft_fast.policy.model import Policy
from arft_fast.rollout import sglang_http, sglang_servers
from arft_fast.rollout.engine import EngineBusy, EngineDied, EngineError, Generation, Sampling
from arft_fast.rollout.sglang_servers import SglangServers
from tests.fake_sglang import FakeServer, FakeSglang, shallow
from tests.sglang_support import ALONE, GREEDY, Serve, connected, prompt, run, serving, truth


@pytest.fixture
def policy(policy: Policy) -> Policy:
    return shallow(policy)


@pytest.fixture
def serve(policy: Policy) -> Iterator[Serve]:
    with serving(policy) as start:
        yield start


def test_a_groups_prompt_is_computed_once_behind_a_url(policy: Policy, serve: Serve) -> None:
    server = serve()
    ids, images = prompt(policy)

    async def work() -> list[Generation]:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            calls = (engine.generate(ids, images, Sampling(max_tokens=2), group="g") for _ in range(8))
            return await asyncio.gather(*calls)

    generations = run(work())
    # SGLang computes the last token of a prompt again for each sample: that is where its logits come from.
    assert server.core.prefilled == sum(g.prefilled_tokens for g in generations) == len(ids) + 8


def test_an_image_is_encoded_once_for_all_its_requests(
    policy: Policy, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    saved: Counter[str] = Counter()
    save = Image.Image.save

    def counted(self: Image.Image, *arguments: Any, **named: Any) -> None:
        saved[str(self.getpixel((0, 0)))] += 1
        save(self, *arguments, **named)

    monkeypatch.setattr(Image.Image, "save", counted)

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            calls = [engine.generate(*prompt(policy, shade=k % 2), Sampling(max_tokens=1)) for k in range(6)]
            await asyncio.gather(*calls)

    run(work())
    assert sorted(saved.values()) == [1, 1]
    assert len({order["image_data"][0] for order in server.core.orders}) == 2


def test_a_group_stays_on_one_replica_and_groups_spread(policy: Policy, serve: Serve) -> None:
    servers = [serve(), serve()]
    names = [f"task/{k}" for k in range(8)]

    async def work() -> None:
        async with connected(policy, *servers) as engine:
            await engine.load_weights(0)
            ids, images = prompt(policy, shade=None)
            for _ in range(2):
                calls = [engine.generate(ids, images, Sampling(max_tokens=1), group=n) for n in names for _ in range(2)]
                await asyncio.gather(*calls)

    run(work())
    seen = [s.core.samples for s in servers]
    assert sum(seen) == 32 and all(count % 4 == 0 and count for count in seen)
    picks = {name: sglang_servers._pick(["a", "b"], name) for name in names}
    assert Counter(picks.values()).most_common()[0][1] < 8


@pytest.mark.parametrize("fault", ["reset", 500, 503, 429])
def test_a_passing_fault_is_met_by_another_attempt(policy: Policy, serve: Serve, fault: Any) -> None:
    server = serve()
    server.plan("/generate", fault, fault)

    async def work() -> Generation:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            return await engine.generate(*prompt(policy), GREEDY)

    assert run(work()).token_ids == truth(policy, *prompt(policy))[0]
    rids = [body["rid"] for body in server.asked("/generate")]
    assert len(set(rids)) == 3 and all(rid.startswith(rids[0]) for rid in rids)


@pytest.mark.parametrize(
    ("fault", "words"), [("reset", "RemoteDisconnected"), ("hang", "in time|timed out"), (500, "planned 500")]
)
def test_a_lasting_fault_ends_in_an_error_that_names_server_and_cause(
    policy: Policy, serve: Serve, fault: Any, words: str
) -> None:
    server = serve()
    server.plan("/generate", *[fault] * 100)

    async def work() -> float:
        async with connected(policy, server, timeout_s=1.0) as engine:
            await engine.load_weights(0)
            started = time.monotonic()
            with pytest.raises(EngineDied, match=f"(?s){server.url}.*({words}).*log"):
                await engine.generate(*prompt(policy), GREEDY)
            return time.monotonic() - started

    assert run(work()) < 3


def test_a_server_that_goes_away_ends_its_requests(policy: Policy, serve: Serve) -> None:
    server = serve(FakeSglang(policy, token_s=0.02))

    async def work() -> None:
        async with connected(policy, server, timeout_s=1.0) as engine:
            await engine.load_weights(0)
            call = asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=100)))
            await asyncio.sleep(0.2)
            server.core.dead = True
            with pytest.raises(EngineDied, match=server.url):
                await call
            with pytest.raises(EngineDied, match=server.url):
                await engine.load_weights(1)

    run(work())


def test_a_refused_request_is_not_repeated_and_the_servers_words_are_kept_short(policy: Policy, serve: Serve) -> None:
    server = serve(FakeSglang(policy, context_length=8))

    async def work() -> str:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            with pytest.raises(EngineError, match="maximum context length of 8") as caught:
                await engine.generate(*prompt(policy), GREEDY)
            return str(caught.value)

    assert server.url in run(work())
    assert len(server.asked("/generate")) == 1
    assert len(sglang_http.words({"error": {"message": "so " * 10_000}})) <= 300


def test_an_answer_that_is_no_json_is_an_error(policy: Policy, serve: Serve) -> None:
    server = serve()
    server.plan("/generate", "garbage")

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            with pytest.raises(EngineError, match=r"<html>garbage.*rollout\.urls"):
                await engine.generate(*prompt(policy), GREEDY)

    run(work())


def test_a_cancelled_call_is_aborted_at_its_server_and_leaves_nothing(policy: Policy, serve: Serve) -> None:
    server = serve(FakeSglang(policy, token_s=0.05))

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            call = asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=150)))
            while not server.core.running:
                await asyncio.sleep(0.01)
            with pytest.raises(EngineBusy):
                await engine.load_weights(1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await engine.sleep()  # 150 tokens would take 7.5 s
            assert not server.core.running and server.asked("/abort_request")
            await engine.load_weights(1)

    started = time.monotonic()
    run(work())
    assert time.monotonic() - started < 5


def test_closing_ends_calls_and_their_requests(policy: Policy, serve: Serve) -> None:
    server = serve(FakeSglang(policy, token_s=0.05))

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(0)
            call = asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=150)))
            while not server.core.running:
                await asyncio.sleep(0.01)
            await engine.close()
            with pytest.raises(EngineDied, match="closed"):
                await call
            assert not server.core.running

    run(work())


def test_a_server_that_was_started_anew_is_noticed(policy: Policy, serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with connected(policy, server) as engine:
            await engine.load_weights(7)
            await engine.generate(*prompt(policy), GREEDY)
            server.core.weight_version = "default"
            with pytest.raises(EngineDied, match="'default', not with version 7"):
                await engine.generate(*prompt(policy), GREEDY)

    run(work())


def test_what_cannot_be_used_is_refused_at_the_start_with_the_remedy(
    policy: Policy, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = serve(key="secret")

    async def refused(server: FakeServer | None, words: str) -> None:
        url = server.url if server else "http://127.0.0.1:9"
        with pytest.raises(EngineError, match=f"{url}.*{words}"):
            await SglangServers.connect(
                policy, [url], transfer="tensor", folder=None, ranks=ALONE, concurrency=1, timeout_s=5
            )

    async def work() -> None:
        await refused(None, r"refused.*rollout\.urls")
        await refused(serve(model_type="llama"), "'llama'.*'qwen2_5_vl'")
        await refused(serve(dp_size=2), "--dp-size 2")
        await refused(locked, "SGLANG_API_KEY")
        starting = serve()
        starting.plan("/model_info", 503)
        await refused(starting, "503.*ready")
        monkeypatch.setenv("SGLANG_API_KEY", "secret")
        async with connected(policy, locked) as engine:
            await engine.load_weights(0)
            await engine.generate(*prompt(policy), GREEDY)

    run(work())


def test_one_server_under_two_urls_is_refused(policy: Policy, serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        with pytest.raises(EngineError, match=r"reached by two of rollout\.urls"):
            await SglangServers.connect(
                policy, [server.url, f"{server.url}/"], transfer="tensor", folder=None, ranks=ALONE, concurrency=1,
                timeout_s=5,
            )  # fmt: skip

    run(work())
