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
from cfsd.store.tables import batches, num_rows

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


class Examined(NamedTuple):
    """Rows laid end to end: the length of each, and of each token its id and whether the base sampled it.

    `nats_T`: the log-probability of each token; empty for a mixture.
    """

    length_R: Array
    token_T: Array
    sampled_T: Array
    nats_T: Array

    def begin_R(self) -> Array:
        """Return the place of each row's first token."""
        begin_R: Array = np.cumsum(self.length_R) - self.length_R
        return begin_R

    def second_R(self) -> Array:
        """Return the token after the first of each row that has one."""
        second_R: Array = self.token_T[self.begin_R()[self.length_R > 1] + 1]
        return second_R


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
    sampled = _examined(corpus, "corpus")
    rows = len(sampled.length_R)
    if not rows:
        return Checked(0, None, None, None, {})
    p = first_token_p(sampled.second_R(), probs_V)
    z, rare_z = likelihood_z(sampled, _examined(probe, "corpus", "probe"))
    failed = {}
    if p < LEVEL:
        failed[FIRST] = f"not by the base's distribution (chi-square over {rows:,} rows: p = {p:.1e})"
    if z is not None and abs(z) >= SIGMAS:
        failed[LIKELIHOOD] = f"{abs(z):.1f} standard errors {'above' if z > 0 else 'below'} the probe's"
    if rare_z is not None and abs(rare_z) >= SIGMAS:
        failed[TAIL] = f"{abs(rare_z):.1f} standard errors {'more' if rare_z > 0 else 'fewer'} than in the probe"
    faults = _start_faults(sampled, probs_V, start, filled=filled)
    mixed = _start_faults(_examined(mixture, "mixture"), probs_V, start, filled=filled)
    faults += [f"{fault} in the mixture" for fault in mixed]
    if changed := changed_rows(mixture, corpus):
        faults.append(f"{changed:,} rows of the mixture are not as they were sampled")
    if faults:
        failed[START] = "; ".join(faults)
    return Checked(rows, p, z, rare_z, failed)


def _start_faults(rows: Examined, probs_V: Array, start: int, *, filled: bool) -> list[str]:
    lacking = rows.token_T[rows.begin_R()] != start
    prompted = rows.length_R - per_row(rows.sampled_T.astype(np.int64), rows.length_R) != 1
    second_R = rows.second_R()
    twice = int((second_R == start).sum())
    by_chance = stats.binom.sf(twice - 1, len(second_R), probs_V[start] / probs_V.sum()) if twice else 1.0
    counts = {
        "do not begin with it": int(lacking.sum()),
        "have other prompt tokens than it": 0 if filled else int(prompted.sum()),
        "have it twice": twice if by_chance < LEVEL else 0,
    }
    return [f"{count:,} of {len(rows.length_R):,} rows {fault}" for fault, count in counts.items() if count]


def changed_rows(mixture: Path, corpus: Path) -> int:
    """Return how many context-free rows of the mixture are not rows of the corpus, token for token."""
    mixed: dict[int, list[int]] = {}
    for batch in _rows_of(SOURCE, mixture, "mixture", ["row_id", "token_ids"]):
        mixed |= dict(zip(batch["row_id"].to_pylist(), batch["token_ids"].to_pylist(), strict=True))
    row_ids = pa.array(list(mixed), pa.int64())
    same = 0
    for batch in _rows_of(SOURCE, corpus, "corpus", ["row_id", "token_ids"], max_rows=None):
        rows = batch.filter(pc.is_in(batch["row_id"], row_ids))
        pairs = zip(rows["row_id"].to_pylist(), rows["token_ids"].to_pylist(), strict=True)
        same += sum(mixed[row_id] == token_ids for row_id, token_ids in pairs)
    return len(mixed) - same


def likelihood_z(sampled: Examined, probed: Examined) -> tuple[float | None, float | None]:
    """Return how many standard errors the corpus is above the probe: mean log-probability, share of rare tokens.

    Both over the positions that both tables have, since the mean changes along a row. Rare are the tokens as unlikely
    as the least likely RARE of the probe's. A cut tail hardly changes the mean, but this share.
    """
    length = min(int(rows.length_R.max(initial=0)) for rows in (sampled, probed))
    samples = [_sampled(rows, length) for rows in (sampled, probed)]
    if not all(len(nats_T) for nats_T, _ in samples):
        return None, None
    edge = np.quantile(samples[1][0], RARE)
    means = difference_z(*((per_row(nats_T, count_R), count_R) for nats_T, count_R in samples))
    shares = difference_z(*((per_row((nats_T <= edge).astype(np.int64), n_R), n_R) for nats_T, n_R in samples))
    return means, shares


def _sampled(rows: Examined, length: int) -> tuple[Array, Array]:
    """Return the log-probabilities of the sampled tokens among each row's first `length`, and how many a row has."""
    place_T = np.arange(len(rows.token_T)) - np.repeat(rows.begin_R(), rows.length_R)
    own_T = rows.sampled_T & (place_T < length)
    return rows.nats_T[own_T].astype(np.float64), per_row(own_T.astype(np.int64), rows.length_R)


def _examined(folder: Path, name: str, source: str = SOURCE) -> Examined:
    """Return the rows of `source` that are examined, of a corpus or mixture table."""
    mask = "logprobs" if name == "corpus" else "supervised"
    parts = [Examined(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32))]
    for batch in _rows_of(source, folder, name, ["token_ids", mask]):
        flat, tokens = batch[mask].flatten(), batch["token_ids"]
        length_R, token_T = pc.list_value_length(tokens).to_numpy(zero_copy_only=False), tokens.flatten().to_numpy()
        sampled_T = (flat.is_valid() if name == "corpus" else flat).to_numpy(zero_copy_only=False)
        nats_T = flat.to_numpy(zero_copy_only=False) if name == "corpus" else np.zeros(0, np.float32)
        parts.append(Examined(length_R, token_T, sampled_T, nats_T))
    return Examined(*map(np.concatenate, zip(*parts, strict=True)))


def _rows_of(
    source: str, folder: Path, name: str, columns: list[str], max_rows: int | None = MAX_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `source`; of a large table rows spread evenly over it."""
    fraction = 1.0 if max_rows is None else max_rows / max(1, num_rows(folder, name))
    first = 0
    for batch in batches(folder, name, ["source", *columns]):
        is_examined = spread(first, batch.num_rows, fraction)
        first += batch.num_rows
        yield batch.filter(pc.and_(pc.equal(batch["source"], source), pa.array(is_examined)))
