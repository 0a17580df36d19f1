"""Stage train: fine-tune the base model on a mixture, in a process of its own.

python -m cfsd.train DRAFT        what the stage starts; DRAFT holds request.json
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cfsd.artifact import Artifact, Draft
from cfsd.benchmark import Benchmark
from cfsd.controller import AIM
from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.methods import Methods
from cfsd.rehearsal import RehearsalSpec
from cfsd.spec import Spec
from cfsd.watch import WatchSpec


class TrainSpec(Spec):
    """How the base model is fine-tuned."""

    version: ClassVar[int] = 2
    neutral: ClassVar[dict[str, Any]] = {"methods": Methods(), "watch": WatchSpec()}

    learning_rate: NonNegativeFloat = Field(1e-5, description="Peak learning rate of AdamW")
    epochs: PositiveInt = Field(1, description="Passes over the target's training rows")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Of the learning rate, after warm-up; linear and cosine end at 0"
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the steps that warm up")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled decay, towards 0")
    clip_norm: PositiveFloat = Field(1.0, description="Largest norm of a global batch's gradient")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on CPU; weights and optimizer stay in float32"
    )
    seed: NonNegativeInt | None = Field(None, description="Of dropout, if the model has any; empty: the recipe's")
    rehearsal: RehearsalSpec = Field(RehearsalSpec(), description="How the corpus takes part")
    methods: Methods = Field(Methods(), description="What else holds the weights back; default nothing")
    watch: WatchSpec = Field(WatchSpec(), description="What is measured on the way; default nothing")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        steered_to = AIM * (self.rehearsal.budget or 0)
        if self.watch.stop_above and self.watch.stop_above < steered_to:
            raise ValueError(
                f"watch.stop_above {self.watch.stop_above} is below what lambda is steered to, {steered_to:.3g} for "
                f"the rehearsal.budget of {self.rehearsal.budget}: training would end early; raise it or leave it out"
            )
        return self


class Watched(BaseModel):
    """What is measured on the way."""

    sample: Artifact
    target: Artifact
    benchmarks: tuple[Benchmark, ...] = ()


class TrainRequest(BaseModel):
    """What the process that trains is told. What the spec makes no use of is None."""

    home: Path
    base: Artifact
    mixture: Artifact
    corpus: Artifact | None = None
    fisher: Artifact | None = None
    watched: Watched | None = None
    spec: TrainSpec
    machine: Machine


def check_sharding(spec: TrainSpec, machine: Machine) -> None:
    """Raise BadInput where `machine` would shard what cannot be sharded."""
    if machine.resolved_sharding() == "shard" and spec.methods.lora.is_on():
        raise BadInput("machine.sharding is shard, but LoRA's frozen weights are not sharded here: set it to replicate")


def train(request: TrainRequest, draft: Draft) -> None:
    """Write the tuned model as a whole transformers folder. Continues from the draft's last whole checkpoint.

    Raises BadInput, NotFinite, OutOfMemory, Stopped or Crashed.
    """
    from cfsd.checkpoint import release_models
    from cfsd.process import run_in_process

    check_sharding(request.spec, request.machine)
    release_models()
    processes = request.machine.resolved_training_processes()
    draft.facts |= run_in_process("cfsd.train", draft.folder, request.model_dump_json(), processes)


if __name__ == "__main__":
    from cfsd.process import serve_request
    from cfsd.trainer import fit

    serve_request(lambda folder, text: fit(folder, TrainRequest.model_validate_json(text)))
