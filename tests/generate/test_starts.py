"""What rows begin with: chat templates of many shapes cut at the user's words, and prompts of training rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.generate.chat_template import template_start
from cfsd.generate.sources import SOURCES, contextual_starts
from cfsd.generate.spec import Source
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import read_rows
from tests.conftest import write_rows


def tokenizer_of(
    template: str | None, specials: list[str], merges: tuple[tuple[str, str], ...] = (), added: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: `specials` are special tokens, `added` whole but ordinary, merges span words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = {"".join(pair): 256 + i for i, pair in enumerate(merges)}
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | joined, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(specials)
    raw.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    names = {"bos_token": specials[0], "eos_token": specials[-1]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.chat_template = template
    return tokenizer


class Shape(NamedTuple):
    """A template, its special tokens (the start first, the end last), and what is wanted of it."""

    template: str
    specials: list[str]
    prefix: str
    end: str | None
    between: str
    added: tuple[str, ...] = ()


def test_every_source_of_the_spec_has_rows() -> None:
    assert set(SOURCES) == {"probe", "chat", "prompts", *get_args(Source)}
    assert all((source.alike is None) != (source.each is None) for source in SOURCES.values())


EACH = "{% for m in messages %}"
SHAPES = {
    "ChatML with a system prompt of its own": Shape(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind<|im_end|>\n{% endif %}"
        + EACH + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\n", "<|im_end|>", "\n<|im_start|>assistant\n",
    ),
    "Llama 3 with the date of today": Shape(
        "{{ bos_token }}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ '<|head|>system<|tail|>\n\nToday: ' + day + '<|eot|>' }}"
        + EACH + "{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}",
        ["<|begin|>", "<|head|>", "<|tail|>", "<|eot|>", "<|end|>"],
        "<|begin|><|head|>system<|tail|>\n\nToday: 26 Jul 2024<|eot|><|head|>user<|tail|>\n\n",
        "<|eot|>", "<|head|>assistant<|tail|>\n\n",
    ),
    "Gemma": Shape(
        "{{ bos_token }}" + EACH
        + "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'].strip() + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
        "<bos><start_of_turn>user\n", "<end_of_turn>", "\n<start_of_turn>model\n", ("\n\n",),
    ),
    "Zephyr": Shape(
        EACH + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}{% endfor %}",
        ["<s>", "</s>"],
        "<|user|>\n", "</s>", "\n<|assistant|>\n",
    ),
    "the assistant's opening closes the user's turn": Shape(
        "{{ bos_token }}" + EACH + "{{ '[U]' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[A]<think>\n' }}{% endif %}",
        ["<begin>", "<end>"],
        "<begin>[U]", "[A]", "<think>\n", ("[U]", "[A]"),
    ),
    "words between line breaks": Shape(
        EACH + "{{ '<u>\n\n' + m['content'] + '\n\n' + '<a>' }}{% endfor %}",
        ["<u>", "<a>", "<end>"],
        "<u>\n\n", "<a>", "", ("\n\n",),
    ),
    "a turn that plain text closes": Shape(
        "{{ bos_token }}" + EACH + "{{ '<|user|>\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ["<begin>", "<end>"],
        "<begin><|user|>\n", None, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_template_is_cut_at_the_users_words(name: str) -> None:
    shape = SHAPES[name]
    tokenizer = tokenizer_of(shape.template, shape.specials, added=shape.added)
    turn = template_start(tokenizer)
    assert tokenizer.decode(turn.prefix_ids) == shape.prefix
    assert (None if turn.end_id is None else tokenizer.decode([turn.end_id])) == shape.end
    assert tokenizer.decode(turn.between_ids) == shape.between


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.end and "date" not in name])
def test_the_parts_make_the_chat_that_the_template_writes(name: str) -> None:
    shape = SHAPES[name]
    tokenizer = tokenizer_of(shape.template, shape.specials, added=shape.added)
    turn = template_start(tokenizer)
    for words in ("hello", "7 times 6?", "Say\nthat"):
        chat: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True, return_dict=True
        )
        opened = [*turn.prefix_ids, *tokenizer(words, add_special_tokens=False)["input_ids"]]
        closed = [turn.end_id, *turn.between_ids]
        token_ids = list(chat["input_ids"])
        assert token_ids[: len(opened)] == opened and token_ids[-len(closed) :] == closed
        assert tokenizer.decode(token_ids[len(opened) : -len(closed)]).strip() == ""  # what the model says itself


def test_the_answer_ends_with_what_closes_it_and_not_with_what_closes_the_users_turn() -> None:
    harmony = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
        "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    )
    specials = ["<|start|>", "<|message|>", "<|end|>", "<|return|>", "<eos>"]
    tokenizer = tokenizer_of(harmony, specials)
    turn = template_start(tokenizer)
    assert tokenizer.decode([turn.end_id or 0]) == "<|end|>"
    assert tokenizer.decode([turn.answer_end_id or 0]) == "<|return|>"
    same = template_start(tokenizer_of(harmony.replace("<|return|>", "<|end|>"), specials))
    assert same.answer_end_id == same.end_id
    refuses = "{% if messages[1:] %}{{ raise_exception('one turn') }}{% endif %}" + harmony
    assert template_start(tokenizer_of(refuses, specials)).answer_end_id is None


def test_a_space_that_belongs_to_the_next_word_is_left_to_the_model() -> None:
    template = "{{ bos_token }}[INST] {{ messages[0]['content'] }}[/INST]"
    for merges, prefix in (((("Ġ", "X"),), "<s>[INST]"), ((), "<s>[INST] ")):
        tokenizer = tokenizer_of(template, ["<s>", "[INST]", "[/INST]", "</s>"], merges)
        turn = template_start(tokenizer)
        assert tokenizer.decode(turn.prefix_ids) == prefix
        assert tokenizer.decode([turn.end_id or 0]) == "[/INST]" and turn.between_ids == []


def test_a_template_whose_last_token_depends_on_the_words_is_refused() -> None:
    tokenizer = tokenizer_of("{{ 'user\n' + messages[0]['content'] }}", ["<s>", "</s>"], (("Ċ", "X"),))
    with pytest.raises(BadInput, match="change with the words"):
        template_start(tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for %}", "cannot write"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "2 times"),
        ("hello", "0 times"),
        ("{{ messages[0]['content'] }}</s>", "a row cannot begin"),
    ],
)
def test_templates_that_give_no_start_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        template_start(tokenizer_of(template, ["<s>", "</s>"]))


@pytest.fixture
def target(store: Store, base: Artifact, tmp_path: Path) -> Path:
    """Prompts of 4 to 7 letters, 8 of 48 held out."""
    spec = Target(path=str(write_rows(tmp_path / "rows.jsonl", count=48)), held_out=8, seed=0)
    return store.path(store.make("target", key_of("prepare", base, spec), lambda d: prepare(base, spec, d))[0])


def prompts_of(target: Path, part: str) -> list[tuple[int, ...]]:
    return [
        tuple(t for t, s in zip(row["token_ids"], row["supervised"], strict=True) if not s)
        for row in read_rows(target, part)
    ]


def test_contextual_rows_begin_with_prompts_of_training_rows_only(target: Path) -> None:
    train = prompts_of(target, "train")
    starts = [tuple(prompt) for prompt in contextual_starts(target, len(train), 0, 100)]
    assert Counter(starts) == Counter(train)
    assert not set(starts) & (set(prompts_of(target, "held_out")) - set(train))
    assert starts != train


def test_prompts_come_again_in_the_same_order_and_more_rows_begin_alike(target: Path) -> None:
    count = len(prompts_of(target, "train"))
    starts = contextual_starts(target, 2 * count + 3, 5, 100)
    assert starts[:count] == starts[count : 2 * count] and starts[:3] == starts[2 * count :]
    for fewer in (1, 7, count):
        assert contextual_starts(target, fewer, 5, 100) == starts[:fewer]
    assert contextual_starts(target, count, 6, 100) != starts[:count]
    starts[0].append(0)
    assert starts[count] == starts[0][:-1]


def test_prompts_without_room_are_counted_and_all_of_them_refused(target: Path) -> None:
    lengths = [len(prompt) for prompt in prompts_of(target, "train")]
    dropped: Counter[str] = Counter()
    starts = contextual_starts(target, 200, 0, 5, dropped)
    assert {len(prompt) for prompt in starts} == {length for length in lengths if length <= 5}
    assert dropped == {"longer than 5 tokens": sum(length > 5 for length in lengths)}
    with pytest.raises(BadInput, match=f"at most 2 tokens fit, but the shortest has {min(lengths)}"):
        contextual_starts(target, 3, 0, 2)


def test_a_target_that_is_only_measured_has_no_prompts(store: Store, base: Artifact, tmp_path: Path) -> None:
    spec = Target(path=str(write_rows(tmp_path / "rows.jsonl")), measure_only=True, seed=0)
    made = store.make("target", key_of("prepare", base, spec), lambda draft: prepare(base, spec, draft))[0]
    with pytest.raises(BadInput, match="none to train on"):
        contextual_starts(store.path(made), 3, 0, 100)


def test_prompts_of_chats_end_where_the_first_answer_begins(store: Store, tmp_path: Path) -> None:
    from tests.data.test_target_kinds import CHAT, chat_base, talk

    base = chat_base(store, tmp_path / "model", CHAT)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(talk(f"{a}b", "cd", "e", "f")) + "\n" for a in "abcdef"))
    spec = Target(path=str(tmp_path / "rows.jsonl"), messages="talk", held_out=2, seed=0)
    made = store.make("target", key_of("prepare", base, spec), lambda draft: prepare(base, spec, draft))[0]
    from cfsd.model.loading import load_tokenizer

    tokenizer = load_tokenizer(store.path(base))
    texts = [tokenizer.decode(prompt) for prompt in contextual_starts(store.path(made), 4, 0, 100)]
    assert all(text.startswith("u:") and text.endswith("ba:") and len(text) == 6 for text in texts)
