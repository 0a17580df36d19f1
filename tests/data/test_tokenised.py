"""A row's tokens are those of its whole text, whatever the kind of tokenizer; the border is where the text's is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.model import TemplateLM
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from cfsd.data.tokenised import _place, added_in_front, tokenise
from cfsd.errors import BadInput
from cfsd.store.artifact import Artifact, Store
from tests.conftest import fetched
from tests.data.test_target import prepared, rows_of, write
from tests.data.tokenizers_of_kinds import KINDS, tokenizer

PAIRS = [
    ("the cat", " sat"), ("Answer:", " four"), ("Answer: ", "four"), ("Answer:\n\n", "four"), ("un", "happy"),
    ("line one\n", "\nline two"), ("say ", "😀"), ("say 😀", "👩‍🚀"), ("e", "\u0301te\u0301"), ("", "the cat"),
    ("two", "  "), ("x=", "y+z"), ("cafe", "\u0301"), ("ﬁne", " ﬁles"), ("x  ", "y"),
    ("<|im_end|>", "</s>"), (" ", " "),
]  # fmt: skip
CHANGES_TEXTS = {"unigram, NFKC", "wordpiece, lower case", "byte-level, NFC", "byte-level, whole words first"}


def cut(tokens: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Return the tokens that are not learned and those that are."""
    made = tokenise(tokens, prompt + response, [(len(prompt), len(prompt + response))])
    sides: tuple[list[int], list[int]] = ([], [])
    for token, learned in zip(made.ids, made.supervised, strict=True):
        sides[learned].append(token)
    assert sides[0] + sides[1] == made.ids  # a prompt and then a response, and nothing between
    return sides


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "response"), PAIRS)
def test_the_tokens_are_those_that_lm_eval_scores(kind: str, prompt: str, response: str) -> None:
    tokens = tokenizer(kind)
    before, after = cut(tokens, prompt, response)
    assert before + after == tokens.encode(prompt + response)
    if not prompt:
        assert before == []
        return
    harness: Any = SimpleNamespace(backend="causal", tok_encode=lambda text: tokens.encode(text))
    _, continuation = TemplateLM._encode_pair(harness, prompt, response)
    clean = (before + after)[: len(tokens.encode(prompt))] == tokens.encode(prompt)
    if clean and prompt == prompt.rstrip():
        assert continuation == after
    if clean:  # lm-eval scores the prompt's last spaces as well
        spaces = continuation[: len(continuation) - len(after)]
        assert continuation == spaces + after and not tokens.decode(spaces).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_of_many_spans_each_token_finds_its_own(kind: str) -> None:
    """Only the spans near a token are looked at; the result is that of looking at all of them."""
    tokens, text = tokenizer(kind), "the cat  sat on\n\nthe 😀 mat, unhappy. " * 6
    if not tokens.is_fast:
        pytest.skip("a tokenizer without offsets has its spans in turn")
    for width, gap in ((1, 0), (1, 1), (3, 2), (7, 1), (2, 9)):
        spans = [(first, first + width) for first in range(2, len(text) - width, width + gap)]
        made = tokenise(tokens, text, spans)
        offsets = tokens(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert made.supervised == [_place(text, begin, end, spans)[0] for begin, end in offsets]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_across_the_border_is_the_responses_where_only_spaces_come_before_it(kind: str) -> None:
    tokens = tokenizer(kind)
    for prompt, response in PAIRS:
        made = tokenise(tokens, prompt + response, [(len(prompt), len(prompt + response))])
        offsets: Any = tokens(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
        across = 0
        for (begin, end), learned in zip(offsets["offset_mapping"], made.supervised, strict=True):
            if begin < len(prompt) < end:
                across += 1
                assert learned == (not prompt[begin:].strip())
            elif begin < end:
                assert learned == (begin >= len(prompt))
        assert made.shared == across


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - CHANGES_TEXTS))
def test_the_tokens_say_what_was_written(kind: str) -> None:
    tokens = tokenizer(kind)
    for prompt, response in PAIRS:
        before, after = cut(tokens, prompt, response)
        plain = (prompt + response).strip(" ")
        if tokens.unk_token_id not in before + after:
            assert str(tokens.decode(before + after, clean_up_tokenization_spaces=False)).strip(" ") == plain


def test_spans_within_a_text_are_cut_at_both_ends() -> None:
    tokens = tokenizer("byte-level")
    text = "answer the question unhappy"
    made = tokenise(tokens, text, [(0, 6), (11, 19)])
    learned = [token for token, inside in zip(made.ids, made.supervised, strict=True) if inside]
    assert tokens.decode(learned) == "answer question"
    assert made.shared == 1  # the space before `question`
    made = tokenise(tokens, text, [(7, 22)])  # ` the` begins before, ` unhappy` ends after
    assert (made.supervised[-3:], made.shared) == ([True, True, False], 2)


@pytest.mark.parametrize(("adds", "front"), [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", [])])
def test_what_a_tokenizer_puts_in_front_is_told_from_what_it_appends(adds: str, front: list[int]) -> None:
    for kind in ("byte-level", "a space before every text", "unigram, NFKC"):
        assert added_in_front(tokenizer(kind, adds=adds), "a") == front


class Pairs(ByT5Tokenizer):
    """A tokenizer of two bytes at a time, without offsets."""

    def _tokenize(self, text: str) -> list[str]:
        characters = [chr(byte) for byte in text.encode()]
        return ["".join(characters[i : i + 2]) for i in range(0, len(characters), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return 3 + ord(token[0]) + (256 * ord(token[1]) if len(token) > 1 else 0)


def test_a_tokenizer_without_offsets_is_cut_by_beginnings_or_refused() -> None:
    tokens: Any = ByT5Tokenizer()
    assert not tokens.is_fast
    before, after = cut(tokens, "é=", "😀")
    assert (before, after) == ([198, 172, 64], [243, 162, 155, 131])
    assert cut(Pairs(), "ab", "cd") == ([3 + 97 + 256 * 98], [3 + 99 + 256 * 100])
    with pytest.raises(BadInput, match=r"'abc' ends within a token when 'd' follows"):
        cut(Pairs(), "abc", "d")


def model(store: Store, folder: Path, kind: str, adds: str = "") -> Artifact:
    tokens = tokenizer(kind, adds=adds)
    torch.manual_seed(0)
    sizes: dict[str, int] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokens),
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return fetched(store, folder)


def rows(store: Store, base: Artifact, path: Path, *pairs: tuple[str, str]) -> tuple[list[dict[str, Any]], Artifact]:
    records = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    made = prepared(store, base, path=str(write(path, records)), measure_only=True, held_out=1)
    by_text = {(row["prompt"], row["response"]): row for row in rows_of(store, made)}
    return [by_text[pair] for pair in pairs if pair in by_text], made


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>"])
def test_a_row_has_one_beginning_and_one_end(store: Store, tmp_path: Path, adds: str) -> None:
    base = model(store, tmp_path / "model", "a space before every text", adds)
    pairs = [("x=", "the cat"), ("<s>x=", "the cat"), ("x=", "the cat</s>"), ("<s>y", "mat</s>")]
    found, made = rows(store, base, tmp_path / "rows.jsonl", *pairs)
    begins = bool(adds)
    for row in found:
        assert row["token_ids"].count(1) == int(begins or "<s>" in row["prompt"])
        assert row["token_ids"].count(2) == 1 and row["token_ids"][-1] == 2 and row["supervised"][-1]
        assert not begins or (row["token_ids"][0] == 1 and not row["supervised"][0])
    assert [line for line in made.metadata["said"] if "special tokens" in line]


def test_a_response_without_a_token_of_its_own_is_dropped_and_counted(store: Store, tmp_path: Path) -> None:
    base = model(store, tmp_path / "model", "byte-level")
    pairs = ("the", " cat"), ("un", "happy"), ("Answer: ", "four")
    found, made = rows(store, base, tmp_path / "rows.jsonl", *pairs)
    assert made.metadata["dropped"] == {"whose response has no token of its own": 1}
    assert [row["response"] for row in found] == [" cat", "four"]
    assert [line.partition(";")[2] for line in made.metadata["said"] if "across the border" in line] == [" rows: 2"]


def test_a_character_that_a_tokenizer_leaves_out_is_said(store: Store, tmp_path: Path) -> None:
    base = model(store, tmp_path / "model", "no unknown token")
    _, made = rows(store, base, tmp_path / "rows.jsonl", ("the", " cat"), ("the", " ЖЖ mat"), ("the ", "e\u0301"))
    assert "characters that this tokenizer has no token for are left out; rows: 1" in made.metadata["said"]


def test_a_text_that_a_tokenizer_refuses_is_told_with_its_row(store: Store, tmp_path: Path) -> None:
    base = model(store, tmp_path / "model", "words that must be known")
    with pytest.raises(BadInput, match=r"line 2 cannot be turned into tokens: .*UNK"):
        rows(store, base, tmp_path / "rows.jsonl", ("the", " cat"), ("the", " dog"))


def test_what_a_tokenizer_does_not_know_is_said(store: Store, tmp_path: Path) -> None:
    base = model(store, tmp_path / "model", "characters")
    _, made = rows(store, base, tmp_path / "rows.jsonl", ("the", " cat"), ("the", " Ж"))
    assert made.metadata["said"] == ["characters that this tokenizer does not know become its unknown token; rows: 1"]
