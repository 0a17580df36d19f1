"""In float64 two processes that train through the trainer end in the weights of one at the same global batches.

No recipe asks for float64. So the base lies in the store in float64, and the one call by which the trainer loads it is
replaced, here and in both ranks. All else is as ever: batches, DDP over gloo, penalties, clipping, AdamW, saving.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cfsd.machine import Machine
from cfsd.model.loading import load_model
from cfsd.process.child import run_in_process
from cfsd.store.artifact import Store
from cfsd.store.journal import read_metrics
from cfsd.train import trainer
from cfsd.train.batches.loading import batches_of
from cfsd.train.spec import TrainSpec
from tests.conftest import ROOT, save_model, write_rows
from tests.train.test_train import World, distance, request_of, signals_given_back, trained, world_in

ONE = Machine(device="cpu", threads=1, micro_batch_tokens=1000)  # a whole global batch in one pass
FORMS: dict[str, dict[str, Any]] = {
    "nll": {"rehearsal": {}},
    "kl": {
        "rehearsal": {"loss": "kl"},
        "clip_norm": 100.0,
        "methods": {"l2": {"weight": 1.0}, "dft": {"power": 1.0}, "target_divergence": {"weight": 0.5}},
    },
}
CUTS = {"one pass": 160, "several passes": 96}  # of each process: the latter accumulate, without exchanging gradients
CASES = [f"{form}, {cut}" for form in FORMS for cut in CUTS]
PLANTED = "kl, planted"
LEAST = 1e-9  # relative, of weights
__all__ = ["signals_given_back"]

RANKS = """
import json
from cfsd.train import trainer
from cfsd.model.loading import load_model
from cfsd.process.child import serve_request
from cfsd.train.spec import TrainRequest

own = trainer.GlobalBatchTrainer._backward
trainer.load_model = lambda folder, device, _: load_model(folder, device, "float64")

def averaged(self, *given):  # the mistake: DDP's mean over processes is taken for their sum
    self.data.world, world = 1, self.data.world
    found = own(self, *given)
    self.data.world = world
    return found

def work(folder, text):
    for name, request in json.loads(text).items():
        trainer.GlobalBatchTrainer._backward = averaged if "planted" in name else own
        (folder / name).mkdir(exist_ok=True)
        trainer.fit(folder / name, TrainRequest.model_validate(request))
    return {}

serve_request(work)
"""


class Found(NamedTuple):
    weights: dict[str, Tensor]
    losses: list[float]
    norms: list[float]


def spec_of(case: str) -> TrainSpec:
    return TrainSpec.model_validate({"learning_rate": 1e-3, "epochs": 2, "seed": 0} | FORMS[case.split(", ")[0]])


def two_of(case: str) -> Machine:
    most = CUTS.get(case.split(", ")[1], CUTS["several passes"])
    return ONE.model_copy(update={"training_processes": 2, "micro_batch_tokens": most})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    model = save_model(folder / "model")
    load_model(model, "cpu", "float64").save_pretrained(model)
    return world_in(Store(folder / "data"), model, write_rows(folder / "rows.jsonl", count=48))


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What two processes found, all cases one after the other in the same two."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "ranks.py").write_text(RANKS)
    cases = {case: request_of(world, world.mixture, spec_of(case), two_of(case)) for case in [*CASES, PLANTED]}
    text = json.dumps({case: request.model_dump(mode="json") for case, request in cases.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        run_in_process("ranks", folder, text, processes=2)
    return {case: found_in(folder / case) for case in cases}


def found_in(folder: Path) -> Found:
    records = list(read_metrics(folder))
    losses, norms = ([r["value"] for r in records if r["name"] == f"train/{n}"] for n in ("loss", "gradient_norm"))
    return Found(load_file(folder / "model.safetensors"), losses, norms)


@pytest.fixture(scope="module")
def one(world: World) -> dict[str, Found]:
    """What one process found, by form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "load_model", lambda folder, device, _: load_model(folder, device, "float64"))
        models = {form: trained(world, form, world.mixture, spec_of(form), ONE) for form in FORMS}
    return {form: found_in(world.store.path(model)) for form, model in models.items()}


def test_the_cuts_are_what_they_are_called(world: World) -> None:
    """Three micro-batches in two processes: the second gets an empty one, so that both exchange gradients as often."""

    def micro_batches(max_tokens: int, rank: int, processes: int) -> set[int]:
        shares = batches_of(world.store, world.mixture, spec_of("nll"), max_tokens, None, rank, processes)
        return {len(shares[step].micro_batches) for step in range(len(shares))}

    assert micro_batches(ONE.micro_batch_tokens, 0, 1) == {1}
    for cut, count in (("one pass", 2), ("several passes", 3)):
        assert micro_batches(CUTS[cut], 0, 1) == {count}
        assert micro_batches(CUTS[cut], 0, 2) == micro_batches(CUTS[cut], 1, 2) == {-(-count // 2)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_in_the_weights_of_one(case: str, one: dict[str, Found], two: dict[str, Found]) -> None:
    wanted, found = one[case.split(", ")[0]], two[case]
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float64}
    assert distance(found.weights, wanted.weights) < LEAST
    assert found.losses == pytest.approx(wanted.losses, rel=LEAST)
    assert found.norms == pytest.approx(wanted.norms, rel=LEAST)  # AdamW alone would hardly notice a wrong scale
    assert len(found.norms) == 10


@pytest.mark.slow
def test_a_mean_over_processes_would_be_noticed(one: dict[str, Found], two: dict[str, Found]) -> None:
    assert distance(two[PLANTED].weights, one["kl"].weights) > 1e-4
