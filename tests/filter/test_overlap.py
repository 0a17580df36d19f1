"""A text overlaps the reference exactly if they share a run of words; benchmarks are read in full."""

import json
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import BUNDLED
from cfsd.evaluate.harness.documents import documents, held_back_texts
from cfsd.filter.overlap import LEAST_WORDS, Grams, words_of
from cfsd.store.tables import TARGET, table_of, write_shard

WORDS = [f"word{i}" for i in range(40)]


def test_thirteen_common_words_in_a_row_are_an_overlap_and_twelve_are_none() -> None:
    grams = Grams({"the book": [" ".join(WORDS)]}, 13)
    assert grams.overlap(" ".join(["before", *WORDS[5:18], "after"])) == ("the book", " ".join(WORDS[5:18]))
    assert not grams.overlap(" ".join(["before", *WORDS[5:17], "after", *WORDS[17:20]]))
    assert not grams.overlap("")


def test_case_and_punctuation_do_not_count() -> None:
    grams = Grams({"the book": ["The cat, “so to speak”, sat on  the mat; didn't it?"]}, 11)
    assert grams.overlap("And THE CAT - so to speak - sat… on\nthe (mat) didnt it indeed")


def test_a_special_token_does_not_hide_the_word_beside_it() -> None:
    text = "Name the longest river that flows through ten states"
    grams = Grams({"the book": [text]}, 13)
    for row in (text, f"<s>{text}", f"{text}</s>", f"<|im_start|>{text}<|im_end|>\n"):
        assert grams.overlap(row), row


def test_each_character_of_chinese_and_japanese_is_a_word() -> None:
    text = "中国最长的河流是长江还是黄河"
    assert words_of("日本の river") == ["日", "本", "の", "river"]
    assert Grams({"the book": [text]}, 13).overlap(f"请问{text}吗")


def test_a_short_reference_counts_as_a_whole_if_it_has_enough_words() -> None:
    grams = Grams({"short": [" ".join(WORDS[:LEAST_WORDS])], "shorter": [" ".join(WORDS[20 : 19 + LEAST_WORDS])]}, 13)
    assert grams.overlap(" ".join(WORDS[:30])) == ("short", " ".join(WORDS[:LEAST_WORDS]))
    assert not grams.overlap(" ".join(WORDS[1:]))  # the whole, not a part of it


def test_no_text_overlaps_an_empty_reference() -> None:
    assert not Grams({}, 13).overlap(" ".join(WORDS))
    assert not Grams({"empty": ["", "a few words"]}, 13).overlap(" ".join(WORDS))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14))
def test_overlaps_are_those_of_a_search_without_hashes(seed: int, size: int) -> None:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices("abc" if size > 5 else "abcdefghij", k=rng.randint(0, 30)))

    groups = {name: [text() for _ in range(3)] for name in ("one", "two")}
    grams = Grams(groups, size)
    for _ in range(20):
        own = text()
        found = grams.overlap(own)
        met = {
            (name, run)
            for name, texts in groups.items()
            for other in texts
            for run in runs(other, size)
            if f" {run} " in f" {own} "
        }
        assert (found is not None) == bool(met)
        assert found is None or found in met


def runs(text: str, size: int) -> set[str]:
    words = text.split()
    if len(words) < size:
        return {text} if len(words) >= min(size, LEAST_WORDS) else set()
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


def bundled(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (BUNDLED / f"{name}.jsonl").read_text().splitlines()]


def test_every_document_of_a_benchmark_is_read_with_its_right_answer() -> None:
    choice = [f"{row['context']} {row['choices'][row['answer']]}" for row in bundled("facts")]  # type: ignore[index]
    assert list(documents(Benchmark(name="facts", limit=2))) == choice
    written = [f"{row['prompt']} {row['answer']}" for row in bundled("tiny_rev")]
    assert list(documents(Benchmark(name="tiny_rev"))) == written
    rolling = [str(row["text"]).split() for row in bundled("technical_english")]
    assert [text.split() for text in documents(Benchmark(name="technical_english"))] == rolling


def test_a_document_whose_choices_are_its_beginnings_is_read_with_the_right_one(tmp_path: Path) -> None:
    rows = [{"starts": ["Rain is", "Fire is"], "right": 1, "end": "hot and bright"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "starts", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "right", "doc_to_choice": "starts",
        "doc_to_target": "{{end}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "starts.yaml").write_text(yaml.safe_dump(settings))
    assert list(documents(Benchmark(name="starts", folder=str(tmp_path)))) == ["Fire is hot and bright"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("they say the tallest animal in the world is the giraffe", "benchmark facts"),
        ("so q: how many sheep are there on the hill, a seven", "held-out target rows"),
        ("the tallest animal in the world is the elephant", None),
        ("how many goats are there on the hill", None),
    ],
)
def test_the_reference_is_the_held_out_rows_and_the_benchmarks(tmp_path: Path, text: str, name: str | None) -> None:
    rows = {"held_out": ("Q: How many sheep are there on the hill? A:", "seven"),
            "train": ("Q: How many goats are there on the hill? A:", "seven")}  # fmt: skip
    for table, (prompt, response) in rows.items():
        row = {"row_id": 0, "source": "target", "token_ids": [0], "supervised": [True], "prompt": prompt}
        write_shard(tmp_path, table, 0, table_of(TARGET, [row | {"response": response}]))
    found = Grams(held_back_texts(tmp_path, [Benchmark(name="facts")]), 13).overlap(text)
    assert (found[0] if found else None) == name


def test_words_of_other_scripts_lose_their_punctuation_too() -> None:
    assert words_of("«Привет» — МИР… ¿Qué?") == ["привет", "мир", "qué"]
