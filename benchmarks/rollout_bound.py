"""The time below which no schedule can roll a problem out on the scripted engine."""

from __future__ import annotations

from dataclasses import dataclass

from .rollout_problem import Latency, RolloutProblem, information
from .scripted_engine import StepCost, prefix_names


@dataclass(frozen=True)
class Bound:
    """No schedule is faster than any of these."""

    engine_s: float
    chain_s: float
    tools_s: float

    @property
    def seconds(self) -> float:
        return max(self.engine_s, self.chain_s, self.tools_s)


def lower_bound(problem: RolloutProblem, cost: StepCost, *, slots: int, latency: Latency, workers: int) -> Bound:
    """The least time of a rollout on ``ScriptedEngine``, whatever the schedule.

    With L_ik the tokens of turn k of trajectory i and L_i their sum, t_ik its tool's latency, C the context tokens that
    have to be computed (each distinct prefix of the prompts once, and every observation) and W the workers:

    - the engine: a step samples at most one token for a trajectory and at most ``slots`` in all, so there are at least
      ``S = max(max_i L_i, sum_i L_i / slots)`` steps; every sampled token costs ``sequence_s`` and every context token
      ``prefill_s`` wherever it goes: ``S * step_s + sum_i L_i * sequence_s + C * prefill_s``;
    - a trajectory's own chain, as if it were alone: its prompt, its steps at batch size 1, its observations, its tools;
    - the tools: ``sum_ik t_ik / W``.
    """
    chat = problem.policy.chat
    prompts = {prompt.uid: chat.prompt(prompt.messages, ())[0] for prompt in problem.prompts}
    observed = len(chat.observation(information(problem.observation), (), turn_is_closed=False)[0])
    lengths = {who: sum(map(len, turns)) for who, turns in problem.episodes.items()}
    waits = {who: sum(latency.seconds(turn.argument) for turn in turns[:-1]) for who, turns in problem.episodes.items()}
    calls = sum(len(turns) - 1 for turns in problem.episodes.values())
    context = len({name for ids in prompts.values() for name in prefix_names(ids)}) + calls * observed
    steps = max(max(lengths.values()), sum(lengths.values()) / slots)

    def chain(uid: str, sample: int) -> float:
        prefilled = len(prompts[uid]) + (len(problem.episodes[uid, sample]) - 1) * observed
        generated = lengths[uid, sample] * (cost.step_s + cost.sequence_s)
        return generated + prefilled * cost.prefill_s + waits[uid, sample]

    return Bound(
        engine_s=steps * cost.step_s + sum(lengths.values()) * cost.sequence_s + context * cost.prefill_s,
        chain_s=max(chain(*who) for who in problem.episodes),
        tools_s=sum(waits.values()) / workers,
    )
