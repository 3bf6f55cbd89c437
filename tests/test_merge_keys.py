from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from arft_fast.policy.prefix_tree import Path, build_tree, merge_keys

IMAGE = 9


def _image_path(ids: Sequence[int], images: Sequence[tuple[str, int]], numbering: dict[str, int]) -> Path:
    token_ids, positions = np.array(ids), np.arange(len(ids))
    return Path(token_ids, positions, positions > 0, merge_keys(token_ids, images, IMAGE, numbering))


def test_two_crops_of_one_size_do_not_merge_and_equal_ones_do() -> None:
    numbering: dict[str, int] = {}
    ids = [1, IMAGE, IMAGE, IMAGE, 2]
    left, again, right = (_image_path(ids, [(content, 3)], numbering) for content in ("left", "left", "right"))
    assert build_tree([left, again]).tokens == 5
    assert build_tree([left, right]).tokens == 1 + 4 + 4
    by_token_id = [path._replace(keys=None) for path in (left, right)]
    assert build_tree(by_token_id).tokens == 5  # what ids alone would have merged


def test_text_after_two_different_images_does_not_merge() -> None:
    numbering: dict[str, int] = {}
    tree = build_tree([_image_path([1, IMAGE, 2, 3], [(content, 1)], numbering) for content in ("a", "b")])
    assert tree.attention().mask("cpu").sum(1).tolist() == [1, 2, 3, 4, 2, 3, 4]


def test_images_in_one_run_of_placeholders_take_their_tokens_in_order() -> None:
    numbering: dict[str, int] = {}
    ids = np.array([1, IMAGE, IMAGE, IMAGE, 2, IMAGE])
    keys = merge_keys(ids, [("a", 2), ("b", 1), ("a", 1)], IMAGE, numbering)
    assert keys[[0, 4]].tolist() == [1, 2] and (keys[[1, 2, 3, 5]] < 0).all()
    assert keys[5] == keys[1] and len(set(keys.tolist())) == 5
    split = merge_keys(ids, [("a", 1), ("a", 1), ("b", 1), ("a", 1)], IMAGE, numbering)
    assert split[2] == split[1] == keys[1] and split[3] == keys[3]


def test_keys_of_many_images_never_meet_and_stay_as_they_are() -> None:
    numbering: dict[str, int] = {}
    ids = np.full(500, IMAGE)
    first = [merge_keys(ids, [(str(content), 500)], IMAGE, numbering) for content in range(50)]
    assert len(np.unique(np.concatenate(first))) == 50 * 500
    again = [merge_keys(ids, [(str(content), 500)], IMAGE, numbering) for content in reversed(range(50))]
    assert np.array_equal(first, again[::-1])


def test_text_keys_are_the_token_ids() -> None:
    ids = np.array([4, 0, 4])
    keys = merge_keys(ids, [], -1, {})
    assert keys.tolist() == [4, 0, 4] and not np.shares_memory(keys, ids)


@pytest.mark.parametrize("images", [[], [("a", 1)], [("a", 2), ("b", 1)]])
def test_placeholders_and_image_tokens_must_agree(images: list[tuple[str, int]]) -> None:
    wanted = sum(tokens for _, tokens in images)
    with pytest.raises(ValueError, match=rf"images: .* {wanted} tokens for 2 placeholders"):
        merge_keys(np.array([1, IMAGE, IMAGE]), images, IMAGE, {})


def test_an_image_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge_keys(np.array([1, IMAGE]), [("a", 1), ("b", 0)], IMAGE, {})
