"""Stage train: fine-tune the base model on a mixture, in a process of its own.

python -m cfsd.train DRAFT        what the stage starts; DRAFT holds request.json
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cfsd.artifact import Artifact, Draft
from cfsd.machine import Machine
from cfsd.spec import Spec


class TrainSpec(Spec):
    """How the base model is fine-tuned."""

    learning_rate: NonNegativeFloat = Field(1e-5, description="Peak learning rate of AdamW")
    epochs: PositiveInt = Field(1, description="Passes over the target's training rows")
    rehearsal_weight: NonNegativeFloat = Field(
        1.0, description="Lambda: multiplies the rehearsal's mean loss per token; 0 draws no rehearsal row"
    )
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


class TrainRequest(BaseModel):
    """What the process that trains is told."""

    home: Path
    base: Artifact
    mixture: Artifact
    spec: TrainSpec
    machine: Machine


def train(base: Artifact, mixture: Artifact, spec: TrainSpec, draft: Draft, machine: Machine) -> None:
    """Write the tuned model as a whole transformers folder. Continues from the draft's last whole checkpoint.

    Raises NotFinite, OutOfMemory, Stopped or Crashed.
    """
    from cfsd.checkpoint import release_models
    from cfsd.process import run_in_process

    release_models()
    request = TrainRequest(home=draft.store.home, base=base, mixture=mixture, spec=spec, machine=machine)
    draft.facts |= run_in_process("cfsd.train", draft.folder, request.model_dump_json())


if __name__ == "__main__":
    from cfsd.process import serve_request
    from cfsd.trainer import fit

    serve_request(lambda folder, text: fit(folder, TrainRequest.model_validate_json(text)))
