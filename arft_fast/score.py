"""Scores a file of answers without a model: ``python -m arft_fast.evaluate --task.name mat_coding --score-only FILE``.

The file is what the released evaluation of arXiv 2505.14246 writes: a JSON list of rows ``{id, gt, pred_answer}``,
where ``gt`` is a text or a list of texts and ``pred_answer`` a text or null. Other keys are ignored. Simple and hard
questions are told apart by position alone, as there.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from arft_fast.config import ConfigError
from arft_fast.rewards.evaluator import score_answer

FLAG = "--score-only"
_RESAMPLES = 10_000
_INTERVAL = (2.5, 97.5)
"""Percentiles: 95 %."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a file of answers holds when it is complete."""

    title: str
    rows: int
    simple: int = 0
    """Rows at the start that are simple, the others being hard; 0 = no such split."""
    bilingual: bool = False
    """The metric's variant; see ``rewards.evaluator``."""


BENCHMARKS: Mapping[str, Benchmark] = {
    "mat_coding": Benchmark(title="MAT-Coding", rows=200, simple=70, bilingual=True),
    "mat_search": Benchmark(title="MAT-Search", rows=150, simple=75),
    "2wiki": Benchmark(title="2WikiMultihopQA", rows=12576),
    "hotpotqa": Benchmark(title="HotpotQA", rows=7405),
    "musique": Benchmark(title="MuSiQue", rows=2417),
    "bamboogle": Benchmark(title="Bamboogle", rows=125),
}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row of the file."""

    golds: tuple[str, ...]
    answer: str | None


def take_flag(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Takes ``--score-only FILE`` out of a command line: the file (None without the flag), and all other words.

    Raises:
        ConfigError: the flag is there without a file, or twice.
    """
    file, rest, words = None, [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != FLAG:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{FLAG} has no file (give the JSON file of answers)")
        if file is not None:
            raise ConfigError(f"{FLAG} is given twice (score one file at a time)")
        file = Path(value)
    return file, rest


def score_file(file: Path, names: Sequence[str], *, seed: int) -> tuple[Table, str]:
    """F1 and EM of the answers in ``file``, in the paper's layout: a table, and the notes that belong under it.

    Args:
        names: one name of ``BENCHMARKS``; more or others are refused.
        seed: of the bootstrap.

    Raises:
        ConfigError: the task is unknown, or the file cannot be read or holds a broken row.
    """
    name = _task(names)
    benchmark, predictions = BENCHMARKS[name], read_predictions(file)
    scores = np.array([score_answer(p.answer, p.golds, bilingual=benchmark.bilingual) for p in predictions])
    parts = split(scores, benchmark)
    published = tomllib.loads(resources.files("arft_fast.tasks").joinpath("published.toml").read_text("utf-8"))
    notes = [f"95 %: percentiles of {_RESAMPLES:,} bootstrap samples of the rows, seed {seed}"]
    notes.append(f"below the line: as printed in {published['source']}; 3B and 7B are Qwen2.5-VL")
    if silent := sum(p.answer is None for p in predictions):
        notes.append(f"{silent} of {len(predictions)} rows have no answer and count as 0")
    if len(predictions) != benchmark.rows:
        notes.append(f"{len(predictions)} rows, not the {benchmark.rows:,} of the published figures")
        if benchmark.simple:
            notes[-1] += ": simple and hard are told apart by position, so only all is given"
    return _table(benchmark.title, parts, published[name], seed=seed), "\n".join(notes)


def read_predictions(file: Path) -> list[Prediction]:
    """The rows of a file of answers, every one checked.

    Raises:
        ConfigError: names the file, the row (from 1) and the field.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{FLAG} {file}: {error.strerror} (give a readable JSON file)") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{FLAG} {file}: not JSON: {error} (give a JSON list of rows)") from error
    if not isinstance(rows, list):
        raise ConfigError(f"{FLAG} {file}: not a list but {_kind(rows)} (give a JSON list of rows)")
    if not rows:
        raise ConfigError(f"{FLAG} {file}: an empty list (give one row or more)")
    return [_prediction(row, f"{FLAG} {file}: row {number}") for number, row in enumerate(rows, 1)]


def _prediction(row: Any, place: str) -> Prediction:
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is no object but {_kind(row)} (give {{id, gt, pred_answer}})")
    for field in ("gt", "pred_answer"):
        if field not in row:
            raise ConfigError(f"{place} has no {field} (give {{id, gt, pred_answer}})")
    gold, answer = row["gt"], row["pred_answer"]
    golds = gold if isinstance(gold, list) else [gold]
    if not golds:
        raise ConfigError(f"{place}: gt is an empty list (give one right answer or more)")
    for item in golds:
        if not isinstance(item, str):
            raise ConfigError(f"{place}: gt holds {_kind(item)} (give a text or a list of texts)")
    if not isinstance(answer, str | None):
        raise ConfigError(f"{place}: pred_answer is {_kind(answer)} (give a text, or null for no answer)")
    return Prediction(golds=tuple(golds), answer=answer)


def split(scores: np.ndarray, benchmark: Benchmark) -> dict[str, np.ndarray]:
    """Rows [N, 2] by the paper's columns: simple, hard, all. All alone where N is not the benchmark's own."""
    if not benchmark.simple or len(scores) != benchmark.rows:
        return {"all": scores}
    return {"simple": scores[: benchmark.simple], "hard": scores[benchmark.simple :], "all": scores}


def bootstrap_interval(scores: np.ndarray, *, seed: int) -> np.ndarray:
    """The 95 % percentile interval of the mean over resampled rows.

    Args:
        scores: [N, 2], F1 and EM of each row.

    Returns:
        [2, 2]: low and high; F1 and EM.
    """
    # Rows with the same scores are interchangeable: their number in a resample of N rows is multinomial.
    values, counts = np.unique(scores, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    # In batches: a file may hold as many different scores as rows.
    batches = [rng.multinomial(len(scores), counts / len(scores), size=100) @ values for _ in range(_RESAMPLES // 100)]
    return np.percentile(np.concatenate(batches) / len(scores), _INTERVAL, axis=0)


def _table(title: str, parts: Mapping[str, np.ndarray], published: Sequence[Mapping[str, Any]], *, seed: int) -> Table:
    table = Table(title=f"{title}, percent", title_justify="left")
    table.add_column("")
    for part in parts:
        for metric in ("F1", "EM"):
            table.add_column(f"{part}\n{metric}", justify="right")
    bounds = [100 * bootstrap_interval(scores, seed=seed) for scores in parts.values()]
    table.add_row("this file", *_cells([100 * scores.mean(axis=0) for scores in parts.values()]))
    table.add_row("  95 % from", *_cells([low for low, _ in bounds]))
    table.add_row("  95 % to", *_cells([high for _, high in bounds]), end_section=True)
    for row in published:
        table.add_row(Text(row["model"]), *_cells([row.get(part) for part in parts]))
    return table


def _cells(pairs: Sequence[Sequence[float] | np.ndarray | None]) -> list[str]:
    return [cell for pair in pairs for cell in (("-", "-") if pair is None else (f"{x:.2f}" for x in pair))]


def _task(names: Sequence[str]) -> str:
    if len(names) == 1 and names[0] in BENCHMARKS:
        return names[0]
    guess = difflib.get_close_matches(names[0], BENCHMARKS, n=1)
    hint = f"did you mean {guess[0]}? " if guess and len(names) == 1 else ""
    raise ConfigError(
        f"--task.name {' '.join(names)} has no scorer of files ({hint}give one of: {', '.join(BENCHMARKS)})"
    )


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
