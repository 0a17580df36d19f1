"""Target: what to fine-tune on, as tokenised rows with a train and a held-out part."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from cfsd.data.chat import dated_template
from cfsd.data.records import Record
from cfsd.data.target import Target, fill, records_of
from cfsd.errors import BadInput
from cfsd.model.loading import Tokenization, load_tokenization
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import TARGET, table_of, write_shard


class Row(NamedTuple):
    """One tokenised row; `supervised[t]` says whether token t counts in the loss."""

    token_ids: list[int]
    supervised: list[bool]
    prompt: str
    response: str


def prepare(base: Artifact, target: Target, draft: Draft) -> None:
    """Write `train` and `held_out` tables. Raises BadInput naming why when too few rows are left."""
    tokens, context = load_tokenization(draft.store.path(base)), base.metadata["context"]
    if isinstance(context, int) and context < target.max_length:
        target = target.model_copy(update={"max_length": context})

    dropped: Counter[str] = Counter()
    usable = list(_rows(target, tokens, dropped))
    _check_number(target, len(usable), dropped)
    random.Random(f"split {target.seed}").shuffle(usable)
    held_out = len(usable) if target.measure_only else target.held_out
    parts = {"held_out": usable[:held_out], "train": usable[held_out:]}
    for name, rows in parts.items():
        records = [{"row_id": i, "source": "target", **row._asdict()} for i, row in enumerate(rows)]
        write_shard(draft.folder, name, 0, table_of(TARGET, records))
    draft.metadata |= {
        "train_rows": len(parts["train"]),
        "held_out_rows": len(parts["held_out"]),
        "train_tokens": sum(len(row.token_ids) for row in parts["train"]),
        "supervised_tokens": sum(sum(row.supervised) for row in parts["train"]),
        "held_out_tokens": sum(len(row.token_ids) for row in parts["held_out"]),
        "dropped": dict(dropped),
    }


def _check_number(target: Target, usable: int, dropped: Counter[str]) -> None:
    if usable > (0 if target.measure_only else target.held_out):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
    raise BadInput(
        f"the target has {usable} usable rows ({reasons}), but held_out={target.held_out} of them are kept "
        "from training; give more rows, a smaller target.held_out or a larger target.max_length"
    )


def _rows(target: Target, tokens: Tokenization, dropped: Counter[str]) -> Iterator[Row]:
    seen: set[tuple[int, ...]] = set()
    for _, record in islice(records_of(target), target.rows):
        row = _chat_row(target, record, tokens.tokenizer) if target.messages else _pair_row(target, record, tokens)
        if not any(row.supervised):
            dropped["with an empty response"] += 1
        elif len(row.token_ids) > target.max_length:
            dropped[f"longer than max_length={target.max_length}"] += 1
        elif (token_ids := tuple(row.token_ids)) in seen:  # a copy in the held-out part would be no evidence
            dropped["seen before"] += 1
        else:
            seen.add(token_ids)
            yield row


def _pair_row(target: Target, record: Record, tokens: Tokenization) -> Row:
    prompt, response = fill(target.prompt, record), fill(target.response, record)
    tokenizer: Any = tokens.tokenizer
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    if tokens.eos_ids and tokenizer.eos_token_id in before[-1:]:
        before = before[:-1]  # some tokenizers end every text by themselves
    end = tokens.end() if after else []
    supervised = [False] * len(before) + [True] * len(after + end)
    if before == [] and supervised:
        supervised[0] = False  # nothing comes before the first token, so nothing predicts it
    return Row(before + after + end, supervised, prompt, response)


def _chat_row(target: Target, record: Record, tokenizer: PreTrainedTokenizerBase) -> Row:
    messages = record.get(target.messages or "")
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"target column {target.messages!r} is not a list of messages; columns: {', '.join(record)}")
    if not tokenizer.chat_template:
        raise BadInput("target.messages is set, but this model has no chat template; use prompt and response")
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise BadInput(f"messages in target column {target.messages!r} need `role` and `content`, both texts")
    if messages[0]["role"] == "assistant":
        raise BadInput("a chat in the target begins with the assistant; it must begin with a user or system message")
    token_ids = _templated(tokenizer, messages)
    supervised = [False] * len(token_ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _templated(tokenizer, messages[:turn], open_turn=True)
            after = _templated(tokenizer, messages[: turn + 1])
            if token_ids[: len(after)] != after or after[: len(before)] != before:
                raise BadInput(
                    "this model's chat template rewrites earlier turns, so the loss cannot be laid on assistant "
                    "turns; give single-turn rows, or prompt and response"
                )
            supervised[len(before) : len(after)] = [True] * (len(after) - len(before))
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    return Row(token_ids, supervised, str(messages[0]["content"]), "\n".join(said))


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[Any], *, open_turn: bool = False) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        messages, chat_template=dated_template(tokenizer), add_generation_prompt=open_turn, return_dict=True
    )
    return list(encoded["input_ids"])
