from __future__ import annotations

import json
import math
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arft_fast.config import Config, ConfigError, RunConfig
from arft_fast.flags import parse_config
from arft_fast.observe import run_folder
from arft_fast.observe.run_folder import RunFolder, run_path, versions
from arft_fast.observe.timeline import Span


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_folder_is_named_after_recipe_and_time() -> None:
    now = datetime(2026, 3, 4, 5, 6, 7)
    config = Config(recipes=("mini", "my/own.toml"))
    assert run_path(config, now) == Path("runs/mini+own-20260304-050607")
    assert run_path(Config(run=RunConfig(dir=Path("here"))), now) == Path("here")


def test_settings_and_versions_are_written_down(tmp_path: Path) -> None:
    config = parse_config(["--train.seed", "11"])
    folder = RunFolder(tmp_path / "a" / "run", config)
    assert json.loads((folder.path / "config.json").read_text())["train"]["seed"] == 11
    assert parse_config(["--config", str(folder.path / "config.toml")]).train == config.train
    written = json.loads((folder.path / "versions.json").read_text())
    assert written == versions()
    assert {"torch", "transformers", "numpy", "python", "platform", "git_commit", "threads"} <= set(written)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, Config()).log_metrics(1, {"reward": 1.0})
    with pytest.raises(ConfigError, match=r"holds a run already \(.*--run.overwrite true\)"):
        RunFolder(tmp_path, Config())
    assert len(_lines(tmp_path / "metrics.jsonl")) == 1


def test_overwrite_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    old = RunFolder(tmp_path, Config())
    old.log_metrics(1, {"reward": 1.0})
    old.log_trajectory({}, [Image.new("RGB", (4, 4))])
    old.write_timeline(3, [Span("train", "trainer", 0, 1)], "step 3", {})
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path, Config(run=RunConfig(overwrite=True)))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert list((tmp_path / "images").iterdir()) == list((tmp_path / "timeline").iterdir()) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^[^\n]*file/run: Not a directory \(give a --run.dir that can be written\)$"
    ):
        RunFolder(tmp_path / "file" / "run", Config())


def test_other_ranks_write_their_trajectories_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Config(), rank=1)
    folder.log_metrics(1, {"reward": 1.0})
    folder.write_summary({"reward": 1.0})
    folder.write_timeline(0, [], "step 0", {})
    assert list(tmp_path.iterdir()) == []
    folder.log_trajectory({"text": "x"}, [Image.new("RGB", (4, 4))])
    assert {path.name for path in tmp_path.iterdir()} == {"trajectories-rank1.jsonl", "images"}


def test_metrics_are_one_line_a_step_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Config())
    folder.log_metrics(1, {"reward": 1.5, "kl": math.nan, "grad_norm": math.inf})
    folder.log_metrics(2, {"reward": float(np.float32(0.5))})
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": 1.5, "kl": None, "grad_norm": None},
        {"step": 2, "reward": 0.5},
    ]


def test_a_timeline_is_a_trace_and_a_picture_of_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Config())
    for step in (0, 120):
        folder.write_timeline(step, [Span("train", "trainer", 0, 1)], f"step {step}", {"timeline/train_s": 1.0})
    names = ["step-00000.html", "step-00000.json", "step-00120.html", "step-00120.json"]
    assert sorted(path.name for path in (tmp_path / "timeline").iterdir()) == names
    assert "train_s" in (tmp_path / "timeline" / "step-00120.html").read_text()
    assert json.loads((tmp_path / "timeline" / "step-00120.json").read_text())["traceEvents"]


def test_trajectories_keep_arrays_and_any_text_on_one_line(tmp_path: Path) -> None:
    text = 'a\nb\u2028c \ud800 [red] </script> "'
    folder = RunFolder(tmp_path, Config())
    folder.log_trajectory({"text": text, "ids": np.arange(3), "reward": np.float32(0.5), "bad": [math.nan]})
    record = {"text": text, "ids": [0, 1, 2], "reward": 0.5, "bad": [None], "images": []}
    assert _lines(tmp_path / "trajectories.jsonl") == [record]


def test_the_same_picture_is_stored_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Config())
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    folder.log_trajectory({}, [red, blue])
    folder.log_trajectory({}, [red.copy()])
    first, second = (record["images"] for record in _lines(tmp_path / "trajectories.jsonl"))
    assert isinstance(first, list) and isinstance(second, list)
    assert second == first[:1] and first[0] != first[1]
    assert sorted(f"images/{path.name}" for path in (tmp_path / "images").iterdir()) == sorted(first)
    assert Image.open(tmp_path / first[0]).getpixel((3, 3)) == (255, 0, 0)


def test_palettes_tell_pictures_apart(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Config())
    pictures = [
        Image.new("RGB", (8, 8), color).convert("P", palette=Image.Palette.ADAPTIVE) for color in ("red", "blue")
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    folder.log_trajectory({}, pictures)
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_photographs_are_jpeg_and_small_drawings_are_exact(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Config())
    folder.log_trajectory({}, [Image.new("RGB", (256, 256)), Image.new("RGB", (257, 256))])
    formats = {path.suffix: Image.open(path).format for path in (tmp_path / "images").iterdir()}
    assert formats == {".png": "PNG", ".jpg": "JPEG"}


def test_the_summary_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, Config())
    folder.write_summary({"reward": 1.0})
    with pytest.raises(TypeError):
        folder.write_summary({"reward": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"reward": 1.0}
    folder.write_summary({"path": tmp_path, "kl": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"path": str(tmp_path), "kl": None}
    assert not list(tmp_path.glob("*.part"))


def _module_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    (folder / "run_folder.py").write_text("")
    monkeypatch.setattr(run_folder, "__file__", str(folder / "run_folder.py"))


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_checkout_is_named_and_changes_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module_in(tmp_path / "package", monkeypatch)
    _git(tmp_path, "init")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "x")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert versions()["git_commit"] == commit
    (tmp_path / "package" / "run_folder.py").write_text("changed")
    assert versions()["git_commit"] == f"{commit}-dirty"


def test_a_repository_around_an_installed_package_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _git(tmp_path, "init")
    _git(tmp_path, "commit", "--allow-empty", "-m", "x")
    _module_in(tmp_path / "venv" / "package", monkeypatch)
    assert versions()["git_commit"] is None
