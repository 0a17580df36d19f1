"""Answers that people read: which prompts there are, what is refused, and that base and tuned are treated alike."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.evaluate.answers import BEGINNINGS, NO_WORDS, REQUESTS, everyday, show
from cfsd.evaluate.show import OFF, Show
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.machine import Machine
from cfsd.model.loading import Tokenization, load_model, load_tokenizer
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import read_rows
from tasks.evaluate import check_benchmarks
from tests.conftest import fetched, save_model, write_rows
from tests.generate.test_prompts import CHAT, OPENED, write
from tests.inputs import CHAT as TEMPLATE
from tests.inputs import save

ON = Machine(device="cpu", threads=1)
KEYS = count()


@pytest.fixture
def target(store: Store, base: Artifact, tmp_path: Path) -> Artifact:
    wanted = Target(path=str(write_rows(tmp_path / "rows.jsonl")), held_out=8, seed=0)
    return store.make("target", "a" * 16, lambda draft: prepare(base, wanted, draft))[0]


@pytest.fixture
def chatting(store: Store, tmp_path: Path) -> Artifact:
    save(tmp_path / "chatting")
    return fetched(store, tmp_path / "chatting")


def answered(
    store: Store, base: Artifact, spec: Show, model: Artifact | None = None, target: Artifact | None = None
) -> tuple[Artifact, list[dict[str, Any]]]:  # fmt: skip
    key = f"{next(KEYS):016x}"  # each is answered anew
    made = store.make("scores", key, lambda draft: show(base, model or base, target, spec, draft, ON))[0]
    return made, read_rows(store.path(made), "answers")


def own(path: Path, content: str, **settings: Any) -> Show:
    path.write_text(content)
    return Show(path=str(path), unprompted=0, target=0, **settings)


def ids(rows: list[dict[str, Any]], *kinds: str) -> list[list[int]]:
    return [row["answer_ids"] for row in rows if row["kind"] in kinds]


def test_equal_models_answer_alike_and_others_do_not(
    store: Store, base: Artifact, model_folder: Path, target: Artifact, tmp_path: Path
) -> None:  # fmt: skip
    copy = load_model(model_folder, "cpu")
    copy.save_pretrained(tmp_path / "copy")
    load_tokenizer(model_folder).save_pretrained(tmp_path / "copy")
    other = fetched(store, save_model(tmp_path / "other", seed=1))
    _, one = answered(store, base, Show(), target=target)
    _, same = answered(store, base, Show(), fetched(store, tmp_path / "copy"), target)
    _, differing = answered(store, base, Show(), other, target)
    assert one == same
    assert [row["prompt_ids"] for row in one] == [row["prompt_ids"] for row in differing]
    assert all(a != b for a, b in zip(ids(one, "unprompted"), ids(differing, "unprompted"), strict=True))


def test_a_seed_changes_what_is_sampled_and_nothing_else(store: Store, base: Artifact, target: Artifact) -> None:
    (_, one), (_, again), (_, other) = (answered(store, base, Show(seed=s), target=target) for s in (0, 0, 1))
    assert one == again
    assert ids(one, "target") == ids(other, "target")
    assert all(a != b for a, b in zip(ids(one, "unprompted"), ids(other, "unprompted"), strict=True))
    assert len({tuple(row) for row in ids(one, "unprompted")}) == len(ids(one, "unprompted")) == 4


def test_target_prompts_are_held_out_and_answered_by_the_likeliest_tokens(
    store: Store, base: Artifact, target: Artifact
) -> None:  # fmt: skip
    made, rows = answered(store, base, Show(unprompted=0, length=5), target=target)
    held_out = read_rows(store.path(target), "held_out")[:4]
    assert [(row["prompt"], row["expected"]) for row in rows] == [(r["prompt"], r["response"]) for r in held_out]
    model = load_model(store.path(base), "cpu").eval()
    for row in rows:
        given = row["prompt_ids"] + row["answer_ids"]
        with torch.no_grad():
            likeliest = model(torch.tensor([given])).logits[0].argmax(-1).tolist()
        assert row["answer_ids"] == likeliest[len(row["prompt_ids"]) - 1 : -1]
        assert row["finish_reason"] == ("eos" if row["answer_ids"][-1] == 1 else "length") and row["temperature"] == 0
        assert "<eos>" not in row["answer"] and len(row["answer"]) == len(row["answer_ids"]) - (
            row["finish_reason"] == "eos"
        )
    assert made.metadata["cut"] == sum(row["finish_reason"] == "length" for row in rows)


def test_a_vocabulary_without_words_is_shown_more_of_the_rest(store: Store, base: Artifact, target: Artifact) -> None:
    made, rows = answered(store, base, Show(), target=target)
    assert [row["kind"] for row in rows] == ["target"] * 4 + ["unprompted"] * 4
    assert made.metadata["no_words"] == NO_WORDS and made.metadata["length"] == 64  # half of the context
    assert {row["temperature"] for row in rows if row["kind"] == "unprompted"} == {1.0}


@pytest.mark.parametrize(("template", "texts"), [(None, BEGINNINGS), (TEMPLATE, REQUESTS)])
def test_everyday_prompts_are_for_vocabularies_of_words(template: str | None, texts: tuple[str, ...]) -> None:
    split = pre_tokenizers.Whitespace()
    parts = {part for text in (*texts, TEMPLATE) for part, _ in split.pre_tokenize_str(text)} | {"user", "assistant"}
    raw = Tokenizer(models.WordLevel({part: i for i, part in enumerate(["<unk>", *sorted(parts)])}, unk_token="<unk>"))
    raw.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", chat_template=template)
    known = Tokenization(tokenizer, 0, ())
    asked = list(everyday(known, Show(), 99))
    assert [row.prompt for row in asked] == list(texts)
    assert {row.kind for row in asked} == {"chat" if template else "text"}
    assert ("user : Write a haiku about the sea" if template else texts[0]) in tokenizer.decode(asked[0].ids)
    assert [row.prompt for row in everyday(known, Show(rows=2), 99)] == list(texts[:2])
    assert list(everyday(known, Show(), 3)) == []


def test_lines_are_continued_or_asked_as_the_base_takes_them(
    store: Store, base: Artifact, chatting: Artifact, tmp_path: Path
) -> None:  # fmt: skip
    spec = own(tmp_path / "prompts.txt", "abc =\n\n  hi  \n", length=6)
    _, plain = answered(store, base, spec)
    _, chats = answered(store, chatting, spec)
    assert [(row["kind"], row["prompt"], row["temperature"]) for row in plain] == [
        ("text", "abc =", 1.0), ("text", "hi", 1.0)
    ]  # fmt: skip
    assert [(row["kind"], row["prompt"], row["temperature"]) for row in chats] == [
        ("chat", "abc =", 0.0), ("chat", "hi", 0.0)
    ]  # fmt: skip
    tokenizer = load_tokenizer(store.path(chatting))
    assert tokenizer.decode(chats[1]["prompt_ids"]) == "<|turn|>user:hi<|end|><|turn|>assistant:"
    _, warm = answered(store, chatting, spec.model_copy(update={"temperature": 2.0}))
    assert {row["temperature"] for row in warm} == {2.0}


def test_chats_are_given_whole_and_shown_with_their_roles(store: Store, chatting: Artifact, tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": [CHAT[0]]}])
    _, rows = answered(store, chatting, Show(path=str(tmp_path / "chats.jsonl"), unprompted=0, length=4))
    assert load_tokenizer(store.path(chatting)).decode(rows[0]["prompt_ids"]) == OPENED
    assert [row["prompt"] for row in rows] == ["user: hi\nassistant: ho\nuser: so?", "hi"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("p.txt", "", "prompts to show .*is empty; fix evaluate.show"),
    ("p.txt", "\n  \n", "prompts to show: .* holds no prompt; fix evaluate.show"),
    ("p.jsonl", '{"question": "a"}', "has no column 'prompt' or 'messages'; .*in evaluate.show"),
    ("p.pdf", "x", "ends in '.pdf'; allowed"),
    ("p.txt", "a\n" + "ab" * 40, r"line 2 has 80 tokens, and with an answer of 64 .* attends to 128; .*length to 48"),
    ("p.jsonl", json.dumps({"messages": CHAT}), "prompts to show are chats, but the base has no chat template"),
])  # fmt: skip
def test_bad_prompts_are_refused_before_anything_runs(
    base: Artifact, tmp_path: Path, name: str, content: str, message: str
) -> None:  # fmt: skip
    spec = EvaluateSpec(show=own(tmp_path / name, content))
    with pytest.raises(BadInput, match=message):
        spec.check()
        spec.check_base(base)
        check_benchmarks(base, spec, ON)


def test_prompts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"prompts to show .*does not exist.*; fix evaluate\.show"):
        EvaluateSpec(show=Show(path=str(tmp_path / "none.txt"))).check()


def test_a_tuned_model_of_a_shorter_context_has_no_answer_there(store: Store, base: Artifact, tmp_path: Path) -> None:
    spec = own(tmp_path / "p.txt", "ab\n" + "ab" * 20, length=10)
    tuned = base.model_copy(update={"metadata": base.metadata | {"context": 20}})
    _, rows = answered(store, base, spec, tuned)
    assert [row["finish_reason"] == "context" for row in rows] == [False, True] and rows[1]["answer"] == ""


def test_what_the_digest_is_of(tmp_path: Path) -> None:
    one, other = (own(tmp_path / name, "abc") for name in ("a.txt", "b.txt"))
    assert one.digest() == other.digest() != own(tmp_path / "c.txt", "abd").digest()
    assert EvaluateSpec().digest() == EvaluateSpec(show=Show()).digest() != EvaluateSpec(show=one).digest()


@pytest.mark.parametrize("value", ["none", False, OFF])
def test_it_can_be_left_out(value: Any) -> None:
    assert not EvaluateSpec.model_validate({"show": value}).show.is_on()
    assert EvaluateSpec.model_validate({"show": None}).show == Show()
    assert EvaluateSpec.model_validate({"show": "a.txt"}).show == Show(path="a.txt")


def test_what_was_read_in_one_of_several_ways_is_said_of_the_base_alone(
    store: Store, base: Artifact, tmp_path: Path
) -> None:  # fmt: skip
    spec = own(tmp_path / "p.txt", "ab\ncd\nef", rows=2, length=3)
    other = fetched(store, save_model(tmp_path / "other", seed=1))
    (made, rows), (tuned, _) = answered(store, base, spec), answered(store, base, spec, other)
    (said,) = made.metadata["said"]  # type: ignore[misc]
    assert "the first 2 prompts are taken, as evaluate.show rows says" in str(said) and len(rows) == 2
    assert "said" not in tuned.metadata
