"""Measures a model while it is trained: divergence from the base, held-out target loss, benchmarks."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from cfsd.evaluate.harness.score import score
from cfsd.generate.token_choice import tail_points
from cfsd.model.batching import arrange
from cfsd.model.likelihood import score_responses, token_logprobs
from cfsd.model.loading import load_tokenizer
from cfsd.model.sample import Sample
from cfsd.model.undisturbed import mode_kept
from cfsd.store.artifact import Store
from cfsd.store.tables import read_rows
from cfsd.train.batches.micro_batches import MicroBatch, Row, micro_batches_of
from cfsd.train.loss.objective import losses
from cfsd.train.loss.token_loss import Stored
from cfsd.train.spec import RehearsalSpec, TrainRequest

TOP, TAIL = 256, 16  # likeliest tokens of the base at each watched token, and samples of the rest: nearly the whole sum
MEASURED = RehearsalSpec(loss="kl")


class Watcher:
    """Takes the base's distributions from the model before its first step, so that no second model is held."""

    def __init__(self, base: PreTrainedModel, store: Store, request: TrainRequest) -> None:
        """Read what is watched; `base` has the base's weights, and is going to be trained."""
        assert request.watched
        spec, self.watched = request.spec.watch, request.watched
        self.max_tokens, self.device = request.machine.micro_batch_tokens, base.device
        sample = read_rows(store.path(request.watched.sample), "corpus", ["token_ids"])[: spec.rows]
        self.micro_batches = _micro_batches(base, [row["token_ids"] for row in sample], self.max_tokens)
        self.held_out = read_rows(store.path(request.watched.target), "held_out")[: spec.held_out_rows]
        self.tokenizer = load_tokenizer(store.path(request.base))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the figures of `model` as it is now; its mode and all random states stay as they are."""
        scored: Any = model
        with mode_kept(model):
            model.eval()
            figures = {"watch/probe_kl": self._divergence(model)}
            if self.held_out:
                records = score_responses(scored, self.held_out, self.max_tokens, lambda done: None)
                figures["watch/target_loss"] = sum(r["nll"] for r in records) / sum(r["count"] for r in records)
            for benchmark in self.watched.benchmarks:
                metadata = score(scored, self.tokenizer, benchmark, max_tokens=self.max_tokens).metadata
                figures[f"watch/{benchmark.name}/{metadata['metric']}"] = float(metadata["score"])
        return figures

    def _divergence(self, model: nn.Module) -> float:
        on_device = (send_to_device(part, self.device) for part in self.micro_batches)
        parts = [losses(model, part, spec=MEASURED).divergence.double() for part in on_device]
        return float(sum(parts)) / sum(int(part.fresh_BT[:, 1:].sum()) for part in self.micro_batches)


def _micro_batches(base: PreTrainedModel, token_rows: list[list[int]], max_tokens: int) -> list[MicroBatch]:
    """Return `token_rows` with the base's distribution at each token after the first."""
    top = min(TOP, base.config.get_text_config().vocab_size)
    points = [tail_points(0, "watch", number, len(row), TAIL) for number, row in enumerate(token_rows)]
    samples = token_logprobs(base, token_rows, (), top_logprobs=top, tail_points=points, max_tokens=max_tokens)
    rows = [Row("context-free", row, [False] + [True] * (len(row) - 1), 1.0) for row in token_rows]
    micro_batches = micro_batches_of(rows, max_tokens, fresh=[True] * len(rows))
    groups = arrange([len(row) for row in token_rows], max_tokens)
    return [
        micro_batch._replace(stored=stored_of([samples[i] for i in group]))
        for micro_batch, group in zip(micro_batches, groups, strict=True)
    ]


def stored_of(samples: list[Sample]) -> Stored:
    """Return what is known of the base at each token of `samples` after the first."""
    tops = [sample.top for sample in samples if sample.top is not None]
    ids, logprobs, rest, *tail = [
        torch.from_numpy(np.concatenate([part[1:] for part in parts])) for parts in zip(*tops, strict=True)
    ]
    drawn = np.concatenate([np.array(sample.logprobs[1:], np.float32) for sample in samples])
    return Stored(ids, logprobs, rest, torch.from_numpy(drawn), *tail)
