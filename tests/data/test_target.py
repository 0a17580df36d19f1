"""Target rows: every file kind reads alike, the loss lies on responses, what is dropped is counted."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cfsd.data.files import Files
from cfsd.data.records import Said, hub_records
from cfsd.data.replay import Replay
from cfsd.data.stage import TURNS, prepare
from cfsd.data.target import Target, records_of
from cfsd.errors import BadInput
from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import read_rows
from tests.conftest import fetched, save_model
from tests.inputs import save

RECORDS: list[dict[str, Any]] = [
    {"question": f"{a}{b}", "answer": f"{b}{a}", "note": "x"} for a in "abcd" for b in "efg"
]
COLUMNS = {"prompt": "question", "response": "answer"}
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(store: Store, base: Artifact, **settings: Any) -> Artifact:
    target = Target(**({"seed": 0, "held_out": 4} | settings))
    target.check()
    return store.make("target", key_of("prepare", base, target), lambda draft: prepare(base, target, draft))[0]


def rows_of(store: Store, made: Artifact) -> Iterator[dict[str, Any]]:
    for name in ("train", "held_out"):
        yield from read_rows(store.path(made), name)


def text_of(store: Store, base: Artifact, row: dict[str, Any], *, supervised: bool) -> str:
    tokens = [t for t, s in zip(row["token_ids"], row["supervised"], strict=True) if s == supervised]
    return str(load_tokenizer(store.path(base)).decode(tokens))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_kind_gives_the_same_rows(store: Store, base: Artifact, tmp_path: Path, suffix: str) -> None:
    made = prepared(store, base, path=str(write(tmp_path / f"rows{suffix}")), **COLUMNS)
    rows = list(rows_of(store, made))
    assert sorted((row["prompt"], row["response"]) for row in rows) == sorted(
        (record["question"], record["answer"]) for record in RECORDS
    )
    reference = prepared(store, base, path=str(write(tmp_path / "same.jsonl")), **COLUMNS)
    assert made.content == reference.content


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.float64()])
def test_numbers_of_a_table_are_read_as_they_were_written(
    store: Store, base: Artifact, tmp_path: Path, kind: pa.DataType
) -> None:
    answers = ["3.14", "0.1", "12.5", "7.0", "1e-05", "0.3"]
    numbers = pa.array(np.array([float(a) for a in answers]).astype(kind.to_pandas_dtype()), kind)
    table = pa.table({"question": list("abcdef"), "answer": numbers})
    pq.write_table(table, tmp_path / "rows.parquet")
    made = prepared(store, base, path=str(tmp_path / "rows.parquet"), **COLUMNS)
    read = {row["prompt"]: row["response"] for row in rows_of(store, made)}
    assert [read[q] for q in "abcdef"] == answers


def test_numbers_within_a_table_are_read_as_they_were_written(store: Store, base: Artifact, tmp_path: Path) -> None:
    values = pa.array([{"v": 3.14, "all": [0.1]}] * 6, pa.struct({"v": pa.float32(), "all": pa.list_(pa.float32())}))
    pq.write_table(pa.table({"question": list("abcdef"), "of": values}), tmp_path / "rows.parquet")
    made = prepared(store, base, path=str(tmp_path / "rows.parquet"), prompt="question", response="{of[v]}")
    assert {row["response"] for row in rows_of(store, made)} == {"3.14"}


def test_images_and_sounds_of_a_data_set_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a hub's loader replaced by one of a data set in memory; the network is not there."""
    import datasets

    cell = {"bytes": b"neither of both", "path": None}
    columns = {"question": ["q"], "n": [0.1], "image": [cell], "sound": [cell]}
    made = datasets.Dataset.from_dict({name: cells * 1100 for name, cells in columns.items()})
    made = made.cast_column("image", datasets.Image()).cast_column("sound", datasets.Audio())
    made = made.cast_column("n", datasets.Value("float32"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    monkeypatch.setattr("cfsd.data.records.commit_of", lambda *_: "a" * 40)
    found = list(hub_records("org/name", "main", "train"))
    assert [found[i].place for i in (0, 1099)] == ["'org/name' row 1", "'org/name' row 1100"]
    assert all(row.record == {"question": "q", "n": 0.1, "image": cell, "sound": cell} for row in found)


def test_files_named_after_several_splits_are_said(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "testing.jsonl"):
        write(tmp_path / name)
    said = Said()
    list(Files(str(tmp_path), "target", "target.path").records(said))
    assert said.sentences() == []
    write(tmp_path / "test.jsonl")
    list(Files(str(tmp_path), "target", "target.path").records(said))
    (line,) = said.sentences()
    assert line.endswith(f"(test, train) are all read; name those that are meant, as {tmp_path}/train*")
    list(Files(f"{tmp_path}/*.jsonl", "target", "target.path").records(said := Said()))
    assert said.sentences()[0].endswith("name those that are meant")


@pytest.mark.parametrize(
    ("train", "test", "pattern"),
    [
        ("data/train/0.jsonl", "data/test/0.jsonl", "data/train*/*"), ("gsm_train.jsonl", "gsm_test.jsonl", "*train*"),
        ("Train/0.jsonl", "val/0.jsonl", "Train*/*"),
    ],
)  # fmt: skip
def test_a_split_is_known_wherever_its_name_stands(tmp_path: Path, train: str, test: str, pattern: str) -> None:
    for name in (train, test):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name)
    list(Files(str(tmp_path), "target", "target.path").records(said := Said()))
    assert said.sentences()[0].endswith(f"as {tmp_path}/{pattern}")
    assert [path.name for path in tmp_path.glob(pattern)] == [Path(train).name]


def test_settings_that_a_kind_or_a_shape_does_not_read_are_refused_or_said(
    store: Store, base: Artifact, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="prompt and response are not read where messages names a column"):
        Target(path=path, messages="talk", prompt="{question}")
    with pytest.raises(ValueError, match=r"revision is for a replay of kind hub.*set `kind: hub`"):
        Replay(path=path, revision="main")
    with pytest.raises(ValueError, match="has no '@': give what is behind it as `revision`"):
        Target(kind="hub", name="openai/gsm8k@main")
    made = prepared(store, base, path=path, turns="last", **COLUMNS)
    assert TURNS in made.metadata["said"]


def test_a_configuration_of_a_data_set_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("main", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write(tmp_path / "set" / name / "train.jsonl", [{"prompt": name, "response": "x"}])
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("main", "other"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr("cfsd.data.records.commit_of", lambda name, revision: None)
    target = Target(kind="hub", name=str(tmp_path / "set"), subset="other", seed=0)
    assert [row.record["prompt"] for row in records_of(target)] == ["other"]
    with pytest.raises(BadInput, match=r"Config name is missing(?s:.*)set `subset` where there are several"):
        list(records_of(target.model_copy(update={"subset": None})))


def test_the_loss_lies_on_the_response_and_its_end(store: Store, base: Artifact, tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl"))
    made = prepared(store, base, path=path, prompt="q:{question}=", response=" {answer}.")
    for row in rows_of(store, made):
        assert text_of(store, base, row, supervised=False) == row["prompt"]
        assert text_of(store, base, row, supervised=True) == row["response"] + "<eos>"
        assert row["prompt"].startswith("q:") and row["response"].startswith(" ")
        assert row["source"] == "target"


def test_nothing_predicts_the_first_token_of_an_empty_prompt(store: Store, base: Artifact, tmp_path: Path) -> None:
    records = [{"prompt": "", "response": word} for word in ("abc", "bcd", "cde", "def", "efg")]
    made = prepared(store, base, path=str(write(tmp_path / "rows.jsonl", records)))
    assert all(row["supervised"] == [False, True, True, True] for row in rows_of(store, made))


def test_a_bos_that_the_tokenizer_adds_is_not_an_answer(store: Store, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = save_model(tmp_path / "adds")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    raw.save(str(folder / "tokenizer.json"))
    made = prepared(store, fetched(store, folder), path=str(write(tmp_path / "rows.jsonl")), **COLUMNS)
    for row in rows_of(store, made):
        assert row["token_ids"][0] == 0
        assert row["token_ids"].count(1) == 1 and row["token_ids"][-1] == 1
        assert row["supervised"] == [False] * 3 + [True] * 3


def test_a_missing_column_names_those_that_exist(store: Store, base: Artifact, tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl"))
    for prompt in ("prompt", "Q: {prompt}"):
        with pytest.raises(BadInput, match=r"no column.*prompt.*'question', 'answer', 'note'"):
            prepared(store, base, path=path, prompt=prompt, response="answer")


def test_what_is_dropped_is_counted_by_reason(store: Store, base: Artifact, tmp_path: Path) -> None:
    extra: list[dict[str, Any]] = [
        RECORDS[0], RECORDS[0], {"question": "zz", "answer": "", "note": "x"},
        {"question": "zz", "answer": None, "note": "x"}, {"question": "a" * 30, "answer": "b", "note": "x"},
        {"question": "zz", "answer": " ", "note": "x"},
    ]  # fmt: skip
    path = str(write(tmp_path / "rows.jsonl", RECORDS + extra))
    dropped = {"seen before": 2, "with an empty response": 3, "longer than max_length=20": 1}
    for response in ("answer", " {answer}", "#{answer}"):  # the template's own words are no answer
        made = prepared(store, base, path=path, max_length=20, **(COLUMNS | {"response": response}))
        assert made.metadata["dropped"] == dropped
        assert len(list(rows_of(store, made))) == len(RECORDS)


def test_a_model_with_a_short_context_drops_what_it_cannot_attend_to(
    store: Store, base: Artifact, tmp_path: Path
) -> None:
    long = [{"question": "a" * 130, "answer": "b", "note": "x"}]
    made = prepared(store, base, path=str(write(tmp_path / "rows.jsonl", RECORDS + long)), **COLUMNS)
    assert made.metadata["dropped"] == {f"longer than max_length={base.metadata['context']}": 1}


def test_held_out_rows_are_disjoint_seeded_and_of_the_wanted_number(
    store: Store, base: Artifact, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "rows.jsonl", RECORDS + RECORDS))
    held_out = []
    for seed in (0, 1):
        made = prepared(store, base, path=path, held_out=5, seed=seed, **COLUMNS)
        parts = [{row["prompt"] for row in read_rows(store.path(made), name)} for name in ("train", "held_out")]
        assert not parts[0] & parts[1]
        assert (len(parts[0]), len(parts[1])) == (len(RECORDS) - 5, 5)
        held_out.append(parts[1])
    assert held_out[0] != held_out[1]


def test_too_few_rows_are_refused_with_the_counts(store: Store, base: Artifact, tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", RECORDS[:4] + RECORDS[:1]))
    with pytest.raises(BadInput, match=r"4 usable rows \(1 seen before\).*held_out=4"):
        prepared(store, base, path=path, **COLUMNS)


def test_rows_limits_what_is_read(store: Store, base: Artifact, tmp_path: Path) -> None:
    made = prepared(store, base, path=str(write(tmp_path / "rows.jsonl")), rows=7, **COLUMNS)
    assert {row["prompt"] for row in rows_of(store, made)} == {r["question"] for r in RECORDS[:7]}


def test_a_file_counts_by_content_not_by_name(home: Path, tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.jsonl"), write(tmp_path / "two.jsonl")
    other = write(tmp_path / "other.jsonl", RECORDS[:-1])
    digests = [Target(path=str(path), **COLUMNS).digest() for path in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("x.txt", "a", r"\.txt.*allowed: \.jsonl"), ("x.jsonl", "", "is empty"), ("absent.jsonl", None, "does not exist")],
)
def test_check_refuses_what_cannot_be_read(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        Target(path=str(tmp_path / name)).check()


def test_a_file_that_is_not_what_it_says_is_refused(store: Store, base: Artifact, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response"\n')
    with pytest.raises(BadInput, match="could not be read as json"):
        prepared(store, base, path=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("settings", [{}, {"kind": "gym", "name": "x"}, {"kind": "hub", "revision": "main"}])
def test_a_target_without_what_its_kind_needs_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs"):
        Target(**settings)


VALUES: dict[str, tuple[Any, str]] = {
    "null": (None, ""), "a number": (7, "7"), "a fraction": (1.5, "1.5"), "text": ("a", "a"), "nothing": ("", ""),
}  # fmt: skip


@pytest.mark.parametrize("prompt", ["note", "{note}", "<{note}>"])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_read_alike_alone_and_in_a_template(
    store: Store, base: Artifact, tmp_path: Path, name: str, prompt: str
) -> None:
    value, text = VALUES[name]
    records = [{"note": value, "answer": f"{a}{b}"} for a in "abc" for b in "def"]
    made = prepared(store, base, path=str(write(tmp_path / "rows.jsonl", records)), prompt=prompt, response="answer")
    assert {row["prompt"] for row in rows_of(store, made)} == {f"<{text}>" if "<" in prompt else text}
    assert bool(made.metadata["said"]) == isinstance(value, int | float)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, "a truth value"), (["a"], "a list"), ({"a": 1}, "a mapping"), (float("nan"), "no finite number")],
)
@pytest.mark.parametrize("prompt", ["note", "<{note}>"])
def test_a_value_that_is_no_text_is_refused_with_its_row(
    store: Store, base: Artifact, tmp_path: Path, value: Any, kind: str, prompt: str
) -> None:
    records = [*({"note": "x", "answer": a} for a in "abcdefg"), {"note": value, "answer": "h"}]
    with pytest.raises(BadInput, match=f"column 'note' of target '.*' line 8 holds {kind}"):
        prepared(store, base, path=str(write(tmp_path / "rows.jsonl", records)), prompt=prompt, response="answer")


@pytest.mark.parametrize("column", ["prompt", "other", "messages"])
def test_what_is_nested_too_deeply_is_refused(store: Store, base: Artifact, tmp_path: Path, column: str) -> None:
    deep = "[" * 700 + "]" * 700
    chat = '"prompt": "a", "response": "b", ' if column == "other" else ""
    (tmp_path / "rows.jsonl").write_text(f'{{{chat}"{column}": {deep}}}\n' * 3)
    with pytest.raises(BadInput, match=r"rows\.jsonl"):
        prepared(store, base, path=str(tmp_path / "rows.jsonl"), prompt="prompt", response="response")


def test_a_column_that_some_rows_lack_is_empty_there(store: Store, base: Artifact, tmp_path: Path) -> None:
    records = [{"q": f"{a}{b}", "a": a} | ({"more": "m"} if b == "d" else {}) for a in "abc" for b in "def"]
    path = str(write(tmp_path / "rows.jsonl", records))
    made = prepared(store, base, path=path, prompt="{q}{more}=", response="a")
    assert {row["prompt"] for row in rows_of(store, made)} == {f"{r['q']}{r.get('more', '')}=" for r in records}


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        ("{in[text]}", "t"),
        ("{in[list][1]}", "b"),
        ("{{{q}}}", "{x}"),
        ("{a.b}", "dotted"),
        ("{odd:name!r}", "odd"),
        ("", ""),
    ],
)
def test_a_template_takes_columns_and_their_entries(
    store: Store, base: Artifact, tmp_path: Path, prompt: str, filled: str
) -> None:
    row = {"in": {"text": "t", "list": ["a", "b"]}, "q": "x", "a.b": "dotted", "odd:name!r": "odd"}
    path = str(write(tmp_path / "rows.jsonl", [row | {"a": a} for a in "abcdefg"]))
    made = prepared(store, base, path=path, prompt=prompt, response="a")
    assert {found["prompt"] for found in rows_of(store, made)} == {filled}


@pytest.mark.parametrize(
    "prompt",
    [
        "{q.__class__}", "{q!r}", "{q:>5}", "{}", "{0}", "q}", "{q", "{q[}", "{q[]}", "{q[0]}", "{in[no]}",
        "{in[list][9]}",
    ],
)  # fmt: skip
def test_what_a_template_may_not_ask_is_refused(store: Store, base: Artifact, tmp_path: Path, prompt: str) -> None:
    row = {"in": {"text": "t", "list": ["a", "b"]}, "q": "x"}
    path = str(write(tmp_path / "rows.jsonl", [row | {"a": a} for a in "abcdefg"]))
    with pytest.raises(BadInput, match=r"line 1"):
        prepared(store, base, path=path, prompt=prompt, response="a")


def test_alpaca_is_written_in_its_layout(store: Store, tmp_path: Path) -> None:
    save(tmp_path / "model")
    base = fetched(store, tmp_path / "model")
    records = [{"instruction": f"add {a}", "input": i, "output": a} for a in "abc" for i in ("now", "", None)]
    path = str(write(tmp_path / "rows.jsonl", records))
    made = prepared(store, base, path=path, max_length=1000)
    prompts = {row["prompt"] for row in rows_of(store, made)}
    with_input = {prompt for prompt in prompts if "### Input:\nnow\n\n" in prompt}
    assert (len(prompts), len(with_input)) == (6, 3)
    assert all(prompt.endswith("\n\n### Response:\n") for prompt in prompts)
    assert all("Input" not in prompt and "with an input" not in prompt for prompt in prompts - with_input)
    assert made.metadata["dropped"] == {"seen before": 3}
    assert any("layout of Alpaca" in line for line in list(made.metadata["said"]))


def test_prompt_and_completion_are_taken_as_the_pair(store: Store, base: Artifact, tmp_path: Path) -> None:
    records = [{"prompt": f"{a}=", "completion": a} for a in "abcdefg"]
    made = prepared(store, base, path=str(write(tmp_path / "rows.jsonl", records)))
    assert {(row["prompt"], row["response"]) for row in rows_of(store, made)} == {(f"{a}=", a) for a in "abcdefg"}
    assert made.metadata["said"] == ["columns 'prompt' and 'completion' are taken as the pair"]


def test_held_out_answers_that_training_has_too_are_counted_and_said(store: Store, tmp_path: Path) -> None:
    """A chat log with a row for each turn: each row begins another one. It looked like learning, of 32 % of answers."""
    save(tmp_path / "model", template=CHAT)
    base = fetched(store, tmp_path / "model")
    chats = [
        [{"role": role, "content": f"{role} {chat} {turn}"} for turn in range(3) for role in ("user", "assistant")]
        for chat in "abcdefghijkl"
    ]
    per_turn = [{"messages": chat[:last]} for chat in chats for last in (2, 4, 6)]
    whole = [{"messages": chat} for chat in chats]
    near = [{"prompt": f"{c}{space}", "response": f"is {c}"} for c in "abcdefghijkl" for space in (" ", "  ")]
    for name, records, held_out, seen in (("turns", per_turn, 9, 9), ("whole", whole, 4, None), ("near", near, 8, 8)):
        path = str(write(tmp_path / f"{name}.jsonl", records))
        made = prepared(store, base, path=path, max_length=1000, held_out=held_out)
        found: Any = made.metadata.get("held_out_seen")
        assert (found is None) if seen is None else (seen // 2 <= found <= seen), name
        said = [line for line in list(made.metadata["said"]) if "that training has too" in str(line)]
        assert len(said) == (found is not None)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"prompt": "a", "response": "b"}] * 3 + [{"messages": [{"role": "user", "content": "a"}]}],
         r"line 4 has no 'response', by which the first rows are read, but has 'messages': rows of two shapes"),
        ([{"messages": [{"role": "user", "content": "a"}]}, {"conversations": [{"from": "human", "value": "a"}]}],
         r"line 2 has no 'messages', .* but has 'conversations'"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}],
         r"line 2 has no 'output', .* but has 'response'"),
    ],
)  # fmt: skip
def test_rows_of_two_shapes_are_refused(
    store: Store, tmp_path: Path, records: list[dict[str, Any]], words: str
) -> None:
    """Half of the rows were left out, for an empty response that they do not have."""
    save(tmp_path / "model", template=CHAT)
    base = fetched(store, tmp_path / "model")
    with pytest.raises(BadInput, match=words):
        prepared(store, base, path=str(write(tmp_path / "rows.jsonl", records)), max_length=1000)


def test_an_entry_of_an_empty_list_is_nothing(store: Store, base: Artifact, tmp_path: Path) -> None:
    """Questions without an answer, as SQuAD 2 has them."""
    records = [{"question": c, "answers": {"text": [c] if c in "adgj" else []}} for c in "abcdefghijkl"]
    path = str(write(tmp_path / "rows.jsonl", records))
    made = prepared(store, base, path=path, prompt="question", response="{answers[text][0]}", held_out=1)
    assert made.metadata["dropped"] == {"with an empty response": 8}
    with pytest.raises(BadInput, match=r"has no entry 'texts' in column 'answers'"):
        prepared(store, base, path=path, prompt="question", response="{answers[texts][0]}")
