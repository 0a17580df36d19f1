"""What users give that cannot be scored as it stands: each is named, or comes out right."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from cfsd.errors import BadInput, NotFinite
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.check import check_documents
from cfsd.evaluate.harness.score import score
from cfsd.evaluate.spec import EvaluateSpec, check_windows
from cfsd.model.tiny import shipped
from cfsd.statistics.forgetting import TOO_FEW, Measure, benchmark_forgetting
from cfsd.store.artifact import Artifact, Store
from tests.conftest import fetched
from tests.evaluate.test_score import CHOICE, READ, scores_of, write
from tests.evaluate.test_score import model as model
from tests.evaluate.test_score import tokenizer as tokenizer

VALUES = """
def weird(doc, results):
    return {"odd": %s}
"""


def odd(folder: Path, value: str, aggregation: str = "mean") -> str:
    """Write a benchmark whose metric is `value`, a Python expression over `doc`; return its name."""
    metric = {"metric": "odd", "aggregation": aggregation, "higher_is_better": False}
    path = write(folder, CHOICE, metric_list=[metric])
    path.write_text(path.read_text() + "process_results: !function values.weird\n")
    (folder / "values.py").write_text(VALUES % value)
    return path.stem


def inline(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return CHOICE as a task dict, with its data in `folder`."""
    write(folder, CHOICE)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data" / "rows.jsonl")}}}
    return CHOICE | data | {"test_split": "test"} | changes


def test_a_task_dict_is_scored_as_its_yaml(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    task = inline(tmp_path / "a")
    mine = Benchmark.model_validate({"task": task})
    mine.check()
    ours, theirs = score(model, tokenizer, mine), scores_of(model, tokenizer, tmp_path / "a", "pick")
    assert mine.name == "pick" and ours.rows.equals(theirs.rows) and ours.metadata == theirs.metadata
    assert (
        score(model, tokenizer, mine.model_copy(update={"num_fewshot": 0, "limit": 2})).metadata["num_documents"] == 2
    )


def test_a_task_dict_counts_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (
        Benchmark(name="pick", task=inline(tmp_path / "a")),
        Benchmark(name="pick", task=inline(tmp_path / "b")),
    )
    assert here.digest() == there.digest()
    monkeypatch.chdir(tmp_path / "a")
    relative = inline(tmp_path / "a", dataset_kwargs={"data_files": {"test": "data/rows.jsonl"}})
    assert Benchmark(name="pick", task=relative).digest() == here.digest()
    assert Benchmark(name="pick", task=inline(tmp_path / "b", description="x")).digest() != here.digest()
    rows = tmp_path / "b" / "data" / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n")
    assert there.digest() != here.digest()


def test_settings_left_alone_keep_the_key(tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    plain = Benchmark(name="pick", folder=str(tmp_path))
    assert plain.digest() == Benchmark(name="pick", folder=str(tmp_path), chat_template=False).digest()
    changed = [{"chat_template": True}, {"thinking_end": "x"}, {"max_gen_toks": 5}]
    assert len({plain.digest(), *(plain.model_copy(update=change).digest() for change in changed)}) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": {"output_type": "multiple_choice"}}, "name"),
        ({"name": "other", "task": {"task": "pick"}}, "has a `task` named 'pick'; name it once"),
        ({"task": {"task": "pick"}, "folder": "x"}, "both `folder` and `task`"),
        ({"task": {"task": "pick", "include": "base.yaml"}}, "`include` works in YAML files only"),
    ],
)
def test_task_dicts_that_contradict_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Benchmark.model_validate(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, r"no data file .*nowhere.jsonl.*the working directory"),
        ({"output_type": "choices"}, r"output_type 'choices' in its `task` in the recipe is none of .*multiple_choice"),
        ({"unsafe_code": True}, "runs code that the model writes"),
    ],
)
def test_mistakes_in_task_dicts_are_told_before_a_model_is_loaded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        Benchmark(name="pick", task=inline(tmp_path, **changes)).check()


@pytest.mark.parametrize("changes", [{"doc_to_txt": "{{question}}"}, {"doc_to_text": "{{nothing}}"}])
def test_other_mistakes_in_task_dicts_are_named(
    model: Any, tokenizer: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(BadInput, match=r"pick: lm-eval cannot load its `task` in the recipe.*(doc_to_txt|nothing)"):
        score(model, tokenizer, Benchmark(name="pick", task=inline(tmp_path, **changes)))


def test_a_hub_benchmark_without_a_network_says_so(
    model: Any, tokenizer: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's own attempts: 20 s
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"hellaswag: its data is on the hub, which could not be reached") as caught:
        score(model, tokenizer, Benchmark(name="hellaswag"))
    assert isinstance(caught.value, ConnectionError)  # so that the stage is tried once more


def test_three_documents_are_scored_and_have_no_interval(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, READ)
    rows, metadata = scores_of(model, tokenizer, tmp_path, "read", limit=3)
    worse = rows.assign(value=rows["value"] + 1)
    measure = Measure.model_validate({field: metadata[field] for field in Measure.model_fields if field in metadata})
    found = benchmark_forgetting("read", measure, rows, worse)
    assert found.num_documents == 3 and found.forgetting.low is None and found.interval_method == TOO_FEW
    assert found.forgetting.value == pytest.approx(3 / rows["count"].sum())


def test_of_a_metric_that_is_better_when_lower_more_is_worse(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    name = odd(tmp_path, "len(doc['choices']) / 8")
    rows, metadata = scores_of(model, tokenizer, tmp_path, name)
    assert not metadata["higher_is_better"] and metadata["kind"] == "mean" and metadata["score"] == rows["value"].mean()
    more = rows.assign(value=rows["value"] + 0.25)
    measure = Measure.model_validate({field: metadata[field] for field in Measure.model_fields if field in metadata})
    assert benchmark_forgetting("pick", measure, rows, more).forgetting.value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("'N/A'", BadInput, r"pick, document 0: its odd is 'N/A', not a number; choose another metric"),
        ("None if doc['right'] else 1", BadInput, r"document 1: its odd is None, not a number"),
        ("float('nan')", NotFinite, r"document 0: its odd is nan"),
        ("float('inf')", NotFinite, r"document 0: its odd is inf"),
    ],
)
def test_weird_values_are_named(
    model: Any, tokenizer: Any, tmp_path: Path, value: str, error: type[Exception], message: str
) -> None:
    name = odd(tmp_path, value)
    with pytest.raises(error, match=message):
        scores_of(model, tokenizer, tmp_path, name)


def test_documents_that_a_nanmean_does_not_apply_to_are_left_out(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows, metadata = scores_of(
        model, tokenizer, tmp_path, odd(tmp_path, "float('nan') if doc['right'] else 2", "nanmean")
    )
    assert (metadata["num_documents"], metadata["left_out"], metadata["score"]) == (4, 4, 2.0)
    assert list(rows["doc_id"]) == [0, 2, 4, 6]
    with pytest.raises(BadInput, match="its odd is NaN for every document"):
        scores_of(model, tokenizer, tmp_path / "all", odd(tmp_path / "all", "float('nan')", "nanmean"))


def last_word(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a task with a perplexity and an accuracy, as lambada's."""
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ]
    changes = {"output_type": "loglikelihood", "metric_list": metrics, "metadata": metadata}
    task = inline(folder, **changes) | {"doc_to_target": "{{choices[0]}}"}
    return {name: value for name, value in task.items() if name != "doc_to_choice"}


def test_a_stated_score_of_guessing_is_not_the_perplexitys(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    task = last_word(tmp_path, {"chance": 0})
    mine = Benchmark.model_validate({"task": task, "metric": "perplexity"})
    check_documents(mine)
    metadata = score(model, tokenizer, mine).metadata
    assert metadata["kind"] == "perplexity" and metadata["chance"] is None
    accuracy = Benchmark.model_validate({"task": task, "metric": "acc"})
    assert score(model, tokenizer, accuracy).metadata["chance"] == 0.0
    with pytest.raises(BadInput, match=r"chance is 0.5, but its perplexity is a perplexity, .* take chance out"):
        check_documents(mine.model_copy(update={"chance": 0.5}))


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[Artifact, Artifact]:
    """The same model twice, the second one with a shorter context."""
    store = Store(tmp_path / "home")
    shipped(tmp_path / "base")
    tuned = Path(shutil.copytree(tmp_path / "base", tmp_path / "tuned"))
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    return fetched(store, tmp_path / "base"), fetched(store, tuned)


def test_texts_are_read_in_equal_windows(contexts: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    """The same weights seemed to lose 0.14 nats per token, as one of two read 24 tokens at once."""
    (tmp_path / "own.txt").write_text("rev:abc=cba\n" * 20)
    text = {"name": "own", "path": str(tmp_path / "own.txt")}
    with pytest.raises(BadInput, match=r"text own: base reads 256 tokens at once and tuned 24.*window to at most 24"):
        check_windows(*contexts, EvaluateSpec.model_validate({"texts": [text]}))
    check_windows(*contexts, EvaluateSpec.model_validate({"texts": [text | {"window": 24}]}))
    check_windows(contexts[0], contexts[0], EvaluateSpec.model_validate({"texts": [text]}))


def test_whole_texts_of_a_benchmark_are_read_in_equal_windows(contexts: tuple[Artifact, Artifact]) -> None:
    rolling = EvaluateSpec.model_validate({"benchmarks": ["technical_english"]})
    with pytest.raises(
        BadInput, match=r"technical_english reads whole texts in windows.* 256 tokens of base and 24 of"
    ):
        check_windows(*contexts, rolling)
    check_windows(contexts[0], contexts[0], rolling)
    check_windows(*contexts, EvaluateSpec.model_validate({"benchmarks": ["tiny_rev"]}))


def test_texts_and_benchmarks_are_named_once(tmp_path: Path) -> None:
    text = {"name": "book", "path": str(tmp_path)}
    with pytest.raises(ValidationError, match="texts named twice: book"):
        EvaluateSpec.model_validate({"texts": [text, text]})
    plain = EvaluateSpec()
    assert plain.digest() == EvaluateSpec(texts=()).digest()
    (tmp_path / "a.txt").write_text("words")
    assert plain.digest() != EvaluateSpec.model_validate({"texts": [text]}).digest()


def test_scores_are_json(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    metadata = scores_of(model, tokenizer, tmp_path, "pick").metadata
    assert json.loads(json.dumps(metadata)) == metadata and isinstance(metadata["num_documents"], int)
    assert isinstance(scores_of(model, tokenizer, tmp_path, "pick").rows, pd.DataFrame)
