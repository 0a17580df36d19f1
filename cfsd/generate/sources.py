"""The sources of a corpus: what the rows of each begin with, or what they are.

A new source is a function here, its entry in SOURCES and its name in `cfsd.generate.spec.Source`.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from cfsd.data.corpus_table import DROPPED
from cfsd.data.records import Said
from cfsd.errors import BadInput
from cfsd.generate.chat_template import chat_turn, template_start
from cfsd.generate.prompt_rows import prompt_rows
from cfsd.generate.replay_rows import replay_rows
from cfsd.generate.sampling import Rows, Turns
from cfsd.generate.shard_job import Shard, ShardJob
from cfsd.generate.spec import ProbeSpec
from cfsd.model.context import context_tokens
from cfsd.model.loading import Tokenization, load_tokenization
from cfsd.spec import seed_of
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import batches

SAID = b"said"  # in the Parquet metadata of the starts
STARTS = pa.schema([("token_ids", pa.list_(pa.int32())), ("learned", pa.list_(pa.bool_()))])


class Start(NamedTuple):
    """What a row begins with, or all of it; `learned[t]` says whether token t of a whole row counts, None: all do."""

    token_ids: list[int]
    learned: list[bool] | None = None


class Asked(NamedTuple):
    """The rows that are asked of a source which has a prompt for each.

    It counts the prompts that it cannot use in `dropped`, by reason, and says what it read in one of several ways.
    """

    job: ShardJob
    base: Tokenization
    part: int  # which of the job's earlier targets, from 1; 0 for other sources
    rows: int
    dropped: Counter[str]
    said: Said

    def path(self, target: Artifact) -> Path:
        """Return the folder of `target`."""
        return Store(self.job.home).path(target)


class SourceRows(NamedTuple):
    """Where the rows of a source come from: one of a function for rows that begin alike and one for a prompt each."""

    alike: Callable[[ShardJob, Tokenization, list[int]], Rows] | None = None  # gets the ids of the rows
    each: Callable[[Asked], Iterator[Start]] | None = None
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
    each, path = source_of(source).each, _starts_path(job, source)
    if each is None:
        return {}
    if not path.exists() or pq.read_metadata(path).num_rows < rows:
        dropped, said = Counter[str](), Said()
        starts = each(Asked(job, tokenization_of(job), int(source.partition(" ")[2] or 0), rows, dropped, said))
        notes = {DROPPED: json.dumps(dropped), SAID: json.dumps(said.sentences())}
        temporary, size = path.with_name(f"{path.name}.partial"), job.machine.sampling_rows
        with pq.ParquetWriter(temporary, STARTS.with_metadata(notes)) as writer:
            while group := list(islice(starts, size)):
                writer.write_table(pa.table([*map(list, zip(*group, strict=True))], schema=STARTS))
        temporary.replace(path)
    known = pq.read_schema(path).metadata or {}
    found = {"dropped_prompts": json.loads(known.get(DROPPED, b"{}")), "said": json.loads(known.get(SAID, b"[]"))}
    return {name: value for name, value in found.items() if value}


def rows_of(job: ShardJob, shard: Shard) -> Rows:
    """Return the rows of `shard`; `write_starts` comes first. Raises BadInput where a source does not fit the base."""
    ids, base, alike = list(range(shard.first, shard.last)), tokenization_of(job), source_of(shard.source).alike
    if alike is not None:
        return alike(job, base, ids)._replace(stream=shard.source)
    group = pq.ParquetFile(_starts_path(job, shard.source)).read_row_group(shard.first // job.machine.sampling_rows)
    starts = (group[name].to_pylist()[: len(ids)] for name in STARTS.names)
    return Rows(ids, next(starts), base.eos_ids, shard.source, learned=next(starts))


def _starts_path(job: ShardJob, source: str) -> Path:
    return job.folder / f".starts-{source}.parquet"


def _context_free(job: ShardJob, base: Tokenization, ids: list[int]) -> Rows:
    # where one token both ends and begins a text (OLMo, GPT-2), it separates texts by itself
    separator = [] if base.start in base.eos_ids else [base.start]
    turns = Turns(job.spec.length, separator) if job.spec.fill else Turns()
    return Rows(ids, [[base.start]] * len(ids), base.eos_ids, turns=turns)


def _template(job: ShardJob, base: Tokenization, ids: list[int]) -> Rows:
    turn = template_start(base.tokenizer)
    prompts = [turn.prefix_ids] * len(ids)
    if turn.end_id is None:
        return Rows(ids, prompts, base.eos_ids)
    of_answer = (*base.eos_ids, turn.end_id if turn.answer_end_id is None else turn.answer_end_id)
    turns = Turns(1, turn.between_ids, of_answer, closing=turn.end_id)
    return Rows(ids, prompts, (*base.eos_ids, turn.end_id), turns=turns)


def check_template_fits(prefix: Sequence[int], base: Artifact, length: int, setting: str) -> None:
    """Raise BadInput where the base does not attend to the template's `prefix` and `length` tokens after it."""
    context = context_tokens(base)
    if len(prefix) + length > context:
        raise BadInput(
            f"the chat template's {len(prefix)} tokens and {setting} {length} do not fit "
            f"the base model; set {setting} to at most {context - len(prefix)}"
        )


def check_template(base: Artifact, length: int, store: Store) -> None:
    """Raise BadInput where no row of `length` tokens can begin with the base's chat template."""
    turn = template_start(_tokenization(store.path(base), base.content).tokenizer)
    check_template_fits(turn.prefix_ids, base, length, "generate.length")


def check_chat(base: Artifact, spec: ProbeSpec, store: Store) -> None:
    """Raise BadInput where the base cannot write both turns of a chat of `spec.length` tokens."""
    turn, _ = chat_turn(_tokenization(store.path(base), base.content).tokenizer)
    check_template_fits(turn.prefix_ids, base, spec.length, "probe.length")


def answer_places(rows: Sequence[Sequence[int]], base: Tokenization) -> list[int]:
    """Return the place of the answer's first token in each row of mode chat, the row's length where there is none.

    The user's turn ends, as for the sampler, with the first sampled token that is an end; then the template closes it,
    where that was another token, and opens the assistant's, and what follows was sampled again.
    """
    turn, end_id = chat_turn(base.tokenizer)
    ends, first = {*base.eos_ids, end_id}, len(turn.prefix_ids)
    turns = Turns(1, turn.between_ids, closing=end_id)
    of_user = [next((t for t in range(first, len(row)) if row[t] in ends), None) for row in rows]
    return [
        len(row) if end is None else min(len(row), end + 1 + len(turns.inserted(row[end])))
        for row, end in zip(rows, of_user, strict=True)
    ]


def _contextual(asked: Asked) -> Iterator[Start]:
    if asked.job.target is None:
        raise BadInput("generate.source contextual needs a target, whose prompts the base goes on from")
    return _after_prompts(asked, asked.job.target)


def _earlier_prompts(asked: Asked) -> Iterator[Start]:
    return _after_prompts(asked, asked.job.earlier[asked.part - 1])


def _after_prompts(asked: Asked, target: Artifact) -> Iterator[Start]:
    job, path = asked.job, asked.path(target)
    return map(Start, contextual_starts(path, asked.rows, seed_of(job.spec), _room(job), asked.dropped))


def _earlier_rows(asked: Asked) -> Iterator[Start]:
    known = list(_training_rows(asked.path(asked.job.earlier[asked.part - 1])))
    order = _seeded(range(len(known)), f"earlier-rows {seed_of(asked.job.spec)}")
    return (known[order[row % len(order)]] for row in range(asked.rows))


def _prompts(asked: Asked) -> Iterator[Start]:
    job = asked.job
    assert job.prompts
    return map(Start, islice(prompt_rows(job.prompts, asked.base, _room(job), asked.dropped, asked.said), asked.rows))


def count_prompts(job: ShardJob) -> int:
    """Return how many of the user's prompts can be answered. Raises BadInput when it is none."""
    assert job.prompts
    return len(prompt_rows(job.prompts, tokenization_of(job), _room(job), Counter(), Said()))


def _replay(asked: Asked) -> Iterator[Start]:
    spec = asked.job.spec
    assert spec.replay
    wanted: Any = {"rows": asked.rows, "length": spec.length, "seed": seed_of(spec)}
    return map(Start, replay_rows(spec.replay, asked.base, said=asked.said, **wanted))


def _room(job: ShardJob) -> int:
    """Return how many tokens the base can attend to beside `spec.length`."""
    return context_tokens(job.base) - job.spec.length


SOURCES = {
    "probe": SourceRows(alike=_context_free),
    "chat": SourceRows(alike=_template),
    "prompts": SourceRows(each=_prompts),
    "context-free": SourceRows(alike=_context_free),
    "template": SourceRows(alike=_template),
    "contextual": SourceRows(each=_contextual),
    "replay": SourceRows(each=_replay, is_sampled=False),
    "earlier-prompts": SourceRows(each=_earlier_prompts),
    "earlier-rows": SourceRows(each=_earlier_rows, is_sampled=False),
}


def source_of(part: str) -> SourceRows:
    """Return the source of a part of a corpus, such as `earlier-rows 2`."""
    return SOURCES[part.partition(" ")[0]]


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
    order = _seeded(fitting, f"contextual {seed}")[:rows]
    wanted = set(order)
    prompts = {place: prompt for place, prompt in enumerate(_target_prompts(target)) if place in wanted}
    return [list(prompts[order[row % len(order)]]) for row in range(rows)]


def _target_prompts(target: Path) -> Iterator[list[int]]:
    for row in _training_rows(target):
        yield row.token_ids[: (row.learned or []).index(True)]


def _training_rows(target: Path) -> Iterator[Start]:
    for batch in batches(target, "train", ["token_ids", "supervised"]):
        yield from map(Start, *batch.to_pydict().values())


def _seeded(places: Sequence[int], seed: str) -> list[int]:
    return random.Random(seed).sample(places, len(places))
