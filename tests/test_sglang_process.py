"""SGLang inside this process: its death, its refusals, its weights, its end."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
import torch

from arft_fast.policy.model import Policy
from arft_fast.rollout import sglang_process
from arft_fast.rollout.engine import EngineDied, EngineError, Sampling, WeightUpdateError
from arft_fast.rollout.sglang_engine import SGLangEngine
from tests.fake_sglang import FakeSglang, shallow
from tests.sglang_support import GREEDY, importable, in_process, prompt, several, until


@pytest.fixture
def policy(policy: Policy) -> Policy:
    return shallow(policy)


@pytest.fixture
def core(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> FakeSglang:
    return importable(policy, monkeypatch)


def test_a_dead_scheduler_ends_every_call(policy: Policy, core: FakeSglang) -> None:
    """SGLang itself would let them wait for ever."""

    async def work(engine: SGLangEngine) -> None:
        calls = [
            asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=150), group="g"))
            for _ in range(4)
        ]
        await until(lambda: len(core.running) == 4)
        core.dead = True
        async with asyncio.timeout(5):
            assert {type(result) for result in await several(calls)} == {EngineDied}
            for refused in (engine.sleep, lambda: engine.load_weights(1)):
                with pytest.raises(EngineDied):
                    await refused()

    in_process(policy, core, work)


def test_weights_that_kill_the_scheduler_end_in_an_error(
    policy: Policy, core: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of transformers 5 do."""

    async def work(engine: SGLangEngine) -> None:
        monkeypatch.setattr(sglang_process, "checkpoint_tensors", lambda p: iter(p.model.state_dict().items()))
        async with asyncio.timeout(5):
            with pytest.raises(EngineDied):
                await engine.load_weights(1)

    in_process(policy, core, work)


def test_closing_ends_calls_and_gives_the_signal_back(policy: Policy, core: FakeSglang) -> None:
    before = signal.getsignal(signal.SIGQUIT)

    async def work(engine: SGLangEngine) -> None:
        call = asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=150)))
        await until(lambda: core.running)
        await engine.close()
        with pytest.raises(EngineDied):
            await call
        with pytest.raises(EngineDied):
            await engine.generate(*prompt(policy), GREEDY)

    in_process(policy, core, work)
    assert signal.getsignal(signal.SIGQUIT) == before


@pytest.mark.parametrize("method", ["begin_weight_update", "update_weights_from_tensor", "end_weight_update"])
def test_every_failed_flag_is_an_error(policy: Policy, core: FakeSglang, method: str) -> None:
    async def work(engine: SGLangEngine) -> None:
        core.refusals[method] = 100
        with pytest.raises(WeightUpdateError, match=f"{method}.*told to fail"):
            await engine.load_weights(1)
        with pytest.raises(EngineError, match="load_weights"):
            await engine.generate(*prompt(policy), GREEDY)  # nothing is sampled with doubtful weights

    in_process(policy, core, work)


def test_a_flush_that_is_refused_at_first_is_repeated(policy: Policy, core: FakeSglang) -> None:
    async def work(engine: SGLangEngine) -> None:
        before = core.calls.count("flush_cache")
        core.refusals["flush_cache"] = 3
        await engine.load_weights(1)
        assert core.calls.count("flush_cache") - before == 4

    in_process(policy, core, work)


def test_a_flush_that_is_refused_for_ever_is_an_error(
    policy: Policy, core: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_process, "_FLUSH_S", 0.1)

    async def work(engine: SGLangEngine) -> None:
        core.refusals["flush_cache"] = 10**6
        with pytest.raises(WeightUpdateError, match="version 0"):
            await engine.load_weights(1)

    in_process(policy, core, work)


def test_an_adapter_is_loaded_and_unloaded_with_the_same_checks(policy: Policy, core: FakeSglang) -> None:
    async def work(engine: SGLangEngine) -> None:
        process: Any = engine._backend
        await process.load_adapter("a", {"lora_A": torch.zeros(2)}, {"r": 2})
        with pytest.raises(WeightUpdateError, match="already loaded"):
            await process.load_adapter("a", {"lora_A": torch.zeros(2)}, {"r": 2})
        await process.unload_adapter("a")
        with pytest.raises(WeightUpdateError, match="not loaded"):
            await process.unload_adapter("a")

    in_process(policy, core, work)


def test_turns_use_the_adapter_that_was_loaded_last(
    policy: Policy, core: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: SGLangEngine) -> None:
        process: Any = engine._backend
        generate, used = process._manager.generate_request, []
        monkeypatch.setattr(
            process._manager, "generate_request", lambda order, _: used.append(order.lora_path) or generate(order, _)
        )
        ids, images = prompt(policy)
        await engine.generate(ids, images, GREEDY)
        await process.load_adapter("a", {"lora_A": torch.zeros(2)}, {"r": 2})
        await engine.generate(ids, images, GREEDY)
        await process.unload_adapter("a")
        await engine.generate(ids, images, GREEDY)
        assert used == [None, "a", None]

    in_process(policy, core, work)
