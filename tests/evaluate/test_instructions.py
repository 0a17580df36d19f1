"""Benchmarks `instructions` and `questions`: what their checks take and refuse, and what their items are like."""

import json
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import BUNDLED
from cfsd.evaluate.benchmarks.instructions.checks import CHECKS, passes
from cfsd.evaluate.benchmarks.instructions.checks import score as scored
from cfsd.evaluate.harness.load import loaded
from cfsd.evaluate.harness.score import score
from tests.evaluate.test_score import tokenizer as tokenizer
from tests.evaluate.test_score_answers import chatting as chatting

RIGHT_AND_WRONG: dict[str, tuple[list[str], list[str]]] = {
    "words: 3": (["one two three", "a well-known - fact."], ["one two", "1 2 3 4"]),
    "words: -3": (["one", "*one* two\nthree"], ["one two three four"]),
    "words: 3-": (["one two three four"], ["one two -"]),
    "words: 2-3": (["one two", "1 2 3"], ["one", "1 2 3 4"]),
    "sentences: 1": (["It rains.", "It is 3.5 km to St. Ives", "“Go!”"], ["It rains. It pours.", "Sure:\nIt rains."]),
    "sentences: 2": (['He said "no." She left.', "Why? Because!"], ["It rains", "One. Two. Three."]),
    "paragraphs: 2": (["One.\nStill.\n \nTwo."], ["One.\nTwo.", "One.\n\nTwo.\n\nThree."]),
    "lines: 2": (["one\n\ntwo"], ["one", "one\ntwo\nthree"]),
    "bullets: 2": (["Here:\n- a\n* b", "• a\n  • b"], ["- a", "-a\n-b", "**a**\n**b**", "1. a\n2. b"]),
    "bullets: 0": (["a - b"], ["- a"]),
    "numbered: 2": (["Yes:\n1. a\n2) b"], ["1. a", "2. a\n3. b", "1 a\n2 b", "1. a\n1. b"]),
    "list: 3": (["a, b b, c c c.", "1,2,3"], ["a, b", "a, b and c", "a,\nb,\nc", "I would take a, b, c", "a, , c"]),
    "lower case": (["all small, 1 é"], ["All small", "12"]),
    "upper case": (["ALL LARGE, 1 É"], ["ALL lARGE", "12"]),
    "includes: cat | P.S.": (["A Cat. P.S. Hi", "p.s. the cat's"], ["P.S. catalogue", "a cat"]),
    "excludes: cat": (["a catalogue"], ["The CAT.", "cat-like"]),
    "excludes: ,": (["a b"], ["a, b"]),
    "starts: No,": (["No, never.", '"no, not I"'], ["Oh no, no", "Not, this"]),
    "starts: Rain": (["*Rain* fell", "rain, rain"], ["Rainy days"]),
    "ends: home": (["Come home.", 'He said "go home!"', "home"], ["Come home now", "a phonehome x", "tribehome"]),
    "ends: ?": (["Why?", '"Why?"'], ["Why? Because.", "Why?!"]),
    "exactly: A b.": (["A b.", ' "A b." '], ["A b", "a b.", "A b. A b."]),
    "one of: yes | no": (["Yes", "NO.", '"no"', "**Yes**"], ["Yes, it is", "maybe", "yes no"]),
    "number": (["4", "1,000.", "-2.5"], ["four", "4 legs", "x = 4", "4 5"]),
    "times: ha 3": (["ha ha HA", "Ha! Ha-ha"], ["ha ha", "ha ha ha ha", "hahaha"]),
    "times: thank you 2": (["Thank you, thank you"], ["thank you"]),
    "json: a | b": (
        ['{"a": 1, "b": [], "c": 2}', '```json\n{"a": 1,\n"b": 2}\n```'], ['{"a": 1}', '["a", "b"]', "{a: 1}"]
    ),
    "json: a": (['{"a": null}'], ['Here: {"a": 1}', "{'a': 1}", '{"b": {"a": 1}}', "[" * 5000]),
    "language: French": (["Il fait beau.", "C\u2019est une maison."], ["It is a house.", "La casa es mia.", "Oui"]),
    "language: Spanish": (["La casa es grande y blanca."], ["La maison est grande.", "The house is big.", "hola"]),
    "language: German": (["Das Kind ist im Garten."], ["The child is in the garden.", "Kind"]),
    "language: Italian": (["La pizza è molto buona."], ["La pizza es muy buena.", "La pizza est très bonne."]),
    "language: English": (["The cat is on the table."], ["Le chat est sur la table.", "table"]),
    "quoted": (['"Many hands."', "“Many hands.”"], ['He said "go"', '"a" and "b"', '""', "'a b'"]),
    "about: rain | storm": (["Rainy days", "a STORM"], ["brain", "sun"]),
}  # fmt: skip


def documents(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (BUNDLED / name / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("check", RIGHT_AND_WRONG)
def test_a_check_takes_right_answers_and_refuses_wrong_ones(check: str) -> None:
    right, wrong = RIGHT_AND_WRONG[check]
    assert [answer for answer in right if not passes(check, answer)] == []
    assert [answer for answer in [*wrong, "", " \n"] if passes(check, answer)] == []


def test_every_kind_is_tested_and_used_as_often() -> None:
    assert {check.partition(":")[0] for check in RIGHT_AND_WRONG} == set(CHECKS)
    kinds = Counter(document["kind"] for document in documents("instructions"))
    assert set(kinds) == set(CHECKS) - {"about"} and set(kinds.values()) == {15}


def test_every_request_can_be_met_and_no_fixed_answer_meets_more_than_the_stated_chance() -> None:
    items = documents("instructions")
    assert [item["prompt"] for item in items if not all(passes(c, item["example"]) for c in item["checks"])] == []
    constant = [*(item["example"] for item in items), "Yes", "1", "a", "A.", "ok, ok, ok"]
    best = max(sum(all(passes(check, text) for check in item["checks"]) for item in items) for text in constant)
    assert Benchmark(name="instructions").find().config["metadata"]["chance"] == best / len(items)
    assert len({item["prompt"] for item in items}) == len(items) == 300


def test_loose_accuracy_forgives_a_line_before_or_after_and_emphasis() -> None:
    document = {"checks": ["bullets: 2", "lower case"]}
    strict, loose = "prompt_level_strict_acc", "prompt_level_loose_acc"
    assert scored(document, ["- a\n- b"]) == {strict: 1, loose: 1}
    assert scored(document, ["Sure!\n- a\n- b\nBye"]) == {strict: 0, loose: 1}
    assert scored(document, ["Sure!\n- a\n- b\nBye\nBye"]) == {strict: 0, loose: 0}
    assert scored({"checks": ["starts: Rain"]}, ["**Rain** fell"]) == {strict: 1, loose: 1}
    assert scored({"checks": ["exactly: a b"]}, ["**a b**"]) == {strict: 0, loose: 1}
    assert scored({"checks": ["lower case"]}, ["Sure"]) == {strict: 0, loose: 0}  # nothing is left without its line


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" the Pacific Ocean", 1), (" Pacific", 1), ("PACIFIC ", 1), (" Atlantic", 0), ("", 0), (" Pacific one", 0)],
)
def test_questions_are_compared_without_case_articles_and_white_space(answer: str, right: int) -> None:
    with loaded(Benchmark(name="questions"), torch.device("cpu")) as (task, _):
        ocean = next(document for document in task.eval_docs if "largest ocean" in document["question"])
        assert task.process_results(ocean, [answer]) == {"exact_match": right}


def test_no_fixed_answer_is_right_more_often_than_stated() -> None:
    items = documents("questions")
    often = Counter(answer.casefold() for item in items for answer in item["answers"])
    assert Benchmark(name="questions").find().config["metadata"]["chance"] == max(often.values()) / len(items) == 0.02
    assert len({item["question"] for item in items}) == len(items) == 150


@pytest.fixture(scope="module")
def roomy(tokenizer: Any) -> LlamaForCausalLM:
    """A random model with room for the prompts, a token per character."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=1, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model


@pytest.mark.parametrize(("name", "limit"), [("instructions", 64), ("questions", 12)])
def test_a_model_is_asked_in_its_template_or_in_the_form_without_one(
    roomy: Any, tokenizer: Any, chatting: Any, name: str, limit: int
) -> None:
    (item,) = documents(name)[:1]
    asked, begun = item.get("prompt") or item["question"], item.get("beginning", "")
    chat = score(roomy, chatting, Benchmark(name=name, limit=3))
    assert chat.rows["prompt"][0].startswith("<s>u ") and asked in chat.rows["prompt"][0]
    assert chat.rows["prompt"][0].rstrip().endswith(begun or "\na") and chat.metadata["chat_template"]
    plain = score(roomy, tokenizer, Benchmark(name=f"{name}_completion", limit=3))
    assert plain.rows["prompt"][0].endswith(f"{asked}\nAnswer:{' ' if begun else ''}{begun}")
    assert "chat_template" not in plain.metadata
    assert name == "questions" or plain.rows["prompt"][0].count("\n\nRequest: ") == 4  # three examples and this one
    for found in (chat, plain):
        assert found.metadata["kind"] == "binary" and found.metadata["max_gen_toks"] == limit
    with pytest.raises(BadInput, match=f"no chat template; take {name}_completion"):
        score(roomy, tokenizer, Benchmark(name=name))
