"""Chats of the shapes that people have: each is written by the chat template, learned as marked, or refused by name."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsd.data.chat import Rendering
from cfsd.data.conversation import NOT_JSON
from cfsd.data.stage import ENDED, OPEN_TURN
from cfsd.errors import BadInput
from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Artifact, Store
from tests.conftest import fetched
from tests.data.test_target import prepared, rows_of, text_of, write
from tests.inputs import CHAT, NO_SYSTEM, save

TOOLS_TOO = (
    "{% if tools %}<|turn|>tools:{{ tools | tojson }}<|end|>{% endif %}"
    "{% if documents %}<|turn|>documents:{% for d in documents %}{{ d.text }}{% endfor %}<|end|>{% endif %}"
    "{% if shout is defined %}!{% endif %}"
    "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)
TEMPLATES = {
    "plain": CHAT,
    "tools": TOOLS_TOO,
    "no system": NO_SYSTEM + CHAT,
    "known roles": CHAT.replace("messages %}", "messages if m.role in ('system', 'user', 'assistant') %}", 1),
    "thinks": CHAT.replace("assistant:{%", "assistant:[think]{%"),
    "rewrites": CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split(')')[-1] }}"),
    "blocks": "{% for m in messages %}<|turn|>{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] if loop.last else m['content'].split(')')[-1] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}",
    "ends every chat": CHAT + "{% if not add_generation_prompt %}<eos>{% endif %}",  # as Phi's
    "opens inside": "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}<|end|>"
    "{% if loop.last and add_generation_prompt %}<|turn|>assistant:{% endif %}{% endfor %}",  # as Zephyr's
    "undefined": "{{ messages[0]['persona']['name'] }}" + CHAT,
    "strips": CHAT.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}"),
    "arguments as text": CHAT.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}",
    ),
    "arguments printed": CHAT.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments }}{% endfor %}",
    ),
    "content of every turn": TOOLS_TOO.replace("{{ m['content'] }}", "{{ m['content'][:9] }}"),
    "closes with nothing": CHAT.replace("<|end|>", "\n"),  # as Falcon's
    "the next turn ends it": "{% for m in messages %}{% if m['role'] == 'user' %}<eos>{% endif %}{{ m['role'] }}:"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",  # as GLM's
    "asks for the field": "{% for m in messages %}{% if 'tool_calls' in m %}"
    "{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}" + CHAT,  # as Llama's
    "concatenates": "{{ messages[0]['content'] + 1 }}" + CHAT,
}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
Make = Callable[[str], dict[str, Any]]


class World:
    """A store with a model of each template."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "data")
        self.models: dict[str, Artifact] = {}
        for name, template in TEMPLATES.items():
            save(folder / name, template)
            self.models[name] = fetched(self.store, folder / name)

    def prepared(self, records: list[dict[str, Any]], path: Path, template: str = "plain", **settings: Any) -> Artifact:
        return prepared(self.store, self.models[template], path=str(write(path / "rows.jsonl", records)), **settings)

    def read(
        self, make: Make, path: Path, template: str = "plain", **settings: Any
    ) -> tuple[list[tuple[str, str]], Artifact]:
        """Return (what is not learned, what is learned) of each of six rows, with `w` for its word."""
        made = self.prepared([make(f"{i:02}w") for i in range(6)], path, template, **settings)
        texts = []
        for row in rows_of(self.store, made):
            sides = (text_of(self.store, self.models[template], row, supervised=side) for side in (False, True))
            before, after = (re.sub(r"\d\dw", "w", text) for text in sides)
            texts.append((before, after))
        return texts, made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("chats"))


def user(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **fields}


def said(text: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def chat(*more: dict[str, Any], **columns: Any) -> Make:
    return lambda word: {"messages": [user(word), *more], **columns}


def prompts(word: str) -> list[dict[str, Any]]:
    return [user(word)]


ONE = "<|turn|>user:w<|end|><|turn|>assistant:"


def test_a_token_at_the_end_of_any_chat_does_not_hide_earlier_turns(world: World, tmp_path: Path) -> None:
    (texts, *_), _ = world.read(chat(said("a"), user("b"), said("c")), tmp_path, "ends every chat")
    assert texts == (ONE + "<|turn|>user:b<|end|><|turn|>assistant:", "a<|end|>c<|end|><eos>")
    (texts, *_), _ = world.read(chat(said("a"), user("b")), tmp_path, "ends every chat")
    assert texts[1].removesuffix("<eos>") == "a<|end|>"


def test_where_only_others_are_followed_by_an_opening_the_assistant_cannot_begin(world: World, tmp_path: Path) -> None:
    (texts, *_), _ = world.read(chat(said("yes")), tmp_path, "opens inside")
    assert texts == (ONE, "yes<|end|>")
    with pytest.raises(BadInput, match=r"only after others.*give it a user's turn before, or mark that turn weight: 0"):
        world.read(lambda w: {"messages": [said(w), user("b"), said("c")]}, tmp_path, "opens inside")


def test_the_held_out_question_is_the_users_and_not_the_system_message(world: World, tmp_path: Path) -> None:
    make = lambda w: {"messages": [{"role": "system", "content": "Be brief."}, user(w), said("yes")]}  # noqa: E731
    made = world.prepared([make(f"{i:02}w") for i in range(6)], tmp_path)
    assert {row["prompt"] for row in rows_of(world.store, made)} == {f"{i:02}w" for i in range(6)}


SHAPES: dict[str, tuple[Make, str, str]] = {
    "messages": (chat(said("yes")), ONE, "yes<|end|>"),
    "messages as JSON text": (lambda w: {"messages": json.dumps([user(w), said("yes")])}, ONE, "yes<|end|>"),
    "messages as Python's text": (lambda w: {"messages": str([user(w), said("yes")])}, ONE, "yes<|end|>"),
    "prompt and completion as Python's text": (
        lambda w: {"prompt": str([user(w)]), "completion": str([said("yes")])}, ONE, "yes<|end|>",
    ),
    "ShareGPT": (
        lambda w: {"conversations": [{"from": "human", "value": w}, {"from": "gpt", "value": "yes"}]},
        ONE, "yes<|end|>",
    ),
    "role and content in conversations": (lambda w: {"conversations": [user(w), said("yes")]}, ONE, "yes<|end|>"),
    "prompt and completion as messages": (
        lambda w: {"prompt": prompts(w), "completion": [said("yes")]}, ONE, "yes<|end|>",
    ),
    "the prompt's own answers are no response": (
        lambda w: {"prompt": [user(w), said("no"), user("so?")], "completion": [said("yes")]},
        ONE + "no<|end|><|turn|>user:so?<|end|><|turn|>assistant:", "yes<|end|>",
    ),
    "other columns are left alone": (chat(said("yes"), id=7, source="x"), ONE, "yes<|end|>"),
    "a system column": (
        lambda w: {"messages": [user(w), said("yes")], "system": "Hi."},
        "<|turn|>system:Hi.<|end|>" + ONE, "yes<|end|>",
    ),
    "an empty system column": (chat(said("yes"), system=None), ONE, "yes<|end|>"),
    "parts of text": (chat(said([{"type": "text", "text": "y"}, {"type": "text", "text": "es"}])), ONE, "yes<|end|>"),
    "null fields": (chat(said("yes", tool_calls=None, name=None, weight=None)), ONE, "yes<|end|>"),
    "weight 1": (chat(said("yes", weight=1)), ONE, "yes<|end|>"),
    "weight 0": (
        chat(said("BAD", weight=0), user("again"), said("yes", weight=1)),
        ONE + "BAD<|end|><|turn|>user:again<|end|><|turn|>assistant:", "yes<|end|>",
    ),
    "train false": (
        chat(said("BAD", train=False), user("again"), said("yes", train=True)),
        ONE + "BAD<|end|><|turn|>user:again<|end|><|turn|>assistant:", "yes<|end|>",
    ),
    "two answers": (
        chat(said("a"), user("b"), said("c")),
        ONE + "<|turn|>user:b<|end|><|turn|>assistant:", "a<|end|>c<|end|>",
    ),
    "an answer after an answer": (chat(said("a"), said("c")), ONE + "<|turn|>assistant:", "a<|end|>c<|end|>"),
    "an empty answer": (
        chat(said(""), user("b"), said("c")), ONE + "<|end|><|turn|>user:b<|end|><|turn|>assistant:", "c<|end|>"
    ),
    "an empty answer with a name": (
        chat(said("", name="bot", id="7"), user("b"), said("c")),
        ONE + "<|end|><|turn|>user:b<|end|><|turn|>assistant:", "c<|end|>",
    ),
    "an answer of spaces": (
        chat(said(" "), user("b"), said("c")), ONE + " <|end|><|turn|>user:b<|end|><|turn|>assistant:", "c<|end|>"
    ),
    "a user at the end": (chat(said("a"), user("b")), ONE + "<|turn|>user:b<|end|>", "a<|end|>"),
    "a developer": (
        lambda w: {"messages": [{"role": "developer", "content": "Hi."}, user(w), said("yes")]},
        "<|turn|>developer:Hi.<|end|>" + ONE, "yes<|end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_written_by_the_template(world: World, tmp_path: Path, name: str) -> None:
    make, before, after = SHAPES[name]
    texts, _ = world.read(make, tmp_path)
    assert texts == [(before, after)] * 6


ON_TOOLS: dict[str, tuple[Make, str, str]] = {
    "tools": (
        chat(said("yes"), tools=TOOLS),
        '<|turn|>tools:[{"type": "function", "function": {"name": "add", "parameters": {}}}]<|end|>' + ONE,
        "yes<|end|>",
    ),
    "tools as JSON text": (
        chat(said("yes"), tools=json.dumps(TOOLS)),
        '<|turn|>tools:[{"type": "function", "function": {"name": "add", "parameters": {}}}]<|end|>' + ONE,
        "yes<|end|>",
    ),
    "no tools": (chat(said("yes"), tools=[]), ONE, "yes<|end|>"),
    "documents": (
        chat(said("yes"), documents=[{"title": "t", "text": "d"}]), "<|turn|>documents:d<|end|>" + ONE, "yes<|end|>"
    ),
    "template settings that are off": (
        chat(said("yes"), chat_template_kwargs={"think": False, "instructions": "", "xml": None}), ONE, "yes<|end|>"
    ),
    "template settings": (chat(said("yes"), chat_template_kwargs={"shout": True}), "!" + ONE, "yes<|end|>"),
    "calls without content": (
        chat(said(None, tool_calls=CALL), {"role": "tool", "content": "2"}, said("yes")),
        ONE + "<|turn|>tool:2<|end|><|turn|>assistant:", '{"name": "add", "arguments": {"a": 1}}<|end|>yes<|end|>',
    ),
    "calls of ShareGPT": (
        lambda w: {"conversations": [
            {"from": "human", "value": w},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "yes"},
        ]},
        ONE + "<|turn|>tool:2<|end|><|turn|>assistant:", '{"name": "add", "arguments": {"a": 1}}<|end|>yes<|end|>',
    ),
    "reasoning": (chat(said("yes", reasoning_content="hm")), ONE, "yes(hm)<|end|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_TOOLS)
def test_what_else_a_row_gives_reaches_a_template_that_takes_it(world: World, tmp_path: Path, name: str) -> None:
    make, before, after = ON_TOOLS[name]
    texts, _ = world.read(make, tmp_path, "tools")
    assert texts == [(before, after)] * 6


SAID: dict[str, tuple[Make, str, str]] = {
    "a name": (chat(said("yes"), user("b", name="Ann")), "plain", r"field 'name'.*rows: 6"),
    "an id of a call": (
        chat(said("", tool_calls=CALL), {"role": "tool", "content": "2", "tool_call_id": "x"}, said("yes")),
        "tools", "'tool_call_id'",
    ),
    "a mark on a user": (chat(said("yes"), user("b", train=True)), "plain", "unless they are the assistant's"),
    "an empty answer": (chat(said(""), user("b"), said("c")), "plain", "without text is not learned; rows: 6"),
    "other roles": (
        lambda w: {"messages": [{"role": "human", "content": w}, {"role": "gpt", "content": "y"}]}, "plain", "'human'"
    ),
    "chats": (chat(said("yes")), "plain", "column 'messages' is taken as chats"),
    "other columns": (chat(said("yes"), id=1, source="x"), "plain", "columns 'id', 'source' are not read; rows: 6"),
    "special tokens": (chat(said("a<|end|>b")), "plain", "special tokens.*rows: 6"),
    "half an emoji": (chat(said("cut \ud83d")), "plain", "half of a character.*rows: 6"),
    "generation blocks": (chat(said("(a)b"), user("b"), said("c")), "blocks", "generation blocks"),
}  # fmt: skip


WRITTEN = '{"name": "add", "arguments": {"a": 1}}'
CALL_AS_TEXT = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]


@pytest.mark.parametrize("calls", [CALL, CALL_AS_TEXT, json.dumps(CALL)])
@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("tools", WRITTEN), ("content of every turn", WRITTEN), ("arguments as text", 'add{"a": 1}'),
        ("arguments printed", 'add {"a": 1}'),
    ],
)  # fmt: skip
def test_calls_are_given_as_the_template_takes_them(
    world: World, tmp_path: Path, calls: list[Any], template: str, written: str
) -> None:
    make = chat({"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "2"}, said("yes"))
    texts, _ = world.read(make, tmp_path, template)
    assert texts == [(ONE + "<|turn|>tool:2<|end|><|turn|>assistant:", written + "<|end|>yes<|end|>")] * 6


@pytest.mark.parametrize("name", SAID)
def test_what_is_read_in_one_of_several_ways_is_said(world: World, tmp_path: Path, name: str) -> None:
    make, template, sentence = SAID[name]
    _, made = world.read(make, tmp_path, template)
    assert [line for line in made.metadata["said"] if re.search(sentence, line)]


REFUSED: dict[str, tuple[Make, str, str]] = {
    "calls that are no list": (
        chat(said("y", tool_calls="add(1)")), "tools", "line 1.*has tool_calls that are no list of mappings"
    ),
    "a system message": (
        lambda w: {"messages": [{"role": "system", "content": "Hi."}, user(w), said("y")]},
        "no system", r"line 1.*system role is not supported.*move its text into the user's turn",
    ),
    "a field that is not there": (chat(said("y")), "undefined", "line 1.*refuses its messages.*UndefinedError"),
    "a text and a number": (chat(said("y")), "concatenates", "line 1.*refuses its messages.*TypeError"),
    "a role that the template leaves out": (
        lambda w: {"messages": [{"role": "developer", "content": "Hi."}, user(w), said("y")]},
        "known roles", "line 1.*leaves out the message of role 'developer'",
    ),
    "an opened turn that is closed otherwise": (chat(said("y")), "thinks", r"line 1.*opens .*\[think\]"),
    "earlier turns that change": (
        chat(said("(a)b"), user("b"), said("c")), "rewrites", "line 1.*rewrites earlier turns.*target.turns=last"
    ),
    "thinking that is left out": (
        chat(said("<think>hm</think>y")), "strips", "line 1.*leaves out a part of the assistant's turn"
    ),
    "tools": (chat(said("y"), tools=TOOLS), "plain", "line 1.*'tools'.*no place"),
    "documents": (chat(said("y"), documents=[{"text": "d"}]), "plain", "line 1.*'documents'.*no place"),
    "template settings": (chat(said("y"), chat_template_kwargs={"shout": 1}), "plain", "line 1.*'shout'"),
    "reserved settings": (chat(said("y"), chat_template_kwargs={"tokenize": 1}), "plain", "chat_template_kwargs"),
    "calls": (chat(said(None, tool_calls=CALL)), "plain", "line 1.*'tool_calls'"),
    "reasoning": (chat(said("y", reasoning_content="hm")), "plain", "line 1.*'reasoning_content'"),
    "functions": (chat(said("y"), functions=[{"name": "add"}]), "plain", "line 1.*'functions'"),
    "images": (chat(said("y"), images=["a.png"]), "plain", "line 1.*'images'"),
    "a part that is an image": (
        chat(said([{"type": "image_url", "image_url": {"url": "x"}}])), "plain", "line 1.*image_url"
    ),
    "weight one half": (chat(said("y", weight=0.5)), "plain", "line 1.*weight 0.5.*0 or false"),
    "weight as a word": (chat(said("y", weight="0")), "plain", "line 1.*weight '0'"),
    "finer marks": (chat(said("y", train_detail=[])), "plain", "line 1.*train_detail"),
    "no content": (chat({"role": "assistant", "text": "y"}), "plain", "line 1.*`content`"),
    "no role": (chat({"content": "y"}), "plain", "line 1.*`role`"),
    "content that is a mapping": (chat(said({"a": 1})), "plain", "line 1.*a mapping"),
    "content that is true": (chat(said(True)), "plain", "line 1.*a truth value"),
    "a text in the place of messages": (lambda w: {"messages": w}, "plain", "not a list of messages.*line 1"),
    "texts in the place of messages": (lambda w: {"messages": [w]}, "plain", "not a list of messages.*line 1"),
    "half JSON": (lambda w: {"messages": '[{"role": '}, "plain", "not a list of messages.*line 1.*JSON text"),
    "a number in the place of messages": (lambda w: {"messages": 0}, "plain", "not a list of messages.*line 1"),
    "chats of another name": (lambda w: {"talk": [user(w), said("y")], "id": 1}, "plain", "target.messages=talk"),
    "labelled completions": (
        lambda w: {"prompt": w, "completion": "y", "label": w < "03"}, "plain", "keep those of label true"
    ),
    "history beside Alpaca's columns": (
        lambda w: {"instruction": w, "output": "y", "history": [["a", "b"]]}, "plain", "line 1.*'history'"
    ),
    "a system column beside a pair": (
        lambda w: {"prompt": w, "response": "y", "system": "be brief"}, "plain", r"line 1.*'system'.*'\{prompt\}'"
    ),
    "tools beside a completion": (
        lambda w: {"prompt": w, "completion": "y", "tools": [{"name": "f"}]}, "plain", "line 1.*'tools'"
    ),
    "turns of other names": (
        lambda w: {"conversation": [{"input": w, "output": "y"}]}, "plain", "'conversation'; set target.prompt and"
    ),
    "two system messages": (
        lambda w: {"messages": [{"role": "system", "content": "a"}, user(w), said("y")], "system": "b"},
        "plain", "line 1.*'system'",
    ),
    "a completion that is a text": (
        lambda w: {"prompt": prompts(w), "completion": "y"}, "plain", "'prompt'.*lists of messages.*line 1"
    ),
    "another shape in one row": (
        lambda w: {"prompt": prompts(w) if w < "04" else w, "completion": [said("y")]}, "plain", "line 5"
    ),
    "a call that is no JSON": (
        lambda w: {"conversations": [{"from": "human", "value": w}, {"from": "function_call", "value": "add(1)"}]},
        "tools", "line 1.*function call",
    ),
    "preferences": (
        lambda w: {"prompt": w, "chosen": "a", "rejected": "b"}, "plain", "target.response=chosen"
    ),
    "plain texts": (lambda w: {"text": w}, "plain", "target.response=text"),
    "other columns": (lambda w: {"q": w, "a": w}, "plain", "'q', 'a'.*target.prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_chat_template_cannot_write_is_refused_by_name(world: World, tmp_path: Path, name: str) -> None:
    make, template, message = REFUSED[name]
    with pytest.raises(BadInput, match=message):
        world.read(make, tmp_path, template)


def test_the_last_turn_of_a_chat_can_be_learned_where_earlier_ones_are_rewritten(world: World, tmp_path: Path) -> None:
    make = chat(said("(a)b"), user("b"), said("(c)d"))
    texts, made = world.read(make, tmp_path, "rewrites", turns="last")
    assert any("parts of earlier turns" in line for line in list(made.metadata["said"]))
    assert texts == [(ONE + "b<|end|><|turn|>user:b<|end|><|turn|>assistant:", "(c)d<|end|>")] * 6


def test_generation_blocks_tell_what_is_learned_of_rewritten_turns(world: World, tmp_path: Path) -> None:
    make = chat(said("(a)b"), user("b"), said("(c)d"))
    texts, _ = world.read(make, tmp_path, "blocks")
    assert texts == [(ONE + "<|turn|>user:b<|end|><|turn|>assistant:", "b<|end|>(c)d<|end|>")] * 6


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_no_argument_is_learned_that_only_other_rows_of_a_table_have(world: World, tmp_path: Path, suffix: str) -> None:
    def row(i: int) -> dict[str, Any]:
        name, arguments = ("add", {"a": i}) if i % 2 else ("weather", {"city": "Rome"})
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        tool = {"type": "function", "function": {"name": name, "parameters": {key: {"type": "x"} for key in arguments}}}
        return {"messages": [user(f"{i}"), {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}

    path = str(write(tmp_path / f"rows.{suffix}", [row(i) for i in range(8)]))
    texts = {
        text_of(world.store, world.models["tools"], found, supervised=side)
        for found in rows_of(world.store, prepared(world.store, world.models["tools"], path=path))
        for side in (False, True)
    }
    assert '{"name": "add", "arguments": {"a": 3}}<|end|>' in texts
    assert not any("null" in text for text in texts)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_message_may_say_that_it_has_no_text(world: World, tmp_path: Path, suffix: str) -> None:
    rows = [
        {"messages": [user(f"{i}"), said(None, reasoning_content="so") if i % 2 else said(None), user("b"), said("c")]}
        for i in range(8)
    ]
    path = str(write(tmp_path / f"rows.{suffix}", rows))
    made = prepared(world.store, world.models["tools"], path=path)
    assert made.metadata["train_rows"] + made.metadata["held_out_rows"] == 8
    assert any("an assistant turn without text is not learned" in line for line in list(made.metadata["said"]))


def test_chats_in_which_nothing_is_learned_are_dropped_and_counted(world: World, tmp_path: Path) -> None:
    records = [{"messages": [user(f"{i}"), said("y")]} for i in range(6)]
    nothing = [[user("a")], [user("b"), said("y", weight=0)], [user("c"), said("")], None, []]
    records += [{"messages": messages} for messages in nothing]
    made = world.prepared(records, tmp_path)
    assert made.metadata["dropped"] == {"without a turn of the assistant that is learned": 5}


def test_of_a_chat_that_is_too_long_no_turn_is_looked_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is found by writing all before it again: the square of the turns, for a row that is dropped."""
    written, own = Counter[int](), Rendering._render

    def counted(self: Rendering, messages: list[Any], **settings: Any) -> str:
        written[len(self.messages if hasattr(self, "messages") else messages)] += 1
        return own(self, messages, **settings)

    monkeypatch.setattr(Rendering, "_render", counted)
    records = [{"messages": [user(f"{i}"), said("y")]} for i in range(6)]
    records += [{"messages": [turn for _ in range(200) for turn in (user("again"), said("yes"))]}]
    made = world.prepared(records, tmp_path)
    assert made.metadata["dropped"] == {f"longer than max_length={world.models['plain'].metadata['context']}": 1}
    assert written[400] == 1 and written[2] > 6


def test_the_report_reads_what_is_learned(world: World, tmp_path: Path) -> None:
    make = chat(said("BAD", weight=0), user("again"), said("yes"))
    _, made = world.read(make, tmp_path)
    assert {(row["prompt"][2:], row["response"]) for row in rows_of(world.store, made)} == {("w", "yes")}


def test_a_chat_needs_a_template(store: Store, base: Artifact, tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", [{"messages": [user("a"), said("b")]}]))
    with pytest.raises(BadInput, match="line 1 is a chat, but this model has no chat template"):
        prepared(store, base, path=path)
    assert not load_tokenizer(store.path(base)).chat_template


def test_columns_beside_a_pair_are_said_and_empty_ones_are_not_refused(world: World, tmp_path: Path) -> None:
    row = {"response": "y", "context": "c", "system": None, "tools": "[]"}
    read, made = world.read(lambda w: {"prompt": w, **row}, tmp_path)
    assert read[0] == ("w", "y<eos>")
    (unread,) = list(made.metadata["said"])
    assert unread == "beside prompt and response, columns 'context', 'system', 'tools' are not read; rows: 6"
    row["system"] = "be brief"
    read, made = world.read(lambda w: {"prompt": w, **row}, tmp_path, prompt="{system} {prompt}")
    assert (read[0], len(list(made.metadata["said"]))) == (("be brief w", "y<eos>"), 1)
    assert "columns 'context', 'tools' are not read" in str(made.metadata["said"])


def test_a_role_of_another_name_is_said(world: World, tmp_path: Path) -> None:
    read, made = world.read(lambda w: {"messages": [{"role": "prompter", "content": w}, said("y")]}, tmp_path)
    assert read[0] == ("<|turn|>prompter:w<|end|><|turn|>assistant:", "y<|end|>")
    assert any("role 'prompter' is no user" in line for line in list(made.metadata["said"]))


def test_a_turn_that_the_template_closes_with_no_token_teaches_an_end_where_there_is_one(
    world: World, tmp_path: Path
) -> None:
    turns = chat(said("a"), user("b"), said("c"))
    (texts, *_), made = world.read(turns, tmp_path, "closes with nothing")
    assert texts[1] == "a\nc\n<eos>"
    assert [line.partition("; rows")[0] for line in list(made.metadata["said"])][-2:] == [OPEN_TURN, ENDED]
    (texts, *_), made = world.read(turns, tmp_path, "the next turn ends it")
    assert texts[1] == "a<eos>c<eos>" and OPEN_TURN not in str(made.metadata["said"])
    (texts, *_), made = world.read(turns, tmp_path)
    assert texts[1] == "a<|end|>c<|end|>" and ENDED not in str(made.metadata["said"])


def test_an_empty_list_of_calls_is_none(world: World, tmp_path: Path) -> None:
    plain, _ = world.read(chat(said("a")), tmp_path, "asks for the field")
    filled, _ = world.read(chat(said("a", tool_calls=[])), tmp_path, "asks for the field")
    assert filled == plain


@pytest.mark.parametrize("arguments", ['{"city": "Ro', "'a'"])
def test_arguments_that_are_no_json_are_said(world: World, tmp_path: Path, arguments: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    _, made = world.read(chat(said("", tool_calls=[call])), tmp_path, "arguments as text")
    assert NOT_JSON in str(made.metadata["said"])


@pytest.mark.parametrize("arguments", ["[" * 3000, "9" * 5000])
def test_arguments_that_no_parser_takes_are_text(world: World, tmp_path: Path, arguments: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    with pytest.raises(BadInput, match="6 longer than max_length=256"):
        world.read(chat(said("", tool_calls=[call])), tmp_path, "arguments as text")


def test_a_call_without_arguments_is_none_of_these(world: World, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": ""}}
    texts, made = world.read(chat(said("", tool_calls=[call])), tmp_path, "tools", max_length=2000)
    assert '"arguments": {}' in texts[0][1] and NOT_JSON not in str(made.metadata["said"])


def test_a_chat_written_as_text_beside_a_plain_response_is_refused(world: World, tmp_path: Path) -> None:
    def make(word: str) -> dict[str, Any]:
        return {"prompt": json.dumps([user(word)]), "response": "y"}

    with pytest.raises(BadInput, match="column 'prompt' of the target holds lists of messages"):
        world.read(make, tmp_path)
