"""Corpus files as a stream of (title, text), in the shapes that retrieval corpora are published in.

A row is an object with ``text`` and perhaps ``title``, or with ``contents``: title, line break, text. So are the
Wikipedia dump of 2018 that Search-R1 uses (the title in quotes) and FlashRAG's corpora. Other keys are ignored.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO

_TITLE_LIMIT = 300  # a longer first line is no title
_ROWS_PER_BATCH = 1024


class CorpusError(ValueError):
    """The corpus cannot be read. The message names the file, the row (from 1) and what is wrong."""


def read_corpus(path: str | Path) -> Iterator[tuple[str, str]]:
    """(title, text) of each row of a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file; never all of it in memory.

    Raises:
        CorpusError: the file is missing, of another type, or one of its rows is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"corpus {path} does not exist")
    name = path.name.lower()
    if name.endswith(".parquet"):
        rows = _parquet_rows(path)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        rows = _json_rows(path)
    else:
        raise CorpusError(f"corpus {path} is neither .jsonl nor .jsonl.gz nor .parquet; convert it to one of them")
    for number, row in rows:
        yield _passage(path, number, row)


def split_contents(contents: str) -> tuple[str, str]:
    """``contents`` as (title, text): a first line that something follows is the title, without quotes around it."""
    first, _, rest = contents.strip().partition("\n")
    if not rest.strip() or len(first) > _TITLE_LIMIT:
        return "", contents.strip()
    return first.strip().strip('"'), rest.strip()


def _passage(path: Path, number: int, row: object) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise CorpusError(f"{path}, row {number}: not an object with text or contents")
    title, text, contents = row.get("title"), row.get("text"), row.get("contents")
    if isinstance(text, str) and text.strip():
        passage = (title.strip() if isinstance(title, str) else "", text)
    elif isinstance(contents, str) and contents.strip():
        passage = split_contents(contents)
    else:
        keys = ", ".join(sorted(map(str, row))[:8]) or "none"
        raise CorpusError(f"{path}, row {number}: no text and no contents (its keys: {keys})")
    try:
        "".join(passage).encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{path}, row {number}: half a character ({error.reason})") from error
    return passage


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, near row {number + 1}: not UTF-8 ({error.reason})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorpusError(f"{path}, row {number}: not JSON ({error})") from error
    except (OSError, EOFError) as error:
        raise CorpusError(f"{path}, after row {number}: cannot be read ({error})") from error


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        pyarrow = import_module("pyarrow")
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise CorpusError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or give .jsonl") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("title", "text", "contents") if name in file.schema_arrow.names]
            if not {"text", "contents"} & set(columns):
                raise CorpusError(f"{path}: no column text or contents (its columns: {file.schema_arrow.names[:8]})")
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}, after row {number}: cannot be read ({error})") from error
