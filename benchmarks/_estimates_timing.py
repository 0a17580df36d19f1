"""What a training step and a sampled token take with each estimate, in turns, so that all share a slow minute."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.token_choice import tail_points
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import fetch
from cfsd.model.likelihood import token_logprobs
from cfsd.model.loading import load_model
from cfsd.store.artifact import Store
from cfsd.train.batches.micro_batches import MicroBatch, Row, micro_batches_of
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.spec import RehearsalSpec
from cfsd.train.watcher import stored_of

ROUNDS, TOP, SAMPLES = 3, 64, (0, 16, 32)
ROWS, TARGET_LENGTH, LENGTH = 4, 160, 96
SAMPLED = 16  # tokens of each row


def step_seconds() -> dict[str, list[float]]:
    """Return seconds of the forward and backward passes of one global batch, for each form of the rehearsal loss."""
    model = _smollm2()
    token_rows = torch.randint(0, 40_000, (ROWS, 1 + LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    steps = {"nll": _step(model, RehearsalSpec(), _batch(model, token_rows, None))}
    for count in SAMPLES:
        steps[f"kl k={TOP} m={count}"] = _step(model, RehearsalSpec(loss="kl"), _batch(model, token_rows, count))
    return in_turns(steps)


def _batch(model: PreTrainedModel, token_rows: list[list[int]], samples: int | None) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 40_000, (ROWS, TARGET_LENGTH), generator=generator).tolist()
    rows = [Row("target", row, [False] * (len(row) // 2) + [True] * (len(row) // 2), 1.0) for row in target]
    rehearsed = [Row("context-free", row, [False] + [True] * LENGTH, 1.0) for row in token_rows]
    (one,) = micro_batches_of(rows, ROWS * TARGET_LENGTH)
    (other,) = micro_batches_of(rehearsed, ROWS * (1 + LENGTH))
    if samples is not None:
        points = [tail_points(0, "timing", number, 1 + LENGTH, samples) for number in range(ROWS)]
        scored = token_logprobs(model, token_rows, (), top_logprobs=TOP, tail_points=points)
        other = other._replace(stored=stored_of(scored, [row.supervised for row in rehearsed]))
    return [one, other]


def _step(model: PreTrainedModel, spec: RehearsalSpec, parts: list[MicroBatch]) -> Callable[[], float]:
    def work() -> float:
        objective = Objective(model, spec)
        started = time.perf_counter()
        for part in parts:
            losses(model, part).loss.backward()
        seconds = time.perf_counter() - started
        objective.remove()
        model.zero_grad()
        return seconds

    return work


def sampling_seconds() -> dict[str, list[float]]:
    """Return seconds per sampled token of 16 rows."""
    model = _smollm2().eval()
    rows = Rows(range(16), [[0]] * 16, ())

    def sampled(**stored: int) -> Callable[[], float]:
        def work() -> float:
            started = time.perf_counter()
            sample(model, rows, GenerateSpec(length=SAMPLED, seed=0, **stored))
            return (time.perf_counter() - started) / (16 * SAMPLED)

        return work

    plain = {"tokens alone": sampled()}
    return in_turns(plain | {f"k={TOP} m={m}": sampled(top_logprobs=TOP, tail_samples=m) for m in SAMPLES})


def in_turns(works: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Return what each of `works` gives in each of ROUNDS rounds, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            seconds = work()
            found[name] += [seconds] if turn else []
    return found


def _smollm2() -> PreTrainedModel:
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        base, _ = store.make("model", "base", lambda draft: fetch(Checkpoint(kind="smollm2"), draft))
        return load_model(store.path(base), "cpu", "float32")
