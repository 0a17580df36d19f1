"""Whatever a row holds: one message that the user can act on, or tokens that say what was written; nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.store.tables import read_rows
from tests.conftest import fetched
from tests.data.test_conversation import TOOLS_TOO
from tests.inputs import save

TEXTS = st.text(st.sampled_from("ab {}[]\n'\"é\ud83d\x00"), max_size=8) | st.sampled_from(
    ["<|end|>", "<eos>x", "[]", "{}"]
)
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | TEXTS
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "critic"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": ROLES, "content": TEXTS, "from": ROLES, "value": TEXTS, "weight": st.sampled_from([0, 1, 2, None]),
            "name": TEXTS, "tool_calls": ANYTHING, "reasoning_content": SCALARS,
        },
    )
    | st.fixed_dictionaries({"role": ROLES, "content": TEXTS})
    | ANYTHING,
    max_size=4,
)  # fmt: skip
CHATS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}), max_size=4)
COLUMNS = st.sampled_from(
    ["prompt", "response", "completion", "messages", "conversations", "instruction", "input", "output", "system",
     "tools", "text", "chosen", "rejected", "documents", "chat_template_kwargs", "functions", "{a}", ""],
)  # fmt: skip
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)
MARKED = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": TEXTS | st.none()},
        optional={
            "weight": st.sampled_from([0, 1, True, None]), "name": TEXTS, "reasoning_content": TEXTS,
            "tool_calls": st.lists(st.fixed_dictionaries({"function": st.dictionaries(TEXTS, ANYTHING, max_size=2)})),
        },
    ),
    max_size=4,
)  # fmt: skip
RECORDS = (
    st.fixed_dictionaries(
        {"messages": TURNS}, optional={"tools": st.lists(st.dictionaries(TEXTS, TEXTS)), "system": TEXTS}
    )
    | st.fixed_dictionaries({"prompt": TURNS, "completion": TURNS})
    | st.fixed_dictionaries({"messages": MARKED | TURNS})
    | st.fixed_dictionaries({"prompt": TEXTS, "response": TEXTS})
    | st.fixed_dictionaries({"messages": CHATS}, optional={"tools": ANYTHING, "system": SCALARS})
    | st.fixed_dictionaries({"instruction": SCALARS, "input": SCALARS, "output": SCALARS})
    | st.dictionaries(COLUMNS, MESSAGES | ANYTHING, max_size=4)
)
PROMPTS = st.sampled_from(["prompt"] * 8 + ["{input}", "{prompt}={prompt}", "", "{", "{a}", "{input[a]}"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact]:
    folder = tmp_path_factory.mktemp("any")
    save(folder / "model", TOOLS_TOO)
    store = Store(folder / "data")
    return store, fetched(store, folder / "model")


def rows_of(base: tuple[Store, Artifact], target: Target) -> list[dict[str, Any]]:
    store, model = base
    folder = Path(target.path or "").parent / "made"
    folder.mkdir(exist_ok=True)
    prepare(model, target, Draft(store, folder, continued=False))
    return [row for name in ("train", "held_out") for row in read_rows(folder, name)]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(records=st.lists(RECORDS, min_size=1, max_size=2) | RECORDS.map(lambda record: [record]), prompt=PROMPTS)
def test_any_row_is_refused_or_read(
    base: tuple[Store, Artifact], tmp_path_factory: pytest.TempPathFactory, records: list[Any], prompt: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    target = Target(path=str(path), prompt=prompt, seed=0, held_out=1, measure_only=True)
    try:
        target.check()
        rows = rows_of(base, target)
    except BadInput as refusal:
        assert "\n" not in str(refusal).replace("\\n", "")[:80] and len(str(refusal)) < 2000
        return
    tokens = load_tokenizer(base[0].path(base[1]))
    chats = any("messages" in record or "conversations" in record for record in records)
    for row in rows:
        whole = str(tokens.decode(row["token_ids"]))
        learned = str(tokens.decode([t for t, s in zip(row["token_ids"], row["supervised"], strict=True) if s]))
        prompt, response = (re.sub(r"[^ -~\n]", "<unk>", row[name]) for name in ("prompt", "response"))
        assert (learned and whole.endswith(("<eos>", "<|end|>"))) or chats
        if not isinstance(records[0].get("prompt"), list) and "<|turn|>" not in whole:
            assert whole.removesuffix("<eos>") == (prompt + response).removesuffix("<eos>")
            if prompt:
                assert learned.removesuffix("<eos>") == response.removesuffix("<eos>")
            else:  # nothing comes before the first token
                assert row["supervised"] == [False] + [True] * (len(row["token_ids"]) - 1)
        else:
            assert all(part in learned for part in response.split("\n"))
