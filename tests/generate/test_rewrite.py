"""The base says responses in its own words where a check passes; the rest of the target stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsd.data.stage import prepare
from cfsd.data.target import RewriteSpec, Target
from cfsd.generate import rewrite as module
from cfsd.generate.rewrite import rewrite, same_answer
from cfsd.generate.sampling import sample
from cfsd.machine import Machine
from cfsd.model.loading import load_tokenizer, read_start_token
from cfsd.model.sample import Sample
from cfsd.stages import REWRITE
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import read_rows, shard_path
from tests.conftest import fetched, write_rows
from tests.data.test_target import write
from tests.inputs import CHAT, save

MACHINE = Machine(device="cpu", threads=1, sampling_rows=8)
SHORT = "{question} {answer}. again"  # in place of the request, for a model that reads 128 letters
LOOSE = RewriteSpec(answer="", lengths=12, seed=0)  # a random model ends its texts where it likes


class World:
    def __init__(self, store: Store, base: Artifact, folder: Path) -> None:
        self.store, self.base = store, base
        wanted = Target(path=str(write_rows(folder / "rows.jsonl")), held_out=9, seed=0)
        self.target = store.make("target", "0" * 16, lambda draft: prepare(base, wanted, draft))[0]

    def rewritten(self, spec: RewriteSpec, key: str = "") -> Artifact:
        work: Callable[[Draft], None] = lambda draft: rewrite(self.base, self.target, spec, draft, MACHINE)  # noqa: E731
        return self.store.make("target", key or key_of("rewrite", self.target, spec), work)[0]

    def rows(self, target: Artifact, name: str = "train") -> list[dict[str, Any]]:
        return read_rows(self.store.path(target), name)


@pytest.fixture
def world(store: Store, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The random model writes letter by letter, and reads 128 of them: the request is a short one."""
    monkeypatch.setattr(module, "REQUEST", SHORT)
    return World(store, base, tmp_path)


def test_rewrites_stand_where_the_responses_stood_and_are_counted(world: World) -> None:
    made = world.rewritten(LOOSE)
    before, after, tokenizer = world.rows(world.target), world.rows(made), load_tokenizer(world.store.path(world.base))
    changed = 0
    for old, new in zip(before, after, strict=True):
        first = old["supervised"].index(True)
        assert new["token_ids"][:first] == old["token_ids"][:first] and new["token_ids"][-1] == old["token_ids"][-1]
        assert new["supervised"] == [False] * first + [True] * (len(new["token_ids"]) - first)
        assert all(new[name] == old[name] for name in ("row_id", "source", "prompt"))
        if new != old:
            changed += 1
            assert new["response"] == tokenizer.decode(new["token_ids"][first:-1])
            assert tokenizer.eos_token_id not in new["token_ids"][first:-1]
    assert world.rows(made, "held_out") == world.rows(world.target, "held_out")
    metadata: Any = made.metadata
    assert 0 < changed == metadata["rewritten"] and changed + sum(metadata["stayed"].values()) == len(before)
    assert metadata["train_tokens"] == sum(len(row["token_ids"]) for row in after)
    assert metadata["supervised_tokens"] == sum(sum(row["supervised"]) for row in after)
    assert f"{changed} of {len(before)} responses are in the base's own words" in str(metadata["said"])
    assert metadata["held_out_rows"] == world.target.metadata["held_out_rows"]


def test_the_base_writes_after_the_request_and_the_rows_own_prompt(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what it writes stands after the tokens that stand before it in training."""
    asked: list[Any] = []

    def recorded(model: Any, rows: Any, *given: Any, **named: Any) -> list[Sample]:
        asked.extend(zip(rows.ids, rows.prompts, strict=True))
        return sample(model, rows, *given, **named)

    monkeypatch.setattr(module, "sample", recorded)
    world.rewritten(LOOSE)
    folder = world.store.path(world.base)
    tokenizer, start = load_tokenizer(folder), read_start_token(folder)
    assert len(asked) == len(world.rows(world.target))
    for row, (number, prompt) in zip(world.rows(world.target), asked, strict=True):
        text = module.REQUEST.format(question=row["prompt"].strip(), answer=row["response"].strip()) + "\n"
        own = row["token_ids"][: row["supervised"].index(True)]
        assert number == row["row_id"] and own[0] != start
        assert prompt == [start, *tokenizer(text, add_special_tokens=False)["input_ids"], *own]


def chat_model_and_target(store: Store, folder: Path, records: list[dict[str, Any]]) -> tuple[Artifact, Artifact]:
    """Return a model with a chat template, and a target of `records` with two rows held out."""
    save(folder / "chats", CHAT)
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base, wanted = fetched(store, folder / "chats"), Target(path=str(folder / "rows.jsonl"), held_out=2)
    return base, store.make("target", "0" * 16, lambda draft: prepare(base, wanted, draft))[0]


def test_of_a_chat_the_request_is_a_user_turn_and_the_rewrite_the_assistants(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEST", SHORT)
    said = [("user", f"name {i} letters") for i in range(12)], [("assistant", f"abc{i}") for i in range(12)]
    turns = [[{"role": role, "content": text} for role, text in chat] for chat in zip(*said, strict=True)]
    base, target = chat_model_and_target(store, tmp_path, [{"messages": messages} for messages in turns])
    asked: list[list[int]] = []

    def answered(model: Any, given: Any, *_: Any, **__: Any) -> list[Sample]:
        asked.extend(given.prompts)
        text = [*tokenizer("own words", add_special_tokens=False)["input_ids"], end]
        return [Sample([*prompt, *text], [0.0] * len(text), "eos", []) for prompt in given.prompts]

    monkeypatch.setattr(module, "sample", answered)
    tokenizer = load_tokenizer(store.path(base))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    made = store.make("target", "1" * 16, lambda draft: rewrite(base, target, LOOSE, draft, MACHINE))[0]
    before, after = (read_rows(store.path(artifact), "train") for artifact in (target, made))
    assert len(asked) == len(before) == 10
    for old, new, prompt in zip(before, after, asked, strict=True):
        first = old["supervised"].index(True)
        question = tokenizer.decode(old["token_ids"][:first], skip_special_tokens=True)
        assert "letters" in question and "abc" not in question
        request = f"{question} {old['response']}. again"
        assert tokenizer.decode(prompt) == f"<|turn|>user:{request}<|end|><|turn|>assistant:"
        learned = [token for token, is_learned in zip(new["token_ids"], new["supervised"], strict=True) if is_learned]
        assert tokenizer.decode(learned) == "own words<|end|>" and new["token_ids"][:first] == old["token_ids"][:first]


def test_a_response_with_a_special_token_inside_stays_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beginning alone was said again, and the rest followed as it was."""
    monkeypatch.setattr(module, "REQUEST", SHORT)
    records = [{"prompt": f"name {i}", "response": "abc<|turn|>def"} for i in range(6)]
    base, target = chat_model_and_target(store, tmp_path, records)
    made = store.make("target", "1" * 16, lambda draft: rewrite(base, target, LOOSE, draft, MACHINE))[0]
    assert made.metadata["stayed"] == {"with a special token inside": 4} and made.metadata["rewritten"] == 0
    assert read_rows(store.path(made), "train") == read_rows(store.path(target), "train")


def test_it_goes_on_after_a_kill_and_a_seed_decides(world: World) -> None:
    whole = world.rewritten(LOOSE)

    def stopped(draft: Draft) -> None:
        rewrite(world.base, world.target, LOOSE, draft, MACHINE)
        shard_path(draft.folder, "train", 2).unlink()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.store.make("target", "1" * 16, stopped)
    again = world.rewritten(LOOSE, "1" * 16)
    assert again.content == whole.content and again.metadata == whole.metadata
    assert world.rewritten(LOOSE.model_copy(update={"seed": 1})).content != whole.content


def test_shards_of_another_size_are_not_continued() -> None:
    """A draft with shards of 8 rows, continued in shards of 25, would lose rows: its environment must differ."""
    other = MACHINE.model_copy(update={"sampling_rows": 25})
    assert MACHINE.environment(REWRITE) != other.environment(REWRITE)


def test_a_long_prompt_and_a_long_answer_of_different_rows_need_not_fit_together(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": letter * 30, "response": "ab"} for letter in "abcd"]
    rows += [{"prompt": letter, "response": "abcdefgh"} for letter in "abcd"]
    wanted = Target(path=str(write(tmp_path / "mixed.jsonl", rows)), held_out=1, seed=0)
    target = world.store.make("target", "2" * 16, lambda draft: prepare(world.base, wanted, draft))[0]
    needed: list[tuple[int, int]] = []

    def sized(model: Any, rows: Any, spec: Any, **settings: Any) -> list[Sample]:
        needed.append((len(rows.prompts), max(map(len, rows.prompts)) + spec.length))
        return sample(model, rows, spec, **settings)

    monkeypatch.setattr(module, "sample", sized)
    world.store.make("target", "3" * 16, lambda draft: rewrite(world.base, target, LOOSE, draft, MACHINE))
    assert sum(count for count, _ in needed) == 7 and len(needed) == 2
    assert all(most <= world.base.metadata["context"] for _, most in needed)


@pytest.mark.parametrize(
    ("spec", "text", "reason"),
    [
        (LOOSE, "", "is too short"),
        (LOOSE, "a" * 90, "is too long or has no end"),
        (LOOSE.model_copy(update={"max_length": 5}), "abc", "makes the row too long"),
        (RewriteSpec(answer="(never)", lengths=12), "abc", "has another answer"),
    ],
)
def test_what_fails_a_check_stays(
    spec: RewriteSpec, text: str, reason: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(model: Any, rows: Any, *_: Any, **__: Any) -> list[Sample]:
        ids = load_tokenizer(world.store.path(world.base))(text or "a", add_special_tokens=False)["input_ids"]
        ids = list(ids) if text else []
        return [Sample([*prompt, *ids, rows.eos_ids[0]], [], "eos") for prompt in rows.prompts]

    monkeypatch.setattr(module, "sample", said)
    made: Any = world.rewritten(spec)
    assert made.metadata["rewritten"] == 0
    assert made.metadata["stayed"] == {f"whose rewrite {reason}": len(world.rows(made))}
    assert world.rows(made) == world.rows(world.target)


@pytest.mark.parametrize(
    ("response", "rewritten", "pattern", "same"),
    [
        ("She has 4 apples, so 1,200.", "That makes 1200", None, True),
        ("4 + 5 = 9", "9, from 4 and 5", None, False),
        ("no number", "no number either, or 7", None, True),
        ("x #### 12", "so #### 12 it is", r"#### (\S+)", True),
        ("x #### 12", "so 12", r"#### (\S+)", False),
        ("nothing", "nothing", r"#### (\S+)", False),
        (r"\boxed{3}", "it is \\boxed{3}", r"\\boxed\{[^}]*\}", True),
        ("it costs -2.50", "-2.50", None, True),
        ("12", "13", "", True),
    ],
)
def test_answers_are_compared_exactly(response: str, rewritten: str, pattern: str | None, same: bool) -> None:
    assert same_answer(response, rewritten, pattern) == same


def test_a_target_that_is_not_rewritten_keeps_its_key_and_one_that_is_shares_what_was_read(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl"))
    plain, own = Target(path=path, seed=0), Target(path=path, seed=0, rewrite="self", rewrite_lengths=2.0)
    assert plain.rewriting() is None and own.digest() != plain.digest() == own.as_given().digest()
    assert own.rewriting() == RewriteSpec(lengths=2.0, seed=0)
    assert Target.model_validate({"path": path, "rewrite": False}).rewrite == "off"
    with pytest.raises(ValueError, match="is no regular expression"):
        Target(path=path, rewrite_answer="(")
