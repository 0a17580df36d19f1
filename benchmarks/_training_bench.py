"""What the contenders of the training benchmark share: the artifacts they train on, and one training's request."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from cfsd.machine import Machine
from cfsd.store.artifact import Artifact, Store
from cfsd.train.spec import TrainRequest, TrainSpec

NEVER = 1_000_000
LEARNING_RATE = 3e-4
Answer = dict[str, Any]


class Bench(NamedTuple):
    """What `prepare` made, in one store."""

    store: Store
    base: Artifact
    corpus: Artifact
    probe: Artifact  # with MOST_TOP log-probabilities a token
    mixture: Artifact
    single: Artifact  # one target row and one rehearsal row to a batch

    @classmethod
    def at(cls, data: Path) -> "Bench":
        """Read what lies in `data`."""
        found = json.loads((data / "bench.json").read_text())
        return cls(Store(data), *(Artifact.model_validate(found[name]) for name in cls._fields[1:]))


def request_of(bench: Bench, spec: TrainSpec, mixture: str = "mixture", **machine: Any) -> TrainRequest:
    """Return the request that the process that trains gets; `machine` are settings other than the default ones."""
    return TrainRequest(
        home=bench.store.home,
        base=bench.base,
        mixture=getattr(bench, mixture),
        corpus=bench.corpus if spec.rehearsal.reads_corpus() else None,
        spec=spec,
        machine=Machine(device="cpu", checkpoint_steps=NEVER, **machine),
    )
