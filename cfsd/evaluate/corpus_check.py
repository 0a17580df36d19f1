"""Is the corpus what it claims to be: text of the base's own law, written from the start token alone?

Checks of the rows of source context-free, each with faults in mind: first tokens that the base's law does not give
(another model), text that is too likely (temperature), rare tokens that are missing (top_k), anything in front of the
text but one start token (a chat template, a doubled start token), in the corpus or in what mixing made of it.
R rows, T tokens.
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
from pydantic import JsonValue
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
MAX_ROWS = 20_000  # that are looked at; more would find how bfloat16 rounds, not faults
SOURCE = "context-free"
RARE = 0.02  # of the probe's tokens, the least likely ones: a cut tail has none of them
FIRST, LIKELIHOOD, TAIL, START = "first tokens", "mean log-probability", "rare tokens", "start token"
Array = NDArray[Any]


class WrongCorpus(CfsdError):
    """A corpus that claims to be an exact sample of the base is not one."""


class Found(NamedTuple):
    """What the checks came to; `failed` maps a check's name to what is wrong, in words."""

    rows: int
    first_token_p: float | None
    mean_logprob_z: float | None
    rare_token_z: float | None
    failed: dict[str, str]

    def metadata(self) -> dict[str, JsonValue]:
        """Return the facts of the artifact."""
        return {"rows": self.rows, **self.numbers(), "failed": dict(self.failed)}

    def numbers(self) -> dict[str, float | None]:
        """Return the figures by name."""
        names = ("first_token_p", "mean_logprob_z", "rare_token_z")
        return {name: getattr(self, name) for name in names}


class Beginnings(NamedTuple):
    """How rows begin: the token after the first of each, and how many are not as they must be, by what is wrong."""

    rows: int
    first_R: Array
    wrong: dict[str, int]


def check(base: Artifact, probe: Artifact, corpus: Artifact, mixture: Artifact, draft: Draft, machine: Machine) -> None:
    """Check the corpus and what mixing made of it, with what was found as facts.

    Raises WrongCorpus where a corpus that was sampled here, by settings that claim the base's own law, fails. One
    that says itself in what it is biased, or that a server with rounded weights wrote, is only described.
    """
    store = draft.store
    start = read_start_token(store.path(base))
    model = load_for_measuring(store, base, machine.resolved_device())
    filled = "fill" in str(corpus.metadata.get("biased"))
    folders = [store.path(artifact) for artifact in (corpus, probe, mixture)]
    found = check_corpus(folders[0], folders[1], folders[2], first_distribution(model, start), start, filled=filled)
    if claims_exact(corpus.metadata):
        judge_claim(found)
    numbers = found.numbers().items()
    draft.journal.metrics(0, {f"check/{name}": value for name, value in numbers if value is not None})
    write_json(draft.folder / "check.json", found.metadata())
    draft.metadata |= found.metadata()


def claims_exact(metadata: Mapping[str, Any]) -> bool:
    """Say whether a corpus was sampled by this program's own sampler with settings that bend nothing."""
    return metadata.get("biased") == "" and not metadata.get("approximate") and "ids" not in metadata


def first_distribution(model: "PreTrainedModel", start: int) -> Array:
    """Return the law of the token after the start token, over the vocabulary."""
    with torch.inference_mode():
        logits: Any = model(torch.tensor([[start]], device=model.device), use_cache=False).logits
        probs_V: Array = logits[0, -1].double().softmax(-1).cpu().numpy()
    return probs_V


def warnings_of(metadata: Mapping[str, Any]) -> list[str]:
    """Return what the facts of a check have against the corpus, for readers of a report."""
    return [f"suspect by its {name}: {what}" for name, what in metadata.get("failed", {}).items()]


def check_corpus(
    corpus: Path, probe: Path, mixture: Path, probs_V: Array, start: int, *, filled: bool = False
) -> Found:
    """Return what the checks of the tables in these folders say.

    `probs_V` is the base's law of the token after the start token. `filled`: generate.fill gave the rows separators.
    """
    sampled = beginnings(corpus, "corpus", start, filled=filled)
    if not sampled.rows:
        return Found(0, None, None, None, {})
    p, z, rare_z = first_token_p(sampled.first_R, probs_V), *likelihood_z(corpus, probe)
    failed = {}
    if p < LEVEL:
        failed[FIRST] = f"not by the base's law (chi-square over {sampled.rows:,} rows: p = {p:.1e})"
    if z is not None and abs(z) >= SIGMAS:
        failed[LIKELIHOOD] = f"{abs(z):.1f} standard errors {'above' if z > 0 else 'below'} the probe's"
    if rare_z is not None and abs(rare_z) >= SIGMAS:
        failed[TAIL] = f"{abs(rare_z):.1f} standard errors {'more' if rare_z > 0 else 'fewer'} than in the probe"
    mixed = beginnings(mixture, "mixture", start, filled=filled)
    faults = [
        *_start_faults(sampled, probs_V, start),
        *(f"{f} in the mixture" for f in _start_faults(mixed, probs_V, start)),
    ]
    if changed := changed_rows(mixture, corpus):
        faults.append(f"{changed:,} rows of the mixture are not as they were sampled")
    if faults:
        failed[START] = "; ".join(faults)
    return Found(sampled.rows, p, z, rare_z, failed)


def judge_claim(found: Found) -> None:
    """Raise WrongCorpus if a check failed: for corpora that claim to be exact."""
    if found.failed:
        listed = "; ".join(f"{name}: {what}" for name, what in found.failed.items())
        raise WrongCorpus(
            "the rehearsal corpus is not a sample of the base model's own law, and no setting of the recipe says why. "
            f"{listed}. Trained on, it would hold the model to another law. Sample another with generate.seed; if "
            "that fails too, the sampler, the tokenizer or the base's weights changed on the way"
        )


def beginnings(folder: Path, name: str, start: int, *, filled: bool) -> Beginnings:
    """Return how the context-free rows of a corpus or mixture table begin."""
    mask = "logprobs" if name == "corpus" else "supervised"
    firsts: list[Array] = [np.zeros(0, np.int64)]
    wrong = {"do not begin with it": 0, "have more given than it": 0}
    rows = 0
    for batch in _context_free(folder, name, ["token_ids", mask]):
        token_T, length_R = batch["token_ids"].flatten().to_numpy(), _lengths(batch["token_ids"])
        begin_R = np.cumsum(length_R) - length_R
        flat = batch[mask].flatten()
        own_T = flat.is_valid() if name == "corpus" else flat
        given_R = length_R - per_row(own_T.to_numpy(zero_copy_only=False).astype(np.int64), length_R)
        wrong["do not begin with it"] += int((token_T[begin_R] != start).sum())
        wrong["have more given than it"] += 0 if filled else int((given_R != 1).sum())
        firsts.append(token_T[begin_R[length_R > 1] + 1])
        rows += batch.num_rows
    return Beginnings(rows, np.concatenate(firsts), {what: count for what, count in wrong.items() if count})


def _start_faults(found: Beginnings, probs_V: Array, start: int) -> list[str]:
    faults = [f"{count:,} of {found.rows:,} rows {what}" for what, count in found.wrong.items()]
    twice = int((found.first_R == start).sum())
    if twice and stats.binom.sf(twice - 1, len(found.first_R), probs_V[start] / probs_V.sum()) < LEVEL:
        faults.append(f"{twice:,} of {found.rows:,} rows have it twice")
    return faults


def changed_rows(mixture: Path, corpus: Path) -> int:
    """Return how many context-free rows of the mixture are not rows of the corpus, token for token."""
    mixed: dict[int, list[int]] = {}
    for batch in _context_free(mixture, "mixture", ["row_id", "token_ids"]):
        mixed |= dict(zip(batch["row_id"].to_pylist(), batch["token_ids"].to_pylist(), strict=True))
    wanted = pa.array(list(mixed), pa.int64())
    same = 0
    for batch in _context_free(corpus, "corpus", ["row_id", "token_ids"], most=None):
        rows = batch.filter(pc.is_in(batch["row_id"], wanted))
        same += sum(
            mixed[i] == t for i, t in zip(rows["row_id"].to_pylist(), rows["token_ids"].to_pylist(), strict=True)
        )
    return len(mixed) - same


def likelihood_z(corpus: Path, probe: Path) -> tuple[float | None, float | None]:
    """Return how many standard errors the corpus is above the probe: mean log-probability, share of rare tokens.

    Over as many positions as both tables have: later tokens are likelier, or less likely, than earlier ones. Rare are
    tokens as unlikely as the least likely RARE of the probe's. Means hardly see a cut tail, their share does.
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
    found = (
        int(_lengths(batch["logprobs"]).max(initial=0))
        for batch in _context_free(folder, "corpus", ["logprobs"], source)
    )
    return max(found, default=0)


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
    folder: Path, name: str, columns: list[str], source: str = SOURCE, most: int | None = MAX_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `source`; of a large table rows spread evenly over it."""
    total = sum(pq.read_metadata(path).num_rows for path in shards(folder, name))
    first = 0
    for batch in batches(folder, name, ["source", *columns]):
        chosen = spread(first, batch.num_rows, 1.0 if most is None else most / max(1, total))
        first += batch.num_rows
        yield batch.filter(pc.and_(pc.equal(batch["source"], source), pa.array(chosen)))
