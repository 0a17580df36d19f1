"""Digests of files are remembered only while true; digests of rows follow values, whatever the layout."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cfsd.store.digests import DigestMemory, digest_of_files, digest_of_rows, sha256_of_file, write_json

SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("supervised", pa.list_(pa.bool_())),
        ("value", pa.float64()),
        ("text", pa.string()),
    ]
)
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
Row = dict[str, Any]


def maybe_list(items: "st.SearchStrategy[Any]") -> "st.SearchStrategy[Any]":
    return st.none() | st.lists(st.none() | items, max_size=4)


ROW = st.fixed_dictionaries(
    {
        "row_id": st.none() | st.integers(-2, 5),
        "token_ids": maybe_list(st.integers(0, 3)),
        "logprobs": maybe_list(st.floats(-3, 0, width=32)),
        "supervised": maybe_list(st.booleans()),
        "value": st.none() | st.floats(allow_nan=False),
        "text": st.none() | st.text(LETTERS, max_size=4),
    }
)
ROWS = st.lists(ROW, min_size=1, max_size=8)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def digest(rows: list[Row], shard: int = 100, group: int = 100) -> str:
    with TemporaryDirectory() as folder:
        return digest_of_rows(_written(Path(folder), rows, shard, group))


def _written(folder: Path, rows: list[Row], shard: int, group: int) -> Iterator[Path]:
    for first in range(0, len(rows), shard):
        path = folder / f"{first:05}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[first : first + shard], schema=SCHEMA), path, row_group_size=group)
        yield path


@given(ROWS, st.integers(1, 8), st.integers(1, 8))
@quick
def test_shards_and_row_groups_do_not_count(rows: list[Row], shard: int, group: int) -> None:
    assert digest(rows, shard, group) == digest(rows)


@given(ROWS, ROWS)
@quick
def test_different_values_have_different_digests(one: list[Row], two: list[Row]) -> None:
    in_order = [repr([[row[name] for name in SCHEMA.names] for row in rows]) for rows in (one, two)]
    assume(in_order[0] != in_order[1])
    assert digest(one) != digest(two)


@given(ROWS, st.data())
@quick
def test_one_changed_cell_changes_the_digest(rows: list[Row], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(rows) - 1))
    name = data.draw(st.sampled_from(SCHEMA.names))
    other = data.draw(ROW)[name]
    assume(repr(other) != repr(rows[index][name]))
    changed = [{**row, name: other} if i == index else row for i, row in enumerate(rows)]
    assert digest(changed) != digest(rows)


def test_texts_with_zero_bytes_are_told_apart() -> None:
    empty: Row = dict.fromkeys(SCHEMA.names)
    one, two = (("a\0\0b", "c"), ("a", "b\0\0c"))
    assert digest([{**empty, "text": t} for t in one]) != digest([{**empty, "text": t} for t in two])


def test_the_order_of_rows_counts() -> None:
    rows: list[Row] = [dict.fromkeys(SCHEMA.names, None) | {"row_id": i} for i in range(2)]
    assert digest(rows) != digest(rows[::-1])


def test_memory_reads_again_when_size_or_mtime_changed(tmp_path: Path) -> None:
    memory, file = DigestMemory(tmp_path), tmp_path / "file"
    file.write_text("one")
    os.utime(file, ns=(5, 5))
    first = memory.sha256(file)
    file.write_text("two")
    os.utime(file, ns=(5, 5))
    assert memory.sha256(file) == first  # size and mtime are trusted
    os.utime(file, ns=(6, 6))
    assert memory.sha256(file) == sha256_of_file(file) != first


def test_outside_of_the_data_folder_other_files_of_the_same_size_and_mtime_are_read(tmp_path: Path) -> None:
    memory, link = DigestMemory(tmp_path / "home"), tmp_path / "latest"
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(5, 5))
    found = []
    for name in ("a", "b"):
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        found.append(memory.sha256(link))
    (tmp_path / "b").write_text("c")
    os.utime(tmp_path / "b", ns=(5, 5))  # as tar and images set it
    assert len({*found, memory.sha256(link)}) == 3


def test_a_damaged_memory_costs_a_second_reading_only(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    memory = DigestMemory(tmp_path)
    first = memory.sha256(file)
    (tmp_path / "digests.json").write_text('{"file": [3')
    assert memory.sha256(file) == first


def test_what_another_process_remembers_is_found(tmp_path: Path) -> None:
    """The memory is parsed once while it is the same file, and again when another process replaced it."""
    file = tmp_path / "file"
    file.write_text("one")
    memory = DigestMemory(tmp_path)
    memory.sha256(file)
    (stamped,) = json.loads(memory.file.read_text()).values()
    write_json(memory.file, {"file": [*stamped[:-1], "told by another"]}, indent=None)
    assert memory.sha256(file) == "told by another"
    memory.forget([file])
    assert memory.sha256(file) == sha256_of_file(file)


def test_names_and_digests_of_files_both_count() -> None:
    files = {"a": "1", "b": "2"}
    assert digest_of_files(files) == digest_of_files(dict(reversed(files.items())))
    others = [{"a": "2", "b": "1"}, {"a": "1"}, {"a": "1", "c": "2"}]
    assert len({digest_of_files(other) for other in [files, *others]}) == 4


def test_json_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}
