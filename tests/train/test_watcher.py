"""What is measured on the way: the whole divergence, the held-out loss, benchmarks; and nothing is changed by it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.divergence import divergence
from cfsd.model.loading import load_model
from cfsd.statistics.null_band import error_of_ratio, error_of_scores
from cfsd.store.artifact import Store
from cfsd.store.tables import read_rows
from cfsd.train.loss.objective import Objective
from cfsd.train.spec import TrainRequest, Watched
from cfsd.train.watcher import Look, Watcher
from tests.conftest import write_rows
from tests.train.test_train import World, request_of, spec_with, world_in


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    return world_in(Store(folder / "data"), model_folder, write_rows(folder / "rows.jsonl", count=48), corpus_rows=8)


def base_of(world: World) -> Any:
    return load_model(world.store.path(world.base), "cpu", "float32")


def request(world: World, **watch: Any) -> TrainRequest:
    return request_of(world, world.mixture, spec_with(watch={"every": 1, "rows": 24} | watch))


def watched(world: World, model: Any, asked: TrainRequest) -> Watcher:
    """Return a watcher of `model`, which has the base's weights, as the training sets it up."""
    Objective(model, asked.spec.rehearsal)
    return Watcher(model, world.store, asked)


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model


def test_at_the_base_nothing_has_moved(world: World) -> None:
    model = base_of(world)
    watcher = watched(world, model, request(world))
    assert abs(watcher.measure(model)["watch/probe_kl"]) < 1e-5


@pytest.mark.parametrize("rows", [5, 24])
def test_the_figures_are_the_whole_divergence_and_the_held_out_loss(world: World, rows: int) -> None:
    """The vocabulary is below the number of tokens that are kept: nothing is left to the drawn tail."""
    model = base_of(world)
    watcher = watched(world, model, request(world, rows=rows, held_out_rows=rows))
    found = watcher.measure(moved(model))
    sample = read_rows(world.store.path(world.sample), "corpus", ["token_ids"])[:rows]
    parts = divergence(base_of(world), model, [row["token_ids"] for row in sample])
    kl = sum(part.kl for part in parts) / sum(part.num_tokens for part in parts)
    assert kl > 1e-3
    assert found["watch/probe_kl"] == pytest.approx(kl, rel=1e-4)
    assert found["watch/target_loss"] == pytest.approx(held_out_loss(world, model, rows), rel=1e-5)


def held_out_loss(world: World, model: Any, count: int) -> float:
    """Return the mean -log p per response token."""
    nats, tokens = losses_of(world, model, count)
    return float(nats.sum() / tokens.sum())


@torch.no_grad()
def losses_of(world: World, model: Any, count: int) -> tuple[Any, Any]:
    """Return the summed -log p of each held-out response, and its tokens."""
    nats, tokens = np.zeros(count), np.zeros(count)
    for i, row in enumerate(read_rows(world.store.path(world.target), "held_out")[:count]):
        law_TV = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        for t, counted in enumerate(row["supervised"]):
            if counted:
                nats[i], tokens[i] = nats[i] - float(law_TV[t - 1, row["token_ids"][t]]), tokens[i] + 1
    return nats[tokens > 0], tokens[tokens > 0]


def test_the_divergence_does_not_depend_on_micro_batches(world: World) -> None:
    values = []
    for most in (1, 40, 1000):
        model, asked = base_of(world), request(world)
        asked = asked.model_copy(update={"machine": asked.machine.model_copy(update={"micro_batch_tokens": most})})
        watcher = watched(world, model, asked)
        values.append(watcher.measure(moved(model))["watch/probe_kl"])
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-5)


def test_each_figure_has_the_error_of_its_change_since_the_first_look(world: World) -> None:
    model = base_of(world)
    watcher = watched(world, model, request(world, rows=12, held_out_rows=9))
    watcher.measure(model)
    before = losses_of(world, model, 9)
    found = watcher.measure(moved(model))
    sample = read_rows(world.store.path(world.sample), "corpus", ["token_ids"])[:12]
    parts = divergence(base_of(world), model, [row["token_ids"] for row in sample])
    kl, tokens = (np.array([getattr(part, name) for part in parts]) for name in ("kl", "num_tokens"))
    assert found["watch_error/probe_kl"] == pytest.approx(error_of_ratio(kl, tokens), rel=1e-3)
    after = losses_of(world, model, 9)
    assert found["watch_error/target_loss"] == pytest.approx(error_of_ratio(after[0] - before[0], after[1]), rel=1e-3)


def test_scores_and_perplexities_have_errors_in_their_own_unit() -> None:
    scored = pd.Series([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    first, then = Look(4 / 6, scored), Look(3 / 5, scored.drop(5) - [1, 0, 0, 0, 0])  # one lost, one no longer scored
    assert then.error_since(first) == pytest.approx(error_of_scores(np.array([-1.0, 0, 0, 0, 0]), 1.0))
    nats, words = pd.Series([30.0, 50.0, 41.0, 44.0]), pd.Series([10.0, 20.0, 15.0, 14.0])
    risen = nats + np.array([0.1, 0.2, 0.0, 0.1])
    ppl = [np.exp(total.sum() / 50) for total in (nats, risen)]  # of 50 words, not 59 tokens
    slope = ppl[1] * np.log(ppl[1]) / ((nats.sum() + 0.4) / words.sum())
    looks = [Look(ppl[0], nats, words), Look(ppl[1], risen, words, slope)]
    assert looks[1].value - looks[0].value == pytest.approx(slope * 0.4 / 59, rel=0.01)
    expected = slope * error_of_ratio(np.array([0.1, 0.2, 0.0, 0.1]), np.array([10.0, 20.0, 15.0, 14.0]))
    assert looks[1].error_since(looks[0]) == pytest.approx(expected)


def test_looking_changes_nothing(world: World) -> None:
    model = base_of(world)
    watcher = watched(world, model, request(world))
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert watcher.measure(model) == watcher.measure(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    watcher.measure(model)
    assert not model.training


def test_benchmarks_are_scored_under_their_own_names(world: World) -> None:
    asked = request(world)
    watch = Watched(sample=world.sample, target=world.target, benchmarks=(Benchmark(name="tiny_rev", limit=3),))
    model = base_of(world)
    watcher = watched(world, model, asked.model_copy(update={"watched": watch}))
    state = torch.get_rng_state()
    assert watcher.measure(model)["watch/tiny_rev/exact_match"] == 0.0  # a random model
    assert torch.equal(torch.get_rng_state(), state)
