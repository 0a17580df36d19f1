"""Stage generate: text sampled from the base model after nothing but its start token; the probe likewise.

Source: Bansal and Sanghavi 2025, arXiv:2505.13811: rehearsing this text estimates KL(base || tuned) without bias,
at temperature 1 and without truncation. Any other setting estimates the divergence from another distribution.
The other sources are what the method is compared to: text after the target's prompts, after the chat template,
and documents of the user's own.

A corpus is sampled in shards: in this process, in several, or wherever a sampler takes them. A shard is a fixed list of
rows with a batch shape of its own, and its random numbers depend on seed, source and row alone. So its rows are the
same whoever samples it, in whatever order, and however often it was begun.
"""

import math
import time
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq

from cfsd.data.corpus_table import REASONING, corpus_metadata, sampled_per_row, sampled_sums
from cfsd.errors import BadInput, Crashed
from cfsd.generate.prompts import Prompts
from cfsd.generate.shard_job import Sampler, Shard, ShardJob
from cfsd.generate.shard_sampling import check_engine, sample_shard
from cfsd.generate.sources import (
    answer_places,
    check_chat,
    check_template,
    count_prompts,
    tokenization_of,
    write_starts,
)
from cfsd.generate.spec import CHATS, CONTEXT_FREE, SHARDS_PER_SOURCE, GenerateSpec, ProbeSpec
from cfsd.generate.workers import sample_in_workers
from cfsd.machine import Machine
from cfsd.stages import CHAT
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.journal import Journal
from cfsd.store.tables import TURNS, read_rows, shard_path, table_of, write_shard

UNANSWERED = (
    "in {unanswered} of {rows} chats the user's turn did not end within {length} tokens, or just there, so that they "
    "have no answer; a larger probe.length, or length of the mode, leaves fewer"
)
UNFINISHED = (
    "in {unfinished} of {reasoning} rows with reasoning, {end} did not come within {length} tokens, so that they have "
    "no answer after it; a larger {setting} leaves fewer"
)
ATTEMPTS = 3  # at lost shards, before giving up


def generate(
    base: Artifact,
    target: Artifact | None,
    spec: GenerateSpec,
    draft: Draft,
    machine: Machine,
    sampler: Sampler | None = None,
    earlier: tuple[Artifact, ...] = (),
) -> None:
    """Write the `corpus` table shard by shard; finished shards are kept after any error.

    `target` is needed by source contextual only, `earlier` targets by the sources named after them. `sampler` works on
    shards elsewhere than on this machine; those that it loses are asked for again.
    """
    job = _job(draft, base, target, spec, machine).model_copy(update={"earlier": earlier})
    parts = [(source, None if s is None else s * spec.rows * spec.length) for source, s in spec.parts(len(earlier))]
    if spec.rows and CHATS in spec.sources():
        check_template(base, spec.length, draft.store)
    for source, tokens in parts:  # what a source cannot give is said before another one is sampled
        write_starts(job, source, _rows_for(job, tokens))
    for position, (source, tokens) in enumerate(parts):
        sample_source(job, source, position * SHARDS_PER_SOURCE, tokens, draft, sampler)
    _count(draft, spec.length, "generate.length")
    draft.metadata |= {
        "biased": ", ".join(spec.biases()),
        "source": spec.of_auto(CONTEXT_FREE).source,
        "top_logprobs": spec.top_logprobs,
    }
    draft.metadata |= {"tail_samples": spec.stored_tail()} if spec.stored_tail() else {}


def probe(base: Artifact, spec: ProbeSpec, draft: Draft, machine: Machine, sampler: Sampler | None = None) -> None:
    """Write the probe as a `corpus` table, from random numbers that no corpus uses."""
    job = _job(draft, base, None, GenerateSpec(rows=spec.rows, length=spec.length, seed=spec.seed), machine)
    sample_source(job, "probe", 0, None, draft, sampler)
    _count(draft, spec.length, "probe.length")


def chat(base: Artifact, spec: ProbeSpec, draft: Draft, machine: Machine, sampler: Sampler | None = None) -> None:
    """Write chats as a `corpus` table, whose user's turn and answer the base sampled, and `turns`: where answers begin.

    Log-probabilities are null at the template's tokens.
    Raises BadInput where the base has no chat template to cut.
    """
    check_chat(base, spec, draft.store)
    job = _job(draft, base, None, GenerateSpec(rows=spec.rows, length=spec.length, seed=spec.seed), machine)
    sample_source(job, CHAT, 0, None, draft, sampler)
    rows = read_rows(draft.folder, "corpus", ["row_id", "token_ids"])
    places = answer_places([row["token_ids"] for row in rows], tokenization_of(job))
    turns = [{"row_id": row["row_id"], "answer": place} for row, place in zip(rows, places, strict=True)]
    write_shard(draft.folder, "turns", 0, table_of(TURNS, turns))
    unanswered = sum(place == len(row["token_ids"]) for row, place in zip(rows, places, strict=True))
    said: list[Any] = [*cast(Any, draft.metadata.get("said", ()))]
    said += [UNANSWERED.format(unanswered=unanswered, rows=len(rows), length=spec.length)] if unanswered else []
    draft.metadata |= {"unanswered": unanswered, "said": said}
    _count(draft, spec.length, "probe.length, or length of the mode,")


def answers(
    base: Artifact, prompts: Prompts, draft: Draft, machine: Machine, sampler: Sampler | None = None
) -> None:  # fmt: skip
    """Write the base's answers to the user's prompts as a `corpus` table; log-probabilities are null in the prompts.

    They are an exact sample, from random numbers that neither a corpus nor the probe uses.
    """
    spec = GenerateSpec(rows=prompts.rows, length=prompts.length, seed=prompts.seed)
    job = _job(draft, base, None, spec, machine).model_copy(update={"prompts": prompts})
    known = spec.model_copy(update={"rows": count_prompts(job)})
    sample_source(job.model_copy(update={"spec": known}), "prompts", 0, None, draft, sampler)
    draft.metadata |= {"prompts": prompts.name}
    _count(draft, prompts.length, "probe.length, or length of the mode,")


def _count(draft: Draft, length: int, setting: str) -> None:
    """Describe the rows of `draft`; where reasoning did not end within `length`, say so, and what `setting` does it."""
    counts = corpus_metadata(draft.folder)
    draft.metadata |= counts
    if counts.get("unfinished"):
        said = UNFINISHED.format(**counts, end=REASONING[1], length=length, setting=setting)
        draft.metadata["said"] = [*cast(Any, draft.metadata.get("said", ())), said]


def _job(draft: Draft, base: Artifact, target: Artifact | None, spec: GenerateSpec, machine: Machine) -> ShardJob:
    job = ShardJob(home=draft.store.home, folder=draft.folder, base=base, target=target, spec=spec, machine=machine)
    draft.metadata |= check_engine(job)
    return job


def shards_of(source: str, first_index: int, rows: int, size: int) -> list[Shard]:
    """Return `rows` rows cut into shards of `size`."""
    count = -(-rows // size)
    if count > SHARDS_PER_SOURCE:
        raise BadInput(
            f"{rows} rows in shards of {size} make {count} files, at most {SHARDS_PER_SOURCE} are allowed; "
            "raise machine.sampling_rows"
        )
    return [Shard(first_index + i, source, i * size, min((i + 1) * size, rows)) for i in range(count)]


def sample_source(
    job: ShardJob, source: str, first_index: int, tokens: float | None, draft: Draft, sampler: Sampler | None = None
) -> None:
    """Write all shards of one source: `job.spec.rows` rows, or as many as hold `tokens` tokens.

    Raises NotFinite, OutOfMemory, BadInput or Crashed; finished shards stay.
    """
    size = job.machine.sampling_rows
    rows = _rows_for(job, tokens)
    while True:
        found = write_starts(job, source, rows)
        said: list[Any] = [*cast(Any, draft.metadata.get("said", ())), *cast(Any, found.get("said", ()))]
        draft.metadata |= found | {"said": list(dict.fromkeys(said))}
        shards = shards_of(source, first_index, rows, size)
        _sample_missing(job, shards, draft, sampler)
        if tokens is None:
            return
        done = sum(sampled_sums(shard_path(job.folder, "corpus", shard.index))[0] for shard in shards)
        if done >= tokens:
            return _cut(job.folder, shards, tokens)
        if not done:
            raise BadInput(f"{rows} rows of source {source} hold not one sampled token, so no fraction can be filled")
        rows += max(1, math.ceil((tokens - done) * rows / done))


def _rows_for(job: ShardJob, tokens: float | None) -> int:
    """Return how many rows hold `tokens`, if none ends early; the recipe's for None."""
    return job.spec.rows if tokens is None else math.ceil(tokens / job.spec.length)


def _cut(folder: Path, shards: list[Shard], tokens: float) -> None:
    """Drop the rows after the one that completes `tokens`."""
    left = tokens
    for shard in shards:
        path = shard_path(folder, "corpus", shard.index)
        if left <= 0:
            path.unlink()
            continue
        table = pq.read_table(path)
        until = sampled_per_row(table["logprobs"].combine_chunks()).cumsum()
        if len(until) and until[-1] > left:
            write_shard(folder, "corpus", shard.index, table.slice(0, int((until < left).sum()) + 1))
        left -= until[-1] if len(until) else 0


def _sample_missing(job: ShardJob, shards: list[Shard], draft: Draft, sampler: Sampler | None) -> None:
    watch = Watch(job.folder, shards, draft.journal)
    for _ in range(ATTEMPTS):
        if not (missing := watch.look()):
            return
        if sampler is not None:
            sampler(job, missing, watch.look)
        elif job.machine.resolved_processes() > 1:
            sample_in_workers(job, missing, watch.look)
        else:
            for shard in missing:
                sample_shard(job, shard, watch.progress)
                watch.look()
    if missing := watch.look():
        raise Crashed(f"{len(missing)} shards were lost {ATTEMPTS} times, first {missing[0]}; those done are kept")


class Watch:
    """Which shards are finished; new ones are written to the journal."""

    def __init__(self, folder: Path, shards: list[Shard], journal: Journal) -> None:
        """Watch `shards` of a draft; those that are there already were sampled by an earlier attempt."""
        self.folder, self.journal, self.total = folder, journal, sum(shard.last - shard.first for shard in shards)
        self.missing = [shard for shard in shards if not shard.is_done(folder)]
        self.left = sum(shard.last - shard.first for shard in self.missing)
        self.tokens, self.started = 0, time.monotonic()

    def look(self, under_way: float = 0.0) -> list[Shard]:
        """Return the shards that are still missing, of which `under_way` rows are done, and record new ones."""
        new = [shard for shard in self.missing if shard.is_done(self.folder)]
        self.missing = [shard for shard in self.missing if shard not in new]
        self.left = sum(shard.last - shard.first for shard in self.missing)
        for shard in new:
            self._record(shard)
        self.progress(under_way)
        return self.missing

    def progress(self, under_way: float) -> None:
        """Record the progress, with `under_way` rows of missing shards, and look for none: it is asked at every token.

        To look for a thousand shards takes 7 ms.
        """
        self.journal.progress(int(self.total - self.left + under_way), self.total, "rows")

    def _record(self, shard: Shard) -> None:
        tokens, nats = sampled_sums(shard_path(self.folder, "corpus", shard.index))
        self.tokens += tokens
        speed = self.tokens / max(1e-9, time.monotonic() - self.started)
        values = {"tokens": tokens, "mean_logprob": nats / max(1, tokens), "tokens_per_second": speed}
        self.journal.metrics(shard.last, {f"generate/{name}": value for name, value in values.items()})
