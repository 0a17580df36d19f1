"""The rows of one shard: what they begin with, which engine writes them, and what happens when memory runs out."""

import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import JsonValue

from cfsd.data.corpus_table import DROPPED, HALVED, corpus_table
from cfsd.errors import BadInput, OutOfMemory
from cfsd.generate.jobs import SPAN, Look, Shard, ShardJob
from cfsd.generate.replay_rows import replay_rows
from cfsd.generate.sampling import Turns, sample
from cfsd.generate.server.check import check_server
from cfsd.generate.server.sampler import sample_from_server
from cfsd.generate.starts import contextual_starts, template_start
from cfsd.machine import Connection, Machine
from cfsd.model.likelihood import token_logprobs
from cfsd.model.loading import load_for_measuring, load_tokenizer, read_eos_ids, read_start_token
from cfsd.model.sample import Sample
from cfsd.process.child import is_out_of_memory
from cfsd.spec import seed_of
from cfsd.store.artifact import Store
from cfsd.store.tables import write_shard

STARTS = pa.schema([("token_ids", pa.list_(pa.int32()))])
REMEDY = "lower machine.sampling_rows or generate.length"


class Base(NamedTuple):
    """What of the base model every row needs."""

    folder: Path
    start: int
    eos_ids: tuple[int, ...]
    tokenizer: Any


@cache
def _base(folder: Path, content: str) -> Base:
    return Base(folder, read_start_token(folder), read_eos_ids(folder), load_tokenizer(folder))


def _base_of(job: ShardJob) -> Base:
    return _base(Store(job.home).path(job.base), job.base.content)


def check_engine(job: ShardJob) -> dict[str, JsonValue]:
    """Return what a server that is to sample says of itself, once it has shown that it serves the base's own law.

    Raises BadInput naming what differs.
    """
    if job.machine.engine == "torch" or not job.spec.rows or job.spec.sources() == ["replay"]:
        return {}

    base = _base_of(job)
    model = load_for_measuring(Store(job.home), job.base, job.machine.resolved_device())
    found = check_server(_connection(job.machine), model, base.start, job.spec, base.tokenizer, base.eos_ids)
    return found | ({} if found["ids"] == "exact" else {"approximate": "ids reconstructed"})


def _connection(machine: Machine) -> "Connection":

    return Connection(base_url=machine.base_url or "", model=machine.served_model, in_flight=machine.in_flight)


def write_starts(job: ShardJob, source: str, rows: int) -> dict[str, JsonValue]:
    """Write what the rows of `source` begin with, one Parquet row group per shard, where it is not the same for all.

    Returns how many prompts of the target left no room for a text.
    """
    path = job.folder / f".starts-{source}.parquet"
    if source not in ("contextual", "replay"):
        return {}
    if not path.exists() or pq.read_metadata(path).num_rows < rows:
        dropped = Counter[str]()
        starts = _starts(job, source, rows, dropped)
        temporary, size = path.with_name(f"{path.name}.partial"), job.machine.sampling_rows
        with pq.ParquetWriter(temporary, STARTS.with_metadata({DROPPED: json.dumps(dropped)})) as writer:
            while group := list(islice(starts, size)):
                writer.write_table(pa.table([group], schema=STARTS))
        temporary.replace(path)
    found = json.loads((pq.read_schema(path).metadata or {}).get(DROPPED, b"{}"))
    return {"dropped_prompts": found} if found else {}


def _starts(job: ShardJob, source: str, rows: int, dropped: Counter[str]) -> Iterator[list[int]]:
    base, spec = _base_of(job), job.spec
    if source == "replay":
        assert spec.replay
        return replay_rows(
            spec.replay, base.tokenizer, base.start, base.eos_ids, rows=rows, length=spec.length, seed=seed_of(spec)
        )

    if job.target is None:
        raise BadInput("generate.source contextual needs a target, whose prompts the base goes on from")
    target = Store(job.home).path(job.target)
    return iter(contextual_starts(target, rows, seed_of(spec), _room(job), dropped))


def _room(job: ShardJob) -> int:
    """Return how many tokens the base can attend to beside `spec.length`."""
    context = job.base.metadata.get("context")
    return context - job.spec.length if isinstance(context, int) else 1 << 30


def sample_shard(job: ShardJob, shard: Shard, look: Look = lambda under_way: None) -> None:
    """Write one shard. Raises NotFinite naming it, OutOfMemory, BadInput, or ConnectionError for a dead server."""
    base, notes = _base_of(job), {SPAN: shard.span()}
    rows = _rows_of(job, base, shard)
    samples: Sequence[Sample | str]
    if shard.source == "replay" or job.machine.engine == "torch":
        job.machine.settle(job.machine.resolved_processes())
        samples, parts = _within_memory(job, shard, rows, look)
        notes |= {HALVED: str(parts).encode()} if parts > 1 else {}
    else:
        samples = _from_server(job, base, shard, rows, look)
    kept = [(row, s) for row, s in zip(rows.ids, samples, strict=True) if isinstance(s, Sample)]
    if dropped := Counter(s for s in samples if isinstance(s, str)):
        notes[DROPPED] = json.dumps(dropped).encode()
    vocabulary: Any = job.base.metadata.get("vocabulary", 1 << 31)
    table = corpus_table(
        [s for _, s in kept], [row for row, _ in kept], source=shard.source, shard=shard.index, seed=seed_of(job.spec),
        tokenizer=base.tokenizer, top_logprobs=job.spec.top_logprobs, vocabulary=vocabulary,
    )  # fmt: skip
    write_shard(job.folder, "corpus", shard.index, table.replace_schema_metadata(notes))


class Rows(NamedTuple):
    """Rows to be written: what each begins with, what ends a text and what follows an end."""

    ids: list[int]
    prompts: list[list[int]]
    eos_ids: tuple[int, ...]
    turns: Turns

    def part(self, first: int, last: int) -> "Rows":
        """Return some of them."""
        return self._replace(ids=self.ids[first:last], prompts=self.prompts[first:last])


def _rows_of(job: ShardJob, base: Base, shard: Shard) -> Rows:
    ids = list(range(shard.first, shard.last))
    if shard.source in ("contextual", "replay"):
        starts = pq.ParquetFile(job.folder / f".starts-{shard.source}.parquet")
        group = starts.read_row_group(shard.first // job.machine.sampling_rows)
        return Rows(ids, group["token_ids"].to_pylist()[: len(ids)], base.eos_ids, Turns())
    if shard.source == "template":
        turn = template_start(base.tokenizer)
        if len(turn.prefix_ids) > _room(job):
            raise BadInput(
                f"the chat template's {len(turn.prefix_ids)} tokens and generate.length {job.spec.length} do not fit "
                f"the base model; set generate.length to at most {job.spec.length + _room(job) - len(turn.prefix_ids)}"
            )
        if turn.end_id is None:
            return Rows(ids, [turn.prefix_ids] * len(ids), base.eos_ids, Turns())
        return Rows(ids, [turn.prefix_ids] * len(ids), (*base.eos_ids, turn.end_id), Turns(1, turn.between_ids))
    # where one token both ends and begins a text (OLMo, GPT-2), it parts texts by itself
    parting = [] if base.start in base.eos_ids else [base.start]
    turns = Turns(job.spec.length, parting) if job.spec.fill else Turns()
    return Rows(ids, [[base.start]] * len(ids), base.eos_ids, turns)


def _within_memory(job: ShardJob, shard: Shard, rows: Rows, look: Look) -> tuple[list[Sample], int]:
    """Return the rows and in how many parts they were sampled: halves of halves until they fit in memory."""
    count = len(rows.ids)
    try:
        return _with_torch(job, shard, rows, look), 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if count == 1:
            raise OutOfMemory(f"out of memory with one row of shard {shard.index} ({error}); {REMEDY}") from error
    gc.collect()  # outside the handler, whose traceback holds the cache that did not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"out of memory: shard {shard.index} goes on with {count // 2} rows at a time", flush=True)
    first, a = _within_memory(job, shard, rows.part(0, count // 2), look)
    second, b = _within_memory(job, shard, rows.part(count // 2, count), look)
    return first + second, a + b


def _with_torch(job: ShardJob, shard: Shard, rows: Rows, look: Look) -> list[Sample]:
    model = load_for_measuring(Store(job.home), job.base, job.machine.resolved_device())
    where = f"shard {shard.index}"
    if shard.source == "replay":
        return token_logprobs(model, rows.prompts, rows.eos_ids, top_logprobs=job.spec.top_logprobs, where=where)
    lengths = [len(prompt) for prompt in rows.prompts]
    steps = max(lengths) - min(lengths) + job.spec.length

    def on_step(step: int) -> None:
        look(len(rows.ids) * step / steps)

    return sample(
        model, rows.prompts, rows.eos_ids, job.spec, rows.ids, stream=shard.source, turns=rows.turns, where=where,
        on_step=on_step,
    )  # fmt: skip


def _from_server(job: ShardJob, base: Base, shard: Shard, rows: Rows, look: Look) -> Sequence[Sample | str]:

    def on_done(done: int) -> None:
        look(done)

    return sample_from_server(
        _connection(job.machine), rows.prompts, job.spec, rows.ids, stream=shard.source, eos_ids=rows.eos_ids,
        tokenizer=base.tokenizer, on_done=on_done,
    )  # fmt: skip
