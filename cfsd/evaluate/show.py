"""Show: prompts whose answers people read side by side, base beside tuned."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from cfsd.data.contents import named_suffix
from cfsd.data.files import Files
from cfsd.data.records import Located, Said
from cfsd.generate.prompts import TEXTS, Prompts
from cfsd.spec import Spec

SETTING = "evaluate.show"
LINES = ".txt"  # a prompt on each line
OFF = {"rows": 0, "unprompted": 0, "target": 0}


class Show(Spec):
    """Prompts that base and tuned answer for people to read. In YAML a file is enough; `none` shows nothing.

    `version` is raised with the prompts of ours and with `cfsd.evaluate.answers`.
    """

    version: ClassVar[int] = 1

    path: str | None = Field(
        None,
        description=".txt with a prompt on each line; JSONL, JSON, CSV, TSV, Parquet or Arrow with `prompt` or "
        "`messages`; empty: six everyday requests, or beginnings of sentences for a base without a chat template",
    )
    rows: NonNegativeInt = Field(10, description="The first N of these prompts")
    unprompted: NonNegativeInt = Field(2, description="Texts from the start token alone")
    target: NonNegativeInt = Field(2, description="Prompts of held-out target rows, with the response that is expected")
    length: PositiveInt = Field(96, description="Most tokens of an answer; the report says where this cut one")
    temperature: NonNegativeFloat | None = Field(
        None,
        description="Of all answers; 0: always the likeliest token. Empty: 0, and 1 for texts that are only continued. "
        "Unprompted texts have 1",
    )
    seed: NonNegativeInt = Field(0, description="Of the random numbers, which base and tuned share")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if value in ("none", False):
            return OFF
        return ({"path": value} if value else {}) if isinstance(value, str | None) else value

    def _identity(self) -> dict[str, Any]:
        settings = {name: value for name, value in super()._identity().items() if name != "path"}
        return settings | ({"content": self.prompts().files().content()} if self.path and self.rows else {})

    def is_on(self) -> bool:
        """Say whether anything is shown."""
        return bool(self.rows or self.unprompted or self.target)

    def prompts(self) -> "ShownPrompts":
        """Return the user's own prompts; there is a `path`."""
        return ShownPrompts(name="to show", path=str(self.path), rows=self.rows, length=self.length, seed=self.seed)

    def has_own(self) -> bool:
        """Say whether prompts of the user's own are shown."""
        return bool(self.path and self.rows)

    def check(self) -> None:
        """Raise BadInput if there is no prompt to be had; reads all of small files, of others the first rows."""
        if self.has_own():
            self.prompts().check()


class ShownPrompts(Prompts):
    """The user's own prompts to show: as those of `probe.modes`, and lines of text."""

    setting: ClassVar[str] = SETTING

    def is_lines(self) -> bool:
        """Say whether each line of a text file is a prompt."""
        return named_suffix(Path(self.path)) == LINES

    def files(self) -> Files:
        """Return the files."""
        files = Files(self.path, f"prompts {self.name}", SETTING)
        return files._replace(suffixes=(LINES,), column=TEXTS) if self.is_lines() else files

    def _records(self, said: Said) -> Iterator[Located]:
        if not self.is_lines():
            yield from super()._records(said)
            return
        for place, record in self.files().records(said):
            for number, line in enumerate(str(record[TEXTS]).split("\n"), 1):
                if line.strip():
                    yield Located(f"{place} line {number}", {TEXTS: line.strip()})
