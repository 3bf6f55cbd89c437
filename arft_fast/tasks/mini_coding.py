"""Task ``mini_coding``: a drawn image, spoiled by MAT-Coding's labels; name the defect, repair it by code, answer.

<think>..</think> <problem> {'dark'} </problem>  ->  <tips> .. </tips>
<think>..</think> <code> ```python .. ``` </code> ->  the processed image
<think>..</think> <answer> .. </answer>
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from PIL import Image

from arft_fast.protocol import Action, neutralise, parse_labels, parse_turn, render_labels, render_turn
from arft_fast.rewards.episode import GoldStep, episode_rewards
from arft_fast.tasks.mini_images import (
    COLOURS,
    DIGITS,
    PAIR_LABELS,
    REPAIRS,
    SHAPES,
    SINGLE_LABELS,
    Figure,
    distort,
    draw_quarters,
    draw_sign,
    quarter_box,
    random_figure,
)
from arft_fast.tasks.slips import slip_format
from arft_fast.tools.images import decode_image, encode_jpeg
from arft_fast.tools.tool import Tool, ToolResult
from arft_fast.trajectory import Prompt, Trajectory, Turn

_SYSTEM = "Repair the image, then answer."
_QUESTIONS = {
    "colour": "What is the colour of the shape?",
    "shape": "Which shape is drawn?",
    "digit": "Which digit is shown?",
}
_CHOICES = {"colour": tuple(COLOURS), "shape": SHAPES, "digit": DIGITS}
_THOUGHTS = {"problem": "I inspect the image.", "code": "I repair it.", "answer": "I see it now."}


class MiniCoding:
    """Spoiled pictures; see ``tasks.task.Task`` for the contract."""

    name = "mini_coding"
    stepwise = False

    def __init__(self, code_tool: Tool, *, seed: int = 0) -> None:
        self.tools: Mapping[str, Tool] = {"code": code_tool}
        self._seed = seed

    def train_prompt(self, index: int) -> Prompt:
        return self._prompt(f"train-{index}", Random(f"{self.name}/train/{self._seed}/{index}"))

    def eval_prompts(self, count: int) -> Sequence[Prompt]:
        return [self._prompt(f"eval-{k}", Random(f"{self.name}/eval/{k}"), turn=k) for k in range(count)]

    def _prompt(self, uid: str, rng: Random, turn: int | None = None) -> Prompt:
        """One item; ``turn`` deals labels and questions out evenly instead of drawing them."""
        kinds = [(label,) for label in SINGLE_LABELS] + [rng.choice(PAIR_LABELS)] * 2
        labels = kinds[rng.randrange(len(kinds)) if turn is None else turn % len(kinds)]
        topic = rng.choices(("colour", "shape", "digit"), (4, 4, 2))[0]
        question, box = _QUESTIONS[topic], None
        if labels == ("crop",):
            figures = [random_figure(rng) for _ in range(4)]
            quarter = rng.randrange(4)
            figure, box = figures[quarter], quarter_box(quarter)
            image = draw_quarters(figures, rng)
            question = f"{question} Box [{', '.join(map(str, box))} ]"
        else:
            figure = random_figure(rng)
            image = distort(draw_sign(figure, rng), labels, rng)
        return Prompt(
            uid=f"{self.name}/{uid}",
            task=self.name,
            messages=[
                {"role": "system", "content": _SYSTEM},
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": f"<query> {question} </query>"}],
                },
            ],
            images=[image],
            gold={"labels": list(labels), "answer": _answer(figure, topic), "topic": topic, "box": box},
        )

    def observe(self, action: Action, result: ToolResult | None) -> str:
        if action.kind == "problem":
            return _tips(parse_labels(action.body))
        if result is None:
            return "<tips> Write problem, code or answer. </tips>"
        return f"<tips> Failed: {neutralise(result.error)} </tips>" if result.error else "<tips> Processed. </tips>"

    def reward(self, trajectory: Trajectory) -> dict[str, float]:
        gold = trajectory.prompt.gold
        steps = [GoldStep(kind="problem", target=gold["labels"]), GoldStep(kind="answer", target=gold["answer"])]
        if gold["labels"] != ["none"]:
            steps.insert(1, GoldStep(kind="code", target=""))
        return episode_rewards(trajectory.turns, steps)

    def demonstrate(self, prompt: Prompt, rng: Random, slip_rate: float = 0.0) -> Sequence[Turn]:
        gold, image = prompt.gold, prompt.images[0]
        labels, answer = list(gold["labels"]), gold["answer"]
        if rng.random() < slip_rate and labels != ["crop"]:
            labels = list(rng.choice([(label,) for label in SINGLE_LABELS if label != "crop"] + list(PAIR_LABELS)))
        if rng.random() < slip_rate:
            answer = rng.choice(_CHOICES[gold["topic"]])
        turns = [Turn(role="assistant", text=render_turn(_THOUGHTS["problem"], "problem", render_labels(labels)))]
        turns.append(Turn(role="observation", text=self.observe(parse_turn(turns[0].text), None)))
        if labels != ["none"]:
            code = render_turn(_THOUGHTS["code"], "code", repair_code(labels, gold["box"]))
            done = self.observe(parse_turn(code), ToolResult())
            turns.append(Turn(role="assistant", text=code))
            turns.append(Turn(role="observation", text=done, images=[repair(image, labels, gold["box"])], tool="code"))
        turns.append(Turn(role="assistant", text=render_turn(_THOUGHTS["answer"], "answer", answer)))
        return [replace(t, text=slip_format(t.text, rng, slip_rate)) if t.role == "assistant" else t for t in turns]

    def scaffold_texts(self) -> Sequence[str]:
        other = Action(kind="search", body="", think="", well_formed=False)
        failed = ToolResult(error="no image was written to 'path_to_output_image.jpg'")
        return [_tips(None), self.observe(other, None), self.observe(other, failed)]


def repair_code(labels: Sequence[str], box: Sequence[int] | None) -> str:
    """The teacher's ```python block for ``labels``; ``box`` (0..1000) for a crop."""
    lines = ["from PIL import Image, ImageEnhance, ImageFilter", "img = Image.open('path_to_input_image.jpg')"]
    for label in labels:
        if label == "crop":
            assert box is not None, "a crop item carries its box"
            lines += [f"box = [{', '.join(map(str, box))} ]", "img = img.crop([v * img.width // 1000 for v in box])"]
        else:
            lines.append(REPAIRS[label][0])
    lines.append("img.save('path_to_output_image.jpg')")
    return "```python\n" + "\n".join(lines) + "\n```"


def repair(image: Image.Image, labels: Sequence[str], box: Sequence[int] | None) -> Image.Image:
    """The image that ``repair_code`` produces, made in process: thousands of teacher traces need no sandbox.

    A test runs both and compares every pixel.
    """
    image = decode_image(encode_jpeg(image))
    for label in labels:
        if label == "crop":
            assert box is not None, "a crop item carries its box"
            left, top, right, bottom = (v * image.width // 1000 for v in box)
            image = image.crop((left, top, right, bottom))
        else:
            image = REPAIRS[label][1](image)
    written = io.BytesIO()
    image.save(written, format="JPEG")  # the teacher's code saves with Pillow's default quality
    return decode_image(written.getvalue())


def _answer(figure: Figure, topic: str) -> str:
    return {"colour": figure.colour, "shape": figure.shape, "digit": figure.digit}[topic]


def _tips(labels: Sequence[str] | None) -> str:
    if labels is None:
        return "<tips> Unknown problem. </tips>"
    if "none" in labels:
        return "<tips> No repair needed. Answer. </tips>"
    return f"<tips> Write code for {' '.join(label for label in labels if label in SINGLE_LABELS)} </tips>"
