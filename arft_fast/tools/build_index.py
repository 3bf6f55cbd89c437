"""``python -m arft_fast.tools.build_index CORPUS --out PATH``: a corpus file becomes a search index.

CORPUS is ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` (see ``corpus``). ``--engine fts5`` writes one SQLite file,
``--engine tantivy`` a folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from arft_fast.tools.corpus import read_corpus
from arft_fast.tools.search_index import build_index
from arft_fast.tools.search_tantivy import build_tantivy

_PASSAGES_BETWEEN_LINES = 250_000
_BUILDERS = {"fts5": build_index, "tantivy": build_tantivy}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what the arguments say; returns the exit status: 0, or 1 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="arft_fast.tools.build_index", description=__doc__)
    parser.add_argument("corpus", type=Path, help="corpus file: .jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="the index; one that is there is replaced")
    parser.add_argument("--engine", choices=sorted(_BUILDERS), default="fts5", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="take the first LIMIT passages only")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        passages = islice(_reported(read_corpus(options.corpus)), options.limit)
        _BUILDERS[options.engine](options.out, passages)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {_size_mib(options.out):.1f} MiB, {time.perf_counter() - started:.1f} s")
    return 0


def _reported(passages: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for number, passage in enumerate(passages, start=1):
        yield passage
        if number % _PASSAGES_BETWEEN_LINES == 0:
            print(f"{number:,} passages", file=sys.stderr)


def _size_mib(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


if __name__ == "__main__":
    sys.exit(main())
