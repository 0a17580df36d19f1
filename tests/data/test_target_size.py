"""The size of a target, as a plan needs it before the rows are prepared: whatever the files are packed with."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from cfsd.data import target_size
from cfsd.data.target import Target
from cfsd.model.token_counts import token_count

ROWS = 3000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "lines.parquet"])
def test_large_files_are_counted_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    records = [{"prompt": f"How much is {n} times {n + 1}?", "response": str(n * (n + 1))} for n in range(ROWS)]
    text, file = "".join(f"{json.dumps(record)}\n" for record in records), tmp_path / name
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    monkeypatch.setattr(target_size, "READ_BY_CHECKS", 0)
    found = target_size.size_of_target(Target(path=str(file), seed=0), lambda text: float(len(text)))
    assert found and found.rows == pytest.approx(ROWS, rel=0.5)
    assert found.rows == ROWS or name != "rows.parquet"


def test_a_tokenizer_that_was_saved_with_padding_counts_the_texts_own_tokens(
    model_folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    (tmp_path / "plain").mkdir()
    tokenizer.save(str(tmp_path / "plain" / "tokenizer.json"))
    tokenizer.enable_padding(length=600)
    tokenizer.enable_truncation(2)
    (tmp_path / "padded").mkdir()
    tokenizer.save(str(tmp_path / "padded" / "tokenizer.json"))
    plain, padded = (token_count("folder", tmp_path / name)("abcabc") for name in ("plain", "padded"))
    assert plain == padded == 6
