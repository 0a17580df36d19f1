"""Written answers: chat templates, reasoning before the answer, length limits; sizes of batches change nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cfsd.errors import BadInput, OutOfMemory
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.check import check_documents
from cfsd.evaluate.harness.score import Scores, score
from tests.evaluate.test_score import CHOICE, READ, WRITE, by_hand, scores_of, write
from tests.evaluate.test_score import model as model
from tests.evaluate.test_score import tokenizer as tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
# What the chain below writes after each letter. The end mark is `hi`; `</s>` ends; `c` goes on for ever.
STEPS = {"a": "\n", "\n": "h", "h": "i", "i": "b", "b": "</s>", "c": "c", "d": "h", "f": "e", "e": "<t>", "<t>": "b"}


@pytest.fixture(scope="module")
def chatting(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


@pytest.fixture(scope="module")
def chain() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A real Llama whose next token is a function of the last one, as in STEPS; `<t>` is a special token."""
    tokens = ["<s>", "</s>", "?", "\n", " ", "<t>", *"abcdefghi"]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    own = PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="?",
        additional_special_tokens=["<t>"],
    )  # fmt: skip
    width = 2 * len(tokens)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    layer: Any = made.model.layers[0]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, made.lm_head.weight):
        weight.data.zero_()
    made.model.embed_tokens.weight.data = torch.eye(len(tokens), width)
    for last, after in STEPS.items():
        made.lm_head.weight.data[tokens.index(after), tokens.index(last)] = 1.0
    return made, own


def written(folder: Path, letters: str, limit: int = 6) -> str:
    """Write a benchmark with one document per letter, whose right answer is always `b`; return its name."""
    settings = {"until": ["\n"], "max_gen_toks": limit}
    path = write(folder, WRITE, doc_to_target="b", generation_kwargs=settings)
    (folder / "data" / "rows.jsonl").write_text("".join(f'{{"question": "{letter}"}}\n' for letter in letters))
    return path.stem


@pytest.mark.parametrize("examples", [0, 2])
@pytest.mark.parametrize("settings", [CHOICE, WRITE], ids=["choice", "generate"])
def test_chat_templates_equal_lm_eval_by_hand(
    model: Any, chatting: Any, tmp_path: Path, monkeypatch: Any, settings: dict[str, Any], examples: int
) -> None:
    path = write(tmp_path, settings, fewshot_split="test")
    ours = scores_of(model, chatting, tmp_path, path.stem, chat_template=True, num_fewshot=examples)
    theirs = by_hand(model, chatting, path, monkeypatch, apply_chat_template=True, num_fewshot=examples)
    samples, metric = theirs["samples"][path.stem], ours.metadata["metric"]
    assert list(ours.rows["prompt"]) == [sample["arguments"][0][0] for sample in samples]
    assert all(p.startswith("<s>u ") and p.count("\na ") == 1 + examples for p in ours.rows["prompt"])
    assert list(ours.rows["value"]) == [sample[metric] for sample in samples]
    assert ours.metadata["score"] == theirs["results"][path.stem][f"{metric},none"]
    assert (
        ours.metadata["chat_template"]
        and "chat_template" not in scores_of(model, chatting, tmp_path, path.stem).metadata
    )


def test_templates_write_the_same_day_every_day(model: Any, chatting: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    dated = copy.deepcopy(chatting)
    dated.chat_template = "{{ strftime_now('%d %m %Y') }}" + TEMPLATE
    rows = scores_of(model, dated, tmp_path, "pick", chat_template=True).rows
    assert rows["prompt"].str.startswith("26 07 2024").all() and "strftime_now" in dated.chat_template


def test_a_tokenizer_without_template_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    with pytest.raises(BadInput, match=r"pick: chat_template is on, but the model's tokenizer has no chat template"):
        scores_of(model, tokenizer, tmp_path, "pick", chat_template=True)


def test_the_answer_follows_the_reasoning(chain: Any, tmp_path: Path) -> None:
    name = written(tmp_path, "abcd")
    rows, metadata = scores_of(*chain, tmp_path, name, thinking_end="hi")
    # a: reasons with a stop sequence in it; b: ends without a mark; c: never ends; d: reasons and answers
    assert list(rows["value"]) == [1, 0, 0, 1]
    assert [answer.split(" [")[0] for answer in rows["answer"]] == ["b", "", "", "b"]
    assert (metadata["max_gen_toks"], metadata["at_limit"], metadata["unfinished"]) == (6, 0.25, 0.5)
    alone = score(*chain, Benchmark(name=name, folder=str(tmp_path), thinking_end="hi"), max_tokens=1)
    assert alone.rows.equals(rows) and alone.metadata == metadata
    # lm-eval writes until every row of a batch has met its stop sequence: here no other row keeps `a` writing
    assert list(scores_of(*chain, tmp_path, written(tmp_path, "a"), thinking_end="hi").rows["value"]) == [1]


def test_an_end_mark_may_be_a_special_token(chain: Any, tmp_path: Path) -> None:
    name = written(tmp_path, "f")  # writes e<t>b
    assert list(scores_of(*chain, tmp_path, name, thinking_end="<t>").rows["value"]) == [1]


@pytest.mark.parametrize("penalty", [None, 1.5])
def test_a_checkpoints_own_limit_is_not_the_benchmarks(chain: Any, tmp_path: Path, penalty: float | None) -> None:
    model, tokenizer = copy.deepcopy(chain[0]), chain[1]
    name = written(tmp_path, "c")
    model.generation_config.max_new_tokens, model.generation_config.repetition_penalty = 20, penalty
    rows, metadata = scores_of(model, tokenizer, tmp_path, name)
    assert metadata["max_gen_toks"] == 6 and len(rows["answer"][0].split(" [")[0]) <= 6
    assert metadata.get("decoding") == (None if penalty is None else {"repetition_penalty": "1.5"})


def test_reasoning_before_an_answer_that_is_begun_already_is_refused() -> None:
    with pytest.raises(BadInput, match=r"questions begins the answer itself \(gen_prefix\).*leave thinking_end out"):
        Benchmark(name="questions", thinking_end="</think>").check()


def test_answers_at_the_limit_are_counted_without_reasoning_too(chain: Any, tmp_path: Path) -> None:
    name = written(tmp_path, "abcd")
    rows, metadata = scores_of(*chain, tmp_path, name)
    assert (metadata["max_gen_toks"], metadata["at_limit"], "unfinished" in metadata) == (6, 0.25, False)
    assert [answer.split(" [")[0] for answer in rows["answer"]] == ["", "", "cccccc", "hib"]
    longer = scores_of(*chain, tmp_path, name, max_gen_toks=9).metadata
    assert (longer["max_gen_toks"], longer["at_limit"]) == (9, 0.25)
    assert scores_of(*chain, tmp_path, name, max_gen_toks=2).metadata["at_limit"] == 0.5


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (CHOICE, {"thinking_end": "</think>"}, "thinking_end is for answers that the model writes.*multiple_choice"),
        (READ, {"max_gen_toks": 5}, "max_gen_toks is for answers.*loglikelihood_rolling"),
        (WRITE, {"max_gen_toks": 64}, "answers of 64 tokens leave no room for a prompt.*context of 64"),
    ],
)
def test_settings_without_effect_or_room_are_refused(
    model: Any, tokenizer: Any, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    name = write(tmp_path, settings).stem
    with pytest.raises(BadInput, match=message):
        scores_of(model, tokenizer, tmp_path, name, **options)


class Watched:
    """The widths of the batches that went through a model, and a memory of `most` tokens."""

    def __init__(self, most: int = 10**9) -> None:
        self.seen: list[tuple[int, int]] = []
        self.most = most

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, length = (args[0] if args else kwargs["input_ids"]).shape
        if rows * length > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")
        self.seen.append((rows, length))


def scored(model: Any, tokenizer: Any, benchmark: Benchmark, max_tokens: int, watched: Watched) -> Scores:
    handle = model.register_forward_pre_hook(watched, with_kwargs=True)
    try:
        return score(model, tokenizer, benchmark, max_tokens=max_tokens)
    finally:
        handle.remove()


@pytest.mark.parametrize("settings", [CHOICE, WRITE, READ], ids=["choice", "generate", "rolling"])
def test_batches_hold_the_tokens_given_and_change_nothing(
    model: Any, tokenizer: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    benchmark = Benchmark(name=write(tmp_path, settings).stem, folder=str(tmp_path))
    whole = scored(model, tokenizer, benchmark, 10_000, large := Watched())
    small = scored(model, tokenizer, benchmark, 2 if settings is WRITE else 40, batches := Watched())
    full = scored(model, tokenizer, benchmark, 10_000, halved := Watched(most=60))
    assert len(large.seen) < len(batches.seen) and max(rows for rows, _ in large.seen) > 3
    assert settings is WRITE or all(rows * length <= 40 or rows == 1 for rows, length in batches.seen)
    assert max(rows * length for rows, length in halved.seen) <= 60
    for other in (small, full):
        assert list(other.rows["value"]) == pytest.approx(list(whole.rows["value"]), rel=1e-5)
        assert other.metadata["score"] == pytest.approx(whole.metadata["score"], rel=1e-5)
        assert list(other.rows["doc_hash"]) == list(whole.rows["doc_hash"])


def test_a_row_that_does_not_fit_alone_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    benchmark = Benchmark(name=write(tmp_path, CHOICE).stem, folder=str(tmp_path))
    with pytest.raises(OutOfMemory, match=r"one request of \d+ tokens does not fit into memory"):
        scored(model, tokenizer, benchmark, 1024, Watched(most=5))


def test_what_was_warned_of_in_the_check_is_warned_of_again(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    own = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False, "temperature": 0.7}
    write(tmp_path, WRITE, generation_kwargs=own)
    check_documents(Benchmark(name="write", folder=str(tmp_path)))
    for _ in range(2):
        warnings = scores_of(model, tokenizer, tmp_path, "write").metadata["warnings"]
        assert any("setting `temperature` to 0.0" in line for line in warnings)
