"""A stored corpus for trainings that are not ours: found by folder or key, and checked before anything is trained."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from cfsd.errors import BadInput
from cfsd.generate.spec import TAIL_SAMPLES
from cfsd.machine import home
from cfsd.mix.stage import lists_like
from cfsd.model.likelihood import token_logprobs
from cfsd.model.undisturbed import mode_kept
from cfsd.store.artifact import Artifact, Store
from cfsd.store.inventory import Place, entries, named
from cfsd.store.manifest import read_manifest
from cfsd.store.sharing import PARTIAL
from cfsd.store.tables import batches, is_shard, num_rows, shards
from cfsd.train.batches.micro_batches import Row
from cfsd.train.batches.mixture import MixtureRows
from cfsd.train.spec import RehearsalSpec

TRIED_TOKENS = 1024
REMEDY = "Make a corpus of this model with python -m flows.mitigate --until filter"


def corpus_folder(asked: str | Path) -> Path:
    """Return the folder of the corpus (or of another sample of a base, as a probe) that `asked` names.

    `asked` is a folder, or a key of the store of CFSD_HOME or ./data, or the beginning of one. Raises BadInput.
    """
    folder = Path(asked).expanduser()
    if not folder.is_dir() or (folder / PARTIAL).exists():
        store, asked = (Store(folder.absolute().parents[2]), folder.name) if folder.is_dir() else (Store(home()), asked)
        known = {entry.place: entry for entry in entries(store) if entry.manifest and _is_corpus(entry.manifest)}
        folder = store.path(known[named(known, str(asked))].artifact())
    if not shards(folder, "corpus") or folder.name.endswith(".draft"):
        raise BadInput(
            f"{folder} holds no corpus; give a folder store/corpus/KEY of a data folder, or its key: "
            "python -m flows.mitigate recipe.yaml --until filter makes one and prints where it is"
        )
    return folder


def _is_corpus(manifest: dict[str, Any]) -> bool:
    """Say so by the names of its files: those of a shared store may not be here yet."""
    return any(is_shard(name, "corpus") for name in manifest["files"])


def base_of(corpus: Path) -> tuple[Artifact, Path] | None:
    """Return the model that a corpus of a store was made from, and its folder without weights; None: not known."""
    store = Store(corpus.absolute().parent.parent.parent)
    known = {entry.place: entry for entry in entries(store)}
    waiting: list[Place] = [(corpus.absolute().parent.name, corpus.name)]
    while waiting:
        place = waiting.pop()
        if place in known and place[0] == "model":
            model = known[place].artifact()
            return model, store.path(model, weights=False)
        waiting += known[place].inputs if place in known else []
    return None


def check_stored(folder: Path, spec: RehearsalSpec) -> None:
    """Raise BadInput where the corpus in `folder` does not hold what the loss of `spec` reads."""
    if not num_rows(folder, "corpus"):
        raise BadInput(f"the corpus {folder.name} has no rows, so there is nothing to rehearse. {REMEDY}")
    names = set(pq.read_schema(shards(folder, "corpus")[0]).names)
    if not spec.needs_top():
        return
    if "topk_ids" not in names:
        raise BadInput(
            f"loss is kl, but the corpus {folder.name} stores no distributions: make it with generate.top_logprobs "
            "(64 is a good start), or set loss to nll"
        )
    found: dict[str, Any] = (read_manifest(folder) or {}).get("metadata", {})
    exact = found.get("source") == "context-free" and found.get("biased") == ""
    if spec.tail == "sampled" and "tail_ids" not in names and not exact:
        raise BadInput(
            f"tail is sampled, but the corpus {folder.name} has no samples of the tail, and its rows are not known to "
            f"follow the base's own distribution: make it with generate.tail_samples ({TAIL_SAMPLES} is the default), "
            "or set tail to bucket"
        )


def check_base(folder: Path, model: PreTrainedModel, max_gap: float) -> None:
    """Raise BadInput where `model` gives the first rows of a corpus other log-probabilities than are stored with it.

    `max_gap` is how far the means may be apart, in nats per token: rounding and quantisation are no other model.
    """
    rows, base = first_rows(folder, TRIED_TOKENS), base_of(folder)
    known = f" ({base[0].metadata.get('architecture')}, {base[0].key})" if base else ""
    vocabulary, largest = model.config.get_text_config().vocab_size, max(max(row["token_ids"]) for row in rows)
    if largest >= vocabulary:
        raise BadInput(
            f"the corpus {folder.name} has token {largest}, but the model's vocabulary ends at {vocabulary - 1}: it "
            f"was sampled from another model{known}. {REMEDY}"
        )
    with mode_kept(model):
        model.eval()
        found = token_logprobs(model, [row["token_ids"] for row in rows], (), max_tokens=TRIED_TOKENS)
    pairs = zip(rows, found, strict=True)
    gaps = [p - q for row, own in pairs for p, q in zip(row["logprobs"], own.logprobs, strict=True) if p is not None]
    if not abs(gap := fmean(gaps)) <= max_gap:
        raise BadInput(
            f"the model gives the tokens of the corpus {folder.name} {gap:.3g} nats per token less than the model that "
            f"they were sampled from{known}; at most {max_gap:g} apart is allowed: the corpus is of another model, or "
            f"this one was trained since. {REMEDY}, or raise max_gap"
        )


def first_rows(folder: Path, tokens: int) -> list[dict[str, Any]]:
    """Return so many of the first rows of a corpus that they have `tokens` tokens, or all."""
    rows: list[dict[str, Any]] = []
    for batch in batches(folder, "corpus", ["token_ids", "logprobs"]):
        for row in batch.to_pylist():
            rows.append(row)
            tokens -= len(row["token_ids"])
            if tokens <= 0:
                return rows
    return rows


class CorpusRows(MixtureRows):
    """The rows of a corpus as a mixture has them: what was sampled counts in the loss."""

    def __init__(self, folder: Path) -> None:
        """Read the `corpus` table in `folder`."""
        self._table = pa.concat_tables(
            pa.table(
                {
                    "source": batch["source"].dictionary_encode(),
                    "token_ids": batch["token_ids"],
                    "supervised": lists_like(batch["logprobs"], batch["logprobs"].flatten().is_valid()),
                }
            )
            for batch in batches(folder, "corpus", ["source", "token_ids", "logprobs"])
        ).unify_dictionaries()

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        row = {name: self._table[name][index] for name in self._table.column_names}
        ids, supervised = (row[name].values.to_numpy(zero_copy_only=False).tolist() for name in
                           ("token_ids", "supervised"))  # fmt: skip
        return Row(row["source"].as_py(), ids, supervised, 1.0, corpus_row=index)
