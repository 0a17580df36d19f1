"""Which settings need less memory, with the values that they have in a stage's request."""

import json
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple


class Remedy(NamedTuple):
    """What to do with a setting, where a request holds it, and at which values doing so would change something."""

    setting: str
    path: str  # in the request
    advice: str
    helps: Callable[[Any], bool] = lambda now: True


SHARD = "set to shard, with machine.training_processes above 1 on CUDA, without LoRA"
TRAINING = (
    Remedy("machine.micro_batch_tokens", "machine.micro_batch_tokens", "lower", lambda now: now > 1),
    Remedy("machine.gradient_checkpointing", "machine.gradient_checkpointing", "set to true", lambda now: not now),
    Remedy("machine.sharding", "machine.sharding", SHARD, lambda now: now == "replicate"),
    Remedy("machine.training_processes", "machine.training_processes", "raise, when sharded"),
    Remedy("train.methods.lora.rank", "spec.methods.lora.rank", "set to 16, for example", lambda now: not now),
    Remedy("train.rehearsal.reference", "spec.rehearsal.reference", "set to stored", lambda now: now == "base"),
    Remedy(
        "train.methods.target_divergence.reference",
        "spec.methods.target_divergence.reference",
        "set to stored",
        lambda now: now == "base",
    ),
)
SAMPLING = (
    Remedy("machine.sampling_rows", "job.machine.sampling_rows", "lower", lambda now: now > 1),
    Remedy("generate.length", "job.spec.length", "lower"),
)


def memory_remedies(request: str) -> str:
    """Return which settings need less memory, as a clause for an error message, from the request of a stage."""
    settings = json.loads(request)
    samples = "job" in settings
    advice = [_advice(remedy, settings) for remedy in (SAMPLING if samples else TRAINING)]
    return "what helps: " + "; ".join([*filter(None, advice), *([] if samples else ["target.max_length: lower"])])


def _advice(remedy: Remedy, settings: dict[str, Any]) -> str | None:
    now = reduce(lambda part, name: part[name], remedy.path.split("."), settings)
    return f"{remedy.setting} (now {json.dumps(now)}): {remedy.advice}" if remedy.helps(now) else None
