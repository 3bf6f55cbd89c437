"""Task ``mat_coding`` and ``mat_search``: the published training files of MAT, one teacher-forced step a row.

This is how the authors of arXiv 2505.14246 trained: the prompt holds the instructions, the question and the *teacher's*
history; the model writes the next step; the step is compared with the teacher's. No tool runs.

A training file (data set ``laolao77/MAT``, folder ``MAT-Training``) is a JSON list of rows, all values text:

    search    image_path, problem (question and history), solution (one <search> or <answer> block)
    coding    type (pre_problem, pre_code, pre_answer), image_path, problem (question), solution (one block of that
              type), and for all but pre_problem: context (history)

Other keys are ignored, ``gt`` too: the original pastes it over one sample of each group before scoring, while that
sample's ids stay what they were. Images keep their aspect; the original squeezes them to 720 x 720.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from PIL import Image

from arft_fast.protocol import Action, ActionKind, parse_labels, parse_turn
from arft_fast.rewards.similarity import QuerySimilarity, lexical_similarity
from arft_fast.rewards.stepwise import coding_step_rewards, search_step_rewards
from arft_fast.rewards.text import Fidelity
from arft_fast.tools.images import ImageRejected, decode_image
from arft_fast.tools.tool import Tool, ToolResult
from arft_fast.trajectory import Prompt, Trajectory

MatKind = Literal["coding", "search"]

_FILE_NAMES: Mapping[MatKind, tuple[str, ...]] = {
    "coding": ("rft_agent_code_1_2k.json",),
    "search": ("rft_agent_search_20.json", "rft_agent_20.json"),  # the data set's name, the released script's name
}
_MAX_SOURCE_PIXELS = 64_000_000  # photographs as cameras take them; what a model's code writes is held to less
_ACTION_OF_TYPE: Mapping[str, ActionKind] = {"pre_problem": "problem", "pre_code": "code", "pre_answer": "answer"}


class TaskDataError(ValueError):
    """A training file is missing or broken. The message names the file, the row (from 1), the field and the remedy."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One checked row of a training file."""

    number: int
    image: Path
    text: str
    """Question and history, as they follow the instructions."""
    solution: str


class MatTask:
    """Single steps of MAT; see ``tasks.task.Task`` for the contract.

    Args:
        kind: ``coding`` or ``search``.
        data: the training JSON, the folder that holds it, or the folder that holds ``MAT-Training``. Images are looked
            up beside the JSON and in its ``*_images`` sub-folders.
        seed: of the order of the rows; an epoch's order depends on (seed, epoch) and nothing else.
        max_pixels: larger images are scaled down to this many pixels, keeping their aspect; none is scaled up.
        fidelity: rewards ``faithful`` to the released code, or ``corrected`` (see ``rewards.stepwise``).
        similarity: of (query, gold query), for search steps; below 0.5 counts as 0.

    Raises:
        TaskDataError: the file cannot be found or read, or one of its rows is broken. All rows and the presence of all
            images are checked here, so that a run does not fail hours later.
        ValueError: another argument is out of range.
    """

    stepwise = True

    def __init__(
        self,
        kind: MatKind,
        data: Path,
        *,
        seed: int = 0,
        max_pixels: int = 401_408,
        fidelity: Fidelity = "corrected",
        similarity: QuerySimilarity = lexical_similarity,
    ) -> None:
        if kind not in get_args(MatKind):
            raise ValueError(f"kind is {kind!r}; give one of {', '.join(get_args(MatKind))}")
        if fidelity not in get_args(Fidelity):
            raise ValueError(f"fidelity is {fidelity!r}; give one of {', '.join(get_args(Fidelity))}")
        if max_pixels < 1:
            raise ValueError(f"max_pixels is {max_pixels}; give at least 1 (the released scripts use 401408)")
        self.name = f"mat_{kind}"
        self.tools: Mapping[str, Tool] = {}
        self._kind = kind
        self._seed = seed
        self._max_pixels = max_pixels
        self._fidelity: Fidelity = fidelity
        self._similarity = similarity
        self._file = _find_file(kind, data)
        self._rows = _read_rows(kind, self._file)
        self._instructions = resources.files("arft_fast.tasks").joinpath(f"prompts/{self.name}.txt").read_text("utf-8")

    def train_prompt(self, index: int) -> Prompt:
        if index < 0:
            raise ValueError(f"index is {index}; training items are counted from 0")
        epoch, position = divmod(index, len(self._rows))
        return self._prompt(self._rows[_epoch_order(len(self._rows), self._seed, epoch)[position]])

    def eval_prompts(self, count: int) -> Sequence[Prompt]:
        """The file's first ``count`` rows. These are training rows: the published set has no held-out split."""
        return [self._prompt(row) for row in self._rows[: max(0, count)]]

    def observe(self, action: Action, result: ToolResult | None) -> str:
        raise RuntimeError(f"{self.name} is stepwise: an episode ends with its first turn and has no observation")

    def reward(self, trajectory: Trajectory) -> dict[str, float]:
        completion = "".join(turn.text for turn in trajectory.actions())
        solution = trajectory.prompt.gold["solution"]
        if self._kind == "search":
            return search_step_rewards(completion, solution, fidelity=self._fidelity, similarity=self._similarity)
        return coding_step_rewards(completion, solution, fidelity=self._fidelity)

    def _prompt(self, row: _Row) -> Prompt:
        text = f"{self._instructions}\n{row.text}"
        return Prompt(
            uid=f"{self.name}/{row.number}",
            task=self.name,
            messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            images=[self._image(row)],
            gold={"solution": row.solution},
        )

    def _image(self, row: _Row) -> Image.Image:
        try:
            image = decode_image(row.image.read_bytes(), max_pixels=_MAX_SOURCE_PIXELS)
        except (OSError, ImageRejected) as error:
            raise _broken(
                self._file, row.number, "image_path", f"{row.image} cannot be shown ({error}); replace the image"
            ) from error
        return _fit(image, self._max_pixels)


def _fit(image: Image.Image, max_pixels: int) -> Image.Image:
    """``image`` scaled down to at most ``max_pixels``, its aspect kept as far as whole pixels allow."""
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = sqrt(max_pixels / (width * height))
    # The short side of a very long image would round to 0; it stays 1, so the long side must not exceed the budget.
    new_width, new_height = (min(max(1, int(side * scale)), max_pixels) for side in (width, height))
    return image.resize((new_width, new_height), Image.Resampling.BICUBIC)


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    Random(f"mat/{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _find_file(kind: MatKind, data: Path) -> Path:
    if data.is_file():
        return data
    candidates = [folder / name for folder in (data, data / "MAT-Training") for name in _FILE_NAMES[kind]]
    for path in candidates:
        if path.is_file():
            return path
    raise TaskDataError(
        f"no training file for {kind} in {data}: looked for {', '.join(map(str, candidates))}; "
        "give the folder of the data set laolao77/MAT, or the JSON file itself"
    )


def _read_rows(kind: MatKind, file: Path) -> list[_Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise TaskDataError(f"{file}: cannot be read ({error}); download the file again") from error
    if not isinstance(rows, list) or not rows:
        raise TaskDataError(f"{file}: holds no list of rows; give a training file of laolao77/MAT")
    folders = [file.parent, *sorted(path for path in file.parent.glob("*_images") if path.is_dir())]
    return [_check_row(kind, file, folders, number, row) for number, row in enumerate(rows, start=1)]


def _check_row(kind: MatKind, file: Path, folders: Sequence[Path], number: int, row: Any) -> _Row:
    if not isinstance(row, dict):
        raise TaskDataError(f"{file}, row {number}: is {type(row).__name__}; every row must be a JSON object")

    def text(field: str) -> str:
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if field not in row else f"is {value!r:.60}"
            raise _broken(file, number, field, f"{found}; give a text that is not empty")
        return value

    problem = text("problem")
    kinds: tuple[ActionKind, ...] = ("search", "answer")
    if kind == "coding":
        row_type = text("type")
        if row_type not in _ACTION_OF_TYPE:
            raise _broken(file, number, "type", f"is {row_type!r:.60}; give one of {', '.join(_ACTION_OF_TYPE)}")
        kinds = (_ACTION_OF_TYPE[row_type],)
        if row_type != "pre_problem":
            problem = f"{problem}\n{text('context')}"

    solution = text("solution")
    gold = parse_turn(solution)
    if gold.kind not in kinds or not gold.body:
        blocks = " or ".join(f"<{name}> .. </{name}>" for name in kinds)
        raise _broken(file, number, "solution", f"is {solution!r:.60}; write the step as one block {blocks}")
    if gold.kind == "problem" and parse_labels(gold.body) is None:
        raise _broken(file, number, "solution", f"is {solution!r:.60}; name its labels like {{'dark', 'blur'}}")

    image_path = text("image_path")
    candidates = [folder / name for folder in folders for name in (image_path, Path(image_path).name)]
    image = next((path for path in candidates if path.is_file()), None)
    if image is None:
        where = ", ".join(map(str, folders))
        raise _broken(file, number, "image_path", f"no file {image_path!r:.120} in {where}; put the images there")
    return _Row(number=number, image=image, text=problem, solution=solution)


def _broken(file: Path, row: int, field: str, what: str) -> TaskDataError:
    return TaskDataError(f"{file}, row {row}, field {field}: {what}")
