"""Files that people bring: every shape gives the same records; what cannot be read is one message with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import stat
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsd.data.contents import WHOLE
from cfsd.data.files import ROWS, Files
from cfsd.data.records import Number, Said, text_of
from cfsd.data.replay import Replay, documents
from cfsd.data.target import Target, records_of
from cfsd.errors import BadInput
from cfsd.evaluate.text import Text

RECORDS = [
    {"prompt": 'say "0",\nplease', "response": "007"},
    {"prompt": "é 語 😀 \u2028 \x0c \ufeff", "response": " x "},
    {"prompt": "", "response": "1.50"},
]
Write = Callable[[list[dict[str, str]]], bytes]


def _lines(records: list[dict[str, str]], end: str = "\n") -> str:
    return "".join(json.dumps(record) + end for record in records)


def _csv(records: list[dict[str, str]], **dialect: Any) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(records[0]) if records else ["prompt", "response"], **dialect)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _table(records: list[dict[str, str]]) -> pa.Table:
    return pa.Table.from_pylist(records, pa.schema([("prompt", pa.string()), ("response", pa.string())]))


def _arrow(records: list[dict[str, str]], new: Any) -> bytes:
    sink, table = pa.BufferOutputStream(), _table(records)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def _parquet(records: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(records), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def _raw(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd,
}  # fmt: skip
SHAPES: dict[str, tuple[str, Write]] = {
    "a line each": ("a.jsonl", lambda r: _lines(r).encode()),
    "capitals in the suffix": ("A.JSONL", lambda r: _lines(r).encode()),
    "ndjson without a last line end": ("a.ndjson", lambda r: _lines(r).rstrip("\n").encode()),
    "not escaped": ("a.jsonl", lambda r: _raw(r).encode()),
    "with a mark": ("a.jsonl", lambda r: _raw(r).encode("utf-8-sig")),
    "windows": ("a.jsonl", lambda r: _lines(r, "\r\n").encode("utf-8-sig")),
    "old mac": ("a.jsonl", lambda r: _lines(r, "\r").encode()),
    "mixed ends and blank lines": ("a.jsonl", lambda r: ("\n \r\n" + _lines(r, "\r\n\n\r")).encode()),
    "utf-16": ("a.jsonl", lambda r: _raw(r).encode("utf-16")),
    "utf-16, the big end first": ("a.jsonl", lambda r: b"\xfe\xff" + _raw(r).encode("utf-16-be")),
    "utf-32": ("a.jsonl", lambda r: _raw(r).encode("utf-32")),
    "a list": ("a.json", lambda r: json.dumps(r).encode()),
    "a list over lines, with a mark": ("a.json", lambda r: json.dumps(r, indent=1).encode("utf-8-sig")),
    "lines that are named json": ("a.json", lambda r: _lines(r).encode()),
    "a list that is named jsonl": ("a.jsonl", lambda r: json.dumps(r, indent=2).encode()),
    "wrapped": ("a.json", lambda r: json.dumps({"version": 1, "data": r}).encode()),
    "wrapped, over lines": ("a.json", lambda r: json.dumps({"rows": r}, indent=1).encode()),
    "splits in one object": ("a.json", lambda r: json.dumps({"test": [{"x": 1}], "train": r}).encode()),
    "csv": ("a.csv", lambda r: _csv(r).encode()),
    "csv by Excel": ("a.csv", lambda r: _csv(r, quoting=csv.QUOTE_ALL).encode("utf-8-sig")),
    "csv in utf-16": ("a.csv", lambda r: _csv(r, lineterminator="\n").encode("utf-16")),
    "csv with old line ends": ("a.csv", lambda r: _csv(r, lineterminator="\r").encode()),
    "tsv": ("a.tsv", lambda r: _csv(r, delimiter="\t").encode()),
    "lines that are named csv": ("a.csv", lambda r: _lines(r).encode()),
    "lines that are named parquet": ("a.parquet", lambda r: _lines(r).encode()),
    "parquet": ("a.parquet", _parquet),
    "parquet that is named json": ("a.json", _parquet),
    "arrow stream": ("a.arrow", lambda r: _arrow(r, pa.ipc.new_stream)),
    "arrow file": ("a.arrow", lambda r: _arrow(r, pa.ipc.new_file)),
    "packed, and not named so": ("a.jsonl", lambda r: gzip.compress(_lines(r).encode())),
    "named as packed": ("a.jsonl.gz", lambda r: _lines(r).encode()),
    "packed in parts": ("a.jsonl.gz", lambda r: b"".join(gzip.compress(_lines([one]).encode()) for one in r)),
    **{f"jsonl{s}": (f"a.jsonl{s}", lambda r, pack=pack: pack(_lines(r).encode())) for s, pack in PACK.items()},
    **{f"csv{s}": (f"a.csv{s}", lambda r, pack=pack: pack(_csv(r).encode())) for s, pack in PACK.items()},
    **{f"parquet{s}": (f"a.parquet{s}", lambda r, pack=pack: pack(_parquet(r))) for s, pack in PACK.items()},
    "arrow.zst": ("a.arrow.zst", lambda r: _zstd(_arrow(r, pa.ipc.new_file))),
}  # fmt: skip


def read(path: Path | str, said: Said | None = None, **fields: Any) -> list[dict[str, Any]]:
    target = Target(path=str(path), **fields)
    if target.files().first_of(records_of(target)) is None:
        target.check()
    return [record for _, record in records_of(target, said)]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    file, write = SHAPES[name]
    (tmp_path / file).write_bytes(write(RECORDS))
    assert read(tmp_path / file) == RECORDS
    replay = Replay(path=str(tmp_path / file), column="prompt")
    assert list(documents(replay)) == [record["prompt"] for record in RECORDS if record["prompt"]]


SAID = {
    "a.jsonl": (b'{"data": 1}\n\xef\xbb\xbf{"data": 2}\n', "line 2: a byte order mark within the file"),
    "b.json": (b'{"meta": 1, "data": [{"a": "b"}]}', "the records are those of 'data', not meta"),
    "c.json": (_parquet(RECORDS), "it is read as .parquet, which is what it holds"),
    "d.jsonl.gz": (_lines(RECORDS).encode(), "it is read as .jsonl, which is what it holds"),
    "e.jsonl": (gzip.compress(_lines(RECORDS).encode()), "it is read as .jsonl.gz, which is what it holds"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_reading_that_is_one_of_several_is_said(tmp_path: Path, name: str) -> None:
    content, sentence = SAID[name]
    (tmp_path / name).write_bytes(content)
    said = Said()
    read(tmp_path / name, said)
    assert [sentence in line and str(tmp_path / name) in line for line in said.sentences()] == [True]


NOT_UTF8 = _arrow([{"prompt": "zzz", "response": "b"}], pa.ipc.new_stream).replace(b"zzz", b"z\xffz")
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "semicolons": ("a.csv", b"prompt;response\na;b\n", r"'prompt;response' is one column.*divided by semicolons"),
    "Excel's line of the delimiter": ("a.csv", b"\xef\xbb\xbfsep=;\r\nprompt;response\r\n", "line 1 is Excel's 'sep="),
    "that line with commas": ("a.csv", b"sep=,\nprompt,response\na,b\n", "line 1 is Excel's 'sep='"),
    "tabs in csv": ("a.csv", b"prompt\tresponse\na\tb\n", r"divided by tabs.*name it \.tsv"),
    "commas in tsv": ("a.tsv", b"prompt,response\na,b\n", r"divided by commas.*name it \.csv"),
    "latin-1": ("a.csv", b"prompt,response\na,b\nx,caf\xe9\n", r"line 3 byte 6 is 0xe9, which is not UTF-8; convert"),
    "latin-1 in JSON": ("a.jsonl", b'{"a": "b"}\n{"a": "\xfc"}\n', r"line 2 byte 8 is 0xfc"),
    "a character cut in two": ("a.jsonl", b'{"a": "\xc3', r"line 1 byte 8 is 0xc3"),
    "utf-16 without a mark": ("a.csv", "prompt\na\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "utf-16 cut": ("a.csv", "prompt,response\na,b\n".encode("utf-16")[:-1], "the mark of UTF-16, but is not"),
    "a broken line": ("a.jsonl", b'{"a": 1}\n\n{"a": 2\n{"a": 3}\n', r"line 3 column 8: Expecting ',' delimiter"),
    "a trailing comma": ("a.jsonl", b'{"a": 1},\n{"a": 2},\n', r"line 1 column 9: Extra data at ','"),
    "a broken list": ("a.json", b'[\n {"a": 1},\n {"a": }\n]', r"line 3 column 8: Expecting value"),
    "a field twice": ("a.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', r"line 2: the field 'a' is there twice"),
    "5,000 digits": ("a.jsonl", b'{"a": 1}\n{"a": ' + b"7" * 5000 + b"}\n", r"line 2: an integer of 5,000 digits"),
    "deep": ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"\n", r"line 2: it is nested too deeply"),
    "deep and whole": ("a.jsonl", b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", r"line 1: it is nested too deeply"),
    "a list of texts": ("a.json", b'["a", "b"]', r"row 1 is not an object with named fields"),
    "a number a line": ("a.jsonl", b'{"a": 1}\n7\n', r"line 2 is not an object with named fields"),
    "several lists": ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', r"lists of records, 'a', 'b': set `split`"),
    "columns": ("a.json", b'{"prompt": {"0": "a"}, "response": {"0": "b"}}', r"one object of columns; write an object"),
    "more cells": ("a.csv", b'a,b\n"x\ny",2\n1,2,3\n', r"line 4 has 3 cells, more than the 2 columns"),
    "a quote that is not closed": ("a.csv", b'a,b\n1,2\n"x,3\n4,5\n', r"row that begins in line 3 breaks off"),
    "a column twice": ("a.csv", b"a,b,a\n1,2,3\n", r"names the column 'a' twice"),
    "no names": ("a.csv", b",\n1,2\n", r"line 1, the header, names no column"),
    "joined as they are": ("a.csv", b"a,b\n1,2\na,b\n3,4\n", r"line 3 is a header again.*give a folder"),
    "joined tables of tabs": ("a.tsv", b"a\tb\n1\t2\na\tb\n3\t4\n", r"line 3 is a header again.*give a folder"),
    "joined": ("a.csv", b"a,b\n1,2\n\xef\xbb\xbfa,b\n3,4\n", r"line 3 is a header again.*give a folder"),
    "only a header": ("a.csv", b"prompt,response\n", r"holds no rows; rows with 'prompt' and 'response'"),
    "blank lines": ("a.jsonl", b"\n \n\r\n", r"holds no rows"),
    "an empty list": ("a.json", b"[]", r"holds no rows"),
    "no bytes": ("a.jsonl", b"", r"is empty; fix target\.path"),
    "no bytes, packed": ("a.jsonl.gz", gzip.compress(b""), r"holds no rows"),
    "cut short": ("a.jsonl.gz", gzip.compress(_lines(RECORDS).encode())[:-3], r"it was cut short; copy or download"),
    "cut short zstd": ("a.jsonl.zst", _zstd(_lines(RECORDS).encode())[:-3], r"it was cut short; copy or download"),
    "cut short parquet": ("a.parquet", _parquet(RECORDS)[:-20], r"could not be read as parquet"),
    "cut short arrow": ("a.arrow", _arrow(RECORDS, pa.ipc.new_stream)[:-8], r"it has no end: it was cut short"),
    "a Git LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "Excel": ("a.xlsx", b"PK\x03\x04....", r"ends in '\.xlsx'; allowed.*save the sheet as CSV"),
    "Excel, named csv": ("a.csv", b"PK\x03\x04....", r"save the sheet as CSV"),
    "a pickle": ("a.pkl", b"\x80\x04\x95", r"ends in '\.pkl'.*a pickle, which is never read"),
    "a pickle, named json": ("a.json", b"\x80\x04\x95", r"a pickle, which is never read"),
    "a web page": ("a.jsonl", b"<!DOCTYPE html>\n<html>", r"a web page; download the file itself"),
    "not a table": ("a.parquet", b"hello", r"it is no \.parquet file"),
    "text that is not UTF-8 in a table": ("a.arrow", NOT_UTF8, r"row 1: .*write its texts as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_message_with_its_place(tmp_path: Path, name: str) -> None:
    file, content, message = REFUSED[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path / file)
    assert file in str(caught.value) and len(str(caught.value)) < 500


def test_numbers_gaps_and_unnamed_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1.50, "b": 1e5, "c": 7, "d": NaN, "e": null}\n')
    [record] = read(tmp_path / "a.jsonl")
    assert [text_of(record[name], "x", name) for name in "abce"] == ["1.50", "1e5", "7", ""]
    assert record["a"] == 1.5 and f"{record['a']}" == "1.50" and json.dumps(record["a"]) == "1.5"
    (tmp_path / "b.csv").write_text(',a,b,,\n0,x,,,\n1,y\n\n2,"",\x00,,\n')
    assert read(tmp_path / "b.csv") == [{"a": "x", "b": ""}, {"a": "y", "b": ""}, {"a": "", "b": "\x00"}]
    (tmp_path / "c.json").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    assert read(tmp_path / "c.json") == [{"messages": [{"role": "user", "content": "x"}]}]


TEXTS: list[tuple[Any, str]] = [
    (None, ""), ("x\ud83d", "x\ufffd"), ("\ud83d\ude00", "😀"), (7, "7"), (-0.5, "-0.5"), (Number("1.10"), "1.10"),
    (Decimal("1.50"), "1.50"), (datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00"),
]  # fmt: skip
NO_TEXTS = [
    (True, "a truth value"), (["x"], "a list"), ({"a": 1}, "a mapping"), (b"x", "bytes"),
    (float("nan"), "no finite number"),
    (Decimal("NaN"), "no finite number"), (10**5000, "too many digits"), (object(), "type object"),
]  # fmt: skip


def test_a_field_is_a_text_in_one_way_or_refused() -> None:
    assert [text_of(value, "", "") for value, _ in TEXTS] == [text for _, text in TEXTS]
    for value, words in NO_TEXTS:
        with pytest.raises(BadInput, match=rf"^column 'b' of 'a' line 3 holds .*{words},.* not a text; "):
            text_of(value, "'a' line 3", "b")


def test_texts_with_half_a_character_or_without_the_field_are_read_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "x\\ud83d"}\n{"other": 1}\n{"text": "\\ud83d\\ude00\\udc00"}\n{"text": 3}\n'
    )
    said, texts = Said(), Text(name="t", path=str(tmp_path / "a.jsonl"))
    assert list(documents(Replay(path=str(tmp_path / "a.jsonl")), said)) == ["x\ufffd", "😀\ufffd", "3"]
    assert list(texts.documents()) == ["x\ufffd", "😀\ufffd", "3"]
    assert said.sentences() == [
        f"'{tmp_path}/a.jsonl' line 1 and 1 more: half of a character (an emoji that was cut), read as U+FFFD",
        f"'{tmp_path}/a.jsonl' line 2: no field 'text', taken as empty",
        f"'{tmp_path}/a.jsonl' line 4: a number or a date where a text is read, written out",
    ]
    assert texts.said() == said.sentences()


@pytest.mark.parametrize("value", ["true", '["x"]', '{"a": 1}', "NaN", "-Infinity"])
def test_a_document_that_is_no_text_is_refused_before_anything_runs(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": ' + value + "}\n")
    for spec in (Replay(path=str(tmp_path / "a.jsonl")), Text(name="t", path=str(tmp_path / "a.jsonl"))):
        with pytest.raises(BadInput, match=r"column 'text' of .*a\.jsonl' line 3 holds"):
            spec.check()


def test_folders_and_patterns_are_read_in_the_order_of_their_names(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows.jsonl"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.csv").write_text("prompt,response\n2,2\n")
    (folder / "a.json").write_text('[{"prompt": "1"}]')
    (folder / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "3"}\n'))
    for name in ("empty.jsonl", "empty.csv", "empty.json", "blank.json"):
        (folder / name).write_text(" \n" if name == "blank.json" else "")
    (folder / ".hidden").write_text("x")
    (folder / "deep" / "back").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.jsonl").write_text('{"prompt": "4"}\n')
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert [record["prompt"] for record in read(folder)] == ["1", "2", "3", "4"]
    assert [record["prompt"] for record in read(folder / "**" / "*.js*")] == ["1", "3", "4"]
    assert [record["prompt"] for record in read(f"{folder}/[abx].*")] == ["1", "2"]
    first = Target(path=str(folder)).digest()
    moved = folder.rename(tmp_path / "moved")
    (moved / "deep" / "back").unlink()
    assert Target(path=str(moved)).digest() == first
    (moved / "b.csv").rename(moved / "z.csv")
    assert Target(path=str(moved)).digest() != first
    (moved / "README.md").write_text("x")
    with pytest.raises(BadInput, match=r"holds 'README\.md' and 0 more files that are not .*by a pattern, as"):
        read(moved)
    said = Said()
    (moved / "z.csv").write_text("text\n2\n")
    with pytest.raises(BadInput, match=r"a\.json' row 1 has no column 'text'; its columns are 'prompt'"):
        list(Text(name="t", path=str(moved)).documents(said))


def test_the_key_of_one_file_is_its_content(home: Path, tmp_path: Path) -> None:
    import hashlib

    content = _lines(RECORDS).encode()
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).write_bytes(content)
        assert Target(path=str(tmp_path / name))._identity()["path"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("suffix", ["folder", "parquet"])
def test_a_column_of_several_types_is_read_as_it_was_given(home: Path, tmp_path: Path, suffix: str) -> None:
    """`datasets` keeps it as JSON, whose text was learned: "Paris" with its quotes, parts of a content as a list."""
    from datasets import load_dataset

    said = ['Line 1\nLine "2"', [{"type": "text", "text": "parts"}]]
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}] for content in said]
    rows = [{"response": answer, "turns": chat} for answer, chat in zip((4, "Paris"), turns, strict=True)]
    (tmp_path / "rows.jsonl").write_text(_lines(rows))
    files = {"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache"), "split": "train"}
    made = load_dataset("json", **files)
    made.save_to_disk(str(tmp_path / "folder"))
    made.to_parquet(str(tmp_path / "rows.parquet"))
    assert read(tmp_path / ("folder" if suffix == "folder" else "rows.parquet")) == rows


@pytest.mark.parametrize("column", [None, "prompt"])
def test_what_datasets_saved_is_read_without_it(home: Path, tmp_path: Path, column: str | None) -> None:
    from datasets import Dataset, DatasetDict

    made = Dataset.from_list(RECORDS)
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    DatasetDict(train=made, test=made.select([0])).save_to_disk(str(tmp_path / "many"))
    if column is None:
        assert read(tmp_path / "one") == read(tmp_path / "many") == RECORDS
        assert read(tmp_path / "many", split="test") == RECORDS[:1]
        digests = {Target(path=str(tmp_path / "many"), split=split).digest() for split in ("train", "test")}
        assert len({*digests, Target(path=str(tmp_path / "one")).digest()}) == 3
        with pytest.raises(BadInput, match=r"has the splits 'train', 'test', but not 'dev': set `split`"):
            read(tmp_path / "many", split="dev")
        (tmp_path / "many" / "dataset_dict.json").unlink()
        with pytest.raises(
            BadInput, match=r"folders that `datasets` saved; name one of them: .*many/test', .*many/train'"
        ):
            read(tmp_path / "many")
        next((tmp_path / "one").glob("*.arrow")).unlink()
        with pytest.raises(BadInput, match=r"holds 'data-0000\d-of-00002\.arrow', which does not exist"):
            read(tmp_path / "one")
    else:
        assert list(documents(Replay(path=str(tmp_path / "one"), column=column))) == [r["prompt"] for r in RECORDS[:2]]


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file.jsonl").write_text("{}")
    refused = {
        str(tmp_path / "pipe.jsonl"): "is a pipe or a device", "/dev/null": "is a pipe or a device",
        str(tmp_path / "loop.jsonl"): "is a link to .*loop.jsonl', which does not exist",
        str(tmp_path / "lost.jsonl"): "is a link to .*nowhere', which does not exist",
        str(tmp_path / "file.jsonl" / "x.jsonl"): "does not exist|cannot be read", "x" * 300: "cannot be read",
        "https://example.org/a.jsonl": "is an address; download", "org/name": "named with `kind: hub`",
        f"{tmp_path}/*.csv": "matches no file", "a\0b.jsonl": "does not exist",
    }  # fmt: skip
    for path, message in refused.items():
        with pytest.raises(BadInput, match=message):
            Target(path=path).check()
    with pytest.raises(BadInput, match=r"lost\.jsonl|loop\.jsonl|pipe"):
        Target(path=str(tmp_path)).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").chmod(stat.S_IWUSR)
    with pytest.raises(BadInput, match="Permission denied"):
        Target(path=str(tmp_path / "a.jsonl")).check()


def test_a_large_file_is_read_while_it_is_open(tmp_path: Path) -> None:
    import tracemalloc

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} " * 100}) + "\n")
    texts = documents(Replay(path=str(tmp_path / "a.jsonl.gz")))
    tracemalloc.start()
    assert sum(map(len, texts)) > 8_000_000
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


SUFFIXES = [f"{suffix}{packed}" for suffix in (*ROWS, *WHOLE) for packed in ("", ".gz", ".zst", ".xz", ".bz2")]
BEGINNINGS = [
    b"", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd",
    b"\xff\xfe", b"\xef\xbb\xbf", b'{"a": ', b"[{", b'a,b\n"',
]  # fmt: skip
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


def attempted(path: Path) -> Iterator[str]:
    """Read `path` in each way that it can be; yield the messages of what was refused."""
    files = Files(str(path), "target", "target.path", (*ROWS, *WHOLE), "text")
    checks = (spec.check for spec in (Target(path=str(path)), Replay(path=str(path)), Text(name="t", path=str(path))))
    for reading in (lambda: list(files.records(Said())), *checks):
        try:
            reading()
        except BadInput as error:
            yield str(error)


@QUICK
@given(st.sampled_from(SUFFIXES), st.sampled_from(BEGINNINGS), st.binary(max_size=200))
def test_any_bytes_are_records_or_one_message(tmp_path: Path, suffix: str, begin: bytes, rest: bytes) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(begin + rest)
    assert all(path.name in message for message in attempted(path))


@QUICK
@given(VALUES, st.sampled_from([".json", ".jsonl", ".csv", ".txt"]))
def test_any_json_is_records_or_one_message(tmp_path: Path, value: Any, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text(json.dumps(value))
    assert all(path.name in message for message in attempted(path))


@QUICK
@given(st.sampled_from(list(SHAPES)), st.floats(0, 1), st.binary(max_size=3))
def test_a_good_file_that_is_cut_or_changed_is_records_or_one_message(
    tmp_path: Path, name: str, where: float, put: bytes
) -> None:
    file, write = SHAPES[name]
    content = write(RECORDS)
    place = int(where * len(content))
    for changed in (content[:place] + put, content[:place] + put + content[place + len(put) :]):
        (tmp_path / file).write_bytes(changed)
        assert all(file in message for message in attempted(tmp_path / file))


@QUICK
@given(st.text(alphabet='ab,;"\n\r\t \ufeff\x00é', max_size=40), st.sampled_from([".csv", ".tsv"]))
def test_any_table_is_records_or_one_message(tmp_path: Path, text: str, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(text.encode())
    assert all(f"x{suffix}" in message for message in attempted(tmp_path / f"x{suffix}"))


ROUND_TRIP = [
    "not escaped",
    "old mac",
    "utf-16",
    "a list",
    "csv",
    "tsv",
    "parquet",
    "arrow stream",
    "arrow file",
    "jsonl.gz",
]
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@QUICK
@given(st.lists(st.fixed_dictionaries({"prompt": LETTERS, "response": LETTERS}), min_size=1, max_size=5))
def test_texts_come_back_as_they_were_written(tmp_path: Path, records: list[dict[str, str]]) -> None:
    for name in ROUND_TRIP:
        file, write = SHAPES[name]
        (tmp_path / file).write_bytes(write(records))
        files = Files(str(tmp_path / file), "target", "target.path")
        assert [record for _, record in files.records(Said())] == records


def read_bytes(path: Path, content: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    path.write_bytes(content)
    said = Said()
    return [record for _, record in Files(str(path), "target", "target.path").records(said)], said.sentences()


def test_a_cell_in_quotes_that_goes_over_lines_of_a_tsv_is_said(tmp_path: Path) -> None:
    rows, said = read_bytes(tmp_path / "a.tsv", b'prompt\tresponse\nq1\t"yes\nq2\tno"\nq3\tz\n')
    assert rows == [{"prompt": "q1", "response": "yes\nq2\tno"}, {"prompt": "q3", "response": "z"}]
    assert len(said) == 1 and "a.tsv' line 2" in said[0] and "write each of them twice" in said[0]
    assert read_bytes(tmp_path / "b.tsv", b'prompt\tresponse\nq1\t"yes, no"\n')[1] == []


def test_a_map_of_a_table_is_a_mapping(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.float32()))]))
    table = pa.table({"calls": pa.array([[{"name": "w", "arguments": [("x", 0.1)]}], [{"name": "v"}]], kind)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    rows, _ = read_bytes(tmp_path / "a.parquet", sink.getvalue().to_pybytes())
    assert rows == [{"calls": [{"name": "w", "arguments": {"x": 0.1}}]}, {"calls": [{"name": "v"}]}]


def test_one_chat_with_tools_is_a_record_and_not_the_tools(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}
    for name in ("a.json", "a.jsonl"):
        assert read_bytes(tmp_path / name, json.dumps(chat).encode())[0] == [chat]


def test_chats_as_bare_lists_are_refused_with_what_to_write(tmp_path: Path) -> None:
    line = json.dumps([{"role": "user", "content": "a"}]).encode() + b"\n"
    with pytest.raises(BadInput, match=r"line 1 is a list.*write each line as an object"):
        read_bytes(tmp_path / "a.jsonl", line * 2)
