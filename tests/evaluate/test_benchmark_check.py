"""What can be known of a benchmark without weights is told before anything is sampled, with its document."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.check import check_documents
from tests.evaluate.test_score import CHOICE, CONTINUE, READ, WRITE, write

MEAN = {"aggregation": "mean", "higher_is_better": True}
GOOD = [{"question": f"a cab {i}", "choices": ["a", "bed"], "right": i % 2} for i in range(6)]
INDEX = "{{choices[right]}}"


def check(
    folder: Path, changes: dict[str, Any], documents: list[Any] | str = GOOD, base: dict[str, Any] = CHOICE, **own: Any
) -> None:
    """Check a benchmark whose YAML and documents are these; `own` are settings of the recipe."""
    path = write(folder, base, **changes)
    text = documents if isinstance(documents, str) else "".join(json.dumps(row) + "\n" for row in documents)
    (folder / "data" / "rows.jsonl").write_text(text)
    check_documents(Benchmark(name=path.stem, folder=str(folder), **own))


def fifth(**changes: Any) -> list[dict[str, Any]]:
    """Return good documents of which number 4 has other fields."""
    return [{**row, **(changes if number == 4 else {})} for number, row in enumerate(GOOD)]


def lacks(field: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if number != 4 or k != field} for number, row in enumerate(GOOD)]


@pytest.mark.parametrize("base", [CHOICE, WRITE, READ, CONTINUE], ids=["choice", "write", "read", "continue"])
def test_a_whole_benchmark_passes(tmp_path: Path, base: dict[str, Any]) -> None:
    check(tmp_path, {}, base=base)


GOODS: dict[str, tuple[dict[str, Any], list[Any], dict[str, Any]]] = {
    "the right choice as text": (CHOICE, [{**row, "right": "bed"} for row in GOOD], {}),
    "true and false as numbers": (CHOICE, [{**row, "right": True} for row in GOOD], {}),
    "a choice twice": (CHOICE, fifth(choices=["a", "a"]), {}),
    "several right ones": (CHOICE, [{**row, "right": [0, 1]} for row in GOOD], {}),
    "several written answers": (WRITE, [{**row, "right": ["a", "b"]} for row in GOOD], {"doc_to_target": "right"}),
    "a field that only some have": (
        CHOICE,
        fifth(hint="so"),
        {"doc_to_text": "{% if hint %}{{hint}} {% endif %}{{question}}"},
    ),
    "numbers as text": (CHOICE, [{**row, "question": 5} for row in GOOD], {"doc_to_text": "{{question}} ="}),
    "contexts to choose from": (
        CHOICE,
        GOOD,
        {"doc_to_text": "right", "doc_to_target": "question", "doc_to_choice": "choices"},
    ),
    "choices in the YAML": (CHOICE, GOOD, {"doc_to_choice": {"A": "one", "B": "two"}}),
    "one right answer for all": (WRITE, GOOD, {"doc_to_target": "yes"}),
    "a generation setting": (
        WRITE,
        GOOD,
        {"generation_kwargs": {"until": "\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9}},
    ),
    "validation only, with examples": (
        CHOICE,
        GOOD,
        {"test_split": None, "validation_split": "test", "num_fewshot": 2},
    ),
    "examples in the YAML": (CHOICE, GOOD, {"num_fewshot": 1, "fewshot_config": {"samples": GOOD[:2]}}),
}


@pytest.mark.parametrize("good", GOODS.values(), ids=GOODS.keys())
def test_what_people_rightly_write_passes(tmp_path: Path, good: tuple[Any, Any, Any]) -> None:
    base, documents, changes = good
    check(tmp_path, changes, documents, base)


DOCUMENTS: dict[str, tuple[dict[str, Any], list[Any] | str, dict[str, Any], str]] = {
    "no question": (
        CHOICE,
        lacks("question"),
        {},
        "document 4 .*doc_to_text prints a field that it has not; null or missing are: question",
    ),
    "no question in a template": (
        CHOICE,
        lacks("question"),
        {"doc_to_text": "{{question}} ="},
        "document 4 .*doc_to_text prints a field that it has not; null or missing are: question",
    ),
    "no target": (
        CHOICE,
        lacks("right"),
        {},
        "document 4 .*doc_to_target is None, .*no right answer.*missing are: right",
    ),
    "no target in a template": (
        WRITE,
        lacks("right"),
        {},
        "document 4 .*doc_to_target prints a field that it has not; .*: right|document 4 .*None",
    ),
    "no written target": (WRITE, lacks("right"), {"doc_to_target": "right"}, "document 4 .*no right answer"),
    "no choices": (CHOICE, lacks("choices"), {}, "document 4 .*doc_to_choice is None; it needs a list"),
    "empty choices": (CHOICE, fifth(choices=[]), {}, r"document 4 .*doc_to_choice is \[\]; it needs a list"),
    "an empty choice": (CHOICE, fifth(choices=["", "b"]), {}, "document 4 .*choice 0 is empty"),
    "numbers as choices": (CHOICE, [{**row, "choices": [1, 2]} for row in GOOD], {}, "choice 0 is 1, not text"),
    "a null choice": (CHOICE, fifth(choices=[None, "b"]), {}, "document 4 .*choice 0 is None, not text"),
    "yes and no of YAML": (CHOICE, GOOD, {"doc_to_choice": [True, False]}, "choice 0 is True, not text; in YAML, yes"),
    "a target beyond the choices": (CHOICE, fifth(right=2), {}, "document 4 .*doc_to_target is 2, .* from 0 to 1"),
    "a target beyond the choices in the first": (
        CHOICE,
        [{**row, "right": "7"} for row in GOOD],
        {"doc_to_target": "{{right}}"},
        "the doc_to_target of document 0 is not the number of one of its choices",
    ),
    "a hidden target": (CHOICE, fifth(right=-1), {}, "document 4 .*doc_to_target is -1"),
    "a target between choices": (CHOICE, fifth(right=0.5), {}, r"doc_to_target is 0\.0"),
    "a number in quotes": (CHOICE, [{**r, "right": "1"} for r in GOOD], {}, "document 0 .*a number written as text"),
    "a target that is no choice": (CHOICE, [{**r, "right": "cab"} for r in GOOD], {}, "doc_to_target is 'cab'"),
    "a number to continue": (
        CONTINUE,
        GOOD,
        {"doc_to_target": "right"},
        "document 0 .*doc_to_target is 0, and it must be text",
    ),
    "nothing to continue with": (CONTINUE, GOOD, {"doc_to_target": ""}, "document 0 .*doc_to_target is ''"),
    "an empty text to read": (READ, fifth(question=""), {}, "document 4 .*doc_to_target is '', and it must be text"),
    "an empty prompt": (WRITE, fifth(question=""), {}, "document 4 .*its prompt is empty"),
    "a number as question": (
        CHOICE,
        [{**r, "question": 5} for r in GOOD],
        {},
        "doc_to_text is 5, .*a bare number is taken for that of a choice",
    ),
    "a template's mistake": (CHOICE, GOOD, {"doc_to_text": "{{question.x.y}}"}, "pick.yaml .*has no attribute 'x'"),
    "broken Jinja": (CHOICE, GOOD, {"doc_to_text": "{{question"}, "pick.yaml .*unexpected end of template"),
    "a field's name misspelt": (
        CHOICE,
        GOOD,
        {"doc_to_text": "qestion"},
        r"doc_to_text is 'qestion', which is no field",
    ),
    "a target's name misspelt": (
        WRITE,
        GOOD,
        {"doc_to_target": "rigth"},
        r"doc_to_target is 'rigth', which is no field",
    ),
    "a bad example": (
        CHOICE,
        GOOD,
        {"num_fewshot": 1, "fewshot_config": {"samples": [GOOD[0], {"question": "x", "choices": ["a"]}]}},
        "few-shot example, document 1 .*doc_to_target cannot be made: KeyError: 'right'|.*'right'",
    ),
    "not JSON": (CHOICE, json.dumps(GOOD[0]) + '\n{"question": "a c\n', {}, r"rows\.jsonl, line 2: not JSON"),
    "a cut last line": (
        CHOICE,
        json.dumps(GOOD[0]) + "\n" + json.dumps(GOOD[1])[:-9],
        {},
        r"rows\.jsonl, line 2: not JSON",
    ),
    "no objects": (CHOICE, '"a"\n"b"\n', {}, r"rows\.jsonl, line 1: '\"a\"' is no document"),
    "half an emoji": (
        CHOICE,
        json.dumps(GOOD[0]) + '\n{"question": "\\ud83d"}\n',
        {},
        r"rows\.jsonl, line 2: half a char",
    ),
    "a cut array": (CHOICE, json.dumps(GOOD)[:-1], {}, r"rows\.jsonl, line 1: not JSON"),
    "no rows": (CHOICE, "[]", {}, "pick.yaml"),
}


@pytest.mark.parametrize("bad", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_documents_that_cannot_be_scored_are_named(tmp_path: Path, bad: tuple[Any, Any, Any, str]) -> None:
    base, documents, changes, message = bad
    with pytest.raises(BadInput, match=message):
        check(tmp_path, changes, documents, base)


def test_words_that_csv_readers_take_for_nothing_are_told(tmp_path: Path) -> None:
    files = {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": "data/rows.jsonl"}}}
    with pytest.raises(BadInput, match=r"write, document 0: a template prints a field .*words such as NA"):
        check(tmp_path, {**files, "doc_to_target": "right"}, "question,right\nNA,b\na,b\n", WRITE)


def test_documents_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    check(tmp_path, {}, lacks("right"), limit=4)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a few-shot split": (CHOICE, {"fewshot_split": "dev"}, "fewshot_split is 'dev', but its data files have test"),
    "one in fewshot_config": (CHOICE, {"fewshot_config": {"split": "dev"}}, "fewshot_config.split is 'dev'"),
    "no split": (CHOICE, {"test_split": None}, "neither test_split nor validation_split"),
    "one file without a split": (
        CHOICE,
        {"dataset_kwargs": {"data_files": "data/rows.jsonl"}},
        "test_split is 'test', but its data files have train",
    ),
    "a split of a folder": (
        CHOICE,
        {"dataset_path": "./data", "dataset_kwargs": None},
        "test_split is 'test', which its data lack",
    ),
    "no choices": (CHOICE, {"doc_to_choice": None}, "it has no doc_to_choice"),
    "no target": (WRITE, {"doc_to_target": None}, "it has no doc_to_target"),
    "no data": (CHOICE, {"dataset_path": None}, "it has no dataset_path"),
    "pictures": (CHOICE, {"doc_to_image": "image"}, "text alone"),
    "an unknown setting": (CHOICE, {"doc_to_txt": "question"}, "doc_to_txt"),
    "more examples than documents": (CHOICE, {"num_fewshot": 6, "fewshot_split": "test"}, "num_fewshot 6 needs 7"),
    "few-shot in words": (CHOICE, {"num_fewshot": "two"}, "num_fewshot is 'two'"),
    "an unknown metric": (WRITE, {"metric_list": [{"metric": "rouge", **MEAN}]}, "metric 'rouge' is not lm-eval's own"),
    "a metric of the hub": (
        WRITE,
        {"metric_list": [{"metric": "bleu", "hf_evaluate": True}]},
        "none is fetched from the hub",
    ),
    "an unknown aggregation": (CHOICE, {"metric_list": [{"metric": "acc", "aggregation": "men"}]}, "aggregation 'men'"),
    "a metric of another type": (
        CHOICE,
        {"metric_list": [{"metric": "perplexity"}]},
        "no metric is an average.*none; .*aggregation: mean",
    ),
    "an option that a metric lacks": (
        WRITE,
        {"metric_list": [{"metric": "exact_match", "ignore_cas": True, **MEAN}]},
        "document 0 .*ignore_cas|its result",
    ),
    "a metric without a name": (CHOICE, {"metric_list": [{"aggregation": "mean"}]}, "metric_list.0 has no metric"),
    "an unknown filter": (WRITE, {"filter_list": [{"name": "x", "filter": [{"function": "regx"}]}]}, "regx"),
    "a filter without a name": (
        WRITE,
        {"filter_list": [{"filter": [{"function": "take_first"}]}]},
        "filter_list.0 has no name",
    ),
    "a broken pattern": (
        WRITE,
        {"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
        "document 0 .*filter x: .*unterminated",
    ),
    "an unknown generation setting": (
        WRITE,
        {"generation_kwargs": {"top_q": 1}},
        "generation_kwargs: top_q is unknown",
    ),
    "a generation setting in words": (WRITE, {"generation_kwargs": {"temperature": "high"}}, "temperature is 'high'"),
    "a probability above one": (
        WRITE,
        {"generation_kwargs": {"do_sample": True, "top_p": 3.0}},
        "generation_kwargs.top_p is 3.0",
    ),
    "sampling without a temperature": (
        WRITE,
        {"generation_kwargs": {"do_sample": True}},
        "generation_kwargs: .*temperature",
    ),
    "until is null": (WRITE, {"generation_kwargs": {"until": None}}, "generation_kwargs.until"),
    "temperature is null": (
        WRITE,
        {"generation_kwargs": {"temperature": None}},
        "generation_kwargs.temperature is None",
    ),
    "a setting that lm-eval sets itself": (
        WRITE,
        {"generation_kwargs": {"use_cache": False}},
        "generation_kwargs: .*use_cache",
    ),
    "another kind of answer": (
        WRITE,
        {"generation_kwargs": {"return_dict_in_generate": True}},
        "generation_kwargs: .*correct or remove",
    ),
    "numbers in until": (WRITE, {"generation_kwargs": {"until": [1]}}, "generation_kwargs.until"),
    "no tokens": (WRITE, {"generation_kwargs": {"max_gen_toks": 0}}, "generation_kwargs.max_gen_toks is 0"),
    "chance in words": (CHOICE, {"metadata": {"chance": "a third"}}, "metadata.chance is 'a third'"),
    "chat template in words": (CHOICE, {"metadata": {"chat_template": "yes please"}}, "chat_template is .yes please"),
    "a prompt of promptsource": (
        CHOICE,
        {"use_prompt": "promptsource:GPT-3 style"},
        "use_prompt takes its prompt from",
    ),
    "an include that is away": (CHOICE, {"include": "../base.yaml"}, "there is no file .*base.yaml"),
}


@pytest.mark.parametrize("bad", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_cannot_work_are_named(tmp_path: Path, bad: tuple[Any, Any, str]) -> None:
    base, changes, message = bad
    with pytest.raises(BadInput, match=f"benchmark {base['task']}.*(?:{message})|{message}"):
        check(tmp_path, changes, base=base)


PYTHON: dict[str, tuple[str, str, str]] = {
    "a module that does not import": ("process_docs", "import nothing_of_the_kind\n", "nothing_of_the_kind"),
    "a mistake in Python": ("process_docs", "def own(docs:\n", "SyntaxError"),
    "no such function": ("process_docs", "def other(docs):\n    return docs\n", "no function 'own'"),
    "a list that is away": ("process_docs", "open('/nowhere/list.json')\n", r"mine\.py, line 1: FileNotFoundError"),
    "it exits": ("process_docs", "import sys\nsys.exit(3)\n", r"mine\.py, line 2: SystemExit: 3"),
    "process_docs fails": ("process_docs", "def own(docs):\n    assert 0, 'too few'\n", r"mine\.py, line 2: .*too few"),
    "process_docs gives nothing": ("process_docs", "def own(docs):\n    pass\n", "NoneType"),
    "process_docs leaves none": (
        "process_docs",
        "def own(docs):\n    return docs.filter(lambda d: False)\n",
        "pick.yaml",
    ),
    "doc_to_text fails for one": (
        "doc_to_text",
        "def own(doc):\n    return 'x' * (1 // (4 - int(doc['question'][-1])))\n",
        r"document 4 .*doc_to_text cannot be made: mine\.py, line 2: ZeroDivisionError",
    ),
    "doc_to_text gives bytes": (
        "doc_to_text",
        "def own(doc):\n    return b'x'\n",
        "document 0 .*doc_to_text is b'x', not text",
    ),
    "doc_to_choice gives a tuple": ("doc_to_choice", "def own(doc):\n    return ('a', 'b')\n", "doc_to_choice is"),
    "process_results fails": (
        "process_results",
        "def own(doc, results):\n    return {'acc': results[7]}\n",
        r"document 0 .*its result: mine\.py, line 2: IndexError",
    ),
    "process_results gives a number": (
        "process_results",
        "def own(doc, results):\n    return 1.0\n",
        "process_results gives 1.0",
    ),
    "process_results lacks the metric": (
        "process_results",
        "def own(doc, results):\n    return {'f2': 1.0}\n",
        "no metric is an average",
    ),
}


@pytest.mark.parametrize("bad", PYTHON.values(), ids=PYTHON.keys())
def test_python_that_fails_is_named_with_its_line(tmp_path: Path, bad: tuple[str, str, str]) -> None:
    setting, module, message = bad
    (tmp_path / "mine.py").write_text(module)
    (tmp_path / "base.yaml").write_text(f"{setting}: !function mine.own\n")
    with pytest.raises(BadInput, match=f"(?s)benchmark pick.*(?:{message})"):
        check(tmp_path, {"include": "base.yaml", setting: None})


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=6),
    st.sampled_from(["question", "right", "{{right}}", "{{x}}", "{% if %}", "test", "generate_until", "json", "."]),
    st.lists(st.one_of(st.none(), st.integers(0, 3), st.text(max_size=3)), max_size=2),
    st.dictionaries(st.sampled_from(["metric", "until", "split", "x", "data_files"]), st.integers(0, 2), max_size=2),
)  # fmt: skip
FIELDS = sorted({*CHOICE, *WRITE, "dataset_path", "dataset_kwargs", "test_split", "num_fewshot", "fewshot_config",
                 "fewshot_split", "filter_list", "description", "target_delimiter", "fewshot_delimiter", "repeats",
                 "metadata", "gen_prefix", "include", "tag", "group", "class", "unsafe_code"})  # fmt: skip


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    base=st.sampled_from([CHOICE, WRITE, READ, CONTINUE]),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2),
    document=st.dictionaries(st.sampled_from(["question", "choices", "right", "other"]), VALUES, max_size=4),
)
def test_any_yaml_and_any_document_is_right_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any], changes: dict[str, Any], document: Any
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    path = write(tmp_path, base)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    rows = [*GOOD, document] if document else GOOD
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        check_documents(Benchmark(name=path.stem, folder=str(tmp_path)))
    except BadInput as error:
        assert "Traceback" not in str(error) and "\n" not in str(error)
