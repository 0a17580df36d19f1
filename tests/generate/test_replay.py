"""Replayed documents: every kind of file gives the same rows, cut and ended as sampled rows are."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from scipy.stats import chisquare

from cfsd.data.replay import Replay, documents
from cfsd.errors import BadInput
from cfsd.evaluate.text import Text
from cfsd.generate.replay_rows import replay_rows
from cfsd.model.loading import Tokenization, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = 0, 1
TEXTS = ["abc", "", "defghij klm", "x = y", " ", "a" * 25, "bcd.efg.hij", "no", "tuv:wxyz abcdefg"]
KEPT = [text for text in TEXTS if text.strip()]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> "PreTrainedTokenizerBase":
    return load_tokenizer(model_folder)


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    records = [{"number": i, column: text} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=4)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == "":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:04}.txt").write_text(text)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def replay_of(path: Path, **settings: Any) -> Replay:
    replay = Replay(path=str(path), **settings)
    replay.check()
    return replay


def rows_of(
    path: Path, tokenizer: "PreTrainedTokenizerBase", rows: int, *, length: int = 6, seed: int = 0,
    eos_ids: tuple[int, ...] = (END,), start: int = START,
) -> list[list[int]]:  # fmt: skip
    return list(
        replay_rows(replay_of(path), Tokenization(tokenizer, start, eos_ids), rows=rows, length=length, seed=seed)
    )


def cut(text: str, tokenizer: "PreTrainedTokenizerBase", length: int, end: list[int]) -> list[list[int]]:
    """Return the rows of one document, the plain way."""
    ids = [*tokenizer.convert_tokens_to_ids(list(text)), *end]
    rows = [[START, *ids[i : i + length]] for i in range(0, len(ids), length)]
    return rows[:-1] if rows[-1] == [START, *end] else rows


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "folder"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, tokenizer: Any, name: str) -> None:
    path = write(tmp_path / name, TEXTS)
    assert list(documents(replay_of(path))) == KEPT
    assert rows_of(path, tokenizer, 12) == rows_of(write(tmp_path / "same.jsonl", TEXTS), tokenizer, 12)


@pytest.mark.parametrize(("eos_ids", "end"), [((END,), [END]), ((5, END), [END]), ((5,), [5]), ((), [])])
def test_rows_are_the_documents_cut_from_their_start_to_their_end(
    tmp_path: Path, tokenizer: Any, eos_ids: tuple[int, ...], end: list[int]
) -> None:
    texts = [text for text in KEPT if tokenizer.convert_ids_to_tokens(5) not in text]
    whole = {text: cut(text, tokenizer, 6, end) for text in texts}
    total = sum(map(len, whole.values()))
    rows = rows_of(write(tmp_path / "rows.jsonl", texts), tokenizer, total, eos_ids=eos_ids)
    assert Counter(map(tuple, rows)) == Counter(tuple(row) for part in whole.values() for row in part)
    assert any(len(part) > 2 for part in whole.values())
    for part in whole.values():
        at = rows.index(part[0])
        assert rows[at : at + len(part)] == part


def test_an_end_that_does_not_fit_is_no_row_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", ["abcdef", "ghi"])
    assert sorted(map(len, rows_of(path, tokenizer, 2))) == [5, 7]
    with pytest.raises(BadInput, match="gives 2 rows"):
        rows_of(path, tokenizer, 3)


def test_more_rows_begin_with_the_same_ones_in_an_order_of_their_seed(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [f"{a}{b}{c}defgh" for a in "abcd" for b in "efgh" for c in "ijkl"])
    orders = [rows_of(path, tokenizer, 128, seed=seed) for seed in (0, 1)]
    assert orders[0] != orders[1] and Counter(map(tuple, orders[0])) == Counter(map(tuple, orders[1]))
    for fewer in (1, 2, 63, 64, 127):
        assert rows_of(path, tokenizer, fewer) == orders[0][:fewer]


def test_every_document_comes_first_equally_often(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", ["a", "bcdefghij", "klmnopqrstuvwxyz", "b", "c"])
    replay, base = replay_of(path), Tokenization(tokenizer, START, (END,))
    first = Counter(tuple(next(replay_rows(replay, base, rows=1, length=30, seed=seed))) for seed in range(400))
    assert len(first) == 5 and chisquare(list(first.values())).pvalue > 1e-3


def test_a_book_is_rehearsed_from_everywhere_and_nothing_of_it_is_lost(tmp_path: Path, tokenizer: Any) -> None:
    words = "".join(f"{a}{b}{c}{d} " for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh" for d in "abcdefgh")
    path = write(tmp_path / "rows.jsonl", [words])
    few = ["".join(tokenizer.convert_ids_to_tokens(row[1:])) for row in rows_of(path, tokenizer, 200)]
    places = [words.index(text) / len(words) for text in few]
    assert min(places) < 0.25 and max(places) > 0.75
    with pytest.raises(BadInput, match=rf"gives \d+ rows of at most 6 tokens \({len(words) + 1} tokens in all\)"):
        rows_of(path, tokenizer, len(words))


def test_a_tokenizer_that_adds_marks_does_not_double_them(tmp_path: Path, model_folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    adds: Any = load_tokenizer(model_folder)
    adds.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", START), ("<eos>", END)]
    )
    assert adds("ab")["input_ids"][0] == START and adds("ab")["input_ids"][-1] == END
    path = write(tmp_path / "rows.jsonl", ["<bos>abc", "def<eos>", "g"])
    rows = rows_of(path, adds, 3, length=20)
    assert sorted(adds.decode(row) for row in rows) == ["<bos>abc<eos>", "<bos>def<eos>", "<bos>g<eos>"]


@pytest.mark.parametrize("start", [START, END])
def test_an_end_written_in_the_text_ends_the_document(tmp_path: Path, tokenizer: Any, start: int) -> None:
    path = write(tmp_path / "rows.jsonl", ["<eos>abc<eos>defghij<eos><eos>"])
    rows = rows_of(path, tokenizer, 3, start=start)
    assert [row[0] for row in rows] == [start] * 3
    assert [tokenizer.decode(row[1:]) for row in rows] == ["abc<eos>", "defghi", "j<eos>"]


def test_too_few_documents_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", ["abc", "", "defghij"])
    with pytest.raises(BadInput, match=r"3 rows of at most 6 tokens \(12 tokens in all\), but 4 rows are wanted; give"):
        rows_of(path, tokenizer, 4)


def test_what_counts_is_content_not_path(home: Path, tmp_path: Path) -> None:
    one, two, other = (write(tmp_path / f"{n}.jsonl", TEXTS[: 9 - (n == "c")]) for n in "abc")
    digests = [Replay(path=str(path)).digest() for path in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]
    as_text = two.rename(tmp_path / "b.txt")  # read as one document
    assert Replay(path=str(as_text)).digest() != digests[0]


def test_of_packed_files_both_endings_count(home: Path, tmp_path: Path) -> None:
    """`.txt.gz` is one document and `.jsonl.gz` is records: the same bytes, and another corpus."""
    packed = gzip.compress(write(tmp_path / "docs.jsonl", TEXTS).read_bytes())
    digests = {}
    for name in ("docs.txt.gz", "docs.jsonl.gz", "other.jsonl.gz"):
        (tmp_path / name).write_bytes(packed)
        text = Text(name="own", path=str(tmp_path / name))
        digests[name] = (replay_of(tmp_path / name).digest(), text.digest())
    assert digests["docs.jsonl.gz"] == digests["other.jsonl.gz"]
    assert not {*digests["docs.txt.gz"]} & {*digests["docs.jsonl.gz"]}


def test_a_folder_counts_by_its_files_names_and_contents(home: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "one", TEXTS)
    first = Replay(path=str(folder)).digest()
    folder = folder.rename(tmp_path / "two")
    (folder / ".hidden").write_text("x")
    assert Replay(path=str(folder)).digest() == first
    (folder / "0000.txt").rename(folder / "9999.txt")  # comes last now
    renamed = Replay(path=str(folder)).digest()
    (folder / "9999.txt").write_text("other")
    assert len({first, renamed, Replay(path=str(folder)).digest()}) == 3


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "docs" / "b").mkdir(parents=True)
    write(tmp_path / "docs" / "b" / "part.jsonl", ["second", "third"])
    (tmp_path / "docs" / "a.txt").write_text("first\nof all")
    write(tmp_path / "docs" / "c.csv", ["fourth"])
    assert list(documents(replay_of(tmp_path / "docs"))) == ["first\nof all", "second", "third", "fourth"]


def test_long_cells_gaps_and_other_columns_are_read(tmp_path: Path) -> None:
    assert list(documents(replay_of(write(tmp_path / "a.csv", ["x" * 200_000, "y"])))) == ["x" * 200_000, "y"]
    (tmp_path / "a.jsonl").write_text('{"text": null, "body": "one"}\n\n{"text": "two", "body": "three"}\n')
    assert list(documents(replay_of(tmp_path / "a.jsonl"))) == ["two"]
    assert list(documents(replay_of(tmp_path / "a.jsonl", column="body"))) == ["one", "three"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_missing_column_names_those_that_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"no column 'text'; its columns are 'number', 'body'; set"):
        replay_of(write(tmp_path / name, TEXTS, column="body"))


CASES = {
    "absent": ("absent.jsonl", None, "does not exist.*generate.replay.path"),
    "another kind": ("a.docx", "x", r"ends in '\.docx'; allowed: .*\.txt"),
    "no bytes": ("a.txt", "", "is empty; fix generate.replay.path"),
    "no text": ("a.jsonl", '{"text": " "}\n{"text": null}\n', "holds no text"),
    "no records": ("a.csv", "text\n", "holds no text"),
    "not a text": ("a.jsonl", '{"text": ["x", "y"]}\n', r"holds a list, \['x', 'y'\], not a text"),
    "not JSON": ("a.jsonl", "hello\n", "could not be read as jsonl: line 1"),
    "not UTF-8": ("a.txt", "\udcff", "could not be read as txt: line 1 byte 1 is 0xff, which is not UTF-8"),
    "not a table": ("a.parquet", "hello", "could not be read as parquet"),
}


@pytest.mark.parametrize("name", CASES)
def test_check_refuses_what_gives_no_documents(tmp_path: Path, name: str) -> None:
    file, text, message = CASES[name]
    if text is not None:
        (tmp_path / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match=message):
        replay_of(tmp_path / file)


def test_check_refuses_a_folder_without_or_with_other_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no text"):
        replay_of(tmp_path)
    write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.docx").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"'b\.docx' and 0 more"):
        replay_of(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"kind": "hub"}, {"kind": "hub", "revision": "v1"}])
def test_a_replay_without_what_its_kind_needs_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs"):
        Replay(**settings)


def test_a_data_set_is_read_as_a_file_is(home: Path, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "set").mkdir()
    file = write(tmp_path / "set" / "train.parquet", TEXTS)
    hub = Replay(kind="hub", name=str(tmp_path / "set"), revision="0" * 40)  # a folder is a data set too
    assert list(documents(hub)) == KEPT
    rows = list(replay_rows(hub, Tokenization(tokenizer, START, (END,)), rows=9, length=6, seed=0))
    assert rows == rows_of(file, tokenizer, 9)
    with pytest.raises(BadInput, match="no column 'body'; its columns are 'number', 'text'"):
        list(documents(hub.model_copy(update={"column": "body"})))
    with pytest.raises(BadInput, match=r"could not be loaded.*split 'test'"):
        list(documents(hub.model_copy(update={"split": "test"})))
