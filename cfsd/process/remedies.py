"""Which settings need less memory, with the values that they have in a stage's request."""

import json
from collections.abc import Callable
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
)
SAMPLING = (
    Remedy("machine.sampling_rows", "job.machine.sampling_rows", "lower", lambda now: now > 1),
    Remedy("generate.length", "job.spec.length", "lower"),
)
ANY = "lower machine.micro_batch_tokens, machine.sampling_rows, target.max_length or generate.length"


def memory_remedies(request: str) -> str:
    """Return which settings need less memory, as a clause for an error message."""
    try:
        settings = json.loads(request)
    except json.JSONDecodeError:
        return ANY
    if not isinstance(settings, dict) or not settings.keys() & {"job", "spec"}:
        return ANY
    advice = [_advice(remedy, settings) for remedy in (SAMPLING if "job" in settings else TRAINING)]
    more = [] if "job" in settings else ["target.max_length: lower"]
    return "what helps: " + "; ".join([*filter(None, advice), *more])


def _advice(remedy: Remedy, settings: dict[str, Any]) -> str | None:
    now: Any = settings
    for name in remedy.path.split("."):
        if not isinstance(now, dict) or name not in now:
            return None
        now = now[name]
    return f"{remedy.setting} (now {json.dumps(now)}): {remedy.advice}" if remedy.helps(now) else None
