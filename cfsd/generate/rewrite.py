"""Stage rewrite: the base, shown a response, says it in its own words; what fails a check stays as it is.

Source: Yang et al. 2024, self-distillation, arXiv:2402.13669. Differs: the words of the request; the rewrite is sampled
where the response stood, so that its tokens are taken as they were sampled; checked by its answer and its length.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from transformers import PreTrainedModel

from cfsd.data.chat import dated_template
from cfsd.data.target import RewriteSpec
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.trial import check_sampling
from cfsd.machine import Machine
from cfsd.model.context import context_tokens
from cfsd.model.loading import Tokenization, load_for_measuring, load_tokenization
from cfsd.model.sample import Sample
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import TARGET, blocks, num_rows, read_rows, shard_path, shards, table_of, write_shard

STREAM = "rewrite"  # of random numbers
KEPT = b"kept"  # in a shard's Parquet metadata: how many rows stayed as they were, by reason
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
REQUEST = (
    "Here is a question and a correct answer to it.\n\nQuestion:\n{question}\n\nCorrect answer:\n{answer}\n\n"
    "Give this answer again in your own words, the way you would have written it. Keep all facts and numbers, and end "
    "with the same result. Write the answer alone.\n"
)


class Asked(NamedTuple):
    """One row of the target: where its response stands, and what the base is given to say it again."""

    row: dict[str, Any]
    first: int  # of the response's tokens
    last: int  # one after its last; what follows ends the row
    prompt: list[int]

    def response(self) -> list[int]:
        """Return the response's tokens, without what ends the row."""
        tokens: list[int] = self.row["token_ids"][self.first : self.last]
        return tokens

    def rewritten(self, tokens: list[int], text: str) -> dict[str, Any]:
        """Return the row with other tokens as its response."""
        ids, supervised = self.row["token_ids"], self.row["supervised"]
        return self.row | {
            "token_ids": [*ids[: self.first], *tokens, *ids[self.last :]],
            "supervised": [*supervised[: self.first], *[True] * len(tokens), *supervised[self.last :]],
            "response": text,
        }


def rewrite(base: Artifact, target: Artifact, spec: RewriteSpec, draft: Draft, machine: Machine) -> None:
    """Write the tables of `target`, in `train` with the base's own words. Continues after the last whole shard.

    The metadata count the rewritten rows, and by reason those that stayed.
    """
    machine.settle()
    model = load_for_measuring(draft.store, base, machine.resolved_device())
    check_sampling(model)
    folder, tokens = draft.store.path(target), load_tokenization(draft.store.path(base))
    writer = _Writer(model, tokens, spec, context_tokens(base))
    total = num_rows(folder, "train")
    for index, (first, block) in enumerate(blocks(folder, "train", TARGET.names, machine.sampling_rows)):
        if not shard_path(draft.folder, "train", index).exists():
            rows, kept = writer.rewrite(block.to_pylist())
            table = table_of(TARGET, rows).replace_schema_metadata({KEPT: json.dumps(kept).encode()})
            write_shard(draft.folder, "train", index, table)
        draft.journal.progress(first + block.num_rows, total, "rows")
    write_shard(draft.folder, "held_out", 0, table_of(TARGET, read_rows(folder, "held_out")))
    draft.metadata |= target.metadata | _metadata(draft, total)


def _metadata(draft: Draft, total: int) -> dict[str, Any]:
    kept, tokens, learned = Counter[str](), 0, 0
    for path in shards(draft.folder, "train"):
        kept.update(json.loads((pq.read_schema(path).metadata or {}).get(KEPT, b"{}")))
        for row in pq.read_table(path, columns=["supervised"])["supervised"].to_pylist():
            tokens, learned = tokens + len(row), learned + sum(row)
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.most_common())
    said = f"{total - kept.total()} of {total} responses are in the base's own words; the others stayed: {reasons or 0}"
    counts: dict[str, Any] = {"train_tokens": tokens, "supervised_tokens": learned, "said": [said]}
    return counts | {"rewritten": total - kept.total(), "stayed": dict(kept)}


class _Writer:
    """Says responses again, a block of rows at a time."""

    def __init__(self, model: PreTrainedModel, tokens: Tokenization, spec: RewriteSpec, context: int) -> None:
        self.model, self.tokens, self.spec, self.context = model, tokens, spec, context
        self.tokenizer: Any = tokens.tokenizer
        added = {token for token, known in self.tokenizer.added_tokens_decoder.items() if known.special}
        self.ends = added | {*tokens.eos_ids}

    def rewrite(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Return the rows, and why some of them are as they were."""
        kept, asked = Counter[str](), dict[int, Asked]()
        for place, row in enumerate(rows):
            found = self._asked(row)
            if isinstance(found, str):
                kept[found] += 1
            else:
                asked[place] = found
        made = list(rows)
        for (place, one), said in zip(asked.items(), self._sampled(list(asked.values())), strict=True):
            tokens = said.token_ids[len(one.prompt) :]
            tokens = tokens[:-1] if said.finish_reason == "eos" else tokens
            text = self.tokenizer.decode(tokens)
            if reason := self._fault(one, said, tokens, text):
                kept[reason] += 1
            else:
                made[place] = one.rewritten(tokens, text)
        return made, kept

    def _asked(self, row: dict[str, Any]) -> Asked | str:
        """Return what the base is asked, or why it cannot be."""
        ids, supervised = row["token_ids"], row["supervised"]
        spans = [len(list(same)) for learned, same in groupby(supervised) if learned]
        first = supervised.index(True)
        if len(spans) > 1:
            return "with several learned turns"
        last = next((i for i in range(first, len(ids)) if ids[i] in self.ends), first + spans[0])
        if last >= len(ids):
            return "without an end token"
        if last == first:
            return "without words"
        if self._has_words(ids[last : first + spans[0]]):
            return "with a special token inside"
        one = Asked(row, first, last, [])
        try:
            prompt = self._prompt(one)
        except Exception:  # of any kind, from the template's own code: some want a system turn first
            return "whose request the chat template refuses"
        if len(prompt) + self._most(one) > self.context:
            return "too long to be shown to the base"
        return one._replace(prompt=prompt)

    def _has_words(self, tokens: list[int]) -> bool:
        """Say whether more than what ends a row is in `tokens`."""
        return bool(self.tokenizer.decode([token for token in tokens if token not in self.ends]).strip())

    def _most(self, one: Asked) -> int:
        return 1 + int(self.spec.lengths * (one.last - one.first))

    def _prompt(self, one: Asked) -> list[int]:
        """Return the tokens after which the base writes: in its chat template, or with the row's own prompt at the end.

        Of a chat the question is all that was said before.
        """
        before = one.row["token_ids"][: one.first]
        answer = self.tokenizer.decode(one.response()).strip()
        if self.tokenizer.chat_template and any(token in self.ends for token in before[1:]):
            question = self.tokenizer.decode(before, skip_special_tokens=True).strip()
            message = {"role": "user", "content": REQUEST.format(question=question, answer=answer)}
            template = dated_template(self.tokenizer)
            text = self.tokenizer.apply_chat_template(
                [message], chat_template=template, tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        question = self.tokenizer.decode(before, skip_special_tokens=True).strip()
        request = self.tokenizer(REQUEST.format(question=question, answer=answer) + "\n", add_special_tokens=False)
        begun = before[:1] == [self.tokens.start]
        return [self.tokens.start, *request["input_ids"], *before[begun:]]

    def _sampled(self, asked: Sequence[Asked]) -> list[Sample]:
        """Return a rewrite for each row; what is drawn for one does not depend on the rows beside it."""
        ends = sorted({one.row["token_ids"][one.last] for one in asked} | {*self.tokens.eos_ids})
        sampled: dict[int, Sample] = {}
        for group in self._groups(asked):
            own = [asked[i] for i in group]
            rows = Rows([one.row["row_id"] for one in own], [one.prompt for one in own], ends, STREAM)
            longest = max(map(self._most, own))
            settings = {
                "rows": len(own),
                "length": longest,
                "temperature": self.spec.temperature,
                "seed": self.spec.seed,
            }
            found = sample(self.model, rows, GenerateSpec.model_validate(settings), where="the rewrites")
            sampled.update(zip(group, found, strict=True))
        return [sampled[i] for i in range(len(asked))]

    def _groups(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Divide the rows, by their number, so that the longest prompt and answer of a group fit into the context."""
        groups: list[list[int]] = []
        prompt = most = 0
        for i in sorted(range(len(asked)), key=lambda i: self._most(asked[i])):
            prompt, most = max(prompt, len(asked[i].prompt)), max(most, self._most(asked[i]))
            if not groups or prompt + most > self.context:
                groups.append([])
                prompt, most = len(asked[i].prompt), self._most(asked[i])
            groups[-1].append(i)
        return [sorted(group) for group in groups]

    def _fault(self, one: Asked, said: Sample, tokens: list[int], text: str) -> str | None:
        """Return why the rewrite is not taken, None if it is."""
        count, own = len(tokens), one.last - one.first
        if count > self.spec.lengths * own or said.finish_reason != "eos":
            return "whose rewrite is too long or has no end"
        if not text.strip() or count < own / self.spec.lengths:
            return "whose rewrite is too short"
        if self.ends & {*tokens}:
            return "whose rewrite has a special token in it"
        if len(one.row["token_ids"]) - own + count > self.spec.max_length:
            return "whose rewrite makes the row too long"
        response = self.tokenizer.decode(one.response())
        return None if same_answer(response, text, self.spec.answer) else "whose rewrite has another answer"


def same_answer(response: str, rewritten: str, pattern: str | None) -> bool:
    """Say whether both have the same answer: the last match of `pattern`, without one (None) the last number.

    A response without a number has none to be compared; one without a match of a given pattern is never the same. An
    empty pattern compares nothing.
    """
    if pattern == "":
        return True
    own, other = (_answer(text, pattern or NUMBER) for text in (response, rewritten))
    if own is None and pattern is None:
        return True
    return own is not None and own == other


def _answer(text: str, pattern: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    found: str = matches[-1].group(1 if matches[-1].re.groups else 0) or ""
    return found.replace(",", "").strip()
