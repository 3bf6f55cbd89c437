from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console as RichConsole

from arft_fast.observe.console import Console
from arft_fast.observe.report import _running_mean, reward_png, summary_table


def _metrics(path: Path, rows: list[dict[str, float | None]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(steps: int) -> list[dict[str, float | None]]:
    return [
        {
            "step": step,
            "reward": step / steps,
            "rewards/accuracy/mean": step / steps,
            "rewards/$x_1$/mean": 0.5,
            "entropy": 1.0 - step / steps,
            "kl": None,
        }
        for step in range(steps)
    ]


def _picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int64)


def _text(item: object, width: int = 100) -> str:
    console = RichConsole(file=io.StringIO(), width=width)
    console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_picture_shows_the_rewards(tmp_path: Path) -> None:
    reward_png(_metrics(tmp_path / "metrics.jsonl", [{"step": 0, "eval/x": 1.0}, *_run(30)]), tmp_path / "reward.png")
    picture = _picture(tmp_path / "reward.png")
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    assert ((blue - red) > 100).sum() > 1000, "the reward's line is blue"
    assert ((green - red) > 80).sum() > 500, "the components' lines are green"


def test_a_different_run_gives_a_different_picture(tmp_path: Path) -> None:
    rows = _run(30)
    reward_png(_metrics(tmp_path / "a.jsonl", rows), tmp_path / "a.png")
    reward_png(_metrics(tmp_path / "b.jsonl", [{**row, "reward": 0.1} for row in rows]), tmp_path / "b.png")
    assert (_picture(tmp_path / "a.png") != _picture(tmp_path / "b.png")).any()


def test_a_run_of_one_step_with_the_reward_alone_is_drawn(tmp_path: Path) -> None:
    reward_png(_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "reward": 1.0}]), tmp_path / "reward.png")
    assert len(np.unique(_picture(tmp_path / "reward.png"))) > 10


def test_a_run_without_rewards_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no step with a reward \(.*\)"):
        reward_png(_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "reward": None}]), tmp_path / "reward.png")


def test_the_smoothed_line_looks_back_only_and_skips_gaps() -> None:
    values = np.array([1.0, np.nan, 3.0, *[5.0] * 10])
    smooth = _running_mean(values)
    assert smooth[:3].tolist() == [1.0, 1.0, 2.0]
    assert smooth[-1] == 5.0
    assert np.isnan(_running_mean(np.array([np.nan, 1.0]))).tolist() == [True, False]


def test_the_table_shows_before_after_and_change_of_each_task() -> None:
    before = {"mini_coding": {"reward": 1.0, "f1": 0.5, "em": 0.25, "tool_use": 1.0}}
    after = {"mini_coding": {"reward": 1.5, "f1": 0.5, "em": 0.125, "tool_use": 2.0}, "other": {"em": 0.5}}
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in _text(summary_table(before, after)).splitlines()
    ]
    cells = [row for row in rows if row]
    assert ["mini_coding", "reward", "1.000", "1.500", "+0.500"] in cells
    assert ["", "F1", "0.500", "0.500", "+0.000"] in cells
    assert ["", "EM", "0.250", "0.125", "-0.125"] in cells
    assert ["", "tool use", "1.000", "2.000", "+1.000"] in cells
    assert ["other", "EM", "-", "0.500", "-"] in cells
    assert len(cells) == 5


def test_markup_in_a_name_does_not_style_the_table() -> None:
    assert "[red]x[/red]" in _text(summary_table({}, {"[red]x[/red]": {"em": 0.5}}))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_model_text_cannot_style_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = _Terminal()
    Console(file=terminal).print("[red]a[/red] :smile: \x1b[31mb\x07 [/nonsense]")
    assert (
        terminal.getvalue().rstrip("\n")
        == "[red]a[/red] :smile: \N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER} [/nonsense]"
    )


def test_a_log_gets_one_whole_line_a_step() -> None:
    log = io.StringIO()
    with Console(file=log).progress("step", 12) as steps:
        for _ in range(12):
            steps.advance(reward=1.43, note="n" * 100)
    lines = log.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("step  1/12  reward 1.43  note nnn")
    assert "s/step" in lines[0]
    assert lines[-1].endswith("ETA 0:00")


def test_a_long_loop_can_log_every_so_many_and_the_last() -> None:
    log = io.StringIO()
    with Console(file=log).progress("trace", 25, every=10) as steps:
        for _ in range(25):
            steps.advance()
    assert [line.split("  ")[0] for line in log.getvalue().splitlines()] == [
        "trace 10/25",
        "trace 20/25",
        "trace 25/25",
    ]


def test_a_terminal_gets_a_bar_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    terminal = _Terminal()
    with Console(file=terminal).progress("[red]", 2) as steps:
        steps.advance(reward=0.25)
        steps.advance(reward=0.75)
    shown = terminal.getvalue()
    assert "[red]" in shown and "2/2" in shown and "reward 0.75" in shown and "ETA" in shown


def test_other_ranks_are_silent() -> None:
    log = io.StringIO()
    console = Console(enabled=False, file=log)
    console.banner(["a"])
    console.print("b", summary_table({}, {"t": {"em": 1.0}}))
    with console.progress("step", 1) as steps:
        steps.advance(reward=1.0)
    assert log.getvalue() == ""


def test_the_banner_is_plain_in_a_log() -> None:
    log = io.StringIO()
    Console(file=log).banner(["[bold]model tiny", "w" * 200])
    assert log.getvalue() == "[bold]model tiny\n" + "w" * 200 + "\n"
