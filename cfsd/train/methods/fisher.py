"""Stage fisher: the diagonal of the base's Fisher matrix, from text that the base wrote without a context."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cfsd.errors import BadInput, NotFinite
from cfsd.machine import Machine
from cfsd.model.loading import load_model, release_models
from cfsd.store.artifact import CHECKPOINTS, Artifact, Draft
from cfsd.store.tables import batches
from cfsd.train.methods.ewc import FisherSpec

FILE = "fisher.safetensors"
SOURCE = "context-free"
SAVE_SECONDS = 60.0  # work that a kill can lose


class Text(NamedTuple):
    """One row that the model itself wrote. Entry t belongs to token t, which token t-1 predicts."""

    token_ids: Sequence[int]
    sampled: Sequence[bool]  # False for prompt tokens


class Sums:
    """Sums over rows of weight x squared gradient, by parameter name; a tied parameter is listed once.

    A row's gradient is that of log p = sum over its sampled tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start at zero."""
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.squares = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.tokens = 0.0

    def add(self, text: Text, weight: float = 1.0) -> None:
        """Add one row; one forward and one backward pass."""
        device = next(iter(self.parameters.values())).device
        ids_T = torch.tensor(text.token_ids, device=device)
        counted_T = torch.tensor(text.sampled, dtype=torch.bool, device=device)[1:]
        logits_TV = self.model(input_ids=ids_T[None], use_cache=False).logits[0, :-1][counted_T]
        cross_entropy(logits_TV, ids_T[1:][counted_T], reduction="sum").backward()
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.squares[name].addcmul_(parameter.grad, parameter.grad, value=weight)
                parameter.grad = None
        self.tokens += weight * int(counted_T.sum())

    def fisher(self) -> dict[str, Tensor]:
        """Return F: the mean over rows, divided by the mean number of sampled tokens per row. Ends the sums.

        Then 1/2 sum of F (theta - theta*)^2 approximates KL(base || model) in nats per token, along the diagonal.
        """
        for square in self.squares.values():
            square.div_(self.tokens)  # (sum / rows) / (tokens / rows)
        return self.squares


def fisher(base: Artifact, corpus: Artifact, spec: FisherSpec, draft: Draft, machine: Machine) -> None:
    """Write F in float32 as safetensors by parameter name, from the corpus' first context-free rows.

    Source: Kirkpatrick et al. 2016, arXiv:1612.00796, section 2. Differs: the true Fisher matrix, expected under
    the model's own distribution, not under labels of a data set; per token. Continues from the last save, bit-equal.

    Raises BadInput when the corpus has too few such rows, NotFinite when a gradient is not finite.
    """
    texts = _texts(draft.store.path(corpus), corpus, spec.rows)
    release_models()
    machine.settle()
    sums = Sums(load_model(draft.store.path(base), machine.resolved_device(), "float32").eval())
    saved, done = monotonic(), _resume(sums, draft.folder)
    for row in range(done, spec.rows):
        sums.add(texts[row])
        draft.journal.progress(row + 1, spec.rows, "rows")
        if monotonic() - saved > SAVE_SECONDS:
            _save(sums, draft.folder, row + 1)
            saved = monotonic()
    matrix = {name: tensor.cpu() for name, tensor in sums.fisher().items()}
    if not all(bool(tensor.isfinite().all()) for tensor in matrix.values()):
        raise NotFinite(
            "a gradient of the base on its own text is not finite, so there is no Fisher matrix: turn ewc off"
        )
    save_file(matrix, draft.folder / FILE)
    draft.metadata |= {"rows": spec.rows, "tokens": int(sums.tokens)}


def _texts(folder: Path, corpus: Artifact, wanted: int) -> list[Text]:
    texts: list[Text] = []
    sources: Counter[str] = Counter()
    for batch in batches(folder, "corpus", ["source", "token_ids", "logprobs"]):
        for row in batch.to_pylist():
            sources[row["source"]] += 1
            if row["source"] == SOURCE:
                texts.append(Text(row["token_ids"], [value is not None for value in row["logprobs"]]))
            if len(texts) == wanted:
                return texts
    held = ", ".join(f"{count} of source {source}" for source, count in sources.items()) or "no rows at all"
    raise BadInput(
        f"EWC wants {wanted} rows that the base wrote without a context (ewc.rows); corpus {corpus.key} has {held}: "
        f"sample at least {wanted} with generate.source context-free (generate.rows), or lower ewc.rows"
    )


def _save(sums: Sums, folder: Path, done: int) -> None:
    place = folder / CHECKPOINTS / FILE
    place.parent.mkdir(exist_ok=True)
    partial = place.with_suffix(".partial")
    save_file(sums.squares, partial, {"rows": str(done), "tokens": repr(sums.tokens)})
    partial.replace(place)


def _resume(sums: Sums, folder: Path) -> int:
    """Go on from what an earlier attempt saved; return how many rows that are."""
    place = folder / CHECKPOINTS / FILE
    if not place.exists():
        return 0
    with safe_open(place, framework="pt") as saved:
        for name, square in sums.squares.items():
            square.copy_(saved.get_tensor(name))
        done, sums.tokens = int(saved.metadata()["rows"]), float(saved.metadata()["tokens"])
    return done
