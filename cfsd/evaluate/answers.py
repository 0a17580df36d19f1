"""Answers that people read: the same prompts answered by base and tuned, with the same random numbers.

The prompts become tokens by the base's tokenizer and chat template for both models, so that both are given the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from cfsd.data.conversation import Conversation
from cfsd.data.records import Said
from cfsd.data.stage import SPECIAL
from cfsd.data.tokenised import special_tokens
from cfsd.errors import BadInput
from cfsd.evaluate.show import SETTING, Show
from cfsd.evaluate.stage import load_models, write_result
from cfsd.generate.prompt_rows import tokens_of
from cfsd.generate.prompts import Prompt
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.trial import check_sampling
from cfsd.machine import Machine, home
from cfsd.model.context import context_tokens
from cfsd.model.loading import Tokenization, load_tokenization, read_eos_ids
from cfsd.model.sample import Sample
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.store.tables import SHOWN, batches, table_of

CHAT, TEXT, TARGET, UNPROMPTED = "chat", "text", "target", "unprompted"
STREAM = "show"  # of random numbers, which no corpus and no probe uses
REQUESTS = (
    "Write a haiku about the sea.",
    "List three fruits.",
    "What is the capital of France?",
    "Make this sentence polite: Give me the report now.",
    "Explain to a child why the sky is blue.",
    "Is a whale a fish? Answer yes or no.",
)
BEGINNINGS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "To make a cup of tea, first",
    "Three kinds of fruit are",
    "The sky is blue because",
    "Dear Sir or Madam, I am writing to",
)
NO_WORDS = "this vocabulary has no words, so the everyday prompts are left out; give your own in evaluate.show"
OPENING = 40  # characters: what a template may write between a user's turn and the answer


class Asked(NamedTuple):
    """What a model is given: of which kind it is, as people read it, as tokens, and which answer is expected."""

    kind: str
    prompt: str
    ids: list[int]
    expected: str = ""


def show(
    base: Artifact, model: Artifact, target: Artifact | None, spec: Show, draft: Draft, machine: Machine
) -> None:  # fmt: skip
    """Write the answers of `model`, which is the base or was tuned from it, as the `answers` table.

    Raises BadInput for prompts of the user's own that leave no room for an answer, or need a chat template.
    """
    own, length, said = load_tokenization(draft.store.path(base)), answer_length(base, spec), Said()
    asked = list(asked_of(draft.store, base, own, target, spec, said))
    (loaded,) = load_models([model], draft, machine)
    check_sampling(loaded)
    eos_ids = read_eos_ids(draft.store.path(model))
    records = _answered(_Answering(model, loaded, eos_ids, length, spec, machine), asked, own, draft)
    tokens = sum(len(record["answer_ids"]) for record in records)
    cut = sum(record["finish_reason"] == "length" for record in records)
    metadata: dict[str, Any] = {"rows": len(records), "tokens": tokens, "length": length, "cut": cut}
    metadata |= {"said": said.sentences()} if base.content == model.content and said.count else {}
    if not any(row.kind in (CHAT, TEXT) for row in asked) and spec.rows and not spec.path:
        metadata["no_words"] = NO_WORDS
    write_result(draft, "answers", table_of(SHOWN, records), metadata, {})


def check_own(base: Artifact, spec: Show) -> None:
    """Raise BadInput for a prompt of the user's own that the base cannot be given; reads no weights."""
    for _ in own_prompts(base, load_tokenization(Store(home()).path(base, weights=False)), spec, Said()):
        pass


def answer_length(base: Artifact, spec: Show) -> int:
    """Return the most tokens of an answer: as the spec says, or half of what the base attends to if that is less."""
    return min(spec.length, max(1, context_tokens(base) // 2))


def asked_of(
    store: Store, base: Artifact, own: Tokenization, target: Artifact | None, spec: Show, said: Said
) -> Iterator[Asked]:
    """Yield what is asked: prompts, those of held-out rows, then nothing. Raises BadInput for the user's own.

    Where a vocabulary has no words, there are twice as many of the others.
    """
    room, length = context_tokens(base), answer_length(base, spec)
    prompts = list(own_prompts(base, own, spec, said) if spec.has_own() else everyday(own, spec, room - length))
    more = 1 if prompts or not spec.rows else 2
    yield from prompts
    if target:
        yield from islice(_held_out(store, target, own, room - length), spec.target * more)
    yield from (Asked(UNPROMPTED, "", [own.start]) for _ in range(spec.unprompted * more))


def own_prompts(base: Artifact, own: Tokenization, spec: Show, said: Said) -> Iterator[Asked]:
    """Yield the user's own prompts; where the base has a chat template, a text is a user's turn.

    Raises BadInput for one that is too long, that has no token, or that is a chat for a base without a template.
    """
    room, length = context_tokens(base), answer_length(base, spec)
    dropped, special = Counter[str](), special_tokens(own.tokenizer)
    for prompt in spec.prompts().read(said, dropped):
        asked = _asked(prompt, own)
        if special.search(asked.prompt):
            said.add(SPECIAL, prompt.place)
        if not asked.ids:
            raise BadInput(f"{prompt.place} has no token of this model's vocabulary; take it out of {SETTING}")
        if len(asked.ids) + length > room:
            raise BadInput(
                f"{prompt.place} has {len(asked.ids)} tokens, and with an answer of {length} it does not fit a model "
                f"that attends to {room}; shorten it, or lower {SETTING}.length to {max(1, room - len(asked.ids))}"
            )
        yield asked
    for reason, count in dropped.items():
        said.add(f"{count} {reason}, left out", "prompts to show")


def everyday(own: Tokenization, spec: Show, max_tokens: int) -> Iterator[Asked]:
    """Yield prompts of ours that the vocabulary has words for and that fit."""
    for text in (REQUESTS if own.tokenizer.chat_template else BEGINNINGS)[: spec.rows]:
        ids = own.tokenizer.encode(text, add_special_tokens=False)
        has_words = 0 < 2 * len(ids) <= len(text) and own.tokenizer.unk_token_id not in ids
        if has_words and len((asked := _asked(Prompt("a prompt to show", text), own)).ids) <= max_tokens:
            yield asked


def _asked(prompt: Prompt, own: Tokenization) -> Asked:
    content = prompt.content
    if isinstance(content, str) and own.tokenizer.chat_template:
        content = Conversation(prompt.place, [{"role": "user", "content": content}], [False], {})
    ids = tokens_of(prompt._replace(content=content), own)
    return Asked(TEXT if isinstance(content, str) else CHAT, _read(prompt.content), ids)


def _read(content: str | Conversation) -> str:
    """Return a prompt as people read it: a lone user's turn without its role."""
    if isinstance(content, str):
        return content
    turns = content.messages
    if [turn["role"] for turn in turns] == ["user"]:
        return str(turns[0].get("content", ""))
    return "\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in turns)


def _held_out(store: Store, target: Artifact, own: Tokenization, max_tokens: int) -> Iterator[Asked]:
    """Yield the prompts of held-out rows that leave room: all tokens before the first that is learned."""
    for batch in batches(store.path(target), "held_out", ["token_ids", "supervised", "prompt"]):
        for row in batch.to_pylist():
            first = row["supervised"].index(True)
            last = next((i for i in range(first, len(row["supervised"])) if not row["supervised"][i]), None)
            before, learned = row["token_ids"][:first], row["token_ids"][first:last]
            if len(before) <= max_tokens:
                text = _decoded(own, before, special=False)
                rest = text.partition(row["prompt"])[2]  # of several turns, the first alone would mislead
                prompt = text if len(rest) > OPENING else row["prompt"]
                yield Asked(TARGET, prompt, before, _decoded(own, learned, special=False))


class _Answering(NamedTuple):
    """A model that answers, and how."""

    model: Artifact
    loaded: PreTrainedModel
    eos_ids: Sequence[int]
    length: int
    spec: Show
    machine: Machine

    def temperature(self, kind: str) -> float:
        """Return 0 for the likeliest token each time."""
        if kind == UNPROMPTED:
            return 1.0
        own = self.spec.temperature
        return own if own is not None else float(kind == TEXT)

    def spec_at(self, temperature: float) -> GenerateSpec:
        """Return how tokens are taken; of the likeliest one alone, the random number decides nothing."""
        settings: dict[str, Any] = {"temperature": temperature} if temperature else {"top_k": 1}
        return GenerateSpec(rows=1, length=self.length, seed=self.spec.seed, **settings)


def _answered(how: _Answering, asked: list[Asked], own: Tokenization, draft: Draft) -> list[dict[str, Any]]:
    samples: dict[int, Sample] = {}
    fitting = [i for i, row in enumerate(asked) if len(row.ids) + how.length <= context_tokens(how.model)]
    for temperature in sorted({how.temperature(asked[i].kind) for i in fitting}):
        of_it = [i for i in fitting if how.temperature(asked[i].kind) == temperature]
        for first in range(0, len(of_it), how.machine.sampling_rows):
            part = of_it[first : first + how.machine.sampling_rows]
            rows = Rows(part, [asked[i].ids for i in part], how.eos_ids, STREAM)
            samples |= zip(part, sample(how.loaded, rows, how.spec_at(temperature), where="what is shown"), strict=True)
            draft.journal.progress(len(samples), len(asked), "answers")
    return [_record(how, i, row, samples.get(i), own) for i, row in enumerate(asked)]


def _record(how: _Answering, row_id: int, asked: Asked, sample: Sample | None, own: Tokenization) -> dict[str, Any]:
    ids = sample.token_ids[len(asked.ids) :] if sample else []
    reason = sample.finish_reason if sample else "context"
    return {
        "row_id": row_id, "kind": asked.kind, "prompt": asked.prompt, "expected": asked.expected,
        "answer": _decoded(own, ids[:-1] if reason == "eos" else ids), "finish_reason": reason,
        "temperature": how.temperature(asked.kind), "prompt_ids": asked.ids, "answer_ids": ids,
    }  # fmt: skip


def _decoded(own: Tokenization, ids: list[int], *, special: bool = True) -> str:
    return str(own.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))
