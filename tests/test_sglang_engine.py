"""Turns on SGLang: groups, prompts, ends, cancelled calls. The backend is the one inside this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import EngineBusy, EngineError, Generation, PromptMismatch, Sampling
from arft_fast.rollout.sglang_engine import SGLangEngine
from tests.fake_sglang import FakeSglang, shallow
from tests.sglang_support import GREEDY, change, importable, in_process, prompt, several, truth, until


@pytest.fixture
def policy(policy: Policy) -> Policy:
    return shallow(policy)


@pytest.fixture
def core(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> FakeSglang:
    return importable(policy, monkeypatch)


def uniform(policy: Policy) -> None:
    """Every id that is allowed becomes equally likely."""
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.zero_()
        policy.head.weight.zero_()


@pytest.mark.parametrize("group", ["g", ""])
def test_a_prompt_is_prefilled_once_for_its_group(policy: Policy, core: FakeSglang, group: str) -> None:
    ids, images = prompt(policy)

    async def work(engine: SGLangEngine) -> Sequence[Generation]:
        return await asyncio.gather(
            *(engine.generate(ids, images, Sampling(max_tokens=3), group=group) for _ in range(8))
        )

    generations = in_process(policy, core, work)
    # The last token of a prompt is computed again for each sample: its logits are not kept.
    assert core.prefilled == (len(ids) + 8 if group else 8 * len(ids))  # without a group nobody leads
    assert sum(g.prefilled_tokens for g in generations) == core.prefilled
    assert len({tuple(g.token_ids) for g in generations}) > 1


def test_nobody_waits_for_the_leaders_whole_turn(policy: Policy, core: FakeSglang) -> None:
    ids, images = prompt(policy)

    async def work(engine: SGLangEngine) -> None:
        leader = asyncio.ensure_future(engine.generate(ids, images, Sampling(max_tokens=60), group="g"))
        follower = engine.generate(ids, images, Sampling(max_tokens=1), group="g")
        await follower
        assert not leader.done()
        leader.cancel()
        await asyncio.gather(leader, return_exceptions=True)

    in_process(policy, core, work)


def test_a_failing_leader_hands_over(policy: Policy, core: FakeSglang) -> None:
    ids, images = prompt(policy)

    async def work(engine: SGLangEngine) -> list[Any]:
        core.refusals["generate"] = 1
        return await several([engine.generate(ids, images, Sampling(max_tokens=2), group="g") for _ in range(4)])

    first, *others = in_process(policy, core, work)
    assert isinstance(first, EngineError) and "told to fail" in str(first)
    assert all(isinstance(other, Generation) for other in others)
    assert core.prefilled == len(ids) + 3


def test_a_cancelled_leader_hands_over(policy: Policy, core: FakeSglang) -> None:
    ids, images = prompt(policy)

    async def work(engine: SGLangEngine) -> list[Any]:
        core.token_s = 0.05
        calls = [
            asyncio.ensure_future(engine.generate(ids, images, Sampling(max_tokens=1), group="g")) for _ in range(4)
        ]
        await until(lambda: core.running)
        calls[0].cancel()
        return await several(calls)

    first, *others = in_process(policy, core, work)
    assert isinstance(first, asyncio.CancelledError)
    assert all(isinstance(other, Generation) for other in others)
    assert core.samples == 3 and not core.running


def test_greedy_ids_are_those_of_transformers_before_and_after_an_update(policy: Policy, core: FakeSglang) -> None:
    ids, images = prompt(policy)
    one, other = images[0], prompt(policy, 7)[1][0]
    both = prompt(policy, 7)[0] + ids
    truths = [truth(policy, ids, images)[0], truth(policy, both, [other, one])[0]]

    async def work(engine: SGLangEngine) -> list[list[int]]:
        old = await engine.generate(ids, images, GREEDY), await engine.generate(both, [other, one], GREEDY)
        await engine.sleep()
        change(policy)
        await engine.load_weights(1)
        new = await engine.generate(ids, images, GREEDY), await engine.generate(both, [other, one], GREEDY)
        assert [g.weight_version for g in (*old, *new)] == [0, 0, 1, 1]
        assert new[0].cached_tokens == 0
        return [g.token_ids for g in (*old, *new)]

    generated = in_process(policy, core, work)
    assert generated[:2] == truths
    assert generated[2:] == [truth(policy, ids, images)[0], truth(policy, both, [other, one])[0]]
    assert generated[:2] != generated[2:]
    assert {order["cache_salt"] for order in core.orders} == {"v0", "v1"}


def test_a_later_turn_computes_only_what_was_added(policy: Policy, core: FakeSglang) -> None:
    ids, images = prompt(policy)
    more, pictures = policy.chat.observation("seen", [Image.new("RGB", (56, 84), (1, 2, 3))], turn_is_closed=False)

    async def work(engine: SGLangEngine) -> Generation:
        first = await engine.generate(ids, images, Sampling(max_tokens=3), group="g")
        later = [*ids, *first.token_ids, *more]
        second = await engine.generate(later, [*images, *pictures], Sampling(max_tokens=3), group="g")
        assert second.prefilled_tokens == len(more) + 1  # and the token that ended the first turn
        return second

    assert in_process(policy, core, work).cached_tokens == len(ids) + 2


def test_another_prompt_than_was_sent_is_an_error(policy: Policy, core: FakeSglang) -> None:
    ids, images = prompt(policy)
    letters = [policy.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "answer"]

    async def work(engine: SGLangEngine) -> None:
        await engine.generate(ids + letters, images, Sampling(max_tokens=1))
        core.retokenises = True
        with pytest.raises(PromptMismatch, match=f"first difference at {len(ids)}"):
            await engine.generate(ids + letters, images, Sampling(max_tokens=1))

    in_process(policy, core, work)


def test_placeholders_that_are_not_the_images_are_refused_before_they_are_sent(
    policy: Policy, core: FakeSglang
) -> None:
    ids, images = prompt(policy)

    async def work(engine: SGLangEngine) -> None:
        with pytest.raises(ValueError, match="placeholders"):
            await engine.generate(ids, images * 2, GREEDY)
        with pytest.raises(ValueError, match=r"rollout\.max_tokens"):
            await engine.generate(ids * 8, images * 8, GREEDY)

    in_process(policy, core, work)
    assert not core.orders


def test_a_vision_token_is_never_sampled(policy: Policy, core: FakeSglang) -> None:
    uniform(policy)
    ids, images = prompt(policy, None)

    async def work(engine: SGLangEngine) -> Sequence[Generation]:
        return await asyncio.gather(*(engine.generate(ids, images, Sampling(max_tokens=20)) for _ in range(8)))

    generations = in_process(policy, core, work)
    forbidden = set(torch.isinf(policy.logit_bias).nonzero().flatten().tolist())
    assert not forbidden & {token for g in generations for token in g.token_ids}
    allowed = len(policy.logit_bias) - len(forbidden)
    np.testing.assert_allclose([lp for g in generations for lp in g.logprobs], -np.log(allowed), atol=1e-5)


@pytest.mark.parametrize("text", ["</answer>", "<|im_end|>"])
def test_what_ends_a_turn_stays_in_it(policy: Policy, core: FakeSglang, text: str) -> None:
    allowed = policy.tokenizer.encode(text, add_special_tokens=False)
    uniform(policy)
    policy.logit_bias.fill_(float("-inf"))
    policy.logit_bias[allowed] = 0.0

    async def work(engine: SGLangEngine) -> Generation:
        return await engine.generate(*prompt(policy, None), Sampling(max_tokens=64, stop=("</answer>",)))

    generation = in_process(policy, core, work)
    assert generation.finish == "stop"
    assert policy.tokenizer.decode(generation.token_ids).endswith(text)
    assert policy.tokenizer.decode(generation.token_ids).count(text) == 1


def test_a_cancelled_call_is_aborted_and_leaves_nothing(policy: Policy, core: FakeSglang) -> None:
    async def work(engine: SGLangEngine) -> None:
        call = asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=150)))
        await until(lambda: core.running)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await engine.sleep()  # SGLang's scheduler dies of this while anything runs
        assert not core.running and core.released
        await engine.load_weights(1)
        await engine.generate(*prompt(policy), Sampling(max_tokens=1))

    in_process(policy, core, work)


def test_sleep_and_new_weights_are_refused_while_a_request_runs(policy: Policy, core: FakeSglang) -> None:
    async def work(engine: SGLangEngine) -> None:
        call = asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=150)))
        await until(lambda: core.running)
        (rid,) = core.running
        for refused in (engine.sleep, lambda: engine.load_weights(1)):
            with pytest.raises(EngineBusy, match=rid):
                await refused()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    in_process(policy, core, work)


def test_a_sleeping_engine_generates_nothing(policy: Policy, core: FakeSglang) -> None:
    async def work(engine: SGLangEngine) -> None:
        await engine.sleep()
        with pytest.raises(EngineError, match="load_weights"):
            await engine.generate(*prompt(policy), GREEDY)

    in_process(policy, core, work)


def test_a_request_that_sglang_ends_itself_is_an_error(policy: Policy, core: FakeSglang) -> None:
    async def work(engine: SGLangEngine) -> None:
        call = asyncio.ensure_future(engine.generate(*prompt(policy), Sampling(max_tokens=150)))
        await until(lambda: core.running)
        core.abort(abort_all=True)
        with pytest.raises(EngineError, match="Abort in waiting queue"):
            await call

    in_process(policy, core, work)


def test_the_timeline_gets_one_span_for_each_stretch_of_work(policy: Policy, core: FakeSglang) -> None:
    timeline = Timeline()

    async def work(engine: SGLangEngine) -> None:
        for _ in range(2):
            await asyncio.gather(*(engine.generate(*prompt(policy), Sampling(max_tokens=2)) for _ in range(3)))

    in_process(policy, core, work, timeline)
    assert [(span.kind, span.track) for span in timeline.take()] == [("engine", "engine")] * 2
