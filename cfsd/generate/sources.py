"""The sources of a corpus: what the rows of each begin with, or what they are.

A new source is a function here, its entry in SOURCES and its name in `cfsd.generate.spec.Source`.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from cfsd.data.corpus_table import DROPPED
from cfsd.data.records import Said
from cfsd.errors import BadInput
from cfsd.generate.chat_template import template_start
from cfsd.generate.prompt_rows import prompt_rows
from cfsd.generate.replay_rows import replay_rows
from cfsd.generate.sampling import Rows, Turns
from cfsd.generate.shard_job import Shard, ShardJob
from cfsd.model.loading import Tokenization, load_tokenization
from cfsd.spec import seed_of
from cfsd.store.artifact import Store
from cfsd.store.tables import batches

SAID = b"said"  # in the Parquet metadata of the starts
STARTS = pa.schema([("token_ids", pa.list_(pa.int32()))])


class SourceRows(NamedTuple):
    """Where the rows of a source come from: one of a function for rows that begin alike and one for a prompt each.

    The latter counts the prompts that it cannot use, by reason, and says what it read in one of several ways.
    """

    alike: Callable[[ShardJob, Tokenization, list[int]], Rows] | None = None  # gets the ids of the rows
    each: Callable[[ShardJob, Tokenization, int, Counter[str], Said], Iterator[list[int]]] | None = None  # and number
    is_sampled: bool = True  # False: `each` gives whole rows, which the base only scores


@cache
def _tokenization(folder: Path, content: str) -> Tokenization:
    return load_tokenization(folder)


def tokenization_of(job: ShardJob) -> Tokenization:
    """Return the tokenizer of the job's base, and the tokens that begin and end its texts."""
    return _tokenization(Store(job.home).path(job.base), job.base.content)


def write_starts(job: ShardJob, source: str, rows: int) -> dict[str, JsonValue]:
    """Write the tokens of each row of `source`, one Parquet row group per shard, where rows do not begin alike.

    Returns how many prompts left no room for a text, and what is to be said of documents.
    """
    each, path = SOURCES[source].each, _starts_path(job, source)
    if each is None:
        return {}
    if not path.exists() or pq.read_metadata(path).num_rows < rows:
        dropped, said = Counter[str](), Said()
        starts = each(job, tokenization_of(job), rows, dropped, said)
        notes = {DROPPED: json.dumps(dropped), SAID: json.dumps(said.sentences())}
        temporary, size = path.with_name(f"{path.name}.partial"), job.machine.sampling_rows
        with pq.ParquetWriter(temporary, STARTS.with_metadata(notes)) as writer:
            while group := list(islice(starts, size)):
                writer.write_table(pa.table([group], schema=STARTS))
        temporary.replace(path)
    known = pq.read_schema(path).metadata or {}
    found = {"dropped_prompts": json.loads(known.get(DROPPED, b"{}")), "said": json.loads(known.get(SAID, b"[]"))}
    return {name: value for name, value in found.items() if value}


def rows_of(job: ShardJob, shard: Shard) -> Rows:
    """Return the rows of `shard`; `write_starts` comes first. Raises BadInput where a source does not fit the base."""
    ids, base, alike = list(range(shard.first, shard.last)), tokenization_of(job), SOURCES[shard.source].alike
    if alike is not None:
        return alike(job, base, ids)._replace(stream=shard.source)
    group = pq.ParquetFile(_starts_path(job, shard.source)).read_row_group(shard.first // job.machine.sampling_rows)
    return Rows(ids, group["token_ids"].to_pylist()[: len(ids)], base.eos_ids, shard.source)


def _starts_path(job: ShardJob, source: str) -> Path:
    return job.folder / f".starts-{source}.parquet"


def _context_free(job: ShardJob, base: Tokenization, ids: list[int]) -> Rows:
    # where one token both ends and begins a text (OLMo, GPT-2), it separates texts by itself
    separator = [] if base.start in base.eos_ids else [base.start]
    turns = Turns(job.spec.length, separator) if job.spec.fill else Turns()
    return Rows(ids, [[base.start]] * len(ids), base.eos_ids, turns=turns)


def _template(job: ShardJob, base: Tokenization, ids: list[int]) -> Rows:
    turn, room = template_start(base.tokenizer), _room(job)
    if len(turn.prefix_ids) > room:
        raise BadInput(
            f"the chat template's {len(turn.prefix_ids)} tokens and generate.length {job.spec.length} do not fit "
            f"the base model; set generate.length to at most {job.spec.length + room - len(turn.prefix_ids)}"
        )
    prompts = [turn.prefix_ids] * len(ids)
    if turn.end_id is None:
        return Rows(ids, prompts, base.eos_ids)
    return Rows(ids, prompts, (*base.eos_ids, turn.end_id), turns=Turns(1, turn.between_ids))


def _contextual(job: ShardJob, base: Tokenization, rows: int, dropped: Counter[str], said: Said) -> Iterator[list[int]]:
    if job.target is None:
        raise BadInput("generate.source contextual needs a target, whose prompts the base goes on from")
    return iter(contextual_starts(Store(job.home).path(job.target), rows, seed_of(job.spec), _room(job), dropped))


def _prompts(job: ShardJob, base: Tokenization, rows: int, dropped: Counter[str], said: Said) -> Iterator[list[int]]:
    assert job.prompts
    return islice(prompt_rows(job.prompts, base, _room(job), dropped, said), rows)


def count_prompts(job: ShardJob) -> int:
    """Return how many of the user's prompts can be answered. Raises BadInput when it is none."""
    assert job.prompts
    return len(prompt_rows(job.prompts, tokenization_of(job), _room(job), Counter(), Said()))


def _replay(job: ShardJob, base: Tokenization, rows: int, dropped: Counter[str], said: Said) -> Iterator[list[int]]:
    assert job.spec.replay
    return replay_rows(job.spec.replay, base, rows=rows, length=job.spec.length, seed=seed_of(job.spec), said=said)


def _room(job: ShardJob) -> int:
    """Return how many tokens the base can attend to beside `spec.length`."""
    context = job.base.metadata.get("context")
    return context - job.spec.length if isinstance(context, int) else 1 << 30


SOURCES = {
    "probe": SourceRows(alike=_context_free),
    "prompts": SourceRows(each=_prompts),
    "context-free": SourceRows(alike=_context_free),
    "template": SourceRows(alike=_template),
    "contextual": SourceRows(each=_contextual),
    "replay": SourceRows(each=_replay, is_sampled=False),
}


def contextual_starts(
    target: Path, rows: int, seed: int, max_tokens: int, dropped: Counter[str] | None = None
) -> list[list[int]]:
    """Return `rows` prompts of the target's training rows, all tokens before the first supervised one.

    They come in one seeded order, again and again; more rows begin with the same ones. Prompts of more than
    `max_tokens` are left out and counted in `dropped`. Raises BadInput when none is left.
    """
    lengths = np.array([len(prompt) for prompt in _target_prompts(target)], dtype=np.int64)
    fitting = np.flatnonzero(lengths <= max_tokens).tolist()
    if dropped is not None and len(fitting) < len(lengths):
        dropped[f"longer than {max_tokens} tokens"] += len(lengths) - len(fitting)
    if not fitting:
        shortest = f"the shortest has {lengths.min()} tokens" if len(lengths) else "there are none to train on"
        raise BadInput(
            f"no prompt of the target leaves room for generate.length: at most {max_tokens} tokens fit, but "
            f"{shortest}; set a smaller generate.length, or another generate.source"
        )
    order = random.Random(f"contextual {seed}").sample(fitting, len(fitting))[:rows]
    wanted = set(order)
    prompts = {place: prompt for place, prompt in enumerate(_target_prompts(target)) if place in wanted}
    return [list(prompts[order[row % len(order)]]) for row in range(rows)]


def _target_prompts(target: Path) -> Iterator[list[int]]:
    for batch in batches(target, "train", ["token_ids", "supervised"]):
        for token_ids, supervised in zip(*batch.to_pydict().values(), strict=True):
            yield token_ids[: supervised.index(True)]
