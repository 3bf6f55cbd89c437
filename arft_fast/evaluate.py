"""Evaluate a policy on held-out items: ``python -m arft_fast.evaluate --config mini --policy.model RUN/checkpoint``."""

from __future__ import annotations

import os

# As in training.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import asyncio
import sys
from collections.abc import Sequence

from arft_fast.assemble import check_parts, open_agents, open_engine, open_policy, open_ranks, open_tasks
from arft_fast.assemble_tools import running_tools
from arft_fast.config import Config, ConfigError
from arft_fast.flags import load_config, one_line_errors
from arft_fast.observe.console import Console
from arft_fast.observe.report import evaluation_table
from arft_fast.observe.timeline import Timeline
from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.rewards.compose import DEFAULT_WEIGHTS
from arft_fast.rollout.agent import SamplingSettings
from arft_fast.rollout.collect import collect
from arft_fast.rollout.engine import Engine
from arft_fast.rollout.evaluation import Evaluation, summarise
from arft_fast.rollout.stop import StopSignal
from arft_fast.score import FLAG, score_file, take_flag
from arft_fast.tasks.mixture import Mixture

GREEDY = SamplingSettings(temperature=0.0)


async def evaluate(
    config: Config,
    policy: Policy,
    engine: Engine,
    mixture: Mixture,
    ranks: Ranks,
    stop: StopSignal,
    timeline: Timeline,
) -> dict[str, Evaluation]:
    """Held-out episodes, ``sampled`` as in training (``eval.samples`` an item) and ``greedy`` (one an item).

    Nothing (an empty dict) when ``eval.prompts_per_task`` is 0.

    Raises:
        Stopped: a stop was requested.
    """
    if not config.eval.prompts_per_task:
        return {}
    prompts = ranks.share(mixture.eval_prompts(config.eval.prompts_per_task))
    results = {}
    for way, sampling, samples in (("sampled", None, config.eval.samples), ("greedy", GREEDY, 1)):
        agents = open_agents(config, policy, engine, mixture, timeline, sampling)
        episodes = collect(
            prompts,
            agents,
            mixture.by_name,
            group_size=samples,
            seed=(config.train.seed,),
            groups_in_flight=config.rollout.groups_in_flight,
            timeline=timeline,
        )
        groups = await stop.guard(episodes) or []
        stop.check(ranks)
        results[way] = summarise(ranks.gather([group.without_images() for group in groups]), DEFAULT_WEIGHTS)
    return results


async def _run(config: Config, ranks: Ranks, mixture: Mixture, stop: StopSignal) -> dict[str, Evaluation]:
    async with running_tools(mixture, ranks):
        policy = open_policy(config, mixture, ranks)
        timeline = Timeline()
        async with open_engine(config, policy, ranks, timeline) as engine:
            await engine.load_weights(0)
            return await evaluate(config, policy, engine, mixture, ranks, stop, timeline)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a setting that cannot be used ends in one line and exit code 2, before any work."""
    with one_line_errors():
        answers, words = take_flag(sys.argv[1:] if argv is None else argv)
    config = load_config(
        words,
        "python -m arft_fast.evaluate",
        "Play held-out episodes with a policy and print F1, exact match, reward and tool use for each task.\n"
        f"Or, with {FLAG} FILE and --task.name: score a JSON file of answers as the paper does, without a model.",
    )
    if answers is not None:
        with one_line_errors():
            table, notes = score_file(answers, config.task.name, seed=config.train.seed)
        Console().print(table)
        Console().print(notes)
        return
    with one_line_errors(), open_ranks(config) as ranks, StopSignal() as stop:
        if config.policy.model == "tiny":
            raise ConfigError("--policy.model is 'tiny', which is untrained here (give a checkpoint folder of a run)")
        check_parts(config)
        with open_tasks(config, ranks) as mixture:
            results = asyncio.run(_run(config, ranks, mixture, stop))
    console = Console(enabled=ranks.main)
    for way, evaluation in results.items():
        console.print(evaluation_table(way, evaluation.tasks))


if __name__ == "__main__":
    main()
