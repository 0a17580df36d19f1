"""Logs of lm-eval, of four versions and with all that may be wrong with them."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from cfsd.errors import BadInput, NotFinite
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import BUNDLED
from cfsd.evaluate.logs.alike import check_alike
from cfsd.evaluate.logs.folder import Log, logs_in
from cfsd.evaluate.logs.rows import read
from cfsd.report.scores import metric_of
from cfsd.store.artifact import Artifact, Store

LOGS = Path(__file__).parent / "lm_eval_logs"
VERSIONS = ("0.4.3", "0.4.5", "0.4.9.1")
CHECKED = "all_parts is compared; parts cannot be, being no average of a number per document"
Change = Callable[[Path], object]


@pytest.fixture(scope="session")
def made_now(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same logs, written by the lm-eval that is installed."""
    folder = tmp_path_factory.mktemp("logs")
    subprocess.run([sys.executable, LOGS / "make.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Logs that a test may change."""
    return Path(shutil.copytree(LOGS / "0.4.9.1", tmp_path / "base"))


def file_of(folder: Path, name: str) -> Path:
    (path,) = folder.rglob(f"{name}_2*")
    return path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a results file."""
    content = json.loads((path := file_of(folder, "results")).read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_samples(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the samples of a benchmark."""
    samples = samples_of(folder, name)
    change(samples)
    file_of(folder, f"samples_{name}").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def samples_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file_of(folder, f"samples_{name}").read_text().splitlines()]


def one(folder: Path, name: str, **chosen: Any) -> Log:
    return logs_in(folder).only([Benchmark(name=name, **chosen)]).log(name)


@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_every_version_says_the_same_of_one_model(version: str) -> None:
    check_same(LOGS / version, LOGS / VERSIONS[-1])


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_installed_version_says_the_same_as_older_ones(version: str, made_now: Path) -> None:
    check_same(LOGS / version, made_now)


def check_same(one: Path, other: Path) -> None:
    old, new = logs_in(one), logs_in(other)
    assert old.names() == new.names() == ["checks", "last_word", "prose", "sums", "words"]  # and not the group `both`
    assert (old.name, old.source, old.dtype) == ("model", "hf", "float32")
    assert len(check_alike(old, new)) == 5
    for name in new.names():
        before, after = read(old.log(name)), read(new.log(name))
        numbers = [
            [{**row, "value": round(row["value"], 4), "answer": ""} for row in side.rows] for side in (before, after)
        ]
        assert numbers[0] == numbers[1]
        known = [
            {k: v for k, v in side.metadata.items() if k not in ("lm_eval", "score", "scores")}
            for side in (before, after)
        ]
        assert known[0] == known[1]


@pytest.mark.parametrize(
    "name", ["facts", "tiny_rev", pytest.param("wording", marks=pytest.mark.slow), "technical_english"]
)
def test_rows_are_those_of_measuring_the_model(name: str, base: Artifact, store: Store, tmp_path: Path) -> None:
    from cfsd.evaluate.harness.score import score
    from cfsd.model.loading import load_for_measuring, load_tokenizer

    model, tokenizer = load_for_measuring(store, base, "cpu"), load_tokenizer(store.path(base))
    logged_by_lm_eval(model, tokenizer, name, tmp_path)
    ours, logged = score(model, tokenizer, Benchmark(name=name, limit=12)), read(logs_in(tmp_path).log(name))
    rows = ours.rows.to_dict("records")
    unlike = ("count", "answer") if name == "technical_english" else ()
    same = [column for column in rows[0] if column not in ("value", *unlike)]
    assert [[row[c] for c in same] for row in logged.rows] == [[row[c] for c in same] for row in rows]
    assert [row["value"] for row in logged.rows] == pytest.approx([row["value"] for row in rows], rel=1e-5)
    known = ("metric", "higher_is_better", "chance", "kind", "num_documents", "num_fewshot", "filters", "lm_eval")
    assert {k: logged.metadata[k] for k in known} == {k: ours.metadata[k] for k in known}


def logged_by_lm_eval(model: Any, tokenizer: Any, name: str, folder: Path) -> None:
    """Write the logs of 12 documents of a bundled benchmark, by what lm-eval's command line calls."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(folder))
    with contextlib.chdir(BUNDLED):  # the paths in the YAML start from the working directory
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=[name], limit=12, bootstrap_iters=0,
            evaluation_tracker=tracker,
            task_manager=TaskManager(include_path=str(BUNDLED), include_defaults=False),
        )  # fmt: skip
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name=name, samples=samples[name])


def test_what_is_read_of_each_kind_of_benchmark() -> None:
    model = logs_in(LOGS / "0.4.5")
    words, last, prose, sums, checks = (read(model.log(n)) for n in ("words", "last_word", "prose", "sums", "checks"))
    assert words.metadata["chance"] == pytest.approx(1 / 3) and words.metadata["num_fewshot"] == 1
    assert [row["value"] for row in words.rows] == [1.0, 1.0, 0.0] and words.metadata["kind"] == "binary"
    assert words.rows[2]["answer"] == "hot [right: cold]" and words.rows[2]["prompt"].endswith("\n\nice is")
    assert sums.metadata["filters"] == ["strict", "last-letter"]
    assert [(row["filter"], row["value"]) for row in sums.rows] == [
        ("strict", 0.0), ("strict", 1.0), ("strict", 0.0), ("last-letter", 0.0), ("last-letter", 0.0),
        ("last-letter", 0.0),
    ]  # fmt: skip
    assert prose.metadata["kind"] == "perplexity" and prose.metadata["per"] == "word"
    assert (prose.rows[0]["value"], prose.rows[0]["count"]) == (pytest.approx(97.283, abs=1e-3), 6)
    assert last.metadata["metric"] == "acc" and last.metadata["chance"] is None
    assert checks.metadata["metric"] == "all_parts" and checks.metadata["remarks"] == [CHECKED]


def test_another_metric_and_chance_may_be_chosen() -> None:
    folder = LOGS / "0.4.9.1"
    perplexity = read(one(folder, "last_word", metric="perplexity"))
    assert perplexity.metadata["per"] == "document" and perplexity.rows[0]["value"] == pytest.approx(15.451, abs=1e-3)
    bits = read(one(folder, "prose", metric="bits_per_byte"))
    assert bits.metadata["per"] == "byte" and bits.rows[0]["count"] == 24
    assert read(one(folder, "words", metric="acc_norm", chance=0.25)).metadata["chance"] == 0.25
    with pytest.raises(BadInput, match=r"parts of .* is no average over documents .* usable are all_parts"):
        read(one(folder, "checks", metric="parts"))
    with pytest.raises(BadInput, match="limit cannot be set"):
        one(folder, "words", limit=2)


def test_the_newest_log_of_each_benchmark_is_read_and_that_is_said(copy: Path) -> None:
    later = copy / "again" / "model"
    shutil.copytree(copy / "model", later)
    for path in later.iterdir():
        path.rename(path.with_name(path.name.replace("2026", "2027")))
    edit(later, lambda content: [content[part].pop("sums") for part in ("results", "configs")])
    file_of(later, "samples_sums").unlink()
    model = logs_in(copy)
    assert "2027" in model.log("words").path and "2026" in model.log("sums").path
    assert "of checks, last_word, prose, words the newest log is read" in model.said[0]


def test_a_results_file_of_a_name_of_ones_own_is_found(copy: Path) -> None:
    path = file_of(copy, "results")
    path.rename(path.with_name(path.name.replace("results", "mine")))  # as `--output_path mine.json` writes it
    (path.parent / "notes_2026-11-29T12-34-41.json").write_text("{}")
    assert len(logs_in(copy).logs) == 5


def test_documents_without_digests_are_told_apart_by_their_content(copy: Path) -> None:
    whole = read(one(LOGS / "0.4.9.1", "words"))
    digests = ("doc_hash", "prompt_hash", "target_hash")
    edit_samples(copy, "words", lambda samples: [s.pop(name) for s in samples for name in digests])
    bare = read(one(copy, "words"))
    assert bare.asked == whole.asked and bare.rows == whole.rows


def test_documents_to_which_a_metric_does_not_apply_are_left_out(copy: Path) -> None:
    edit_samples(
        copy, "sums", lambda samples: [s.update(exact_match=float("nan")) for s in samples if s["doc_id"] == 2]
    )
    edit(copy, lambda content: content["results"]["sums"].update({"exact_match,strict": 0.5}))
    found = read(one(copy, "sums"))
    assert found.metadata["left_out"] == 1 and found.metadata["num_documents"] == 2


@pytest.mark.parametrize("of_base", [[], [0]])
@pytest.mark.parametrize("of_tuned", [[], [0], [0, 2]])
def test_a_metric_that_may_not_apply_is_paired_where_it_applies_to_both(
    copy: Path, tmp_path: Path, of_base: list[int], of_tuned: list[int]
) -> None:
    """Documents are compared by what was asked, not by those that have a value."""
    other = Path(shutil.copytree(copy, tmp_path / "tuned"))
    for folder, without in ((copy, of_base), (other, of_tuned)):
        values = {0: 0.25, 1: 0.5, 2: 0.75} | dict.fromkeys(without, math.nan)
        edit_samples(folder, "words", lambda own, values=values: [s.update(acc=values[s["doc_id"]]) for s in own])
        there = [value for value in values.values() if not math.isnan(value)]
        reported = {"words": {"acc,none": sum(there) / len(there)}}
        edit(folder, lambda content, reported=reported: content["results"].update(reported))
    models = [logs_in(folder).only([Benchmark(name="words")]) for folder in (copy, other)]
    check_alike(*models)
    sides = [read(model.log("words")) for model in models]
    artifacts: list[Any] = [SimpleNamespace(metadata=side.metadata) for side in sides]
    _, pairs = metric_of(*artifacts).paired(*(pd.DataFrame(side.rows) for side in sides))
    assert set(pairs["doc_id"]) == {0, 1, 2} - {*of_base, *of_tuned}


def test_a_perplexity_has_no_score_of_guessing(copy: Path) -> None:
    """What the metadata states is of another metric; what the user states is refused."""
    edit(copy, lambda content: content["configs"]["prose"].update(metadata={"chance": 0.25}))
    assert read(one(copy, "prose")).metadata["chance"] is None
    with pytest.raises(BadInput, match=r"prose: chance is 0.5, but its \w+ is a perplexity"):
        read(one(copy, "prose", chance=0.5))


def test_one_of_several_filters_reads_the_answers_and_that_is_said(copy: Path) -> None:
    first, other = read(one(copy, "sums")), read(one(copy, "sums", filter="last-letter"))
    assert first.metadata["filters"] == ["strict", "last-letter"] == other.metadata["filters"][::-1]
    assert first.metadata["remarks"] == ["answers are as filter strict reads them, not as last-letter (`filter`)"]
    for found in (first, other):
        assert found.metadata["score"] == found.metadata["scores"][found.metadata["filters"][0]]
    with pytest.raises(BadInput, match=r"filter 'none' is none of its own; allowed: strict, last-letter"):
        read(one(copy, "sums", filter="none"))


def test_a_probability_has_no_score_of_guessing_by_the_number_of_choices(copy: Path) -> None:
    edit_samples(copy, "words", lambda samples: [s.update(acc=0.7) for s in samples])
    edit(copy, lambda content: content["results"]["words"].update({"acc,none": 0.7}))
    assert read(one(copy, "words")).metadata["chance"] is None


def test_functions_among_filters_are_the_same_in_every_run(copy: Path) -> None:
    def written(place: str) -> None:
        function = f"<function last at {place}>"
        parts = [{"name": "none", "filter": [{"function": "custom", "filter_fn": function}]}]
        edit(copy, lambda content: content["configs"]["words"].update(filter_list=parts))

    written("0x7f21074804a0")
    first = logs_in(copy)
    written("0x55d0c0ffee00")
    assert logs_in(copy).digest() == first.digest()


def test_a_metric_that_a_function_names_has_the_direction_of_those_listed(copy: Path) -> None:
    """As pass@1 of HumanEval, which lists pass_at_k."""
    edit_samples(copy, "words", lambda samples: [s.update({"pass@1": s.pop("acc")}) for s in samples])
    edit(
        copy,
        lambda content: content["results"]["words"].update({"pass@1,none": 2 / 3}),
    )
    assert read(one(copy, "words", metric="pass@1")).metadata["higher_is_better"] is True


def test_some_documents_of_a_task_are_whole_where_the_scores_prove_it(copy: Path) -> None:
    """lm-eval --samples before 0.4.13 counts all documents."""
    edit(copy, lambda content: content["n-samples"]["words"].update(effective=9))
    found = read(one(copy, "words")).metadata
    assert found["num_documents"] == 3
    assert "3 of 9 documents are in the log, whose scores are of these (--samples)" in found["remarks"]
    edit_samples(copy, "words", lambda samples: [s.update(acc=0.0, acc_norm=0.0) for s in samples])
    edit(copy, lambda content: content["results"]["words"].update({"acc,none": 0.0, "acc_norm,none": 0.0}))
    with pytest.raises(BadInput, match="holds 3 documents, the results beside it are of 9"):
        read(one(copy, "words"))


@pytest.mark.parametrize(("documents", "version"), [(2, "0.4.9.1"), (9, "0.4.13")])
def test_more_documents_than_counted_or_a_version_that_counts_are_refused(
    copy: Path, documents: int, version: str
) -> None:
    edit(copy, lambda content: content["n-samples"]["words"].update(effective=documents))
    edit(copy, lambda content: content.update(lm_eval_version=version))
    with pytest.raises(BadInput, match=f"holds 3 documents, the results beside it are of {documents}"):
        read(one(copy, "words"))


def test_several_right_choices_raise_the_score_of_guessing(copy: Path) -> None:
    edit_samples(copy, "words", lambda samples: samples[0].update(target="[0, 2]"))
    found = read(one(copy, "words"))
    assert found.metadata["chance"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert found.rows[0]["answer"] == "pet [right: pet or stone]"


def test_what_a_model_wrote_at_length_is_not_kept(copy: Path) -> None:
    edit_samples(copy, "sums", lambda samples: [s.update(resps=[["x" * 1_000_000]]) for s in samples])
    assert max(len(str(row)) for row in read(one(copy, "sums")).rows) < 1000


def _drop_samples(folder: Path) -> None:
    for path in folder.rglob("samples_*"):
        path.unlink()


def _other_model(folder: Path) -> None:
    later = folder / "other"
    shutil.copytree(folder / "model", later)
    edit(later, lambda content: content.update(model_name="other"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


MISTAKES: dict[str, tuple[Change, type[Exception], str]] = {
    "no folder": (shutil.rmtree, BadInput, "is not a folder"),
    "nothing in it": (lambda f: shutil.rmtree(f / "model"), BadInput, "holds no logs of lm-eval"),
    "results alone": (_drop_samples, BadInput, r"no samples_\*.jsonl; run lm-eval again with --output_path and --log"),
    "samples alone": (lambda f: file_of(f, "results").unlink(), BadInput, "but no results file of the same date"),
    "one file missing": (
        lambda f: file_of(f, "samples_words").unlink(), BadInput, "newest that measured words, has no samples_words_",
    ),
    "two models": (_other_model, BadInput, r"several models \(model, other\); give the folder of one"),
    "results cut short": (lambda f: _cut(file_of(f, "results")), BadInput, "is no JSON .* copy it again"),
    "results of another program": (
        lambda f: file_of(f, "results").write_text('{"results": []}'), BadInput, "no results file of lm-eval 0.4.3",
    ),
    "samples cut short": (lambda f: _cut(file_of(f, "samples_words")), BadInput, "jsonl, line 3 is no JSON"),
    "samples without lines": (
        lambda f: edit_samples(f, "words", lambda samples: samples.pop()), BadInput,
        "holds 2 documents, the results beside it are of 3; it was cut short",
    ),
    "no bytes": (lambda f: file_of(f, "samples_words").write_bytes(b""), BadInput, "holds 0 documents"),
    "bytes that are no text": (lambda f: file_of(f, "samples_words").write_bytes(b"\xff\n"), BadInput, "1 is no JSON"),
    "lines of another program": (
        lambda f: edit_samples(f, "words", lambda samples: samples[1].pop("arguments")), BadInput,
        r"line 2 is no sample of lm-eval 0.4.3 or later \(arguments missing",
    ),
    "lines without documents": (
        lambda f: edit_samples(f, "words", lambda samples: [s.pop("doc") for s in samples]), BadInput,
        r"line 1 is no sample of lm-eval 0.4.3 or later \(doc missing",
    ),
    "a list for a line": (lambda f: file_of(f, "samples_words").write_text("[]\n"), BadInput, "line 1 is no sample"),
    "a document twice": (
        lambda f: edit_samples(f, "words", lambda samples: samples.append(samples[0])), BadInput,
        "0 comes more than once",
    ),
    "samples of another run": (
        lambda f: edit_samples(f, "words", lambda samples: [s.update(acc=0, acc_norm=0) for s in samples]), BadInput,
        "no metric of .* comes to the score in the results beside it",
    ),
    "NaN": (
        lambda f: (
            edit_samples(f, "words", lambda samples: samples[1].update(acc=float("nan"))),
            edit(f, lambda content: content["results"]["words"].update({"acc,none": float("nan")})),
        ), NotFinite, "line 2: its acc is nan",
    ),
    "a likelihood of NaN behind an accuracy": (
        lambda f: edit_samples(f, "words", lambda s: s[0].update(filtered_resps=[["nan", "False"]] * 3)), NotFinite,
        "line 1: the model's log-likelihood is nan",
    ),
    "no direction": (
        lambda f: edit(f, lambda content: (
            content["higher_is_better"].pop("words"),
            [entry.pop("higher_is_better") for entry in content["configs"]["words"]["metric_list"]],
        )), BadInput, "do not say whether more of acc is better",
    ),
    "settings of another kind": (
        lambda f: edit(f, lambda content: content["configs"]["words"].update(repeats="many")), BadInput,
        "what it says of words is not lm-eval's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str, copy: Path) -> None:
    change, kind, message = MISTAKES[name]
    change(copy)
    with pytest.raises(kind, match=message):
        read(logs_in(copy).log("words"))


def _answer(samples: list[dict[str, Any]], index: int, **fields: Any) -> None:
    samples[index].update(fields)


DIFFERENCES: dict[str, tuple[Change, str]] = {
    "few-shot": (
        lambda f: edit(f, lambda content: content["n-shot"].update(words=0)),
        r"words: its examples in the prompt \(num_fewshot\) is 1 \(base\) and 0 \(tuned\)",
    ),
    "version": (
        lambda f: edit(f, lambda content: content["versions"].update(words=2)),
        r"words: its version of the task is 1 \(base\) and 2 \(tuned\)",
    ),
    "template": (
        lambda f: edit(f, lambda content: content.update(chat_template_sha="ab12")),
        r"words: its chat template \(chat_template_sha\) is none \(base\) and ab12 \(tuned\)",
    ),
    "generation": (
        lambda f: edit(f, lambda content: content["configs"]["sums"]["generation_kwargs"].update(max_gen_toks=9)),
        "sums: its generation_kwargs is",
    ),
    "document": (
        lambda f: edit_samples(f, "words", lambda samples: _answer(samples, 1, doc_hash="ab")),
        r"words: 1 of 3 documents are others \(doc_hash; first: 1\)",
    ),
    "prompt": (
        lambda f: edit_samples(f, "words", lambda samples: _answer(
            samples, 2, prompt_hash="ab", arguments={"gen_args_0": {"arg_0": "Today is Sunday", "arg_1": " a"}}
        )),
        r"3 prompts \(prompt_hash; first: document 2\) are others: …'the.*… \(base\) and …'Today is Sunday'… \(tuned",
    ),
    "right answer": (
        lambda f: edit_samples(f, "words", lambda samples: _answer(samples, 0, target_hash="ab")),
        r"1 of 3 right answers \(target_hash; first: document 0\) are others",
    ),
    "other documents": (
        lambda f: edit_samples(f, "words", lambda samples: _answer(samples, 0, doc_id=9)),
        r"1 of 3 documents were scored for the base model only \(first: 0\)",
    ),
    "window": (
        lambda f: edit(f, lambda content: content.update(max_length=63)),
        r"prose: its window in tokens \(by max_length\) is 64 \(base\) and 63 \(tuned\)",
    ),
    "benchmark": (
        lambda f: edit(f, lambda content: [content[part].pop("words") for part in ("results", "configs")]),
        "measured on the base model only: words",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_is_named_with_what_agrees(name: str, copy: Path) -> None:
    change, message = DIFFERENCES[name]
    change(copy)
    with pytest.raises(BadInput, match=message) as refused:
        check_alike(logs_in(LOGS / "0.4.9.1"), logs_in(copy))
    rest = str(refused.value).rpartition("those that agree: ")[2].replace("--benchmark", "").split()
    everything = ["checks", "last_word", "prose", "sums", "words"]
    unlike = {"generation": "sums", "window": "prose"}.get(name, "words")
    assert name == "template" or rest == [n for n in everything if n != unlike]


def test_answers_that_one_model_has_right_in_part_are_compared(copy: Path) -> None:
    def graded(samples: list[dict[str, Any]]) -> None:
        samples[0]["exact_match"] = 0.5

    edit_samples(copy, "sums", graded)
    strict = [s["exact_match"] for s in samples_of(copy, "sums") if s["filter"] == "strict"]
    edit(copy, lambda content: content["results"]["sums"].update({"exact_match,strict": fmean(strict)}))
    assert "sums" in check_alike(logs_in(LOGS / "0.4.9.1"), logs_in(copy))


def test_windows_are_compared_as_the_engine_cuts_them(copy: Path) -> None:
    edit(copy, lambda content: content.update(max_length=65, model_source="local-completions"))
    assert len(check_alike(logs_in(LOGS / "0.4.9.1"), logs_in(copy))) == 5


def test_one_that_cannot_be_read_is_named_beside_those_that_can(copy: Path) -> None:
    edit_samples(copy, "words", lambda samples: samples[1].pop("arguments"))
    with pytest.raises(BadInput, match=r"words: .*line 2 is no sample(.|\n)*--benchmark checks --benchmark last"):
        check_alike(logs_in(LOGS / "0.4.9.1"), logs_in(copy))


def test_examples_as_turns_count_only_where_there_are_examples_in_a_template(copy: Path) -> None:
    edit(copy, lambda content: content.update(fewshot_as_multiturn=True))
    assert len(check_alike(logs_in(LOGS / "0.4.9.1"), logs_in(copy))) == 5


def test_all_differences_are_in_one_message(copy: Path) -> None:
    for change, _ in DIFFERENCES.values():
        if change is not DIFFERENCES["benchmark"][0]:
            change(copy)
    with pytest.raises(BadInput) as refused:
        check_alike(logs_in(LOGS / "0.4.9.1"), logs_in(copy))
    for word in ("num_fewshot", "version of the task", "chat_template_sha", "generation_kwargs", "doc_hash"):
        assert word in str(refused.value)


def test_models_of_logs_count_by_content_and_not_by_place(copy: Path) -> None:
    known, moved = logs_in(LOGS / "0.4.9.1").log("words"), logs_in(copy).log("words")
    assert known.path != moved.path and known.digest() == moved.digest()
    edit(copy, lambda content: content["n-shot"].update(words=0))
    assert logs_in(copy).log("words").digest() != known.digest()
