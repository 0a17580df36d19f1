"""What fails or is cut while scores are made is told with its document."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from cfsd.errors import BadInput
from cfsd.evaluate.harness.rows import best_choice
from tests.evaluate.test_score import CHOICE, READ, WRITE, scores_of, write
from tests.evaluate.test_score import model as model
from tests.evaluate.test_score import tokenizer as tokenizer

TWICE = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("first", "second")]
FAILS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a result": (
        CHOICE,
        {"process_results": "own"},
        "def own(doc, results):\n    return {'acc': 1 // (doc['question'] != 'cab')}",
        r"document 2 .*its result: own\.py, line 2: ZeroDivisionError",
    ),
    "a result under a second filter": (
        WRITE,
        {"process_results": "own", "filter_list": TWICE},
        "S = []\ndef own(doc, results):\n    S.append(doc)\n    assert len(S) < 12\n    return {'exact_match': 1}",
        r"document 3 .*its result: own\.py, line 4: AssertionError",
    ),
    "an aggregation": (
        CHOICE,
        {"aggregation": "own"},
        "def own(values):\n    raise RuntimeError('no')\n",
        r"aggregation of acc: own\.py, line 2: RuntimeError: no",
    ),
    "a text": (
        CHOICE,
        {"doc_to_text": "own"},
        "def own(doc):\n    return doc['q'] if doc['question'] == 'cab' else 'a'",
        r"document 2 .*doc_to_text cannot be made: own\.py, line 2: KeyError",
    ),
}


@pytest.mark.parametrize("case", FAILS.values(), ids=FAILS.keys())
def test_python_that_fails_while_scores_are_made_is_named(
    model: Any, tokenizer: Any, tmp_path: Path, case: tuple[Any, Any, str, str]
) -> None:
    base, changes, module, message = case
    path = write(tmp_path, base, **{key: value for key, value in changes.items() if key == "filter_list"})
    (tmp_path / "own.py").write_text(module)
    text = path.read_text()
    for key in changes.keys() - {"filter_list"}:
        tagged = f"{key}: !function own.own\n"
        text = text.replace("aggregation: mean", tagged.strip()) if key == "aggregation" else f"{text}{tagged}"
    path.write_text(text)
    with pytest.raises(BadInput, match=f"benchmark {path.stem}, {message}") as caught:
        scores_of(model, tokenizer, tmp_path, path.stem)
    assert "\n" not in str(caught.value)


def test_documents_that_are_cut_are_counted_and_said(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE, doc_to_text="{% if question == 'cab' %}{{question * 30}}{% else %}{{question}}{% endif %}")
    (remark,) = scores_of(model, tokenizer, tmp_path, "pick").metadata["remarks"]
    assert remark.startswith("1 of 8 documents are longer than the model's context of 64 tokens and were cut")
    assert "the first is document 2" in remark
    write(tmp_path, WRITE, doc_to_text="{{question * 9}}")
    assert scores_of(model, tokenizer, tmp_path, "write").metadata["remarks"][0].startswith("5 of 8 documents")
    write(tmp_path, READ, doc_to_target="{{question * 9}}")  # read in windows, whole
    assert "remarks" not in scores_of(model, tokenizer, tmp_path, "read").metadata


def test_what_was_taken_one_of_several_ways_is_said(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE, doc_to_choice=["a", "bed", "a"], num_fewshot=1)
    twice, examples = scores_of(model, tokenizer, tmp_path, "pick").metadata["remarks"]
    assert twice.startswith("8 documents have one choice twice (the first is document 0)")
    assert "its own answer may be among them" in examples
    write(tmp_path, CHOICE, doc_to_choice=["1", "0"], doc_to_target="{{right}}")
    (number,) = scores_of(model, tokenizer, tmp_path, "pick").metadata["remarks"]
    assert number.startswith(
        "8 documents have a right answer that is the number of one choice, counted from 0, and the"
    )
    write(tmp_path, CHOICE, doc_to_choice=["1", "0"], doc_to_target="{{['1', '0'].index(right | string)}}")
    assert "remarks" not in scores_of(model, tokenizer, tmp_path, "pick").metadata
    write(tmp_path, CHOICE, doc_to_choice=["a", "bed", "cab"], num_fewshot=1, fewshot_split="test")
    assert "remarks" not in scores_of(model, tokenizer, tmp_path, "pick").metadata


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (CHOICE, {"doc_to_choice": ["a", "\u00e9"], "target_delimiter": ""}, "an answer comes to no token"),
        (CHOICE, {"doc_to_choice": ["a", "bed" * 30]}, "an answer has 91 tokens, the model's context 64"),
        (READ, {"doc_to_target": "\u00e9"}, "its text comes to no token"),
        (WRITE, {"doc_to_text": "{{'\u00e9'}}"}, "its text comes to no token"),
    ],
)
def test_texts_without_tokens_and_answers_without_room_are_named(
    model: Any, tokenizer: Any, tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    dropping = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    dropping.backend_tokenizer.normalizer = normalizers.Replace("\u00e9", "")
    name = write(tmp_path, base, **changes).stem
    with pytest.raises(BadInput, match=f"benchmark {name}, document 0: {message}"):
        scores_of(model, dropping, tmp_path, name)


def test_generation_settings_that_do_not_go_together_are_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, WRITE, generation_kwargs={"max_gen_toks": 4, "num_return_sequences": 3})
    with pytest.raises(BadInput, match=r"benchmark write: its generation_kwargs do not work|generation_kwargs: "):
        scores_of(model, tokenizer, tmp_path, "write")


def test_a_file_that_is_read_elsewhere_is_said(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "bench", CHOICE)
    path.write_text(path.read_text() + "process_docs: !function own.own\n")
    (tmp_path / "list.json").write_text('["a "]')
    (path.parent / "beside.json").write_text('["a "]')
    read = (
        "import json\nfrom pathlib import Path\nHERE = Path(__file__).parent\nW = json.loads((HERE / %r).read_text())\n"
    )
    use = "def own(docs):\n    return docs.map(lambda doc: {'question': W[0] + doc['question']})\n"
    (path.parent / "own.py").write_text(read % "beside.json" + use)
    assert "remarks" not in scores_of(model, tokenizer, path.parent, "pick").metadata
    (path.parent / "own.py").write_text(read % "../list.json" + use)
    (remark,) = scores_of(model, tokenizer, path.parent, "pick").metadata["remarks"]
    assert remark.startswith(f"its Python reads {tmp_path / 'list.json'}, outside the folder of its YAML")


def test_the_answer_that_is_shown_is_the_one_that_was_scored() -> None:
    """lm-eval's acc_mutual_info takes the choice that the prompt makes likeliest, against the choice by itself."""
    answers = [(-1.0, False), (-2.0, False), (-0.1, False), (-5.0, False)]
    assert [best_choice(metric, ["a", "b"], answers) for metric in ("acc", "acc_mutual_info")] == [0, 1]
    assert best_choice("acc_norm", ["a", "bbbb"], answers) == 1
