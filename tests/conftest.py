"""Shared pieces: one untrained tiny policy with the mini tasks, built once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small tensors, a core for each process: threads would only wait

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported: nothing above does

from arft_fast.kernels import head_impl
from arft_fast.policy.model import Policy, load_policy
from arft_fast.policy.tiny import build_tiny
from arft_fast.rollout.teacher import teacher_texts
from arft_fast.tasks.mini_coding import MiniCoding
from arft_fast.tasks.mini_corpus import corpus_passages
from arft_fast.tasks.mini_search import MiniSearch
from arft_fast.tasks.mixture import Mixture
from arft_fast.tools.python_image_code import PythonImageCode
from arft_fast.tools.sandbox import Sandbox
from arft_fast.tools.search_index import SearchIndex, build_index

torch.set_num_threads(1)

LONG_FILES = ("test_train.py", "test_readme.py", "test_triton_compile.py")


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Worker processes for the whole suite; none for a choice of files, or where tests share a GPU or an engine."""
    chosen, default = ([Path(name) for name in names] for names in (config.args, config.getini("testpaths")))
    whole = chosen == default and "not gpu" in config.option.markexpr
    return None if whole else 0  # None: pytest-xdist counts the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long go first: none is left to one worker at the end, while the others wait."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@dataclass(frozen=True)
class Mini:
    """The mini tasks around one search index; ``mixture`` makes a fresh sandbox, which belongs to one event loop."""

    index: SearchIndex

    def mixture(self) -> Mixture:
        return Mixture([MiniCoding(PythonImageCode(Sandbox(workers=1))), MiniSearch(self.index)])


def _or_skip(name: str) -> str:
    try:
        return head_impl(torch.zeros(1), name)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["reference", "native"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation of the vocabulary head that runs fast on a CPU."""
    return _or_skip(request.param)


@pytest.fixture(params=["reference", "native", "triton"])
def every_impl(request: pytest.FixtureRequest) -> str:
    """Each implementation; without a GPU Triton runs in its interpreter, at ten milliseconds a row."""
    return _or_skip(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Sums over rows run on more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mini]:
    path = tmp_path_factory.mktemp("index") / "mini.sqlite"
    build_index(path, corpus_passages())
    yield Mini(SearchIndex(path, top_k=1))


@pytest.fixture(scope="session")
def tiny_folder(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved, untrained tiny policy."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = [text for task in mini.mixture().by_name.values() for text in teacher_texts(task, 200, seed=0)]
    build_tiny(folder, texts, seed=0)
    return folder


@pytest.fixture
def policy(tiny_folder: Path) -> Policy:
    """The tiny policy, loaded anew: a test may change its weights."""
    return load_policy(tiny_folder, device=torch.device("cpu"), dtype=torch.float32)
