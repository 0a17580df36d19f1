"""Golden numbers of what is computed in floating point: trainings of three steps, merging, Fisher matrix, selection,
measurements; and faults, planted one by one, that each make the comparison fail.

Rounding differs between machines, so numbers are compared within tolerances far below what any fault changes.

python -m tests.test_golden_numbers        # writes tests/golden/numbers.json anew
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cfsd.evaluate.divergence import score_probe, score_target_divergence
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.evaluate.stage import score_target
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.stage import generate
from cfsd.merge.budget import keep_budget
from cfsd.merge.spec import MergeSpec
from cfsd.merge.stage import merge
from cfsd.mix.stage import mix
from cfsd.select.embed import embed, open_embedding
from cfsd.select.spec import SelectSpec
from cfsd.select.stage import select
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.journal import read_metrics
from cfsd.store.tables import read_rows
from cfsd.train.batches.global_batches import GlobalBatch
from cfsd.train.loss.objective import Losses
from cfsd.train.methods.ewc import FisherSpec
from cfsd.train.methods.fisher import FILE, fisher
from cfsd.train.spec import RehearsalSpec, TrainRequest, TrainSpec
from cfsd.train.trainer import fit
from tests.test_golden import GOLDEN, MACHINE, Stages
from tests.train.test_train import signals_given_back

pytestmark = pytest.mark.processes
__all__ = ["signals_given_back"]
NUMBERS = GOLDEN / "numbers.json"
CLOSE = 2e-3  # relative; other instruction sets and threads change up to 5e-5

TRAINED = {"learning_rate": 1e-2, "epochs": 1, "seed": 0, "clip_norm": 3.0, "schedule": "linear"}  # clips some steps
KL = {"loss": "kl", "tail": "sampled"}
TRAININGS: dict[str, dict[str, Any]] = {
    "nll": {},
    "kl stored": {"rehearsal": KL},
    "kl live": {"rehearsal": {"loss": "kl", "reference": "base"}},
    "budget": {"rehearsal": {"loss": "kl", "reference": "base", "budget": 0.008}},  # steered from both sides
    "l2": {"methods": {"l2": {"weight": 0.5}}},
    "ewc": {"methods": {"ewc": {"weight": 5.0, "rows": 8}}},
    "lora": {"methods": {"lora": {"rank": 2}}},
}
FIGURES = ("loss", "target_loss", "rehearsal_loss", "gradient_norm", "rehearsal_weight", "divergence")


def version_of(name: str) -> list[int]:
    """Return the versions of the specs whose code makes these numbers."""
    own: dict[str, type[Spec]] = {
        "merge": MergeSpec, "merge to a budget": MergeSpec, "fisher": FisherSpec, "select": SelectSpec,
        "evaluate": EvaluateSpec,
    }  # fmt: skip
    return [own.get(name, TrainSpec).version, *([RehearsalSpec.steering] if name == "budget" else [])]


class Numbers:
    """Makes each output when it is asked for, all of them from the same few artifacts."""

    def __init__(self, folder: Path) -> None:
        stages = Stages(folder)
        self.store, self.base, self.target, self.probe = stages.store, stages.base, stages.target, stages.probe
        law = GenerateSpec(rows=24, length=10, seed=0, top_logprobs=4, tail_samples=0)
        self.corpus = self.make("corpus", "top", lambda draft: generate(self.base, None, law, draft, MACHINE))
        folders, spec = (stages.store.path(stages.target), stages.store.path(self.corpus)), stages.mixing
        self.mixture = self.make("mixture", "top", lambda draft: mix(*folders, spec, draft))
        self.fisher = self.make("fisher", "f", partial(self._fisher))
        self.count = 0

    def make(self, kind: str, key: str, work: Callable[[Draft], None]) -> Artifact:
        return self.store.make(kind, key, work)[0]

    def _fisher(self, draft: Draft) -> None:
        fisher(self.base, self.corpus, FisherSpec(rows=8), draft, MACHINE)

    def output(self, name: str) -> dict[str, Any]:
        """Return the numbers of one output, computed anew."""
        self.count += 1
        others: dict[str, Callable[[], dict[str, Any]]] = {
            "merge": self.merged, "merge to a budget": self.merged_to_a_budget, "fisher": self.fishers,
            "select": self.selected, "evaluate": self.evaluated,
        }  # fmt: skip
        return others[name]() if name in others else self.training(name)

    def trained(self, name: str) -> Artifact:
        spec = TrainSpec.model_validate(TRAINED | TRAININGS[name])
        request = TrainRequest(
            home=self.store.home, base=self.base, mixture=self.mixture, spec=spec, machine=MACHINE,
            corpus=self.corpus if spec.rehearsal.reads_corpus() else None,
            fisher=self.fisher if spec.methods.ewc.is_on() else None,
        )  # fmt: skip

        def work(draft: Draft) -> None:
            draft.metadata |= fit(draft.folder, request)

        return self.make("model", f"{name} {self.count}", work)

    def training(self, name: str) -> dict[str, Any]:
        """Return how each weight has changed after three steps, and the figures of each step."""
        model = self.trained(name)
        steps: dict[str, list[float]] = {}
        for record in read_metrics(self.store.path(model)):
            if (figure := record["name"].removeprefix("train/")) in FIGURES:
                steps.setdefault(figure, []).append(record["value"])
        return {"change": self.change(self.store.path(model)), "steps": steps}

    def change(self, folder: Path) -> dict[str, list[float]]:
        start, end = (load_file(place / "model.safetensors") for place in (self.store.path(self.base), folder))
        return {name: sketch(end[name] - start[name]) for name in sorted(start)}

    def merged(self) -> dict[str, Any]:
        folder = self.store.home / f"merged {self.count}"
        folder.mkdir()
        merge(self.store.path(self.base), self.store.path(self.trained("nll")), 0.3, folder, "cpu")
        return {"change": self.change(folder)}

    def merged_to_a_budget(self) -> dict[str, Any]:
        tuned, spec = self.trained("nll"), MergeSpec(budget=0.01)
        found = self.make(
            "scores", f"alpha {self.count}", lambda d: keep_budget(self.base, tuned, (self.probe,), spec, d, MACHINE)
        )
        return {name: [found.metadata[name]] for name in ("alpha", "control_kl", "control_kl_at_most")}

    def fishers(self) -> dict[str, Any]:
        made = self.make("fisher", f"f {self.count}", self._fisher)
        return {name: sketch(tensor) for name, tensor in sorted(load_file(self.store.path(made) / FILE).items())}

    def selected(self) -> dict[str, Any]:
        vectors = self.make(
            "embedding", f"e {self.count}", lambda draft: embed(self.base, self.target, "train", draft, MACHINE)
        )
        array, spec = open_embedding(self.store.path(vectors)), SelectSpec(target_rows=4)
        made = self.make("target", f"selected {self.count}", lambda draft: select(self.target, spec, draft, array))
        kept = [float(row["row_id"]) for row in read_rows(self.store.path(made), "train", ["row_id"])]
        return {"embedding": sketch(torch.tensor(array)), "rows": kept}

    def evaluated(self) -> dict[str, Any]:
        tuned = self.trained("nll")
        scored: dict[str, Callable[[Draft], None]] = {
            "probe": lambda draft: score_probe(self.base, tuned, self.probe, draft, MACHINE),
            "target divergence": lambda draft: score_target_divergence(
                self.base, tuned, self.target, None, draft, MACHINE
            ),
            "target": lambda draft: score_target(tuned, self.target, None, draft, MACHINE),
        }
        made = {name: self.make("scores", f"{name} {self.count}", work).metadata for name, work in scored.items()}
        wanted = ("probe_kl", "probe_kl_sampled", "target_divergence", "loss", "accuracy", "tokens")
        return {
            f"{name}: {figure}": [float(metadata[figure])]  # type: ignore[arg-type]
            for name, metadata in made.items()
            for figure in wanted
            if figure in metadata
        }


def sketch(tensor: Tensor) -> list[float]:
    """Return the norm and two projections: what changes any number by much changes one of them."""
    flat = tensor.double().flatten()
    places = torch.arange(len(flat), dtype=torch.float64)
    return [float(flat.norm()), *(float(flat @ torch.sin(factor * places + 1)) for factor in (1.3, 0.37))]


def numbers_of(output: Any) -> Iterator[tuple[str, list[float]]]:
    """Yield every list of numbers with where it stands."""
    for name, value in output.items():
        yield from [(name, value)] if isinstance(value, list) else ((f"{name} {k}", v) for k, v in numbers_of(value))


def problem_of(stored: dict[str, Any], name: str, found: dict[str, Any]) -> str | None:
    """Return what is wrong with the output `name`, or None."""
    if stored["version"] != version_of(name):
        return f"golden numbers are of versions {stored['version']}: run python -m tests.test_golden_numbers"
    wanted, own = dict(numbers_of(stored["output"])), dict(numbers_of(found))
    if wanted.keys() != own.keys():
        return f"other numbers than before: {sorted(wanted.keys() ^ own.keys())}"
    for place, numbers in wanted.items():
        scale = max(map(abs, numbers))
        if len(numbers) != len(own[place]) or max(map(away, numbers, own[place])) > CLOSE * scale:
            return f"{place} is {own[place]}, was {numbers}: cached artifacts would be stale: raise version"
    return None


def away(one: float, other: float) -> float:
    return abs(one - other)


OUTPUTS = [*TRAININGS, "merge", "merge to a budget", "fisher", "select", "evaluate"]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    return Numbers(tmp_path_factory.mktemp("numbers"))


def compared(numbers: Numbers, name: str) -> str | None:
    return problem_of(json.loads(NUMBERS.read_text())[name], name, numbers.output(name))


@pytest.mark.parametrize("name", OUTPUTS)
def test_numbers_change_only_with_the_version(numbers: Numbers, name: str) -> None:
    assert compared(numbers, name) is None


# Faults: what stands in for the right code, and the output in which it shows.


def caught(numbers: Numbers, name: str) -> None:
    problem = compared(numbers, name)
    assert problem and "cached artifacts would be stale" in problem, problem


@pytest.mark.parametrize("name", ["nll", "kl stored", "kl live", "l2"])
def test_a_loss_three_times_as_large_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from cfsd.train.trainer import losses

    def tripled(*args: Any) -> Losses:
        parts = losses(*args)
        return parts._replace(loss=3 * parts.loss)

    monkeypatch.setattr("cfsd.train.trainer.losses", tripled)
    caught(numbers, name)


def test_a_controllers_gain_of_nine_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsd.train.controller.GAIN", 9.0)
    caught(numbers, "budget")


def test_another_aim_of_steering_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsd.train.controller.STEERED_TO", 1.0)
    caught(numbers, "budget")


def test_another_aim_of_merging_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsd.merge.budget.MERGED_TO", 0.85)
    caught(numbers, "merge to a budget")


def test_a_clip_twice_as_high_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    from cfsd.train.trainer import training_arguments

    def doubled(*args: Any) -> Any:
        arguments = training_arguments(*args)
        arguments.max_grad_norm *= 2
        return arguments

    monkeypatch.setattr("cfsd.train.trainer.training_arguments", doubled)
    caught(numbers, "nll")


@pytest.mark.parametrize("part", ["target", "rehearsal"])
def test_a_swapped_pair_of_rows_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    from cfsd.train.batches.loading import plan_batches

    def swapped(*args: Any, **named: Any) -> list[GlobalBatch]:
        plan = plan_batches(*args, **named)
        first, second = (getattr(batch, part) for batch in plan[:2])
        first[-1], second[-1] = second[-1], first[-1]
        return plan

    monkeypatch.setattr("cfsd.train.batches.loading.plan_batches", swapped)
    caught(numbers, "nll")


def test_merging_the_other_way_round_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsd.merge.stage.interpolated", lambda base, tuned, alpha: base.lerp(tuned, 1 - alpha))
    caught(numbers, "merge")


def test_a_pull_twice_as_strong_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    from cfsd.train.methods.ewc import Ewc
    from cfsd.train.methods.l2 import L2

    for method, name in ((L2, "l2"), (Ewc, "ewc")):
        right = method.pull
        monkeypatch.setattr(method, "pull", lambda self, right=right: right(self)._replace(scale=2 * right(self).scale))
        caught(numbers, name)


def test_a_divergence_in_the_other_direction_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    from cfsd.evaluate.divergence import _chunk

    monkeypatch.setattr("cfsd.evaluate.divergence._chunk", lambda base, tuned: _chunk(tuned, base))
    caught(numbers, "evaluate")


def test_a_fisher_matrix_of_means_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(*args: Any, **_: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(*args)

    monkeypatch.setattr("cfsd.train.methods.fisher.cross_entropy", mean)
    caught(numbers, "fisher")


def test_a_selection_of_the_first_rows_is_caught(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsd.select.stage.match", lambda vectors, center, k, on_progress: list(range(k)))
    caught(numbers, "select")


def write_numbers() -> None:
    with TemporaryDirectory() as folder:
        made = Numbers(Path(folder))
        found = {name: {"version": version_of(name), "output": made.output(name)} for name in OUTPUTS}
    text = json.dumps(json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.7g}")))
    NUMBERS.write_text(text.replace("], ", "],\n").replace("}, ", "},\n") + "\n")


if __name__ == "__main__":
    write_numbers()
