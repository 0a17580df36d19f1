"""Is the corpus what it claims to be: a sample of the base's own distribution after the start token alone?

Four checks of the rows of source context-free, each made for one kind of fault: first tokens that the base would not
write (another model), text that is too likely (temperature), rare tokens that are missing (top_k), and anything but
one start token before the text (a chat template, a doubled start token), in the corpus or in the mixture made of it.
R rows, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy import stats
from transformers import PreTrainedModel

from cfsd.data.ngrams import spread
from cfsd.errors import CfsdError
from cfsd.machine import Machine
from cfsd.model.loading import load_for_measuring, read_start_token
from cfsd.statistics.sample_tests import difference_z, first_token_p, per_row
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.digests import write_json
from cfsd.store.tables import batches, shards

SIGMAS = 4.0
LEVEL = float(2 * stats.norm.sf(SIGMAS))  # of every check: one false alarm in 16,000
MAX_ROWS = 20_000  # that are examined; with more, the rounding of bfloat16 would show as a fault
SOURCE = "context-free"
RARE = 0.02  # the least likely share of the probe's tokens: a cut tail has none of them
FIRST, LIKELIHOOD, TAIL, START = "first tokens", "mean log-probability", "rare tokens", "start token"
Array = NDArray[Any]


class WrongCorpus(CfsdError):
    """A corpus that claims to be an exact sample of the base is not one."""


class Checked(NamedTuple):
    """The figures of the checks; `failed` maps the name of a check to what is wrong, in words."""

    rows: int
    first_token_p: float | None
    mean_logprob_z: float | None
    rare_token_z: float | None
    failed: dict[str, str]


class Beginnings(NamedTuple):
    """How rows begin: the token after the first of each, and how many begin wrongly, by what is wrong."""

    rows: int
    first_R: Array
    wrong: dict[str, int]


def check(base: Artifact, probe: Artifact, corpus: Artifact, mixture: Artifact, draft: Draft, machine: Machine) -> None:
    """Check the corpus and the mixture made of it, and write the figures as metadata.

    Raises WrongCorpus where a corpus fails that was sampled here with settings that leave the base's distribution
    as it is. One whose metadata name a bias, or that a server with rounded weights wrote, is only described.
    """
    store = draft.store
    start = read_start_token(store.path(base))
    probs_V = first_distribution(load_for_measuring(store, base, machine.resolved_device()), start)
    filled = "fill" in str(corpus.metadata.get("biased"))
    checked = check_corpus(store.path(corpus), store.path(probe), store.path(mixture), probs_V, start, filled=filled)
    if claims_exact(corpus.metadata) and checked.failed:
        listed = "; ".join(f"{name}: {fault}" for name, fault in checked.failed.items())
        raise WrongCorpus(
            "the rehearsal corpus is not a sample of the base model's own distribution, and no setting of the recipe "
            f"says why. {listed}. Trained on, it would hold the model to another distribution. Sample another with "
            "generate.seed; if that fails too, the sampler, the tokenizer or the base's weights have changed"
        )
    figures = {name: value for name, value in checked._asdict().items() if name not in ("rows", "failed")}
    draft.journal.metrics(0, {f"check/{name}": value for name, value in figures.items() if value is not None})
    write_json(draft.folder / "check.json", checked._asdict())
    draft.metadata |= checked._asdict()


def claims_exact(metadata: Mapping[str, Any]) -> bool:
    """Return whether our own sampler made the corpus, with settings that leave the base's distribution as it is."""
    return metadata.get("biased") == "" and not metadata.get("approximate") and "ids" not in metadata


def first_distribution(model: PreTrainedModel, start: int) -> Array:
    """Return the probability of each token after the start token, over the vocabulary."""
    with torch.inference_mode():
        logits: Any = model(torch.tensor([[start]], device=model.device), use_cache=False).logits
        probs_V: Array = logits[0, -1].double().softmax(-1).cpu().numpy()
    return probs_V


def warnings_of(metadata: Mapping[str, Any]) -> list[str]:
    """Return what the metadata of a check hold against the corpus, for readers of a report."""
    return [f"suspect by its {name}: {fault}" for name, fault in metadata.get("failed", {}).items()]


def check_corpus(
    corpus: Path, probe: Path, mixture: Path, probs_V: Array, start: int, *, filled: bool = False
) -> Checked:
    """Return the figures and faults of the tables in these folders.

    `probs_V`: the base's distribution after the start token. `filled`: generate.fill put separators into the rows.
    """
    sampled = beginnings(corpus, "corpus", start, filled=filled)
    if not sampled.rows:
        return Checked(0, None, None, None, {})
    p, z, rare_z = first_token_p(sampled.first_R, probs_V), *likelihood_z(corpus, probe)
    failed = {}
    if p < LEVEL:
        failed[FIRST] = f"not by the base's distribution (chi-square over {sampled.rows:,} rows: p = {p:.1e})"
    if z is not None and abs(z) >= SIGMAS:
        failed[LIKELIHOOD] = f"{abs(z):.1f} standard errors {'above' if z > 0 else 'below'} the probe's"
    if rare_z is not None and abs(rare_z) >= SIGMAS:
        failed[TAIL] = f"{abs(rare_z):.1f} standard errors {'more' if rare_z > 0 else 'fewer'} than in the probe"
    mixed = beginnings(mixture, "mixture", start, filled=filled)
    faults = _start_faults(sampled, probs_V, start)
    faults += [f"{fault} in the mixture" for fault in _start_faults(mixed, probs_V, start)]
    if changed := changed_rows(mixture, corpus):
        faults.append(f"{changed:,} rows of the mixture are not as they were sampled")
    if faults:
        failed[START] = "; ".join(faults)
    return Checked(sampled.rows, p, z, rare_z, failed)


def beginnings(folder: Path, name: str, start: int, *, filled: bool) -> Beginnings:
    """Return how the context-free rows of a corpus or mixture table begin."""
    mask = "logprobs" if name == "corpus" else "supervised"
    firsts: list[Array] = [np.zeros(0, np.int64)]
    lacking = prompted = rows = 0
    for batch in _context_free(folder, name, ["token_ids", mask]):
        token_T, length_R = batch["token_ids"].flatten().to_numpy(), _lengths(batch["token_ids"])
        begin_R = np.cumsum(length_R) - length_R
        flat = batch[mask].flatten()
        own_T = flat.is_valid() if name == "corpus" else flat
        prompt_R = length_R - per_row(own_T.to_numpy(zero_copy_only=False).astype(np.int64), length_R)
        lacking += int((token_T[begin_R] != start).sum())
        prompted += 0 if filled else int((prompt_R != 1).sum())
        firsts.append(token_T[begin_R[length_R > 1] + 1])
        rows += batch.num_rows
    wrong = {"do not begin with it": lacking, "have other prompt tokens than it": prompted}
    return Beginnings(rows, np.concatenate(firsts), {fault: count for fault, count in wrong.items() if count})


def _start_faults(begun: Beginnings, probs_V: Array, start: int) -> list[str]:
    faults = [f"{count:,} of {begun.rows:,} rows {fault}" for fault, count in begun.wrong.items()]
    twice = int((begun.first_R == start).sum())
    if twice and stats.binom.sf(twice - 1, len(begun.first_R), probs_V[start] / probs_V.sum()) < LEVEL:
        faults.append(f"{twice:,} of {begun.rows:,} rows have it twice")
    return faults


def changed_rows(mixture: Path, corpus: Path) -> int:
    """Return how many context-free rows of the mixture are not rows of the corpus, token for token."""
    mixed: dict[int, list[int]] = {}
    for batch in _context_free(mixture, "mixture", ["row_id", "token_ids"]):
        mixed |= dict(zip(batch["row_id"].to_pylist(), batch["token_ids"].to_pylist(), strict=True))
    row_ids = pa.array(list(mixed), pa.int64())
    same = 0
    for batch in _context_free(corpus, "corpus", ["row_id", "token_ids"], max_rows=None):
        rows = batch.filter(pc.is_in(batch["row_id"], row_ids))
        pairs = zip(rows["row_id"].to_pylist(), rows["token_ids"].to_pylist(), strict=True)
        same += sum(mixed[row_id] == token_ids for row_id, token_ids in pairs)
    return len(mixed) - same


def likelihood_z(corpus: Path, probe: Path) -> tuple[float | None, float | None]:
    """Return how many standard errors the corpus is above the probe: mean log-probability, share of rare tokens.

    Both over the positions that both tables have, since the mean changes along a row. Rare are the tokens as unlikely
    as the least likely RARE of the probe's. A cut tail hardly changes the mean, but this share.
    """
    tables = [(corpus, SOURCE), (probe, "probe")]
    length = min(_longest(folder, source) for folder, source in tables)
    sampled, probed = (_tokens(folder, source, length) for folder, source in tables)
    if not len(sampled[0]) or not len(probed[0]):
        return None, None
    edge = np.quantile(probed[0], RARE)
    means, shares = (
        difference_z(*((per_row(value(nats_T), count_R), count_R) for nats_T, count_R in (sampled, probed)))
        for value in (np.asarray, lambda nats_T: (nats_T <= edge).astype(np.int64))
    )
    return means, shares


def _longest(folder: Path, source: str) -> int:
    parts = _context_free(folder, "corpus", ["logprobs"], source)
    return max((int(_lengths(batch["logprobs"]).max(initial=0)) for batch in parts), default=0)


def _tokens(folder: Path, source: str, length: int) -> tuple[Array, Array]:
    """Return the log-probabilities of the sampled tokens among each row's first `length`, and how many a row has."""
    nats, counts = [np.zeros(0)], [np.zeros(0, np.int64)]
    for batch in _context_free(folder, "corpus", ["logprobs"], source):
        flat, length_R = batch["logprobs"].flatten(), _lengths(batch["logprobs"])
        place_T = np.arange(len(flat)) - np.repeat(np.cumsum(length_R) - length_R, length_R)
        own_T = flat.is_valid().to_numpy(zero_copy_only=False) & (place_T < length)
        nats.append(flat.to_numpy(zero_copy_only=False)[own_T].astype(np.float64))
        counts.append(per_row(own_T.astype(np.int64), length_R))
    return np.concatenate(nats), np.concatenate(counts)


def _lengths(lists: pa.ListArray) -> Array:
    lengths: Array = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return lengths


def _context_free(
    folder: Path, name: str, columns: list[str], source: str = SOURCE, max_rows: int | None = MAX_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `source`; of a large table rows spread evenly over it."""
    total = sum(pq.read_metadata(path).num_rows for path in shards(folder, name))
    first = 0
    for batch in batches(folder, name, ["source", *columns]):
        is_examined = spread(first, batch.num_rows, 1.0 if max_rows is None else max_rows / max(1, total))
        first += batch.num_rows
        yield batch.filter(pc.and_(pc.equal(batch["source"], source), pa.array(is_examined)))
