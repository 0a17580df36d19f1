"""A corpus in the forms that other trainers read: the same tokens, the same masks.

trl            input_ids, labels: SFTTrainer takes them as they are, and so does transformers' Trainer
axolotl        with attention_mask, by which axolotl knows rows that are tokenised; where the corpus stores
               distributions, a second file for its KD plugin
llama-factory  text, and dataset_info.json: only rows whose text gives the same tokens again

Every token that was sampled is learned, and no other: not the start token, nor a prompt. Rows that were cut at their
length end without EOS.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cfsd.errors import BadInput
from cfsd.integrations import Format
from cfsd.integrations.corpus import base_of, corpus_folder
from cfsd.model.loading import load_tokenizer
from cfsd.store.new_folder import new_folder
from cfsd.store.tables import batches, num_rows, shards

IGNORED = -100  # the label of what is not learned
NO_LOGPROB = -1e9  # where a distribution has no entry, as axolotl pads
KD_COLUMNS = ("topk_ids", "topk_logprobs")
DATASET = "cfsd_rehearsal"  # its name for LLaMA-Factory

Rows = Iterator[dict[str, Any]]


def write_corpus(asked: str | Path, to: Path, form: Format, *, jsonl: bool = False) -> list[str]:
    """Write the corpus that `asked` names into the new folder `to`, and return what is to be said of it.

    `jsonl` true: JSON lines in place of Parquet. Raises BadInput: there is no such corpus, `to` is not new, or for
    text there is no tokenizer, or no row that can be written as text; or the corpus has no rows.
    """
    corpus = corpus_folder(asked)
    with new_folder(to) as part:
        if not num_rows(corpus, "corpus"):
            raise BadInput(f"the corpus {corpus.name} has no rows; give one that has some")
        return _written(corpus, part, form, jsonl=jsonl)


def _written(corpus: Path, to: Path, form: Format, *, jsonl: bool) -> list[str]:
    if form == "llama-factory":
        if (base := base_of(corpus)) is None:
            raise BadInput(
                f"the base of {corpus} is not in its store, and its tokenizer is needed to write text; give the corpus "
                "of a data folder that has it, or use --format trl"
            )
        return _write_text(corpus, to, load_tokenizer(base[1]))
    columns = ["input_ids", "labels"] + (["attention_mask"] if form == "axolotl" else [])
    written = _write(to, "corpus", jsonl, ({name: row[name] for name in columns} for row in token_rows(corpus)))
    said = [f"{written.name}: {', '.join(columns)}"]
    stored = set(KD_COLUMNS) <= set(pq.read_schema(shards(corpus, "corpus")[0]).names)
    if form == "axolotl" and stored:
        with_teacher = _write(to, "corpus-kd", jsonl, kd_rows(corpus))
        said.append(f"{with_teacher.name}: the same rows with target_logprobs, target_token_ids and target_mask")
    return said


def token_rows(corpus: Path) -> Rows:
    """Yield each row as input_ids, attention_mask and labels; entry t of the labels is token t."""
    for batch in batches(corpus, "corpus", ["token_ids", "logprobs"]):
        for ids, logprobs in zip(*(batch[name].to_pylist() for name in ("token_ids", "logprobs")), strict=True):
            labels = [IGNORED if value is None else token for token, value in zip(ids, logprobs, strict=True)]
            yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def kd_rows(corpus: Path) -> Rows:
    """Yield each row with what axolotl's KD trainer reads: entry t is the distribution of token t + 1.

    Its kernel compares entry t with what the model says after token t, and shifts the labels alone. The probabilities
    of the k likeliest tokens are scaled to add up to 1, as it asks for: with kd_normalize_topk the model's are, too,
    and the loss is 0 at the base. What is stored of the rest is not in this form.
    """
    stored = (row for batch in batches(corpus, "corpus", list(KD_COLUMNS)) for row in batch.to_pylist())
    for row, top in zip(token_rows(corpus), stored, strict=True):
        length = len(row["input_ids"])
        ids_TK, logprobs_TK = (_wide(top[name], length) for name in KD_COLUMNS)
        counted_T1 = (np.array(row["labels"]) != IGNORED)[:, None]
        mask_TK = _next(np.isfinite(logprobs_TK) & counted_T1, False)
        target_TK = np.where(mask_TK, _next(_scaled(logprobs_TK), NO_LOGPROB), NO_LOGPROB)
        yield row | {
            "target_logprobs": target_TK.astype(np.float32).tolist(),
            "target_token_ids": np.where(mask_TK, _next(ids_TK, 0), 0).astype(np.int64).tolist(),
            "target_mask": mask_TK.astype(np.int64).tolist(),
        }


def _wide(values: list[float | None], length: int) -> NDArray[np.float64]:
    return np.array(values, np.float64).reshape(length, -1)


def _scaled(logprobs_TK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log of the probabilities divided by their sum; entries that are not there stay out of it."""
    scaled_TK: NDArray[np.float64] = logprobs_TK - np.log(
        np.nansum(np.exp(logprobs_TK), axis=1, keepdims=True).clip(1e-300)
    )
    return scaled_TK


def _next(values_TK: NDArray[Any], last: Any) -> NDArray[Any]:
    """Return the entries of the tokens that follow; after the last one there is `last`."""
    return np.concatenate([values_TK[1:], np.full_like(values_TK[:1], last)])


def _write_text(corpus: Path, to: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Write rows as LLaMA-Factory's `empty` template reads them, and which were left out."""
    left_out: Counter[str] = Counter()
    total = sum(1 for _ in token_rows(corpus))
    file = _write(to, DATASET, True, _text_rows(corpus, tokenizer, left_out))
    if left_out.total() == total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise BadInput(
            f"none of the {total} rows of the corpus {corpus.name} can be written as text ({reasons}); LLaMA-Factory "
            "tokenises text itself: use another trainer, or --format trl with one that takes tokens"
        )
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {DATASET: {"file_name": file.name, "formatting": "alpaca", "columns": columns}}
    (to / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
    said = [f"{file.name}: {total - left_out.total()} of {total} rows as text, to be read with `template: empty`"]
    return said + [f"left out: {count} of {total} rows, {reason}" for reason, count in left_out.items()]


def _text_rows(corpus: Path, tokenizer: PreTrainedTokenizerBase, left_out: Counter[str]) -> Rows:
    for row in token_rows(corpus):
        ids, prompt = row["input_ids"], sum(label == IGNORED for label in row["labels"])
        parts = ids[:prompt], ids[prompt:]
        texts = [str(tokenizer.decode(part, skip_special_tokens=False)) for part in parts]
        again = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if row["labels"][:prompt] != [IGNORED] * prompt or not parts[1]:
            left_out["whose prompt is not at their beginning alone"] += 1
        elif again != [list(part) for part in parts]:
            left_out["whose text gives other tokens than were sampled"] += 1
        else:
            yield {"instruction": texts[0], "input": "", "output": texts[1]}


def _write(to: Path, name: str, jsonl: bool, rows: Rows) -> Path:
    file = to / f"{name}.{'jsonl' if jsonl else 'parquet'}"
    write: Callable[[Path, Rows], None] = _write_lines if jsonl else _write_parquet
    write(file, rows)
    return file


def _write_lines(file: Path, rows: Rows) -> None:
    with file.open("w", encoding="utf-8") as sink:
        sink.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(file: Path, rows: Rows) -> None:
    first = next(rows)
    schema = pa.Table.from_pylist([first]).schema
    with pq.ParquetWriter(file, schema, compression="zstd") as sink:
        for group in _groups(first, rows):
            sink.write_table(pa.Table.from_pylist(group, schema=schema))


def _groups(first: dict[str, Any], rows: Rows, size: int = 256) -> Iterator[list[dict[str, Any]]]:
    group = [first]
    for row in rows:
        if len(group) == size:
            yield group
            group = []
        group.append(row)
    yield group
