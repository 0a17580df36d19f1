"""Target: what to fine-tune on, as tokenised rows with a train and a held-out part."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from cfsd.artifact import Artifact, Draft
from cfsd.chat_date import dated_template
from cfsd.content import DigestMemory
from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.records import check_file, file_records, hub_records
from cfsd.spec import Spec, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Target(Spec):
    """Rows of prompt and response, or of chat messages; the loss is on responses only."""

    kind: Literal["file", "hub", "gym"] = Field(
        "file",
        description="file: JSONL, CSV or Parquet; hub: a pinned data set; gym: a reasoning-gym generator",
    )
    path: str | None = Field(None, description="file only: relative to the working directory")
    name: str | None = Field(None, description="hub: the data set's id; gym: the generator, as `gsm_symbolic`")
    revision: str | None = Field(None, description="hub only: the commit, 40 hex digits")
    split: str = Field("train", description="hub only")
    config: dict[str, JsonValue] = Field({}, description="gym only: the generator's own settings")
    prompt: str = Field("prompt", description="A column, or a template such as `Question: {question}\\n`")
    response: str = Field("response", description="A column, or a template such as ` {answer}`")
    messages: str | None = Field(
        None,
        description="A column of chat messages, in place of prompt and response; loss on assistant turns",
    )
    rows: PositiveInt | None = Field(None, description="Most rows to use, held-out ones included; empty: all")
    held_out: PositiveInt = Field(64, description="Rows kept out of training to measure what was learned")
    measure_only: bool = Field(False, description="Keep every row from training: to measure models that exist")
    max_length: PositiveInt = Field(1024, description="Longer rows (tokens) are dropped and counted, never cut")
    seed: NonNegativeInt | None = Field(None, description="Split and generator; empty: the recipe's")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "file" and not self.path:
            raise ValueError("a target of kind file needs `path`")
        if self.kind == "hub" and not (self.name and re.fullmatch(r"[0-9a-f]{40}", self.revision or "")):
            raise ValueError(f"hub data set {self.name!r} needs `revision`, a commit of 40 hex digits")
        if self.kind == "gym" and not (self.name and self.rows):
            raise ValueError("a target of kind gym needs `name` and `rows`")
        return self

    def _identity(self) -> dict[str, Any]:
        settings = super()._identity()
        if self.kind == "file":
            settings["path"] = DigestMemory(home()).sha256(Path(self.path or ""))
        if self.kind == "gym":
            settings["generator"] = version("reasoning-gym")
        return settings

    def check(self) -> None:
        """Raise BadInput if the rows cannot be had; reads no more than the first one."""
        if self.kind == "gym":
            next(iter(_gym(self)), None)
            return
        if self.kind == "hub":
            return
        needed = f"rows with {self.prompt!r} and {self.response!r} are needed"
        check_file(Path(self.path or ""), "target", "target.path", needed)


class Row(NamedTuple):
    """One tokenised row; `supervised[t]` says whether token t counts in the loss."""

    token_ids: list[int]
    supervised: list[bool]
    prompt: str
    response: str


def prepare(base: Artifact, target: Target, draft: Draft) -> None:
    """Write `train` and `held_out` tables. Raises BadInput naming why when too few rows are left."""
    from cfsd.checkpoint import end_tokens, load_tokenizer
    from cfsd.rows import TARGET, table_of, write_shard

    folder, context = draft.store.path(base), base.facts["context"]
    tokenizer, ends = load_tokenizer(folder), end_tokens(folder)
    if isinstance(context, int) and context < target.max_length:
        target = target.model_copy(update={"max_length": context})

    dropped: Counter[str] = Counter()
    kept = list(_unique(_rows(target, tokenizer, ends, dropped), dropped))
    _enough(target, kept, dropped)
    random.Random(f"split {target.seed}").shuffle(kept)
    held_out = len(kept) if target.measure_only else target.held_out
    parts = {"held_out": kept[:held_out], "train": kept[held_out:]}
    for name, rows in parts.items():
        records = [{"row_id": i, "source": "target", **row._asdict()} for i, row in enumerate(rows)]
        write_shard(draft.folder, name, 0, table_of(TARGET, records))
    draft.facts |= {
        "train_rows": len(parts["train"]),
        "held_out_rows": len(parts["held_out"]),
        "train_tokens": sum(len(row.token_ids) for row in parts["train"]),
        "supervised_tokens": sum(sum(row.supervised) for row in parts["train"]),
        "held_out_tokens": sum(len(row.token_ids) for row in parts["held_out"]),
        "dropped": dict(dropped),
    }


def _enough(target: Target, kept: list[Row], dropped: Counter[str]) -> None:
    if len(kept) > (0 if target.measure_only else target.held_out):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
    raise BadInput(
        f"the target has {len(kept)} usable rows ({reasons}), but held_out={target.held_out} of them are kept "
        "from training; give more rows, a smaller target.held_out or a larger target.max_length"
    )


def _rows(
    target: Target, tokenizer: "PreTrainedTokenizerBase", ends: tuple[int, ...], dropped: Counter[str]
) -> Iterator[Row]:
    for index, record in enumerate(_records(target)):
        if target.rows is not None and index >= target.rows:
            return
        row = _chat_row(target, record, tokenizer) if target.messages else _pair_row(target, record, tokenizer, ends)
        if not any(row.supervised):
            dropped["with an empty response"] += 1
        elif len(row.token_ids) > target.max_length:
            dropped[f"longer than max_length={target.max_length}"] += 1
        else:
            yield row


def _unique(rows: Iterable[Row], dropped: Counter[str]) -> Iterator[Row]:
    seen: set[tuple[int, ...]] = set()
    for row in rows:
        if (tokens := tuple(row.token_ids)) in seen:  # a copy in the held-out part would be no evidence
            dropped["seen before"] += 1
            continue
        seen.add(tokens)
        yield row


def _pair_row(
    target: Target, record: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", ends: tuple[int, ...]
) -> Row:
    prompt, response = _fill(target.prompt, record), _fill(target.response, record)
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    if ends and tokenizer.eos_token_id in before[-1:]:
        before = before[:-1]  # some tokenizers end every text by themselves
    end = [tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]] if ends and after else []
    supervised = [False] * len(before) + [True] * len(after + end)
    if before == [] and supervised:
        supervised[0] = False  # nothing comes before the first token, so nothing predicts it
    return Row(before + after + end, supervised, prompt, response)


def _fill(template: str, record: dict[str, Any]) -> str:
    if template in record:
        return "" if record[template] is None else str(record[template])
    try:
        if "{" not in template:
            raise KeyError(template)
        return template.format(**record)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(
            f"target has no column for {template!r} ({error}); its columns are {', '.join(map(repr, record))}; "
            "a brace that is meant as one is written twice"
        ) from None


def _chat_row(target: Target, record: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Row:
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


def _templated(tokenizer: "PreTrainedTokenizerBase", messages: list[Any], *, open_turn: bool = False) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        messages, chat_template=dated_template(tokenizer), add_generation_prompt=open_turn, return_dict=True
    )
    return list(encoded["input_ids"])


def _records(target: Target) -> Iterator[dict[str, Any]]:
    if target.kind == "gym":
        return _gym(target)
    if target.kind == "hub":
        return hub_records(target.name or "", target.revision or "", target.split)
    return file_records(Path(target.path or ""), "target")


def _gym(target: Target) -> Iterator[dict[str, Any]]:
    import reasoning_gym

    # item i is made from seed + i there, so neighbouring seeds would share nearly all items
    seed = int(digest_of(["gym", target.seed]), 16) % 2**31
    try:
        yield from reasoning_gym.create_dataset(target.name, size=target.rows, seed=seed, **target.config)
    except (ValueError, TypeError, AssertionError) as error:
        raise BadInput(f"reasoning-gym cannot make {target.name!r} with {target.config}: {error}") from error
