"""Corpus files and the indexes that are built of them: FTS5, and tantivy where it is installed."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arft_fast.tools.build_index import main
from arft_fast.tools.corpus import CorpusError, read_corpus, split_contents
from arft_fast.tools.search import Passage
from arft_fast.tools.search_index import SearchIndex
from arft_fast.tools.search_tantivy import TantivyIndex, build_tantivy
from arft_fast.tools.tool import InfraFault

needs_tantivy = pytest.mark.skipif(importlib.util.find_spec("tantivy") is None, reason="tantivy is not installed")
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
ROWS = [
    {"id": "0", "contents": '"Eiffel Tower"\nIt stands in Paris.\nIt is high.'},
    {"id": "1", "contents": "Louvre\nA museum in Paris.", "title": "ignored", "text": ""},
    {"id": 2, "title": "Café Zürich", "text": "A café in Barcelona."},
    {"text": "No title, zebra."},
]
PASSAGES = [
    ("Eiffel Tower", "It stands in Paris.\nIt is high."),
    ("Louvre", "A museum in Paris."),
    ("Café Zürich", "A café in Barcelona."),
    ("", "No title, zebra."),
]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_jsonl_is_read_in_all_its_shapes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", *ROWS, "")
    assert list(read_corpus(path)) == PASSAGES
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_corpus(packed)) == PASSAGES


@needs_pyarrow
def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    path = tmp_path / "c.parquet"
    rows = [{"title": f"t{i}", "text": f"x{i}", "other": i} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_corpus(path)
    assert next(found) == ("t0", "x0") and list(found)[-1] == ("t2999", "x2999")
    rows[2500]["text"] = " "
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(CorpusError, match=r"c\.parquet, row 2501: no text"):
        list(read_corpus(path))
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), path)
    with pytest.raises(CorpusError, match="no column text or contents"):
        list(read_corpus(path))
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(CorpusError, match="cannot be read"):
        list(read_corpus(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match="pip install pyarrow"):
        list(read_corpus(tmp_path / "c.parquet"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not an object"),
        ('{"id": 1, "body": "x"}', r"no text and no contents \(its keys: body, id\)"),
        ('{"text": ["x"]}', "no text"),
        ('{"text": "a\\ud800"}', "half a character"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, words: str) -> None:
    path = jsonl(tmp_path / "c.jsonl", *ROWS, row)
    with pytest.raises(CorpusError, match=rf"c\.jsonl, row 5: .*{words}"):
        list(read_corpus(path))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        list(read_corpus(tmp_path / "c.jsonl"))
    (tmp_path / "c.csv").write_text("a,b")
    with pytest.raises(CorpusError, match=r"neither \.jsonl nor"):
        list(read_corpus(tmp_path / "c.csv"))
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match="not UTF-8"):
        list(read_corpus(tmp_path / "c.jsonl"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:-50])
    with pytest.raises(CorpusError, match="cannot be read"):
        list(read_corpus(tmp_path / "c.jsonl.gz"))


def test_contents_are_split_at_the_title() -> None:
    assert split_contents('"A "B" C"\ntext\nmore') == ('A "B" C', "text\nmore")
    assert split_contents("only text") == ("", "only text")
    assert split_contents("x" * 301 + "\ntext") == ("", "x" * 301 + "\ntext")


def test_the_command_builds_an_fts5_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, out = jsonl(tmp_path / "c.jsonl", *ROWS), tmp_path / "new" / "index.sqlite"
    assert main([str(corpus), "--out", str(out)]) == 0
    assert "index.sqlite: 0." in capsys.readouterr().out
    assert SearchIndex(out).search("zebra") == [Passage(*PASSAGES[3])]
    assert main([str(corpus), "--out", str(out), "--limit", "3"]) == 0
    assert SearchIndex(out).search("zebra") == []


def test_the_command_says_what_is_wrong_in_one_line_and_keeps_the_old_index(tmp_path: Path) -> None:
    corpus, out = jsonl(tmp_path / "c.jsonl", *ROWS), tmp_path / "index.sqlite"
    assert main([str(corpus), "--out", str(out)]) == 0
    jsonl(corpus, *ROWS, "nonsense")
    command = [sys.executable, "-m", "arft_fast.tools.build_index", str(corpus), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "c.jsonl, row 5" in done.stderr and SearchIndex(out).search("zebra")


@pytest.fixture(scope="module")
def tantivy(tmp_path_factory: pytest.TempPathFactory) -> TantivyIndex:
    path = tmp_path_factory.mktemp("tantivy") / "index"
    build_tantivy(path, PASSAGES)
    return TantivyIndex(path)


@needs_tantivy
def test_tantivy_finds_what_fts5_finds(tantivy: TantivyIndex) -> None:
    assert tantivy.search("Where is the EIFFEL tower?")[0] == Passage(*PASSAGES[0])
    assert tantivy.search("CAFE zurich")[0] == Passage(*PASSAGES[2])
    assert tantivy.search("title zebra") == [Passage(*PASSAGES[3])]
    assert (len(tantivy.search("paris")), len(tantivy.search("paris", 1))) == (2, 1)


@needs_tantivy
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    query=st.text(st.characters(codec=None))
    | st.text(alphabet="\"*:^(){}[]+-_\\,\0' ORANDNEARxyz²½ⅷﬁ́")
    | st.lists(st.sampled_from("AND OR NOT IN TO zebra * + - : ( ) [ ] { } \" ' ~ ^2 x² title:".split())).map(" ".join)
)
def test_any_text_is_a_query_of_tantivy(tantivy: TantivyIndex, query: str) -> None:
    assert len(tantivy.search(query)) <= 3


@needs_tantivy
def test_query_syntax_is_only_words(tantivy: TantivyIndex) -> None:
    for query in ("*", "zeb*", "NOT nothing", "text:*", "[y TO z]", "-paris -nothing +nothing", "paris AND nothing"):
        words = {word.strip("-+*").lower() for word in query.split()}
        assert all(words & {"paris", "zebra"} for _ in tantivy.search(query)), query


@needs_tantivy
def test_tantivy_leaves_a_word_of_most_passages_out_beside_a_rarer_one(tmp_path: Path) -> None:
    build_tantivy(tmp_path / "index", ((f"t{i}", f"the{' of' * (i % 10 > 0)} thing{i % 50}") for i in range(2500)))
    index = TantivyIndex(tmp_path / "index")
    assert index.search("the thing7 t7", 1)[0].title == "t7"
    assert {passage.text for passage in index.search("THE of thing7", 99)} == {"the of thing7"}
    assert len(index.search("the of", 9)) == 9  # of common words the rarest stays
    index.close()


@needs_tantivy
def test_a_tantivy_index_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "index"
    build_tantivy(path, [("old", "first")])
    old = TantivyIndex(path)
    with pytest.raises(ValueError, match=r"passages\[1\] \('empty'\) has no text"):
        build_tantivy(path, [("new", "second"), ("empty", " ")])
    with pytest.raises(ValueError, match="passages is empty"):
        build_tantivy(path, [])
    assert TantivyIndex(path).search("first") and [entry.name for entry in tmp_path.iterdir()] == ["index"]
    build_tantivy(path, [("new", "second")])
    new = TantivyIndex(path)
    assert (old.search("first"), new.search("first")) == ([Passage("old", "first")], [])
    assert old.identity != new.identity
    new.close()
    with pytest.raises(InfraFault, match="closed"):
        new.search("second")


@needs_tantivy
def test_what_is_no_tantivy_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; write it with build_tantivy"):
        TantivyIndex(tmp_path)
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="is no tantivy index"):
        build_tantivy(tmp_path / "precious", PASSAGES)
    (tmp_path / "meta.json").write_text("nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        TantivyIndex(tmp_path)


@needs_tantivy
def test_another_process_reads_a_tantivy_index(tmp_path: Path) -> None:
    corpus, out = jsonl(tmp_path / "c.jsonl", *ROWS), tmp_path / "index"
    assert main([str(corpus), "--out", str(out), "--engine", "tantivy"]) == 0
    here = TantivyIndex(out)
    code = "import sys, arft_fast.tools.search_tantivy as t; print(t.TantivyIndex(sys.argv[1]).search('zebra'))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(here.search("zebra"))


def test_without_tantivy_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tantivy", None)
    with pytest.raises(RuntimeError, match=r"pip install .*arft_fast\[search\]"):
        TantivyIndex(tmp_path)
    assert main([str(jsonl(tmp_path / "c.jsonl", *ROWS)), "--out", str(tmp_path / "o"), "--engine", "tantivy"]) == 1
