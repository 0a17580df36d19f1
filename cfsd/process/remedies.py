"""What to set when memory does not suffice, with what it is set to now, as far as the stage's request tells."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Remedy(NamedTuple):
    """A setting, where a request holds it, what to do with it, and whether that would change anything."""

    setting: str
    path: tuple[str, ...]
    advice: str
    helps: Callable[[Any], bool]


TRAINING = (
    Remedy("machine.micro_batch_tokens", ("machine", "micro_batch_tokens"), "lower", lambda now: now > 1),
    Remedy("machine.gradient_checkpointing", ("machine", "gradient_checkpointing"), "set to true", lambda on: not on),
    Remedy(
        "machine.sharding", ("machine", "sharding"),
        "set to shard, with machine.training_processes above 1 on CUDA, without LoRA",
        lambda now: now == "replicate",
    ),
    Remedy("machine.training_processes", ("machine", "training_processes"), "raise, when sharded", lambda _: True),
    Remedy("train.methods.lora.rank", ("spec", "methods", "lora", "rank"), "set to 16, say", lambda rank: not rank),
    Remedy(
        "train.rehearsal.reference", ("spec", "rehearsal", "reference"), "set to stored", lambda now: now == "base"
    ),
    Remedy("target.max_length", (), "lower", lambda _: True),
)  # fmt: skip
SAMPLING = (
    Remedy("machine.sampling_rows", ("job", "machine", "sampling_rows"), "lower", lambda now: now > 1),
    Remedy("generate.length", ("job", "spec", "length"), "lower", lambda _: True),
)
ANY = "lower machine.micro_batch_tokens, machine.sampling_rows, target.max_length or generate.length"


def memory_remedies(request: str) -> str:
    """Return which settings need less memory, as a clause for an error message."""
    try:
        told = json.loads(request)
    except json.JSONDecodeError:
        return ANY
    if not isinstance(told, dict):
        return ANY
    known = SAMPLING if "job" in told else TRAINING if "spec" in told else ()
    advice = [_advice(remedy, told) for remedy in known]
    return "what helps: " + "; ".join(filter(None, advice)) if known else ANY


def _advice(remedy: Remedy, told: dict[str, Any]) -> str | None:
    now: Any = told
    for name in remedy.path:
        if not isinstance(now, dict) or name not in now:
            return None
        now = now[name]
    if not remedy.path:
        return f"{remedy.setting}: {remedy.advice}"
    return f"{remedy.setting} (now {json.dumps(now)}): {remedy.advice}" if remedy.helps(now) else None
