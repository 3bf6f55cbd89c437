"""BM25 over a tantivy index (extra ``search``): a folder of memory-mapped files, for millions of passages.

Faster than ``search_index`` by more than ten times, and half as large on disk. Any number of processes may read one
folder. Words are letters, digits and underscores, in lower case, Latin letters without diacritics. As there, a frequent
word is left out of a query beside a rarer one, but only one that is in more than half of all passages.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arft_fast.tools.search import Passage
from arft_fast.tools.search_index import COMMON_PASSAGES, checked, query_words
from arft_fast.tools.tool import InfraFault

if TYPE_CHECKING:
    from types import ModuleType

PASSAGES_PER_COMMIT = 200_000
COMMON_SHARE = 0.5
"""A word is common when it is in more passages than this share of all, and than ``COMMON_PASSAGES``."""
_HEAP_BYTES = 256 * 2**20
_FIELD = "contents"  # title, line break, text: of one field the search can skip passages that cannot win
_ANALYSER = "arft_words"


def build_tantivy(path: str | Path, passages: Iterable[tuple[str, str]]) -> None:
    """Write the index of ``passages`` (title, text) to the folder ``path``, replacing an index that was there.

    It is written beside ``path`` and moved there when it is whole; passages are committed in portions, so memory does
    not grow with them. A ``TantivyIndex`` that is open on the old folder keeps reading the old files.

    Raises:
        ValueError: no passages, one without text, or ``path`` is something else than such an index.
        RuntimeError: tantivy is not installed.
    """
    tantivy, path = _tantivy(), Path(path)
    if path.exists() and not (path / "meta.json").is_file():
        raise ValueError(f"{path} exists and is no tantivy index; give another path or remove it")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        draft, old = Path(scratch) / "new", Path(scratch) / "old"
        draft.mkdir()
        index = _with_analyser(tantivy, tantivy.Index(_schema(tantivy), path=str(draft)))
        writer = index.writer(_HEAP_BYTES, 1)  # one thread: the order of insertion is kept
        try:
            count = 0
            for count, (title, text) in enumerate(checked(passages), start=1):
                writer.add_document(tantivy.Document(contents=f"{' '.join(title.split())}\n{text}"))
                if count % PASSAGES_PER_COMMIT == 0:
                    writer.commit()
            if not count:
                raise ValueError("passages is empty: give at least one (title, text)")
            writer.commit()
        finally:
            writer.wait_merging_threads()  # its threads write into the folder
        for lock in draft.glob(".tantivy-*.lock"):
            lock.unlink()
        if path.exists():
            path.rename(old)
        os.replace(draft, path)


class TantivyIndex:
    """A folder of ``build_tantivy``, searched. Equal scores come in no promised order.

    Args:
        path: the folder; it is never written.
        top_k: passages of one answer, where a query does not say.

    Raises:
        ValueError: ``path`` is no such folder.
        RuntimeError: tantivy is not installed.
    """

    def __init__(self, path: str | Path, *, top_k: int = 3) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        tantivy = _tantivy()
        self._path = Path(path).absolute()
        remedy = "write it with build_tantivy(path, passages)"
        meta = self._path / "meta.json"
        if not meta.is_file():
            raise ValueError(f"tantivy index {self._path} does not exist; {remedy}")
        try:
            self._index: Any = _with_analyser(tantivy, tantivy.Index.open(str(self._path)))
            self._index.config_reader(reload_policy="manual")  # otherwise a thread would watch the folder
            self._index.reload()
            self._searcher: Any = self._index.searcher()
            self._index.parse_query_lenient("a", [_FIELD])
        except (ValueError, OSError) as error:
            raise ValueError(f"tantivy index {self._path} cannot be read ({error}); {remedy}") from error
        written = meta.stat()
        self.name = f"tantivy over {self._path.name}"
        self.identity = f"tantivy:{self._path.name}:{written.st_size}:{written.st_mtime_ns}"
        self.top_k = top_k

    def search(self, query: str, top_k: int | None = None) -> list[Passage]:
        """The best ``top_k`` passages for any word of ``query``, best first. Any text is a query; no word, no passage.

        Raises:
            InfraFault: the files broke, or the index is closed.
        """
        words = query_words(query)
        if not words:
            return []
        searcher = self._searcher
        if searcher is None:
            raise InfraFault(f"tantivy index {self._path} is closed")
        try:
            parsed, _ = self._index.parse_query_lenient(" ".join(_telling(searcher, words)), [_FIELD])
            hits = searcher.search(parsed, limit=top_k or self.top_k, count=False).hits
            found = [searcher.doc(address) for _, address in hits]
        except (ValueError, OSError) as error:
            raise InfraFault(f"search in {self._path} failed: {error}") from error
        return [Passage(title, text) for title, _, text in (each.get_first(_FIELD).partition("\n") for each in found)]

    def close(self) -> None:
        """Let go of the files. Idempotent."""
        self._searcher = None


def _telling(searcher: Any, words: list[str]) -> list[str]:
    """``words`` without the common ones; of common words only, the rarest."""
    counts = {word: searcher.doc_freq(_FIELD, word) for word in words}
    limit = max(COMMON_PASSAGES, COMMON_SHARE * searcher.num_docs)
    return [word for word in words if counts[word] <= limit] or [min(words, key=lambda word: counts[word])]


def _tantivy() -> ModuleType:
    try:
        return import_module("tantivy")
    except ImportError as error:
        raise RuntimeError('tantivy is not installed; pip install "arft_fast[search]", or use an FTS5 index') from error


def _schema(tantivy: ModuleType) -> Any:
    builder = tantivy.SchemaBuilder()
    # Positions are not needed: a query is a set of words.
    builder.add_text_field(_FIELD, stored=True, tokenizer_name=_ANALYSER, index_option="freq")
    return builder.build()


def _with_analyser(tantivy: ModuleType, index: Any) -> Any:
    filters = (tantivy.Filter.remove_long(64), tantivy.Filter.lowercase(), tantivy.Filter.ascii_fold())
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.regex(r"\w+"))
    for each in filters:
        builder = builder.filter(each)
    index.register_tokenizer(_ANALYSER, builder.build())
    return index
