from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.batch import collate
from arft_fast.policy.forward import score
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import EngineBusy, Generation, Sampling
from arft_fast.rollout.ledger import Ledger
from arft_fast.rollout.sampling import sample
from arft_fast.rollout.transformers_engine import TransformersEngine
from arft_fast.trajectory import Ending, Prompt, Trajectory

T = TypeVar("T")
MAX_TOKENS = 160


def _with_engine(policy: Policy, work: Callable[[TransformersEngine], Awaitable[T]], slots: int = 8) -> T:
    async def run() -> T:
        engine = TransformersEngine(policy, slots=slots, max_tokens=MAX_TOKENS)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def _prompt(policy: Policy, text: str, shade: int | None = None) -> tuple[list[int], list[EncodedImage]]:
    part = [] if shade is None else [{"type": "image"}]
    messages = [{"role": "user", "content": [*part, {"type": "text", "text": text}]}]
    return policy.chat.prompt(messages, [] if shade is None else [Image.new("RGB", (84, 84), (shade, 9, 9))])


async def _episode(policy: Policy, engine: TransformersEngine, shade: int, seed: int) -> Trajectory:
    """Three turns with a new image after the first and text after the second."""
    ledger = Ledger(image_token_id=policy.chat.image_token_id, max_tokens=MAX_TOKENS)
    ledger.add_context(*_prompt(policy, f"What is on picture {shade}?", shade))
    generations = []
    for turn in range(3):
        sampling = Sampling(max_tokens=6 + turn, seed=seed * 10 + turn)
        generation = await engine.generate(ledger.token_ids, ledger.images, sampling)
        generations.append(generation)
        ledger.add_sampled(generation.token_ids, generation.logprobs)
        closed = generation.token_ids[-1] == policy.chat.end_of_turn_id
        pictures = [Image.new("RGB", (56, 84), (0, shade, seed))] if turn == 0 else []
        ledger.add_context(*policy.chat.observation(f"seen {turn}", pictures, turn_is_closed=closed))
    token_ids, mask, logprobs = ledger.arrays()
    return Trajectory(
        prompt=Prompt(uid="p", task="t", messages=[]), sample=0, token_ids=token_ids, policy_mask=mask,
        logprobs=logprobs, images=ledger.images, turns=[], ending=Ending.MAX_TURNS,
        cached_tokens=sum(g.cached_tokens for g in generations),
        prefilled_tokens=sum(g.prefilled_tokens for g in generations),
    )  # fmt: skip


def test_the_engines_logprobs_equal_a_fresh_forward(policy: Policy) -> None:
    async def work(engine: TransformersEngine) -> Sequence[Trajectory]:
        return await asyncio.gather(
            *(_episode(policy, engine, shade, seed) for shade in (10, 200) for seed in range(3))
        )

    trajectories = _with_engine(policy, work)
    fresh = score(policy, collate(policy, trajectories))
    engine = torch.cat([torch.from_numpy(t.logprobs[t.policy_mask]) for t in trajectories])
    assert len(engine) > 60
    torch.testing.assert_close(engine, fresh, atol=1e-5, rtol=0)
    # Negative control: with another image in its place the log-probs are others.
    swapped = [*trajectories[3].images[:1], *trajectories[0].images[1:]]
    trajectories[0].images = swapped
    assert (
        score(policy, collate(policy, trajectories[:1])) - engine[: trajectories[0].completion_length]
    ).abs().max() > 1e-4


def test_a_prompt_is_prefilled_once_for_its_group(policy: Policy) -> None:
    ids, images = _prompt(policy, "Which shape is drawn in the picture, and in what colour?", 77)

    async def work(engine: TransformersEngine) -> Sequence[Generation]:
        calls = (engine.generate(ids, images, Sampling(max_tokens=5, seed=k)) for k in range(8))
        return await asyncio.gather(*calls)

    generations = _with_engine(policy, work)
    assert sum(g.prefilled_tokens for g in generations) == len(ids)
    assert sum(g.cached_tokens for g in generations) == 7 * len(ids)
    assert len({tuple(g.token_ids) for g in generations}) > 1


def test_a_later_turn_computes_only_what_was_added(policy: Policy) -> None:
    async def work(engine: TransformersEngine) -> Trajectory:
        return await _episode(policy, engine, 50, 1)

    trajectory = _with_engine(policy, work)
    # Every token but the last observation enters once; a sampled token that ends a turn enters with the next prefill.
    assert trajectory.prefilled_tokens < len(trajectory.token_ids)


def test_new_weights_leave_nothing_cached(policy: Policy) -> None:
    ids, images = _prompt(policy, "hello", 3)

    async def work(engine: TransformersEngine) -> list[Generation]:
        first = await engine.generate(ids, images, Sampling(max_tokens=4))
        await engine.load_weights(1)
        return [first, await engine.generate(ids, images, Sampling(max_tokens=4))]

    first, second = _with_engine(policy, work)
    assert (first.weight_version, second.weight_version) == (0, 1)
    assert second.cached_tokens == 0
    assert first.token_ids == second.token_ids


def test_what_a_request_samples_does_not_depend_on_its_company(policy: Policy) -> None:
    ids, images = _prompt(policy, "Which digit is shown?", 120)
    sampling = Sampling(max_tokens=12, seed=5)

    async def alone(engine: TransformersEngine) -> Generation:
        return await engine.generate(ids, images, sampling)

    async def in_company(engine: TransformersEngine) -> Generation:
        others = [_prompt(policy, "other " * k, 10 * k) for k in range(1, 6)]
        calls = [engine.generate(*other, Sampling(max_tokens=3 + k, seed=k)) for k, other in enumerate(others)]
        return (await asyncio.gather(*calls[:3], engine.generate(ids, images, sampling), *calls[3:]))[3]

    one, other = _with_engine(policy, alone), _with_engine(policy, in_company)
    assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)


def test_more_requests_than_slots_are_all_served(policy: Policy) -> None:
    async def work(engine: TransformersEngine) -> Sequence[Generation]:
        prompts = [_prompt(policy, f"question {k}", k) for k in range(7)]
        return await asyncio.gather(*(engine.generate(*p, Sampling(max_tokens=4, seed=1)) for p in prompts))

    few, many = _with_engine(policy, work, slots=2), _with_engine(policy, work, slots=8)
    assert [len(g.token_ids) for g in few] == [len(g.token_ids) for g in many]


def test_a_vision_token_is_never_sampled(policy: Policy) -> None:
    with torch.no_grad():  # make the placeholder by far the most likely id
        direction = policy.head.weight[policy.chat.image_token_id]
        policy.model.model.language_model.norm.weight.zero_()
        policy.head.weight[:] = 0.0
        direction.fill_(0.0)
    ids, images = _prompt(policy, "hi")

    async def work(engine: TransformersEngine) -> Sequence[Generation]:
        return await asyncio.gather(*(engine.generate(ids, images, Sampling(max_tokens=100, seed=k)) for k in range(8)))

    forbidden = set(torch.isinf(policy.logit_bias).nonzero().flatten().tolist())
    assert len(forbidden) == 5
    drawn = [token for g in _with_engine(policy, work) for token in g.token_ids]
    assert not forbidden & set(drawn)  # uniform over ~1,100 ids otherwise: 5 of them would show up among ~800 draws
    allowed = len(policy.logit_bias) - len(forbidden)
    logprobs = [lp for g in _with_engine(policy, work) for lp in g.logprobs]
    np.testing.assert_allclose(logprobs, -np.log(allowed), atol=1e-5)


def test_generation_stops_behind_a_closing_tag(policy: Policy) -> None:
    stop = policy.tokenizer.encode(" </answer>", add_special_tokens=False)
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.zero_()
        policy.head.weight.zero_()
    policy.logit_bias.fill_(float("-inf"))
    policy.logit_bias[stop] = 0.0

    async def work(engine: TransformersEngine) -> Generation:
        return await engine.generate(*_prompt(policy, "hi"), Sampling(max_tokens=64, stop=("</answer>",)))

    generation = _with_engine(policy, work)
    text = policy.tokenizer.decode(generation.token_ids)
    assert generation.finish == "stop" and text.endswith("</answer>") and text.count("</answer>") == 1


def test_a_failing_forward_pass_reaches_the_caller(policy: Policy) -> None:
    ids, images = _prompt(policy, "hi", 4)

    async def work(engine: TransformersEngine) -> None:
        policy.model.model.language_model.forward = None
        with pytest.raises(TypeError):
            await asyncio.wait_for(engine.generate(ids, images, Sampling(max_tokens=4)), 5)

    _with_engine(policy, work)


def test_a_sequence_that_cannot_fit_is_refused_with_the_remedy(policy: Policy) -> None:
    async def work(engine: TransformersEngine) -> None:
        with pytest.raises(ValueError, match=r"rollout\.max_tokens"):
            await engine.generate([1] * MAX_TOKENS, [], Sampling(max_tokens=1))

    _with_engine(policy, work)


@pytest.mark.parametrize("max_tokens", [112, 120, 127, 128, 129])
def test_a_sequence_may_fill_the_cache_to_the_last_token(policy: Policy, max_tokens: int) -> None:
    async def run() -> Generation:
        engine = TransformersEngine(policy, slots=1, max_tokens=max_tokens)
        try:
            await engine.generate([5] * (max_tokens - 6), [], Sampling(max_tokens=1))
            return await engine.generate([5] * (max_tokens - 3), [], Sampling(max_tokens=3))  # goes on in its slot
        finally:
            await engine.close()

    assert len(asyncio.run(run()).token_ids) <= 3


def test_sampling_follows_the_distribution_and_its_truncations() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]]).repeat(3000, 1)
    uniforms = np.random.default_rng(0).random(3000).tolist()
    ids, logprobs = sample(logits, [Sampling(max_tokens=1)] * 3000, uniforms)
    expected = torch.softmax(logits[0], -1)
    torch.testing.assert_close(torch.bincount(ids, minlength=4) / 3000, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[ids])
    top2, full = sample(logits, [Sampling(max_tokens=1, top_k=2)] * 3000, uniforms)
    assert set(top2.tolist()) == {1, 2}
    torch.testing.assert_close(full, expected.log()[top2])
    nucleus, _ = sample(logits, [Sampling(max_tokens=1, top_p=0.5)] * 3000, uniforms)
    assert set(nucleus.tolist()) == {2}
    greedy, at_one = sample(logits, [Sampling(max_tokens=1, temperature=0.0)] * 3000, uniforms)
    assert set(greedy.tolist()) == {2}
    torch.testing.assert_close(at_one, expected.log()[greedy])


def test_a_cancelled_request_gives_up_its_slot(policy: Policy) -> None:
    ids, images = _prompt(policy, "hi", 4)

    async def work(engine: TransformersEngine) -> Generation:
        endless = asyncio.ensure_future(engine.generate(ids, images, Sampling(max_tokens=100)))
        await asyncio.sleep(0.02)
        endless.cancel()
        generation = await asyncio.wait_for(engine.generate(ids, images, Sampling(max_tokens=4)), 10)
        await asyncio.sleep(0.02)
        await engine.load_weights(1)  # refuses while anything is generated
        return generation

    assert len(_with_engine(policy, work, slots=1).token_ids) == 4


def test_a_thread_of_its_own_changes_nothing_but_the_loop_stays_free(policy: Policy) -> None:
    ids, images = _prompt(policy, "What is drawn?", 31)

    async def run(threaded: bool) -> tuple[list[list[int]], int]:
        engine = TransformersEngine(policy, slots=4, max_tokens=MAX_TOKENS, threaded=threaded)
        passes = 0

        async def count() -> None:
            nonlocal passes
            while True:
                passes += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        try:
            calls = [engine.generate(ids, images, Sampling(max_tokens=12, seed=k)) for k in range(6)]
            generations = await asyncio.gather(*calls)
            await engine.load_weights(1)
            return [g.token_ids for g in generations], passes
        finally:
            counting.cancel()
            await engine.close()

    (inside, few), (beside, many) = asyncio.run(run(False)), asyncio.run(run(True))
    assert inside == beside
    assert many > 10 * few


def test_closing_in_the_middle_of_a_threads_step_is_clean(policy: Policy) -> None:
    async def run() -> None:
        engine = TransformersEngine(policy, slots=2, max_tokens=MAX_TOKENS, threaded=True)
        endless = asyncio.ensure_future(engine.generate([5] * 20, [], Sampling(max_tokens=100)))
        await asyncio.sleep(0.03)
        await asyncio.wait_for(engine.close(), 10)
        with pytest.raises(asyncio.CancelledError):
            await endless

    asyncio.run(run())


def test_the_timeline_holds_the_stretches_in_which_the_engine_computes(policy: Policy) -> None:
    timeline = Timeline()

    async def run() -> float:
        engine = TransformersEngine(policy, slots=1, max_tokens=MAX_TOKENS, timeline=timeline)
        await engine.generate([5] * 20, [], Sampling(max_tokens=5))
        await asyncio.sleep(0.1)
        first, second = (engine.generate([k] * 20, [], Sampling(max_tokens=20)) for k in (7, 8))
        later = (await asyncio.gather(first, second))[1]
        await engine.close()
        return later.queued_s

    queued = asyncio.run(run())
    spans = timeline.take()
    assert {(span.kind, span.track) for span in spans} == {("engine", "engine")}
    assert max(b.start - a.end for a, b in itertools.pairwise(spans)) >= 0.1
    assert 0 < queued < sum(span.seconds for span in spans)  # one slot: the second request waited for the first


def test_new_weights_are_refused_while_something_is_generated(policy: Policy) -> None:
    async def work(engine: TransformersEngine) -> None:
        running = asyncio.ensure_future(engine.generate([5] * 20, [], Sampling(max_tokens=20)))
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="1 request"):
            await engine.load_weights(1)
        await running

    _with_engine(policy, work)


def test_two_samples_behind_a_leader_start_right_behind_its_prefill(policy: Policy) -> None:
    async def work(engine: TransformersEngine) -> Sequence[Generation]:
        calls = (engine.generate([5] * 20, [], Sampling(max_tokens=9, seed=k)) for k in range(3))
        return await asyncio.gather(*calls)

    # A step later the leader has decoded, and the prompt's last token would have to be computed again.
    assert [g.prefilled_tokens for g in _with_engine(policy, work)] == [20, 0, 0]


def test_a_lone_request_among_decoding_ones_is_let_in_within_three_steps(policy: Policy) -> None:
    async def work(engine: TransformersEngine) -> tuple[Generation, Generation]:
        running = asyncio.ensure_future(engine.generate([5] * 20, [], Sampling(max_tokens=60)))
        await asyncio.sleep(0.02)
        late = await engine.generate([9] * 20, [], Sampling(max_tokens=2))
        assert not running.done()
        return await running, late

    _, late = _with_engine(policy, work)
    assert len(late.token_ids) <= 2
