"""One shard: its rows go through the engine, in smaller parts where memory runs out, and become a table."""

import gc
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import JsonValue

from cfsd.data.corpus_table import DROPPED, HALVED, corpus_table
from cfsd.errors import OutOfMemory
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.server.check import check_server
from cfsd.generate.server.protocol import ServerSampling
from cfsd.generate.server.sampler import sample_from_server
from cfsd.generate.shard_job import SPAN, Look, Shard, ShardJob
from cfsd.generate.sources import SOURCES, rows_of, source_of, tokenization_of
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.token_choice import tail_points
from cfsd.generate.trial import check_sampling, slower_path
from cfsd.model.likelihood import token_logprobs
from cfsd.model.loading import load_for_measuring
from cfsd.model.sample import Sample
from cfsd.process.child import is_out_of_memory
from cfsd.spec import seed_of
from cfsd.store.artifact import Store
from cfsd.store.tables import corpus_schema, write_shard

SCORED_HERE = (
    "a server gives no samples of the tail: its rows pass once through the base here, which gives what is stored of "
    "the base's distributions (generate.tail_samples 0: as the server lists them)"
)
REMEDY = "lower machine.sampling_rows or generate.length"


def check_engine(job: ShardJob) -> dict[str, JsonValue]:
    """Check that the server, if one is to sample, does so from the base's own distribution, and describe it.

    Returns the metadata of the check; of engine torch only whether it takes a slower path. Raises BadInput naming what
    differs.
    """
    is_needed = job.spec.rows and any(SOURCES[source].is_sampled for source in job.spec.sources())
    if not is_needed:
        return {}
    if job.machine.engine == "torch":
        slower = slower_path(Store(job.home).path(job.base))
        return {"said": [slower]} if slower else {}
    base = tokenization_of(job)
    model = load_for_measuring(Store(job.home), job.base, job.machine.resolved_device())
    wanted = ServerSampling(job.machine, _listed(job.spec), base.eos_ids, base.tokenizer)
    metadata = check_server(wanted, model, base.start)
    return metadata | ({"said": [SCORED_HERE]} if job.spec.stored_tail() else {})


def _listed(spec: GenerateSpec) -> GenerateSpec:
    """Return what a server is asked for: it lists the likeliest tokens only where no samples of the others are."""
    return spec.model_copy(update={"top_logprobs": 0}) if spec.stored_tail() else spec


def sample_shard(job: ShardJob, shard: Shard, look: Look = lambda under_way: None) -> None:
    """Write one shard. Raises NotFinite naming it, OutOfMemory, BadInput, or ServerGone."""
    rows, notes, tokenizer = rows_of(job, shard), {SPAN: shard.span()}, tokenization_of(job).tokenizer
    samples: Sequence[Sample | str]
    if job.machine.engine == "torch" or not source_of(shard.source).is_sampled:
        job.machine.settle(job.machine.resolved_processes())
        samples, parts = _within_memory(job, shard, rows, look)
        notes |= {HALVED: str(parts).encode()} if parts > 1 else {}
    else:
        wanted = ServerSampling(job.machine, _listed(job.spec), rows.eos_ids, tokenizer, rows.stream, rows.turns)
        samples = sample_from_server(wanted, rows.prompts, rows.ids, on_done=look)
        if job.spec.stored_tail():
            samples = _with_distributions(job, shard, rows, samples)
    usable = {row: s for row, s in zip(rows.ids, samples, strict=True) if isinstance(s, Sample)}
    if dropped := Counter(s for s in samples if isinstance(s, str)):
        notes[DROPPED] = json.dumps(dropped).encode()
    vocabulary: Any = job.base.metadata.get("vocabulary", 1 << 31)
    schema = corpus_schema(job.spec.top_logprobs, vocabulary, job.spec.stored_tail())
    same = {"shard": shard.index, "seed": seed_of(job.spec)}
    table = corpus_table(usable, tokenizer, schema, source=shard.source, **same)
    write_shard(job.folder, "corpus", shard.index, table.replace_schema_metadata(notes))


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
    where = f"shard {shard.index}"
    if not source_of(shard.source).is_sampled:
        scored = _scored(job, rows, dict(zip(rows.ids, rows.prompts, strict=True)), where)
        return [sample.only(learned) for sample, learned in zip(scored, rows.learned, strict=True)]
    model = load_for_measuring(Store(job.home), job.base, job.machine.resolved_device())
    check_sampling(model)
    lengths = [len(prompt) for prompt in rows.prompts]
    steps = max(lengths) - min(lengths) + job.spec.length
    return sample(model, rows, job.spec, where=where, on_step=lambda step: look(len(rows.ids) * step / steps))


def _scored(job: ShardJob, rows: Rows, texts: Mapping[int, Sequence[int]], where: str) -> list[Sample]:
    """Return the texts of some of `rows`, by row id, as the base scores them."""
    model = load_for_measuring(Store(job.home), job.base, job.machine.resolved_device())
    points = [
        tail_points(seed_of(job.spec), rows.stream, row, len(text), job.spec.stored_tail())
        for row, text in texts.items()
    ]
    top = job.spec.top_logprobs
    return token_logprobs(model, list(texts.values()), rows.eos_ids, top_logprobs=top, tail_points=points, where=where)


def _with_distributions(job: ShardJob, shard: Shard, rows: Rows, samples: Sequence[Sample | str]) -> list[Sample | str]:
    """Return the rows of a server with what the base here gives at each sampled token."""
    texts = {row: s.token_ids for row, s in zip(rows.ids, samples, strict=True) if isinstance(s, Sample)}
    scored = iter(_scored(job, rows, texts, f"shard {shard.index}"))
    return [
        s if isinstance(s, str) else s._replace(top=next(scored).only([p is not None for p in s.logprobs]).top)
        for s in samples
    ]
