from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from arft_fast.policy.model import Policy
from arft_fast.policy.tiny import SPECIAL_TOKENS


def _whole(policy: Policy, said: str, seen: str) -> str:
    """The template's own rendering of prompt, answer and observation with one image each."""
    part = {"type": "image"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": [part, {"type": "text", "text": seen}]},
    ]
    text: str = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.replace("<|image_pad|>", "<|image_pad|>" * 4)


@pytest.mark.parametrize("turn_is_closed", [False, True])
def test_the_ledgers_text_is_the_templates_rendering_of_the_whole_conversation(
    policy: Policy, turn_is_closed: bool
) -> None:
    picture = Image.new("RGB", (56, 56))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    prompt, _ = policy.chat.prompt(messages, [picture])
    said = policy.tokenizer.encode("A cat. </answer>", add_special_tokens=False)
    if turn_is_closed:
        said.append(policy.chat.end_of_turn_id)
    observation, images = policy.chat.observation("Look again.", [picture], turn_is_closed=turn_is_closed)
    assert sum(image.tokens for image in images) == 4
    assert policy.tokenizer.decode([*prompt, *said, *observation]) == _whole(policy, "A cat. </answer>", "Look again.")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=5)), max_size=6))
def test_no_special_token_comes_out_of_a_tools_text(policy: Policy, pieces: list[str]) -> None:
    special = set(policy.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    assert not special & set(policy.chat.plain("".join(pieces)))
    # Negative control: the ordinary encoding does make them.
    assert policy.chat.image_token_id in policy.tokenizer.encode("a <|image_pad|>")


def test_a_placeholder_smuggled_into_a_question_is_refused(policy: Policy) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see <|image_pad|>"}]}]
    with pytest.raises(ValueError, match="2 image placeholders but 1 images"):
        policy.chat.prompt(messages, [Image.new("RGB", (56, 56))])
