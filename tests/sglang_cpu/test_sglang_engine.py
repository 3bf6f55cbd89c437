"""What the real SGLang did in one life of the engine (``scenario``), held against transformers and the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1200)]

Facts = Callable[[str], Any]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What a step of the scenario saw; a step that raised fails its tests with its traceback."""
    folder = tmp_path_factory.mktemp("sglang")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.sglang_cpu.scenario", str(folder / "facts.json")]
        root = Path(__file__).parents[2]
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=root, timeout=1000).returncode
    assert code == 0, (folder / "log").read_text()[-6000:]
    everything = json.loads((folder / "facts.json").read_text())

    def of(step: str) -> Any:
        found = everything[step]
        if isinstance(found, dict) and "raised" in found:
            pytest.fail(f"{found['raised']}\n{(folder / 'log').read_text()[-3000:]}")
        return found

    return of


def test_greedy_ids_equal_those_of_transformers(facts: Facts) -> None:
    seen = facts("greedy_ids")
    assert seen["found"] == seen["expected"]
    assert seen["found"]["text"] != seen["found"]["image"]


@pytest.mark.parametrize("sampling", ["greedy", "sampled", "tempered", "truncated"])
def test_logprobs_of_episodes_with_images_equal_the_trainers(facts: Facts, sampling: str) -> None:
    assert facts("logprobs")["distances"][sampling] < 1e-4


def test_logprobs_without_the_ban_would_not(facts: Facts) -> None:
    assert facts("logprobs")["without_ban"] > 1e-3


def test_a_later_turn_computes_only_what_was_added(facts: Facts) -> None:
    first, second, third = facts("later_turns")
    for before, turn in ((first, second), (second, third)):
        known = before["cached"] + before["prefilled"] + before["sampled"]
        assert turn["cached"] >= known - 1  # the last sampled token has not been through the model


def test_a_group_computes_its_prompt_once(facts: Facts) -> None:
    seen = facts("group")
    # The last token of a cached prompt is computed again, to sample from it.
    assert sum(seen["prefilled"]) == seen["prompt"] + 8
    assert seen["texts"] > 1


def test_samples_that_are_no_group_compute_their_prompt_again(facts: Facts) -> None:
    seen = facts("group")
    assert sum(seen["alone"]) > 2 * seen["prompt"]


def test_a_stretch_of_work_is_one_span(facts: Facts) -> None:
    ((kind, track, seconds),) = facts("group")["spans"]
    assert (kind, track) == ("engine", "engine")
    assert seconds > 0


def test_the_token_that_holds_a_stop_is_kept_whole(facts: Facts) -> None:
    seen = facts("stops")
    assert seen["stopped"] == seen["free"][:1] and len(seen["free"]) > 1
    assert seen["finish"][0] == "stop"


def test_the_end_of_a_turn_is_kept(facts: Facts) -> None:
    seen = facts("stops")
    assert seen["ended"] == [seen["end"]]
    assert seen["finish"][1] == "stop"


def test_a_policy_that_wants_vision_ids_gets_none(facts: Facts) -> None:
    seen = facts("vision_ids")
    assert not {token for turn in seen["held"] for token in turn} & set(seen["banned"])
    assert {token for turn in seen["free"] for token in turn} & set(seen["banned"])


def test_logprobs_are_exact_when_most_of_the_mass_is_banned(facts: Facts) -> None:
    assert facts("vision_ids")["distance"] < 1e-4


def test_new_weights_show_in_a_picture_that_was_seen_and_in_one_that_was_not(facts: Facts) -> None:
    seen = facts("new_weights")
    assert seen["after"] == seen["expected"]
    assert seen["before"] != seen["after"][0]
    assert seen["distance"] < 1e-4


def test_nothing_of_older_weights_is_in_the_cache(facts: Facts) -> None:
    assert facts("new_weights")["cached"] == 0


def test_a_turn_names_the_version_of_its_weights(facts: Facts) -> None:
    assert facts("new_weights")["versions"] == [4, 5]


def test_another_prompt_than_was_sent_is_an_error(facts: Facts) -> None:
    assert "computed another prompt" in facts("mismatch")


def test_a_refusal_is_told_in_sglangs_words(facts: Facts) -> None:
    assert "top_p must be in (0, 1]" in facts("refused")["request"]
    assert "LoRA is not enabled" in facts("refused")["adapter"]


def test_sleep_is_refused_while_a_turn_runs(facts: Facts) -> None:
    seen = facts("cancelled")
    assert not seen["finished"]
    assert "1 requests are still being generated" in seen["busy"]


def test_a_cancelled_turn_leaves_nothing(facts: Facts) -> None:
    seen = facts("cancelled")
    assert seen["left"] == []
    assert seen["follower"] > 0


def test_a_killed_scheduler_ends_every_call(facts: Facts) -> None:
    seen = facts("death")
    assert len(seen["words"]) == 3 and all("exit code -9" in words for words in [*seen["words"], seen["later"]])
    assert seen["heard_s"] < 5


def test_closing_ends_sglangs_processes_and_no_others(facts: Facts) -> None:
    seen = facts("death")
    assert seen["sleeper"]
    assert seen["orphans"] == []
    assert seen["closed_s"] < 15
    assert "closed" in seen["after"]


def test_sglang_leaves_this_process_as_it_was(facts: Facts) -> None:
    assert {key: pair for key, pair in facts("surroundings").items() if pair[0] != pair[1]} == {}


def test_nothing_is_generated_before_the_first_weights(facts: Facts) -> None:
    assert "load_weights" in facts("early")


def test_an_engine_that_does_not_start_is_an_error(facts: Facts) -> None:
    assert "no_such" in facts("unknown")
