"""Measures a model while it is trained: divergence from the base, held-out target loss, benchmarks."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.score import score
from cfsd.generate.token_choice import tail_points
from cfsd.model.batching import arrange
from cfsd.model.likelihood import score_responses, token_logprobs
from cfsd.model.loading import load_tokenizer
from cfsd.model.sample import Sample
from cfsd.model.undisturbed import mode_kept
from cfsd.statistics.null_band import error_of_ratio, error_of_scores
from cfsd.store.artifact import Store
from cfsd.store.tables import read_rows
from cfsd.train.batches.micro_batches import MicroBatch, Row, micro_batches_of
from cfsd.train.loss.objective import divergence_by_row
from cfsd.train.loss.token_loss import Stored
from cfsd.train.spec import WATCH, WATCH_ERROR, RehearsalSpec, TrainRequest

TOP, TAIL = 256, 16  # likeliest tokens of the base at each watched token, and samples of the rest: nearly the whole sum
MEASURED = RehearsalSpec(loss="kl")


class Look(NamedTuple):
    """One watched figure as it is now: its value, and the rows or documents that it is the mean of."""

    value: float
    sums: Any  # per row, over its tokens; per document, its score (a pandas Series by document)
    counts: Any = None  # tokens of each row; None: scores
    slope: float = 1.0  # of the value by sum(sums)/sum(counts), where the value is no such mean

    def error_since(self, first: "Look") -> float:
        """Return the standard error of the change since the `first` look at the same rows or documents."""
        changes = np.asarray(self.sums - first.sums, np.float64)
        if self.counts is not None:
            return self.slope * error_of_ratio(changes, np.asarray(self.counts, np.float64))
        both = np.concatenate([self.sums, first.sums])
        reach = 1.0 if both.min() >= 0 and both.max() <= 1 else float(np.ptp(both))
        return error_of_scores(changes[np.isfinite(changes)], reach)  # NaN: a document that was left out once


class Watcher:
    """Takes the base's distributions from the model before its first step, so that no second model is held."""

    def __init__(self, base: PreTrainedModel, store: Store, request: TrainRequest) -> None:
        """Read what is watched; `base` has the base's weights, and is going to be trained."""
        assert request.watched
        spec, self.watched = request.spec.watch, request.watched
        self.max_tokens, self.device = request.machine.micro_batch_tokens, base.device
        sample = read_rows(store.path(request.watched.sample), "corpus", ["token_ids"])[: spec.rows]
        self.micro_batches = micro_batches_from(base, [row["token_ids"] for row in sample], self.max_tokens)
        self.held_out = read_rows(store.path(request.watched.target), "held_out")[: spec.held_out_rows]
        self.tokenizer = load_tokenizer(store.path(request.base))
        self.first: dict[str, Look] | None = None

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the figures of `model` as it is now, each with the standard error of its change since the first look.

        The mode of the model and all random states stay as they are.
        """
        with mode_kept(model):
            model.eval()
            looks = self._looks(model)
        self.first = self.first or looks
        errors = {f"{WATCH_ERROR}{name}": look.error_since(self.first[name]) for name, look in looks.items()}
        return {f"{WATCH}{name}": look.value for name, look in looks.items()} | errors

    def _looks(self, model: Any) -> dict[str, Look]:
        looks = {"probe_kl": self._divergence(model)}
        if self.held_out:
            records = score_responses(model, self.held_out, self.max_tokens, lambda done: None)
            nll_R, count_R = (np.array([record[name] for record in records]) for name in ("nll", "count"))
            looks["target_loss"] = Look(float(nll_R.sum() / count_R.sum()), nll_R, count_R)
        for benchmark in self.watched.benchmarks:
            name, look = self._score(model, benchmark)
            looks[name] = look
        return looks

    def _divergence(self, model: nn.Module) -> Look:
        on_device = (send_to_device(part, self.device) for part in self.micro_batches)
        nats_R = torch.cat([divergence_by_row(model, part, MEASURED) for part in on_device]).numpy()
        count_R = torch.cat([part.fresh_BT[:, 1:].sum(1) for part in self.micro_batches]).numpy()
        return Look(float(nats_R.sum() / count_R.sum()), nats_R, count_R)

    def _score(self, model: Any, benchmark: Benchmark) -> tuple[str, Look]:
        rows, metadata = score(model, self.tokenizer, benchmark, max_tokens=self.max_tokens)
        rows = rows[rows["filter"] == metadata["filters"][0]].set_index("doc_id")
        name, value = f"{benchmark.name}/{metadata['metric']}", float(metadata["score"])
        if metadata["kind"] != "perplexity":
            return name, Look(value, rows["value"])
        nats = rows["value"].sum() / rows["count"].sum()  # of which the value is a power, or in bits a multiple
        growth = value if "bits" in metadata["metric"] else value * math.log(value)
        return name, Look(value, rows["value"], rows["count"], slope=growth / nats)


def micro_batches_from(
    base: PreTrainedModel, token_rows: list[list[int]], max_tokens: int, masks: list[list[bool]] | None = None
) -> list[MicroBatch]:
    """Return `token_rows` with the base's distribution at each token after the first, or at those of `masks`."""
    top = min(TOP, base.config.get_text_config().vocab_size)
    points = [tail_points(0, "watch", number, len(row), TAIL) for number, row in enumerate(token_rows)]
    samples = token_logprobs(base, token_rows, (), top_logprobs=top, tail_points=points, max_tokens=max_tokens)
    masks = masks or [[False] + [True] * (len(row) - 1) for row in token_rows]
    rows = [Row("context-free", row, mask, 1.0) for row, mask in zip(token_rows, masks, strict=True)]
    micro_batches = micro_batches_of(rows, max_tokens, fresh=[True] * len(rows))
    groups = arrange([len(row) for row in token_rows], max_tokens)
    return [
        micro_batch._replace(stored=stored_of([samples[i] for i in group], [masks[i] for i in group]))
        for micro_batch, group in zip(micro_batches, groups, strict=True)
    ]


def stored_of(samples: list[Sample], masks: list[list[bool]]) -> Stored:
    """Return what is known of the base at each token of `samples` that its mask names."""
    tops = [sample.top for sample in samples if sample.top is not None]
    ids, logprobs, rest, *tail = [
        torch.from_numpy(np.concatenate([part[mask] for part, mask in zip(parts, masks, strict=True)]))
        for parts in zip(*tops, strict=True)
    ]
    drawn = [np.array(sample.logprobs, np.float32)[mask] for sample, mask in zip(samples, masks, strict=True)]
    return Stored(ids, logprobs, rest, torch.from_numpy(np.concatenate(drawn)), *tail)
