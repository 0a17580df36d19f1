"""Target: what to fine-tune on, and its records as the user has them."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from cfsd.data.conversation import read_row
from cfsd.data.files import Files
from cfsd.data.records import Located, Said, hub_records
from cfsd.data.shapes import HEAD, PROMPT, RESPONSE, Shape, shape_of
from cfsd.errors import BadInput
from cfsd.model.hub import DATA, MAIN
from cfsd.model.on_hub import OnHub
from cfsd.spec import Spec, digest_of
from cfsd.store.digests import digest_of_files


class RewriteSpec(Spec):
    """How the base says a target's responses in its own words; see `cfsd.generate.rewrite`."""

    answer: str | None = Field(None, description="Regular expression of what must stay; None: the last number")
    lengths: float = Field(3.0, gt=1, description="Most times the tokens of the response, and least share of them")
    max_length: PositiveInt = Field(1024, description="Most tokens of a row")
    temperature: PositiveFloat = Field(1.0, description="Of the sampling")
    seed: NonNegativeInt | None = Field(None, description="Of the sampling")


OF_KINDS = {"path": ("file",), "name": ("hub", "gym"), "subset": ("hub",), "config": ("gym",), "revision": ("hub",)}


class Target(OnHub):
    """Rows of prompt and response, or of chat messages; the loss is on responses only."""

    version: ClassVar[int] = 4  # 4: a template's own words are no response; arguments of tool calls are JSON
    neutral: ClassVar[dict[str, Any]] = {
        "turns": "all", "subset": None, "rewrite": "off", "rewrite_answer": None, "rewrite_lengths": 3.0,
        "rewrite_temperature": 1.0,
    }  # fmt: skip
    prefix: ClassVar[str] = DATA

    kind: Literal["file", "hub", "gym"] = Field(
        "file",
        description="file: JSONL, CSV, Parquet and the like; hub: a data set; gym: a reasoning-gym generator",
    )
    path: str | None = Field(
        None,
        description="file only: JSONL, JSON, CSV, TSV, Parquet or Arrow, each of them compressed too (.gz, .zst, .xz, "
        ".bz2); a folder of these, a pattern as `rows/*.jsonl`, or what `datasets` saved; relative to the working "
        "directory",
    )
    name: str | None = Field(None, description="hub: the data set's id; gym: the generator, as `gsm_symbolic`")
    split: str = Field("train", description="hub, and files that hold several splits")
    subset: str | None = Field(None, description="hub only: one of the data set's configurations, if it has several")
    config: dict[str, JsonValue] = Field({}, description="gym only: the generator's own settings")
    prompt: str = Field(
        "prompt",
        description="A column, or a template such as `Question: {question}\\n`; without the columns prompt and "
        "response the shapes of other tools are recognised",
    )
    response: str = Field("response", description="A column, or a template such as ` {answer}`")
    messages: str | None = Field(
        None,
        description="A column of chat messages, in place of prompt and response; loss on assistant turns",
    )
    turns: Literal["all", "last"] = Field(
        "all", description="Chats only: learn every turn of the assistant that is not marked otherwise, or the last"
    )
    rows: PositiveInt | None = Field(None, description="Most rows to use, held-out ones included; empty: all")
    held_out: PositiveInt = Field(64, description="Rows that are left out of training, to measure what was learned")
    measure_only: bool = Field(False, description="Keep every row from training: to measure models that exist")
    max_length: PositiveInt = Field(1024, description="Longer rows (tokens) are dropped and counted, never cut")
    seed: NonNegativeInt | None = Field(None, description="Split and generator; empty: the recipe's")

    rewrite: Literal["off", "self"] = Field(
        "off",
        description="self: the base is shown each response and says it in its own words; where a check fails the "
        "response stays. Held-out rows stay",
    )
    rewrite_answer: str | None = Field(
        None,
        description="rewrite only: a regular expression, whose last match (its first group) must be the same in both; "
        "left out: the last number of a response that has one; an empty text: nothing is compared",
    )
    rewrite_lengths: float = Field(
        3.0,
        gt=1,
        description="rewrite only: most times the tokens of the response, and least share of them",
    )
    rewrite_temperature: PositiveFloat = Field(1.0, description="rewrite only: of the sampling")

    def unread(self) -> dict[str, str]:
        """Return what has no effect where responses stay as they are."""
        settings = ("rewrite_answer", "rewrite_lengths", "rewrite_temperature")
        return dict.fromkeys(settings, "rewrite: self") if self.rewrite == "off" else {}

    @field_validator("prompt", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return "" if value is None else value  # what YAML makes of nothing: responses alone are learned

    @field_validator("rewrite", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a bare `off`

    @field_validator("rewrite_answer")
    @classmethod
    def _is_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.check_fields("target", OF_KINDS)
        if self.messages is not None and (self.prompt, self.response) != (PROMPT, RESPONSE):
            raise ValueError(
                "prompt and response are not read where messages names a column of chats; take out messages, or both "
                "of them"
            )
        if self.kind == "file" and not self.path:
            raise ValueError("a target of kind file needs `path`")
        if self.kind == "hub" and not self.name:
            raise ValueError("a data set of kind hub needs `name`, such as `openai/gsm8k`")
        if self.kind == "gym" and not (self.name and self.rows):
            raise ValueError("a target of kind gym needs `name` and `rows`")
        return self

    def _identity(self) -> dict[str, Any]:
        settings = super()._identity()
        if self.kind == "hub":
            settings["revision"] = self.commit()
        if self.kind == "file":
            digests = self.files().digests()
            [settings["path"]] = digests.values() if self.files().is_one_file() else [digest_of_files(digests)]
        if self.kind == "gym":
            settings["generator"] = version("reasoning-gym")
        return settings

    def as_given(self) -> Self:
        """Return the target before anything is rewritten."""
        return self.model_copy(update={name: self.neutral[name] for name in self.neutral if "rewrite" in name})

    def rewriting(self) -> RewriteSpec | None:
        """Return how responses are rewritten, None: they are not."""
        settings = {"answer": self.rewrite_answer, "lengths": self.rewrite_lengths, "max_length": self.max_length}
        settings |= {"temperature": self.rewrite_temperature, "seed": self.seed}
        return RewriteSpec.model_validate(settings) if self.rewrite == "self" else None

    def files(self) -> Files:
        """Return the files of kind file."""
        return Files(self.path or "", "target", "target.path", split=self.split)

    def check(self) -> None:
        """Raise BadInput if the rows cannot be had or lack what is asked of them.

        Reads all of small files, of others the first rows.
        """
        if self.kind == "hub":
            self.commit()
            return
        rows = records_of(self)
        head = first_rows(self, rows)
        if self.kind == "file" and not head:
            raise BadInput(
                f"target {self.path!r} holds no rows; rows with {self.prompt!r} and {self.response!r} are needed"
            )
        shape, notes = shape_of_rows(self, head), Counter[str]()
        for row in head:
            read_row(shape, row, notes)
        if self.kind == "file":
            self.files().first_of(rows)


def first_rows(target: Target, records: Iterator[Located]) -> list[Located]:
    """Return the rows whose columns are known before the first one is read."""
    return list(islice(records, 1 if target.kind == "gym" else min(HEAD, target.rows or HEAD)))


def shape_of_rows(target: Target, head: Sequence[Located]) -> Shape:
    """Return how the rows of `target` are read, by its settings and its first rows; raises BadInput."""
    return shape_of(target.prompt, target.response, target.messages, head)


def records_of(target: Target, said: Said | None = None) -> Iterator[Located]:
    """Yield the records of `target` as the user has them, each with its place; raises BadInput when unreadable.

    What is read in one of several ways is added to `said`.
    """
    if target.kind == "gym":
        return _gym(target)
    if target.kind == "hub":
        return hub_records(target.name or "", target.revision or MAIN, target.split, target.subset)
    return target.files().records(Said() if said is None else said)


def _gym(target: Target) -> Iterator[Located]:
    import reasoning_gym

    # item i is made from seed + i there, so neighbouring seeds would share nearly all items
    seed = int(digest_of(["gym", target.seed]), 16) % 2**31
    try:
        made = reasoning_gym.create_dataset(target.name, size=target.rows, seed=seed, **target.config)
        yield from (Located(f"{target.name!r} row {number}", record) for number, record in enumerate(made, 1))
    except (ValueError, TypeError, AssertionError) as error:
        raise BadInput(f"reasoning-gym cannot make {target.name!r} with {target.config}: {error}") from error
