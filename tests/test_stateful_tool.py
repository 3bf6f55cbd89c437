"""Tools with a state for each trajectory, and tools by dotted path."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL.Image import Image

from arft_fast.tools.function_schema import Unsupported
from arft_fast.tools.function_tool import function_tool
from arft_fast.tools.load import load_tools
from arft_fast.tools.stateful_tool import stateful_tool
from arft_fast.tools.tool import InfraFault, episode_tools

made: list[Notebook] = []


class Notebook:
    """Remembers lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.closed = 0
        made.append(self)

    def write(self, line: str) -> str:
        """Write a line."""
        if not line:
            raise ValueError("the line is empty")
        if line == "break":
            raise OSError("disk full")
        self.lines.append(line)
        return f"{len(self.lines)} lines"

    async def read(self, image: Image | None) -> str:
        """Read them all."""
        return " ".join(self.lines)

    def close(self) -> None:
        self.closed += 1

    def _hidden(self) -> str:
        return ""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    made.clear()
    yield


def test_each_trajectory_has_a_state_of_its_own() -> None:
    async def episode(word: str) -> str:
        async with episode_tools({"notebook": notebook}) as tools:
            for _ in range(3):
                await tools["write"].call(f'{{"line": "{word}"}}')
                await asyncio.sleep(0)
            return (await tools["read"].call("{}")).text

    async def both() -> tuple[str, str]:
        return await asyncio.gather(episode("a"), episode("b"))

    notebook = stateful_tool(Notebook)
    assert list(asyncio.run(both())) == ["a a a", "b b b"]
    assert [book.closed for book in made] == [1, 1]


def test_the_operations_are_the_public_methods() -> None:
    tool = stateful_tool(Notebook)
    names = [schema["function"]["name"] for schema in tool.schemas]  # type: ignore[index]
    assert names == ["read", "write"] == list(tool.for_episode())


def test_a_state_that_nobody_uses_is_never_made() -> None:
    async def use() -> None:
        async with episode_tools({"notebook": stateful_tool(Notebook)}):
            pass

    asyncio.run(use())
    assert made == []


def test_a_stateless_tool_is_shared_and_stays_open() -> None:
    def echo(text: str) -> str:
        """Echo."""
        return text

    tool = function_tool(echo)

    async def use() -> None:
        async with episode_tools({"say": tool}) as tools:
            assert tools == {"say": tool}

    asyncio.run(use())


def test_the_models_error_leaves_the_state_usable() -> None:
    async def use() -> list[str | None]:
        async with episode_tools({"notebook": stateful_tool(Notebook)}) as tools:
            bad = await tools["write"].call('{"line": ""}')
            good = await tools["write"].call('{"line": "x"}')
        return [bad.error, good.text]

    assert asyncio.run(use()) == ["the line is empty", "1 lines"]


def test_after_a_fault_the_state_is_of_no_use() -> None:
    async def use() -> None:
        async with episode_tools({"notebook": stateful_tool(Notebook)}) as tools:
            with pytest.raises(InfraFault, match=r"Notebook\.write broke: OSError: disk full"):
                await tools["write"].call('{"line": "break"}')
            with pytest.raises(InfraFault, match=r"unknown state since: Notebook\.write broke: OSError: disk full"):
                await tools["read"].call("{}")

    asyncio.run(use())
    assert made[0].closed == 1


def test_after_a_cancelled_call_the_state_is_of_no_use() -> None:
    gate = threading.Event()

    class Slow:
        """Slow."""

        def wait(self) -> str:
            """Wait."""
            gate.wait(20)
            return ""

    async def use() -> None:
        async with episode_tools({"slow": stateful_tool(Slow)}) as tools:
            calling = asyncio.ensure_future(tools["wait"].call("{}"))
            await asyncio.sleep(0.05)
            calling.cancel()
            await asyncio.wait({calling})
            with pytest.raises(InfraFault, match="unknown state since: a call was cancelled"):
                await tools["wait"].call("{}")
            gate.set()

    asyncio.run(use())


def test_the_state_is_closed_when_the_trajectory_fails() -> None:
    async def use() -> None:
        async with episode_tools({"notebook": stateful_tool(Notebook)}) as tools:
            await tools["write"].call('{"line": "x"}')
            raise KeyError("agent")

    with pytest.raises(KeyError):
        asyncio.run(use())
    assert made[0].closed == 1


def test_a_closed_state_is_a_fault() -> None:
    async def use() -> None:
        async with episode_tools({"notebook": stateful_tool(Notebook)}) as tools:
            pass
        await tools["write"].call('{"line": "x"}')

    with pytest.raises(InfraFault, match="Notebook is closed"):
        asyncio.run(use())


def test_an_object_that_cannot_be_made_is_a_fault_whatever_it_raises() -> None:
    def factory() -> Notebook:
        raise ValueError("no room")

    async def use() -> None:
        async with episode_tools({"notebook": stateful_tool(factory)}) as tools:
            await tools["write"].call('{"line": "x"}')

    with pytest.raises(InfraFault, match=r"Notebook\.__init__ broke: no room"):
        asyncio.run(use())


def test_two_tools_of_one_name_are_refused() -> None:
    async def use() -> None:
        async with episode_tools({"a": stateful_tool(Notebook), "b": stateful_tool(Notebook)}):
            pass

    with pytest.raises(ValueError, match="two tools are called 'read'"):
        asyncio.run(use())


def test_what_cannot_be_a_stateful_tool_is_refused() -> None:
    class NeedsArguments:
        def __init__(self, a: int) -> None: ...

    class Empty:
        pass

    def unsaid():  # type: ignore[no-untyped-def]
        return Notebook()

    with pytest.raises(Unsupported, match="NeedsArguments needs arguments"):
        stateful_tool(NeedsArguments)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="Empty has no public method"):
        stateful_tool(Empty)
    with pytest.raises(Unsupported, match="annotate its result"):
        stateful_tool(unsaid)


MODULE = """
from arft_fast.tools.function_tool import function_tool

def turn(degrees: int) -> str:
    '''Turn.'''
    return str(degrees)

def undocumented() -> str:
    return ""

class Pad:
    def draw(self) -> str:
        '''Draw.'''
        return ""

quick = function_tool(turn, name="quick_turn", deadline_s=1.0)
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "arft_test_tools.py").write_text(MODULE)
    (tmp_path / "arft_test_broken.py").write_text("1 / 0")
    (tmp_path / "arft_test_needy.py").write_text("import arft_test_absent")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tools", "broken", "needy"):
        monkeypatch.delitem(sys.modules, f"arft_test_{name}", raising=False)
    return "arft_test_tools"


def test_functions_classes_and_ready_tools_are_loaded(module: str) -> None:
    tools = load_tools([f"{module}:turn", f"{module}:Pad", f"{module}:quick"])
    assert [tool.name for tool in tools] == ["turn", "Pad", "quick_turn"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("arft_test_tools", "arft_test_tools: give module:attribute"),
        ("arft_test_tools:a.b", "give module:attribute"),
        ("arft_nowhere.tools:zoom", "arft_nowhere.tools:zoom: there is no module arft_nowhere; install it"),
        ("arft_test_broken:zoom", r"arft_test_broken breaks on import \(ZeroDivisionError: division by zero\)"),
        ("arft_test_needy:zoom", "arft_test_needy needs the module arft_test_absent; install it"),
        ("arft_test_tools:zoom", "arft_test_tools has no zoom; it has Pad, function_tool, number, quick, turn"),
        ("arft_test_tools:undocumented", "arft_test_tools:undocumented: undocumented has no docstring"),
        ("arft_test_tools:number", "a int is no function, class or tool"),
    ],
)
def test_a_path_that_leads_to_no_tool_is_named(module: str, path: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load_tools([path])


def test_two_loaded_tools_of_one_name_are_refused(module: str) -> None:
    with pytest.raises(ValueError, match="a tool 'turn' is there already"):
        load_tools([f"{module}:turn", f"{module}:turn"])
