"""The folder of a run: settings, versions, one JSON line a step, one a trajectory. JSONL is the truth.

::

    config.json, config.toml   every setting, resolved; config.toml is a recipe that repeats the run
    versions.json              what the run was made with
    metrics.jsonl              {"step": 3, "reward": 1.43, ...}
    trajectories.jsonl         one trajectory a line; pictures by name
    images/                    pictures, named by their content
    timeline/step-00020.json   what happened when, a trace for https://ui.perfetto.dev; .html is a picture of it
    summary.json               the outcome
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arft_fast.config import Config, ConfigError, config_json, config_toml
from arft_fast.observe.timeline import Span
from arft_fast.observe.trace import write_trace
from arft_fast.observe.trace_page import trace_html

if TYPE_CHECKING:
    from PIL.Image import Image

_RECORDS = ("config.json", "config.toml", "versions.json", "metrics.jsonl", "trajectories.jsonl", "summary.json")
_EXACT_PIXELS = 256 * 256
"""Pictures up to this size are kept exactly (PNG); photographs above it as JPEG, a tenth of the size."""


def run_path(config: Config, now: datetime | None = None) -> Path:
    """``--run.dir``, or ``runs/<recipes>-<time>``. The time is this process's: ranks that need it ask rank 0."""
    if config.run.dir is not None:
        return config.run.dir
    recipes = "+".join(Path(recipe).stem for recipe in config.recipes)
    return Path("runs") / f"{recipes}-{now or datetime.now():%Y%m%d-%H%M%S}"


class RunFolder:
    """Writes a run's records under ``path``; ranks above 0 write only their trajectories.

    Every record is on disk when its call returns. A folder that already holds a run is refused, or, with
    ``--run.overwrite``, emptied of that run's records and nothing else.

    Raises:
        ConfigError: the folder holds a run already, or cannot be written.
    """

    def __init__(self, path: Path, config: Config, *, rank: int = 0) -> None:
        self.path = path
        self._main = rank == 0
        self._trajectories = "trajectories.jsonl" if self._main else f"trajectories-rank{rank}.jsonl"
        if not self._main:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any((path / name).exists() for name in _RECORDS):
                if not config.run.overwrite:
                    raise ConfigError(f"{path} holds a run already (give another --run.dir, or --run.overwrite true)")
                _remove_records(path)
            (path / "config.json").write_text(config_json(config), encoding="utf-8")
            (path / "config.toml").write_text(config_toml(config), encoding="utf-8")
            (path / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror} (give a --run.dir that can be written)") from None

    def add_versions(self, **more: Any) -> None:
        """Adds to ``versions.json`` what is known only once it runs."""
        if self._main:
            path = self.path / "versions.json"
            known = json.loads(path.read_text(encoding="utf-8"))
            _write_atomic(path, (json.dumps(known | more, indent=2) + "\n").encode())

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to ``metrics.jsonl``; a figure that is not finite becomes null."""
        if self._main:
            self._append("metrics.jsonl", {"step": step, **metrics})

    def log_trajectory(self, record: Mapping[str, Any], images: Sequence[Image] = ()) -> None:
        """Appends one line to this rank's trajectories; ``images`` are saved once each and named under ``"images"``.

        ``record`` may hold numpy numbers and arrays (written as lists). Its text is a model's: JSON escapes it here,
        whoever shows it escapes it there.
        """
        self._append(self._trajectories, {**record, "images": [self._save_image(image) for image in images]})

    def write_timeline(self, step: int, spans: Sequence[Span], title: str, figures: Mapping[str, float]) -> None:
        """Writes a step's trace and its picture, with ``figures`` on top."""
        if self._main:
            path = self.path / "timeline" / f"step-{step:05d}.json"
            path.parent.mkdir(exist_ok=True)
            write_trace(path, spans)
            path.with_suffix(".html").write_text(trace_html(spans, title, figures), encoding="ascii")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json``; a reader sees the old one or the new one, never half of it."""
        if self._main:
            _write_atomic(self.path / "summary.json", (json.dumps(_plain(summary), indent=2) + "\n").encode())

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        line = json.dumps(_plain(record), allow_nan=False)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _save_image(self, image: Image) -> str:
        """The picture's name relative to the run folder; the same picture has the same name."""
        image = image.convert("RGB")  # what the model sees; a palette would not show in the bytes
        digest = hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()[:20]
        exact = image.width * image.height <= _EXACT_PIXELS
        name = f"images/{digest}.{'png' if exact else 'jpg'}"
        if not (self.path / name).exists():
            data = io.BytesIO()
            if exact:
                image.save(data, "PNG")
            else:
                image.save(data, "JPEG", quality=90)
            (self.path / "images").mkdir(exist_ok=True, parents=True)
            _write_atomic(self.path / name, data.getvalue())
        return name


def versions() -> dict[str, Any]:
    """What a result depends on besides the settings; None where it cannot be told."""
    return {
        "arft_fast": _version("arft_fast"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this file lies in, ``-dirty`` with local changes; None where git does not track it.

    The question about tracking keeps an installed package from naming the commit of a repository around it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    here = Path(__file__).resolve()
    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types: numpy as numbers and lists, paths as text, non-finite numbers as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _write_atomic(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")  # ranks may write the same picture
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _remove_records(path: Path) -> None:
    timelines = [*path.glob("timeline/step-*.json"), *path.glob("timeline/step-*.html")]
    for record in [*(path / name for name in _RECORDS), *path.glob("trajectories-rank*.jsonl"), *timelines]:
        record.unlink(missing_ok=True)
    for image in (path / "images").glob("*"):
        if image.suffix in (".png", ".jpg", ".part"):
            image.unlink()
