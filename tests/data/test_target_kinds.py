"""Targets as chat messages, from a generator, and files whose values look like numbers or dates."""

import json
from pathlib import Path
from typing import Any

import pytest

from cfsd.errors import BadInput
from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Artifact, Store
from tests.conftest import fetched, save_model
from tests.data.test_target import CHAT, prepared, rows_of, text_of, write

REWRITES = CHAT.replace("m['content'] }}", "m['content'] if loop.last else '' }}")


def chat_base(store: Store, folder: Path, template: str) -> Artifact:
    save_model(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return fetched(store, folder)


def talk(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"talk": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def test_in_chats_only_assistant_turns_count(store: Store, tmp_path: Path) -> None:
    base = chat_base(store, tmp_path / "model", CHAT)
    records = [talk(f"{a}b", "cd", "e", f"f{a}") for a in "abcdef"]
    made = prepared(store, base, path=str(write(tmp_path / "rows.jsonl", records)), messages="talk")
    for row in rows_of(store, made):
        assert text_of(store, base, row, supervised=True) == "cd<eos>f" + row["prompt"][0] + "<eos>"
        assert text_of(store, base, row, supervised=False) == f"u:{row['prompt']}a:u:ea:"


def test_the_date_in_a_template_is_the_same_every_day(store: Store, tmp_path: Path) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%A %B') | lower }}{% endif %}" + CHAT
    base = chat_base(store, tmp_path / "model", dated)
    path = str(write(tmp_path / "rows.jsonl", [talk(f"{a}b", "cd") for a in "abcdef"]))
    made = prepared(store, base, path=path, messages="talk")
    for row in rows_of(store, made):
        assert "friday july" in text_of(store, base, row, supervised=False)
        assert text_of(store, base, row, supervised=True) == "cd<eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused(store: Store, tmp_path: Path) -> None:
    base = chat_base(store, tmp_path / "model", REWRITES)
    path = str(write(tmp_path / "rows.jsonl", [talk("ab", "cd", "e", f"f{a}") for a in "abcdef"]))
    with pytest.raises(BadInput, match="rewrites earlier turns"):
        prepared(store, base, path=path, messages="talk")


def test_chats_need_a_template(store: Store, base: Artifact, tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", [talk("ab", "cd")]))
    with pytest.raises(BadInput, match="no chat template"):
        prepared(store, base, path=path, messages="talk")


def test_chats_need_a_list_of_messages(store: Store, tmp_path: Path) -> None:
    base = chat_base(store, tmp_path / "model", CHAT)
    path = str(write(tmp_path / "rows.jsonl", [{"talk": "hello"}]))
    with pytest.raises(BadInput, match="not a list of messages"):
        prepared(store, base, path=path, messages="talk")


def test_a_chat_that_the_assistant_opens_is_read_or_refused(store: Store, tmp_path: Path) -> None:
    base = chat_base(store, tmp_path / "model", CHAT)
    opened = [{"talk": [{"role": "assistant", "content": f"{a}b"}]} for a in "abcdef"]
    path = str(write(tmp_path / "rows.jsonl", opened))
    try:
        made = prepared(store, base, path=path, messages="talk")
    except BadInput:
        return
    assert all(text_of(store, base, row, supervised=True).endswith("b<eos>") for row in rows_of(store, made))


def gym(store: Store, base: Artifact, **settings: Any) -> list[tuple[str, str]]:
    fixed = {"kind": "gym", "name": "letter_counting", "rows": 12, "prompt": "question", "response": "answer"}
    made = prepared(store, base, **(fixed | settings), max_length=2000)
    return [(row["prompt"], row["response"]) for row in rows_of(store, made)]


def test_a_generator_repeats_itself_per_seed_and_heeds_its_settings(store: Store, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    base = fetched(store, folder)
    one = gym(store, base, seed=1)
    assert gym(store, base, seed=1, held_out=3)[0] in one
    assert not set(gym(store, base, seed=2)) & set(one)  # the generator's own neighbouring seeds share items
    few = gym(store, base, seed=1, config={"min_words": 1, "max_words": 2})
    assert sum(len(prompt) for prompt, _ in few) < 0.8 * sum(len(prompt) for prompt, _ in one)


@pytest.mark.parametrize("settings", [{"name": "no_such_game"}, {"config": {"no_such_setting": 1}}])
def test_a_generator_that_cannot_be_made_is_refused(store: Store, base: Artifact, settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="reasoning-gym cannot make"):
        gym(store, base, **settings)


WRITTEN = {
    "leading zeros": ("007", "010"), "trailing zeros": ("1.50", "2.0"), "dates": ("2024-05-01", "2025-01-31"),
    "words for nothing": ("None", "NA"), "words for truth": ("True", "False"), "a gap": ("3", ""),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("name", WRITTEN)
def test_answers_are_texts_and_stay_as_written(
    store: Store, base: Artifact, tmp_path: Path, suffix: str, name: str
) -> None:
    answers = WRITTEN[name]
    records = [{"prompt": f"{a}{b}", "response": answers[i % 2]} for a in "abc" for i, b in enumerate("defg")]
    made = prepared(store, base, path=str(write(tmp_path / f"rows{suffix}", records)))
    assert {row["response"] for row in rows_of(store, made)} == set(answers) - {""}
