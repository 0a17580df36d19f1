"""The unit of sampling, a shard, and the job that all shards of a corpus belong to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from pydantic import BaseModel

from cfsd.generate.prompts import Prompts
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from cfsd.store.artifact import Artifact
from cfsd.store.tables import shard_path

SPAN = b"rows"  # in a shard's Parquet metadata: which rows it was asked for


@dataclass(frozen=True)
class Shard:
    """The unit of work, of retry and of resume: rows first to last - 1 of one source."""

    index: int
    source: str  # also names the stream of random numbers; "probe" is one too, "earlier-rows 2" of the second target
    first: int
    last: int

    def span(self) -> bytes:
        """Return the rows as text."""
        return f"{self.first}:{self.last}".encode()

    def is_done(self, folder: Path) -> bool:
        """Return whether `folder` holds the shard with exactly these rows."""
        path = shard_path(folder, "corpus", self.index)
        return path.exists() and (pq.read_schema(path).metadata or {}).get(SPAN) == self.span()


class ShardJob(BaseModel):
    """Everything that sampling a shard needs to know, in any process and on any node."""

    home: Path
    folder: Path  # the draft
    base: Artifact
    target: Artifact | None
    spec: GenerateSpec
    machine: Machine
    prompts: Prompts | None = None
    earlier: tuple[Artifact, ...] = ()  # targets that the base was trained on


Look = Callable[[float], object]  # called while shards are made, with the number of rows that are under way
Sampler = Callable[[ShardJob, list[Shard], Look], None]  # writes the shards; may lose some
