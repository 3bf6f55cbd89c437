"""What a person sees while a run goes on: a bar with an ETA on a terminal, plain lines in a log, rank 0 alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class Console:
    """Prints for rank 0; every method does nothing with ``enabled=False``."""

    def __init__(self, *, enabled: bool = True, file: TextIO | None = None) -> None:
        self.enabled = enabled
        self._rich = RichConsole(file=file or sys.stdout, markup=False, highlight=False, emoji=False, quiet=not enabled)

    def print(self, *items: RenderableType) -> None:
        """Prints text as it stands, and rich's own objects (tables) as they look.

        Text may be a model's: ``[red]`` stays five characters, and control characters do not reach the terminal.
        """
        renderables = [plain_text(item) if isinstance(item, str) else item for item in items]
        # A log has no width: text is not folded there. A table needs one.
        self._rich.print(*renderables, soft_wrap=all(isinstance(item, str) for item in items))

    def banner(self, lines: Sequence[str]) -> None:
        """The lines that say what is about to run; framed on a terminal."""
        text = plain_text("\n".join(lines))
        if self._rich.is_terminal:
            self._rich.print(Panel.fit(text, border_style="dim"))
        else:
            self._rich.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int, *, every: int = 1) -> Iterator[Steps]:
        """``with console.progress("step", 40) as steps: steps.advance(reward=1.43)``.

        Args:
            title: what is counted; starts each line.
            total: how many there will be.
            every: a log gets a line for every so many, and for the last. A terminal's bar always moves.
        """
        if not (self.enabled and self._rich.is_terminal):
            yield Steps(self, title, total, every=every)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self._rich) as bar:
            yield Steps(self, title, total, every=every, bar=bar)


class Steps:
    """Counts one loop; made by ``Console.progress``."""

    def __init__(self, console: Console, title: str, total: int, *, every: int, bar: Progress | None = None) -> None:
        self._console, self._title, self._total, self._every, self._bar = console, title, total, every, bar
        self._task = None if bar is None else bar.add_task(title, total=total, figures="")
        self._start = time.monotonic()
        self._done = 0

    def advance(self, **figures: float | str) -> None:
        """One more is done. ``figures`` are shown in the order given, e.g. ``reward=1.43``."""
        self._done += 1
        shown = [
            f"{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in figures.items()
        ]
        seconds = (time.monotonic() - self._start) / self._done
        shown.append(f"{seconds:.2g} s/step")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, figures="  ".join(shown))
        elif self._done % self._every == 0 or self._done == self._total:
            count = f"{self._title} {self._done:{len(str(self._total))}d}/{self._total}"
            self._console.print("  ".join([count, *shown, f"ETA {_clock(seconds * (self._total - self._done))}"]))


def plain_text(text: str) -> Text:
    """``text`` as rich text without markup; control characters (but line end and tab) become a replacement mark."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
