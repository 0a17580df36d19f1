"""How far sampling and training of a tiny model are from their definitions, computed plainly, one row at a time.

T tokens of a row, V vocabulary, K stored likeliest tokens.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks._families import END, START, VOCABULARY
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.model.likelihood import token_logprobs
from cfsd.model.sample import Sample
from cfsd.train.adapters import Trained, adapt, merge_trained, trained_by
from cfsd.train.batches.micro_batches import MicroBatch, Row, micro_batches_of
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.loss.token_loss import Stored
from cfsd.train.methods import Methods
from cfsd.train.spec import RehearsalSpec

LENGTH = 20  # tokens sampled: several windows of the families that have one
TOP = 8
WEIGHT = 0.7  # of the rehearsal
LOSSES = {
    "nll": RehearsalSpec(),
    "live": RehearsalSpec(loss="kl", reference="base"),
    "sampled": RehearsalSpec(loss="kl"),
    "bucket": RehearsalSpec(loss="kl", tail="bucket"),
}


def corpus(model: PreTrainedModel) -> list[Sample]:
    """Return rows sampled by our loop: after prompts of several lengths; some end early and leave the batch."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 1, 2, 3, 1, 5]
    prompts = [[START, *torch.randint(2, VOCABULARY, (n - 1,), generator=generator).tolist()] for n in lengths]
    ends = [END, *range(100, 110)]  # enough that half of the rows end before their length
    rows = Rows(range(len(prompts)), prompts, ends)
    return sample(model, rows, GenerateSpec(length=LENGTH, top_logprobs=TOP, tail_samples=0, seed=5))


@torch.no_grad()
def log_law(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Return log p of every token after each of `tokens`, T x V, from one forward pass of that row alone."""
    row_1T = torch.tensor([list(tokens)], device=model.device)
    law: Tensor = model(input_ids=row_1T, use_cache=False).logits[0].double().log_softmax(-1)
    return law


def sampling_error(model: PreTrainedModel, samples: Sequence[Sample]) -> float:
    """Return the largest difference, in nats, of what was recorded while sampling and a forward pass."""
    worst = 0.0
    for row in samples:
        law = log_law(model, row.token_ids).numpy()
        assert row.top is not None
        for t, recorded in enumerate(row.logprobs):
            if recorded is None:
                continue
            worst = max(worst, abs(recorded - law[t - 1, row.token_ids[t]]))
            known = law[t - 1, row.top.ids[t]]
            worst = max(worst, float(np.abs(row.top.logprobs[t] - known).max()))
            rest = np.logaddexp.reduce(np.delete(law[t - 1], row.top.ids[t]))
            worst = max(worst, abs(float(row.top.rest[t]) - rest))
    return worst


class Corpus:
    """What a training reads of the samples: each row's stored distributions."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        """Hold `samples`."""
        self.samples = samples

    def at(self, rows: Sequence[tuple[int | None, list[int], list[bool]]]) -> Stored:
        """Return what is stored at the tokens that count."""
        nothing = np.zeros((0, TOP)), np.zeros((0, TOP)), np.zeros(0), np.zeros(0)
        parts: list[list[Any]] = [[nothing[0].astype(int)], *([part] for part in nothing[1:])]
        for place, _, supervised in rows:
            row, counted = self.samples[place or 0], np.asarray(supervised)
            assert row.top is not None
            logprobs = np.asarray([0.0 if value is None else value for value in row.logprobs])
            for part, values in zip(parts, (*row.top[:3], logprobs), strict=True):
                part.append(values[counted])
        return Stored(*(torch.from_numpy(np.concatenate(part)) for part in parts))


def mixture(samples: Sequence[Sample]) -> list[Row]:
    """Return rows of the target, of several lengths, and the samples as rehearsal."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for length in (13, 4, 9):
        tokens = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Row("target", tokens, [t > length // 3 for t in range(length)], 1.0))
    for number, row in enumerate(samples):
        counted = [value is not None for value in row.logprobs]
        rows.append(Row("context-free", row.token_ids, counted, 1.0, corpus_row=number))
    return rows


def batches(samples: Sequence[Sample], max_tokens: int = 60) -> list[MicroBatch]:
    """Return the micro-batches of one global batch."""
    distributions: Any = Corpus(samples)
    return micro_batches_of(mixture(samples), max_tokens, distributions=distributions)


def gradient(model: PreTrainedModel) -> Tensor:
    """Return the gradient by all weights as one vector."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([part.double().flatten() for part in parts])


def ours(model: PreTrainedModel, base: PreTrainedModel, kind: str, samples: Sequence[Sample]) -> tuple[float, Tensor]:
    """Return loss and gradient of the global batch by the objective."""
    spec = LOSSES[kind]
    model.zero_grad()
    objective = Objective(model, spec, base if spec.needs_base() else None)
    total = 0.0
    for micro_batch in batches(samples):
        found = losses(model, micro_batch, WEIGHT)
        found.loss.backward()
        total += found.loss.item()
    objective.remove()
    return total, gradient(model)


def defined(
    model: PreTrainedModel, base: PreTrainedModel, kind: str, samples: Sequence[Sample]
) -> tuple[float, Tensor]:
    """Return the same by the definition: all logits of each row alone, and autograd."""
    model.zero_grad()
    rows = mixture(samples)
    counts = {source: sum(sum(row.supervised) for row in rows if row.source == source) for source in
              ("target", "context-free")}  # fmt: skip
    total = 0.0
    for row in rows:
        ids_T, counted_T = torch.tensor(row.token_ids), torch.tensor(row.supervised)[1:]
        law_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)[counted_T]
        next_T1 = ids_T[1:][counted_T][:, None]
        if row.is_target() or kind == "nll":
            loss_T = -law_TV.gather(1, next_T1)[:, 0]
        else:
            base_TV = log_law(base, row.token_ids)[:-1][counted_T]
            loss_T = _divergence(law_TV, base_TV, next_T1, kind)
        loss = loss_T.sum() * (1.0 if row.is_target() else WEIGHT) / counts[row.source]
        loss.backward()
        total += loss.item()
    return total, gradient(model)


def _divergence(law_TV: Tensor, base_TV: Tensor, next_T1: Tensor, kind: str) -> Tensor:
    """Return the divergence from the base per token, whole or with the base's tail sampled or as one event."""
    if kind == "live":
        return (base_TV.exp() * (base_TV - law_TV)).sum(-1)
    top_TK, ids_TK = base_TV.topk(TOP, -1)
    on_top_T = (top_TK.exp() * (top_TK - law_TV.gather(1, ids_TK))).sum(-1)
    if kind == "sampled":
        outside_T = (ids_TK != next_T1).all(-1)
        return on_top_T + outside_T * (base_TV - law_TV).gather(1, next_T1)[:, 0]
    rest_T, base_rest_T = (law.scatter(1, ids_TK, -torch.inf).logsumexp(-1) for law in (law_TV, base_TV))
    return on_top_T + base_rest_T.exp() * (base_rest_T - rest_T)


def loss_error(
    model: PreTrainedModel, base: PreTrainedModel, kind: str, samples: Sequence[Sample]
) -> tuple[float, float]:
    """Return how far the loss is from its definition, in nats, and the gradient, relatively."""
    wanted, wanted_gradient = defined(model, base, kind, samples)
    found, found_gradient = ours(model, base, kind, samples)
    difference = (found_gradient - wanted_gradient).norm() / wanted_gradient.norm()
    return abs(found - wanted), float(difference)


def measuring_error(model: PreTrainedModel, samples: Sequence[Sample]) -> float:
    """Return the largest difference of the log-probabilities of a text that exists, many rows to a pass, and by row."""
    rows, worst = [row.token_ids for row in samples], 0.0
    for row in token_logprobs(model, rows, (), max_tokens=50):
        law = log_law(model, row.token_ids)
        worst = max(worst, *(abs(value - float(law[t - 1, row.token_ids[t]]))
                             for t, value in enumerate(row.logprobs) if value is not None))  # fmt: skip
    return worst


def merging_error(model: PreTrainedModel, methods: Methods) -> tuple[float, Trained, int]:
    """Return how far the merged model is from the one that was trained, relatively; what LoRA trains; idle matrices."""
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(6))
    plain = model(input_ids=ids, use_cache=False).logits.detach()
    adapted: Any = adapt(methods, model)
    trained = trained_by(model)
    adapted(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 3].sum().backward()
    added = [p for name, p in adapted.named_parameters() if p.requires_grad and "lora_B" in name]
    idle = sum(p.grad is None or not bool(p.grad.any()) for p in added)
    with torch.no_grad():
        for parameter in added:
            parameter += 0.05
        wanted = adapted(input_ids=ids, use_cache=False).logits
        with tempfile.TemporaryDirectory() as folder:
            found = merge_trained(methods, adapted, Path(folder))(input_ids=ids, use_cache=False).logits
    return float((found - wanted).norm() / (wanted - plain).norm()), trained, idle
