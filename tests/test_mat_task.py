"""The reader of MAT's training files: what it shows a model, and what it refuses before a run begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from arft_fast.protocol import Action, render_turn
from arft_fast.tasks.mat import MatTask, TaskDataError, _fit
from arft_fast.tasks.task import Task
from arft_fast.trajectory import Ending, Prompt, Trajectory, Turn

CODE = "<code>\n```python\nimport cv2\n```\n</code>"
CODING_ROWS: list[dict[str, Any]] = [
    {
        "type": "pre_problem",
        "image_path": "dark_1_proc.png",
        "problem": "<query> What is written? </query>",
        "solution": "<problem> {'dark'} </problem>",
        "gt": "<think> It is dark. </think>\n<problem> {'dark'} </problem>",
    },
    {
        "type": "pre_code",
        "image_path": "dark_1_proc.png",
        "problem": "<query> What is written? </query>",
        "context": "<think> It is dark. </think>\n<problem> {'dark'} </problem>",
        "solution": CODE,
        "gt": f"<think> Brighten. </think>\n{CODE}",
    },
    {
        "type": "pre_answer",
        "image_path": "dark_1_ori.png",
        "problem": "<query> What is written? </query>",
        "context": f"<think> It is dark. </think>\n<problem> {{'dark'}} </problem>\n{CODE}",
        "solution": "<answer> exit </answer>",
        "gt": "<think> I see it. </think>\n<answer> exit </answer>",
    },
]
SEARCH_ROWS: list[dict[str, Any]] = [
    {
        "image_path": "rft_agent_search_20_images/tower.png",
        "problem": "<query> How high is this tower? </query>",
        "solution": "<search> Eiffel Tower height </search>",
    },
    {
        "image_path": "rft_agent_search_20_images/tower.png",
        "problem": "<query> How high is this tower? </query>\n<information> 330 m </information>",
        "solution": "<answer> 330 m </answer>",
    },
]


def write_coding(folder: Path, rows: object = CODING_ROWS) -> Path:
    """The coding file of the data set, with its images in the sub-folder that the data set has for them."""
    images = folder / "rft_agent_code_1_2k_images"
    images.mkdir(parents=True, exist_ok=True)
    for name, colour in (("dark_1_proc.png", (1, 2, 3)), ("dark_1_ori.png", (200, 100, 50))):
        Image.new("RGB", (40, 20), colour).save(images / name)
    (folder / "rft_agent_code_1_2k.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def write_search(folder: Path, name: str = "rft_agent_search_20.json") -> Path:
    (folder / "rft_agent_search_20_images").mkdir(parents=True)
    Image.new("RGBA", (40, 20)).save(folder / "rft_agent_search_20_images" / "tower.png")
    (folder / name).write_text(json.dumps(SEARCH_ROWS), encoding="utf-8")
    return folder


def text_of(prompt: Prompt) -> str:
    text: str = prompt.messages[0]["content"][1]["text"]
    return text


def finished(prompt: Prompt, text: str) -> Trajectory:
    return Trajectory(
        prompt=prompt,
        sample=0,
        token_ids=np.zeros(0, np.int64),
        policy_mask=np.zeros(0, bool),
        logprobs=np.zeros(0, np.float32),
        images=[],
        turns=[Turn(role="assistant", text=text)],
        ending=Ending.STEP,
    )


def test_a_prompt_is_one_user_message_with_the_image_first(tmp_path: Path) -> None:
    task: Task = MatTask("coding", write_coding(tmp_path))
    for prompt in task.eval_prompts(3):
        (message,) = prompt.messages
        assert message["role"] == "user"
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        assert len(prompt.images) == 1 and prompt.images[0].mode == "RGB"


def test_the_text_is_instructions_question_and_history(tmp_path: Path) -> None:
    prompts = MatTask("coding", write_coding(tmp_path)).eval_prompts(3)
    instructions = text_of(prompts[0]).removesuffix("\n" + CODING_ROWS[0]["problem"])
    for prompt, row in zip(prompts, CODING_ROWS, strict=True):
        parts = [instructions, row["problem"], *([row["context"]] if "context" in row else [])]
        assert text_of(prompt) == "\n".join(parts)
    assert instructions.splitlines()[-1] == "# Current reasoning chain:"


@pytest.mark.parametrize(
    ("kind", "write", "sections"),
    [
        (
            "coding",
            write_coding,
            ("# Role", "# Output Format", "# Image Processing Rules", "# Output Format (strict):"),
        ),
        ("search", write_search, ("# Role", "# Guiding Principles", "# Output Format (strict):")),
    ],
)
def test_the_instructions_have_the_published_sections(
    kind: Any, write: Callable[[Path], Path], sections: tuple[str, ...], tmp_path: Path
) -> None:
    lines = text_of(MatTask(kind, write(tmp_path)).train_prompt(0)).splitlines()
    assert [line for line in lines if line.startswith("# ")] == [*sections, "# Current reasoning chain:"]


def test_the_coding_instructions_name_the_labels_and_both_image_names(tmp_path: Path) -> None:
    text = text_of(MatTask("coding", write_coding(tmp_path)).train_prompt(0))
    assert "{'rotation90', 'rotation180', 'dark', 'overexposure', 'blur', 'noise', 'crop', 'none'}" in text
    assert "'path_to_input_image.jpg'" in text and "'path_to_output_image.jpg'" in text


def test_the_gold_is_never_in_the_prompt(tmp_path: Path) -> None:
    for task in (MatTask("coding", write_coding(tmp_path)), MatTask("search", write_search(tmp_path / "search"))):
        for prompt in task.eval_prompts(3):
            assert prompt.gold["solution"] not in text_of(prompt)


@pytest.mark.parametrize("name", ["rft_agent_search_20.json", "rft_agent_20.json"])
def test_both_published_names_of_the_search_file_are_found(name: str, tmp_path: Path) -> None:
    assert len(MatTask("search", write_search(tmp_path, name)).eval_prompts(10)) == 2


def test_the_file_is_found_in_the_folder_above_and_by_its_own_path(tmp_path: Path) -> None:
    write_coding(tmp_path / "MAT-Training")
    for data in (tmp_path, tmp_path / "MAT-Training", tmp_path / "MAT-Training" / "rft_agent_code_1_2k.json"):
        assert MatTask("coding", data).eval_prompts(1)[0].uid == "mat_coding/1"


@pytest.mark.parametrize(
    "image_path",
    ["dark_1_proc.png", "rft_agent_code_1_2k_images/dark_1_proc.png", "/elsewhere/images/dark_1_proc.png"],
)
def test_images_are_found_by_name_in_the_images_folder(image_path: str, tmp_path: Path) -> None:
    task = MatTask("coding", write_coding(tmp_path, [CODING_ROWS[0] | {"image_path": image_path}]))
    assert task.train_prompt(0).images[0].getpixel((0, 0)) == (1, 2, 3)


def test_every_epoch_shows_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    rows = [CODING_ROWS[0] | {"problem": f"question {k}"} for k in range(30)]
    task = MatTask("coding", write_coding(tmp_path, rows), seed=3)
    epochs = [[task.train_prompt(30 * epoch + k).uid for k in range(30)] for epoch in range(3)]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_training_prompt_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    rows = [CODING_ROWS[0] | {"problem": f"question {k}"} for k in range(30)]
    write_coding(tmp_path, rows)
    forwards = [MatTask("coding", tmp_path, seed=3).train_prompt(k).uid for k in range(60)]
    other = MatTask("coding", tmp_path, seed=3)
    assert [other.train_prompt(k).uid for k in reversed(range(60))] == forwards[::-1]
    assert [MatTask("coding", tmp_path, seed=4).train_prompt(k).uid for k in range(60)] != forwards


def test_a_negative_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="index"):
        MatTask("coding", write_coding(tmp_path)).train_prompt(-1)


def test_evaluation_takes_the_first_rows_in_their_order(tmp_path: Path) -> None:
    task = MatTask("coding", write_coding(tmp_path))
    assert [prompt.uid for prompt in task.eval_prompts(2)] == ["mat_coding/1", "mat_coding/2"]
    assert len(task.eval_prompts(99)) == 3 and len(task.eval_prompts(0)) == 0


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 5000))
@example(1, 3000, 2)
@example(3000, 1, 2)
def test_an_image_is_scaled_down_into_the_budget_and_never_up(width: int, height: int, budget: int) -> None:
    image = Image.new("1", (width, height))
    small = _fit(image, budget)
    assert small.width * small.height <= budget and min(small.size) >= 1
    assert small.width <= width and small.height <= height
    if width * height <= budget:
        assert small.size == image.size


@pytest.mark.parametrize(
    ("size", "fitted"), [((2000, 1000), (632, 316)), ((1000, 3000), (258, 774)), ((640, 480), None)]
)
def test_an_image_keeps_its_aspect(size: tuple[int, int], fitted: tuple[int, int] | None) -> None:
    scaled = _fit(Image.new("RGB", size), 640 * 480 if fitted is None else 200_000)
    assert scaled.size == (fitted or size)


def test_the_pixel_budget_reaches_the_prompt(tmp_path: Path) -> None:
    assert MatTask("coding", write_coding(tmp_path), max_pixels=200).train_prompt(0).images[0].size == (20, 10)


def test_a_step_is_rewarded_against_the_teachers(tmp_path: Path) -> None:
    task = MatTask("coding", write_coding(tmp_path))
    problem, code, answer = task.eval_prompts(3)
    assert task.reward(finished(problem, render_turn("t", "problem", "{'dark'}"))) == {"format": 1.0, "accuracy": 1.0}
    assert task.reward(finished(code, render_turn("t", "code", "```python\nx = (\n```"))) == {
        "format": 1.0,
        "accuracy": 0.0,
    }
    assert task.reward(finished(answer, render_turn("t", "problem", "{'dark'}"))) == {"format": 0.0, "accuracy": 0.0}


def test_fidelity_and_similarity_reach_the_reward(tmp_path: Path) -> None:
    write_search(tmp_path)
    turn = render_turn("t", "search", "height of it") + "\n"
    for fidelity, form in (("faithful", 0.0), ("corrected", 1.0)):
        task = MatTask("search", tmp_path, fidelity=fidelity, similarity=lambda query, gold: 0.75)  # type: ignore[arg-type]
        assert task.reward(finished(task.eval_prompts(1)[0], turn)) == {"format": form, "accuracy": 0.75}


def test_a_stepwise_task_has_no_tool_and_no_observation(tmp_path: Path) -> None:
    task = MatTask("coding", write_coding(tmp_path))
    assert task.stepwise and not task.tools
    with pytest.raises(RuntimeError, match="stepwise"):
        task.observe(Action(kind="code", body="", think="", well_formed=True), None)


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize(
    ("row", "field", "remedy"),
    [
        (without(CODING_ROWS[1], "image_path"), "image_path", "missing"),
        (without(CODING_ROWS[1], "problem"), "problem", "missing"),
        (without(CODING_ROWS[1], "solution"), "solution", "missing"),
        (without(CODING_ROWS[1], "context"), "context", "missing"),
        (without(CODING_ROWS[1], "type"), "type", "missing"),
        (CODING_ROWS[1] | {"problem": 7}, "problem", "give a text"),
        (CODING_ROWS[1] | {"problem": " "}, "problem", "give a text"),
        (CODING_ROWS[1] | {"context": None}, "context", "give a text"),
        (CODING_ROWS[1] | {"image_path": ["a.png"]}, "image_path", "give a text"),
        (CODING_ROWS[1] | {"type": "pre_search"}, "type", "pre_problem, pre_code, pre_answer"),
        (CODING_ROWS[1] | {"image_path": "gone.png"}, "image_path", "put the images there"),
        (CODING_ROWS[1] | {"image_path": "bad\0name.png"}, "image_path", "put the images there"),
        (CODING_ROWS[1] | {"solution": "import cv2"}, "solution", "<code> .. </code>"),
        (CODING_ROWS[1] | {"solution": "<code>import cv2"}, "solution", "<code> .. </code>"),
        (CODING_ROWS[1] | {"solution": "<answer> exit </answer>"}, "solution", "<code> .. </code>"),
        (CODING_ROWS[2] | {"solution": "<answer> </answer>"}, "solution", "<answer> .. </answer>"),
        (CODING_ROWS[0] | {"solution": "<problem> dark </problem>"}, "solution", "'dark', 'blur'"),
    ],
)
def test_a_broken_row_is_named_with_file_row_field_and_remedy(
    row: dict[str, Any], field: str, remedy: str, tmp_path: Path
) -> None:
    write_coding(tmp_path, [CODING_ROWS[0], row])
    with pytest.raises(TaskDataError) as caught:
        MatTask("coding", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'rft_agent_code_1_2k.json'}, row 2, field {field}: ")
    assert remedy in message and "\n" not in message


@pytest.mark.parametrize("row", ["text", None, ["a"], 3])
def test_a_row_that_is_no_object_is_named(row: object, tmp_path: Path) -> None:
    write_coding(tmp_path, [CODING_ROWS[0], row])
    with pytest.raises(TaskDataError, match=r"row 2.*JSON object"):
        MatTask("coding", tmp_path)


@pytest.mark.parametrize("rows", [[], {}, "text", None])
def test_a_file_without_rows_is_refused(rows: object, tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="no list of rows"):
        MatTask("coding", write_coding(tmp_path, rows))


@pytest.mark.parametrize("content", [b"[{", b"\xff\xfe\x00", b""])
def test_a_file_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rft_agent_code_1_2k.json").write_bytes(content)
    with pytest.raises(TaskDataError, match="cannot be read"):
        MatTask("coding", tmp_path)


def test_a_missing_file_is_named_with_every_place_that_was_searched(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError) as caught:
        MatTask("search", tmp_path / "nowhere")
    for place in ("nowhere/rft_agent_search_20.json", "nowhere/MAT-Training/rft_agent_20.json", "laolao77/MAT"):
        assert place in str(caught.value)


def test_a_search_row_of_a_coding_action_is_refused(tmp_path: Path) -> None:
    write_search(tmp_path)
    (tmp_path / "rft_agent_search_20.json").write_text(json.dumps([SEARCH_ROWS[0] | {"solution": CODE}]))
    with pytest.raises(TaskDataError, match=r"row 1, field solution: .*<search> \.\. </search> or <answer>"):
        MatTask("search", tmp_path)


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_shown(tmp_path: Path) -> None:
    write_coding(tmp_path)
    (tmp_path / "rft_agent_code_1_2k_images" / "dark_1_ori.png").write_bytes(b"no image")
    task = MatTask("coding", tmp_path)
    assert len(task.eval_prompts(2)) == 2
    with pytest.raises(TaskDataError, match=r"row 3, field image_path: .*dark_1_ori\.png.*replace the image"):
        task.eval_prompts(3)


@pytest.mark.parametrize(
    "wrong", [{"kind": "chess"}, {"fidelity": "exact"}, {"max_pixels": 0}], ids=["kind", "fidelity", "max_pixels"]
)
def test_an_argument_out_of_range_is_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"kind": "coding", "data": write_coding(tmp_path)} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MatTask(**arguments)
