"""Measures a model while it is trained: divergence from the base, held-out target loss, benchmarks."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from cfsd.artifact import Store
from cfsd.checkpoint import load_tokenizer
from cfsd.microbatch import arrange
from cfsd.objective import losses
from cfsd.packs import Pack, Row, packs_of
from cfsd.rehearsal import RehearsalSpec
from cfsd.responses import score_responses
from cfsd.rows import read_rows
from cfsd.sampling import Sample
from cfsd.score import score
from cfsd.scoring import score_given
from cfsd.token_loss import Stored
from cfsd.train import TrainRequest
from cfsd.undisturbed import mode_kept

TOP = 256  # of the base's law at each watched token; the rest as drawn: unbiased, and nearly the whole sum
MEASURED = RehearsalSpec(loss="kl")


class Watcher:
    """Takes the base's law from the model before its first step, so that no second model is held."""

    def __init__(self, base: PreTrainedModel, store: Store, request: TrainRequest) -> None:
        """Read what is watched; `base` has the base's weights, and is going to be trained."""
        assert request.watched
        spec, self.watched = request.spec.watch, request.watched
        self.most_tokens, self.device = request.machine.micro_batch_tokens, base.device
        sample = read_rows(store.path(request.watched.sample), "corpus", ["token_ids"])[: spec.rows]
        self.packs = _packs(base, [row["token_ids"] for row in sample], self.most_tokens)
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
                records = score_responses(scored, self.held_out, self.most_tokens, lambda done: None)
                figures["watch/target_loss"] = sum(r["nll"] for r in records) / sum(r["count"] for r in records)
            for benchmark in self.watched.benchmarks:
                facts = score(scored, self.tokenizer, benchmark, most_tokens=self.most_tokens).facts
                figures[f"watch/{benchmark.name}/{facts['metric']}"] = float(facts["score"])
        return figures

    def _divergence(self, model: nn.Module) -> float:
        found = [losses(model, pack.to(self.device), spec=MEASURED).divergence.double() for pack in self.packs]
        return float(sum(found)) / sum(int(pack.fresh_BT[:, 1:].sum()) for pack in self.packs)


def _packs(base: PreTrainedModel, token_rows: list[list[int]], most_tokens: int) -> list[Pack]:
    """Return `token_rows` with the base's law at each token after the first."""
    packs = []
    for group in arrange([len(row) for row in token_rows], most_tokens):
        members = [token_rows[i] for i in group]
        rows = [Row("context-free", row, [False] + [True] * (len(row) - 1), 1.0) for row in members]
        (pack,) = packs_of(rows, len(rows) * len(members[0]), fresh=[True] * len(rows))  # longest first: one pack
        most = min(TOP, base.config.get_text_config().vocab_size)
        samples = score_given(base, members, (), top_logprobs=most, most_tokens=most_tokens)
        real_BT = pack.coefficient_BT != 0
        packs.append(pack._replace(fresh_BT=pack.fresh_BT & real_BT, stored=_stored(samples)))
    return packs


def _stored(samples: list[Sample]) -> Stored:
    tops = [sample.top for sample in samples if sample.top is not None]
    joined = [np.concatenate([getattr(top, name)[1:] for top in tops]) for name in ("ids", "logprobs", "rest")]
    drawn = np.concatenate([np.array(sample.logprobs[1:], np.float32) for sample in samples])
    return Stored(*(torch.from_numpy(part) for part in (*joined, drawn)))
