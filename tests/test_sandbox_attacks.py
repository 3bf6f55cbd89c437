"""No attack succeeds in mode strict, for root and for others; most are shown to succeed where nothing is confined."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.sandbox_attacks import ATTACKS, Attack, unprivileged
from tests.sandbox_attacks.campaign import Campaign, campaign
from tests.sandbox_attacks.resources import LEFT

Run = tuple[Campaign, asyncio.Runner]


@pytest.fixture(scope="module", params=["strict"])
def strict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield from _campaign(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=["off"])
def off(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield from _campaign(request.param, tmp_path_factory)


def _campaign(mode: str, folders: pytest.TempPathFactory) -> Iterator[Run]:
    with asyncio.Runner() as runner:
        context = campaign(mode, folders.mktemp(mode))  # type: ignore[arg-type]
        running = runner.run(context.__aenter__())
        yield running, runner
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_fails_and_harmless_code_works(strict: Run, attack: Attack) -> None:
    running, runner = strict
    assert not runner.run(running.succeeds(attack))
    runner.run(running.check())


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.unconfined], ids=lambda attack: attack.name)
def test_the_attack_succeeds_where_nothing_is_confined(off: Run, attack: Attack) -> None:
    running, runner = off
    assert runner.run(running.succeeds(attack))


def test_what_looks_for_an_earlier_call_would_find_it(strict: Run) -> None:
    """The same search for a mark that is in its own code succeeds."""
    running, runner = strict
    (attack,) = [attack for attack in ATTACKS if attack.name == "find-an-earlier-call"]
    code = f"known = {LEFT!r}\n" + attack.source(running.world)
    assert "SUCCEEDED" in runner.run(running.patient.run(code, {}, [])).stdout


def test_every_attack_has_its_own_name() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


def test_no_attack_of_a_user_without_privileges_succeeds() -> None:
    reason = unprivileged.why_not()
    if reason:
        pytest.skip(reason)
    done = unprivileged.run_campaign(timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{len(ATTACKS)} attacks, 0 succeeded: none\n"
