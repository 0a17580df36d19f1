"""The user's own prompts: how they are read and refused, and that the base's answers to them are an exact sample."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cfsd.data.records import Said
from cfsd.errors import BadInput
from cfsd.evaluate.divergence import divergence, score_prompts
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.generate.prompt_rows import PLAIN, prompt_rows
from cfsd.generate.prompts import ANSWERED, Prompts
from cfsd.generate.spec import ProbeSpec
from cfsd.generate.stage import answers, probe
from cfsd.machine import Machine
from cfsd.model.loading import Tokenization, load_model, load_tokenizer
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import read_rows
from tests.conftest import fetched, save_model
from tests.inputs import save

ON = Machine(device="cpu", threads=1, micro_batch_tokens=200, sampling_rows=4)
WORDS = ["abc =", "d", "efgh ij ="]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompts_of(path: Path, **settings: Any) -> Prompts:
    return Prompts(**{"name": "support", "path": str(path), "length": 6} | settings)


def probe_with(path: Path, rows: int = 256, **mode: Any) -> ProbeSpec:
    """Return a probe that measures along answers to the prompts in `path`, too."""
    own = {"name": "support", "prompts": str(path)} | mode
    return ProbeSpec.model_validate({"rows": rows, "length": 24, "modes": ["auto", own]})


def texts(folder: Path, **settings: Any) -> Prompts:
    return prompts_of(write(folder / "prompts.jsonl", [{"prompt": word} for word in WORDS]), **settings)


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> Tokenization:
    return Tokenization(load_tokenizer(model_folder), 0, (1,))


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chatting")
    save(folder)
    return Tokenization(load_tokenizer(folder), 1, (2,))


def rows_of(prompts: Prompts, base: Tokenization, max_tokens: int = 99) -> tuple[list[str], list[str], Counter[str]]:
    said, dropped = Said(), Counter[str]()
    rows = prompt_rows(prompts, base, max_tokens, dropped, said)
    return base.tokenizer.batch_decode(rows), said.sentences(), dropped


def test_a_text_is_continued_as_it_stands(tmp_path: Path, plain: Tokenization, chatting: Tokenization) -> None:
    assert rows_of(texts(tmp_path), plain) == (WORDS, [], Counter())
    found, (said,), _ = rows_of(texts(tmp_path), chatting)
    assert found == WORDS and PLAIN in said and "and 2 more" in said


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "so?"}]
OPENED = "<|turn|>user:hi<|end|><|turn|>assistant:ho<|end|><|turn|>user:so?<|end|><|turn|>assistant:"


@pytest.mark.parametrize("record", [
    {"messages": CHAT}, {"prompt": CHAT}, {"conversations": CHAT}, {"prompt": json.dumps(CHAT)},
    {"conversations": [{"from": m["role"].replace("user", "human"), "value": m["content"]} for m in CHAT]},
])  # fmt: skip
def test_a_chat_is_written_by_the_template_up_to_the_answer(tmp_path: Path, chatting: Any, record: Any) -> None:
    prompts = prompts_of(write(tmp_path / "chats.jsonl", [record]))
    assert prompts.are_chats()
    assert rows_of(prompts, chatting)[0] == [OPENED]


def test_an_answer_that_is_there_is_left_out_and_said(tmp_path: Path, chatting: Any) -> None:
    answered = [*CHAT, {"role": "assistant", "content": "the answer"}]
    found, (said,), dropped = rows_of(prompts_of(write(tmp_path / "a.jsonl", [{"messages": answered}])), chatting)
    assert found == [OPENED] and ANSWERED in said and not dropped


def test_a_prompt_of_which_the_template_leaves_out_a_part_is_refused(tmp_path: Path, chatting: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = {"messages": [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "2"}]}
    prompts = prompts_of(write(tmp_path / "chats.jsonl", [chat]))
    with pytest.raises(BadInput, match="has 'tool_calls' in a message, but this model's chat template does not write"):
        prompt_rows(prompts, chatting, 100, Counter(), Said())


def test_earlier_thoughts_that_a_template_leaves_out_are_said(tmp_path: Path, chatting: Any) -> None:
    thought = {"role": "assistant", "content": "b", "reasoning_content": "so"}
    chat = {"messages": [{"role": "user", "content": "a"}, thought, {"role": "user", "content": "c"}]}
    said = Said()
    assert prompt_rows(prompts_of(write(tmp_path / "chats.jsonl", [chat])), chatting, 100, Counter(), said)
    assert any("'reasoning_content' of messages is not written" in line for line in said.sentences())


def test_what_cannot_be_answered_is_counted_and_said(tmp_path: Path, plain: Tokenization) -> None:
    records = [{"prompt": "ab"}, {"prompt": ""}, {"prompt": None}, {"prompt": "abcdefgh"}]
    found, said, dropped = rows_of(prompts_of(write(tmp_path / "p.jsonl", records)), plain, max_tokens=5)
    assert found == ["ab"] and dropped == {"without a text": 2, "longer than 5 tokens": 1}
    assert said == [f"prompts support: {count} {reason}, left out" for reason, count in dropped.items()]


def test_more_prompts_than_asked_for_are_said(tmp_path: Path, plain: Tokenization) -> None:
    found, (said,), _ = rows_of(texts(tmp_path, rows=2), plain)
    assert found == WORDS[:2] and "the first 2 prompts" in said
    assert rows_of(texts(tmp_path, rows=3), plain)[:2] == (WORDS, [])


@pytest.mark.parametrize(("records", "message"), [
    ([], "is empty; fix probe"),
    ([{"prompt": ""}], "holds no prompt"),
    ([{"question": "a"}], "has no column 'prompt' or 'messages'; its columns are 'question'; set `column`"),
    ([{"prompt": "a", "system": "be kind"}], "has a column 'system', for which a prompt of plain text has no place"),
    ([{"prompt": {"a": 1}}], "holds a mapping"),
    ([{"messages": "no chat"}], r"is not a list of messages \(prompts support .*line 1\)"),
    ([{"messages": CHAT}, {"messages": [{"role": "user"}]}], "line 2 needs `role` and `content`"),
])  # fmt: skip
def test_a_bad_file_is_refused_before_anything_runs(tmp_path: Path, records: Any, message: str) -> None:
    spec = probe_with(write(tmp_path / "p.jsonl", records))
    with pytest.raises(BadInput, match=message):
        spec.check()


def test_a_missing_file_and_unusable_prompts_are_refused(tmp_path: Path, plain: Tokenization) -> None:
    with pytest.raises(BadInput, match=r"fix probe\.modes"):
        prompts_of(tmp_path / "none.jsonl").check()
    with pytest.raises(BadInput, match=r"none can be answered .*3 longer than 0 tokens"):
        rows_of(texts(tmp_path), plain, max_tokens=0)


def test_chats_need_a_chat_template_and_answers_a_context(base: Artifact, home: Path, tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    with pytest.raises(BadInput, match="prompts support are chats, but the base has no chat template"):
        probe_with(chats, rows=8, length=9).check_base(base)
    with pytest.raises(BadInput, match=r"length 500 and the start token do not fit.* set probe\.modes\[support\]\.len"):
        probe_with(Path(texts(tmp_path).path), rows=8, length=500).check_base(base)


def test_names_are_of_one_set_each_and_not_the_probes(tmp_path: Path) -> None:
    support = {"name": "support", "prompts": texts(tmp_path).path}
    with pytest.raises(ValidationError, match="named twice: support"):
        ProbeSpec.model_validate({"modes": ["auto", support, support]})
    with pytest.raises(ValidationError, match=r"add \{name, prompts: FILE\} to probe\.modes"):
        EvaluateSpec.model_validate({"prompts": [{"name": "support", "path": "p.jsonl"}]})
    assert EvaluateSpec.model_validate({"prompts": []}) == EvaluateSpec(), "as older records have it"


def test_the_key_is_of_content_and_settings_not_of_name_or_place(tmp_path: Path) -> None:
    known = texts(tmp_path).digest()
    (tmp_path / "elsewhere").mkdir()
    assert texts(tmp_path / "elsewhere", name="other").digest() == known
    assert {texts(tmp_path, seed=1).digest(), texts(tmp_path, length=7).digest()}.isdisjoint({known})
    write(tmp_path / "prompts.jsonl", [{"prompt": "another"}])
    assert prompts_of(tmp_path / "prompts.jsonl").digest() != known


@pytest.fixture
def answered(store: Store, base: Artifact, tmp_path: Path) -> tuple[Artifact, Artifact, list[dict[str, Any]]]:
    prompts = prompts_of(write(tmp_path / "p.jsonl", [{"prompt": WORDS[i % 3]} for i in range(10)]))
    made = store.make("corpus", "a" * 16, lambda draft: answers(base, prompts, draft, ON))[0]
    return base, made, read_rows(store.path(made), "corpus")


def test_the_base_answers_every_prompt_from_its_own_distribution(answered: Any, store: Store, plain: Any) -> None:
    base, made, rows = answered
    model = load_model(store.path(base), "cpu").eval()
    assert made.metadata["rows"] == 10 and made.metadata["prompts"] == "support"
    for i, row in enumerate(rows):
        prompt = plain.tokenizer.encode(WORDS[i % 3], add_special_tokens=False)
        sampled = row["token_ids"][len(prompt) :]
        assert row["token_ids"][: len(prompt)] == prompt and 1 <= len(sampled) <= 6
        assert row["logprobs"][: len(prompt)] == [None] * len(prompt)
        with torch.no_grad():
            expected = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        found = [float(expected[len(prompt) - 1 + t, token]) for t, token in enumerate(sampled)]
        assert row["logprobs"][len(prompt) :] == pytest.approx(found, abs=1e-4)
        assert (row["finish_reason"] == "eos") == (sampled[-1] in plain.eos_ids)
    assert len({tuple(row["token_ids"]) for row in rows}) > 3, "equal prompts have answers of their own"


def test_answers_share_no_random_numbers_with_the_probe(
    store: Store, base: Artifact, tmp_path: Path, plain: Any
) -> None:  # fmt: skip
    start = [{"prompt": "<bos>"}] * 8  # what the probe begins with
    prompts = prompts_of(write(tmp_path / "p.jsonl", start), length=12)
    free = ProbeSpec(rows=8, length=12, seed=0)
    own = store.make("corpus", "a" * 16, lambda draft: answers(base, prompts, draft, ON))[0]
    held = store.make("corpus", "b" * 16, lambda draft: probe(base, free, draft, ON))[0]
    found, other = (read_rows(store.path(made), "corpus") for made in (own, held))
    assert {row["token_ids"][0] for row in (*found, *other)} == {plain.start}
    assert not {tuple(row["token_ids"]) for row in found} & {tuple(row["token_ids"]) for row in other}


def test_the_divergence_is_along_the_answers_alone(answered: Any, store: Store, tmp_path: Path) -> None:
    base, made, rows = answered
    tuned = fetched(store, save_model(tmp_path / "tuned", seed=1))
    scores = store.make("scores", "c" * 16, lambda draft: score_prompts(base, tuned, made, "named anew", draft, ON))[0]
    models = [load_model(store.path(model), "cpu").eval() for model in (base, tuned)]
    masks = [[logprob is not None for logprob in row["logprobs"]] for row in rows]
    expected = divergence(models[0], models[1], [row["token_ids"] for row in rows], masks)
    records = read_rows(store.path(scores), "divergence")
    assert [record["kl"] for record in records] == pytest.approx([part.kl for part in expected], rel=1e-5)
    assert [record["count"] for record in records] == [sum(mask) for mask in masks]
    tokens = sum(part.num_tokens for part in expected)
    assert scores.metadata["tokens"] == tokens == made.metadata["tokens"]
    assert scores.metadata["prompts"] == "named anew"  # the answers to equal prompts are shared, their figures are not
    assert scores.metadata["kl"] == pytest.approx(sum(part.kl for part in expected) / tokens, rel=1e-5)
