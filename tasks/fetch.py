"""Bring a model into the store: linked, downloaded, dequantised or, for `tiny`, made from its committed weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cfsd.machine import Machine, home
from cfsd.model.checkpoint import Checkpoint
from cfsd.stages import FETCH
from cfsd.store.artifact import Artifact, Draft, Store
from tasks import record
from tasks._stage import stage

_not_made: ContextVar[Artifact | None] = ContextVar("not_made", default=None)


@contextmanager
def planned_on(model: Artifact) -> Iterator[None]:
    """Within the block, of a plan, let the base be a model that another plan is going to make."""
    token = _not_made.set(model)
    try:
        yield
    finally:
        _not_made.reset(token)


def fetch_model(checkpoint: Checkpoint, machine: Machine) -> Artifact:
    """Make a transformers folder of the checkpoint; a plan knows of one that is not made if it has a chat template."""
    base = _fetch_made(made, machine) if (made := _not_made.get()) else _fetch_model(checkpoint, machine)
    known = {} if base.content else {"chat_template": checkpoint.has_chat_template()}
    return base.model_copy(update={"metadata": base.metadata | known})


@stage(FETCH, "model")
def _fetch_made(draft: Draft, model: Artifact, machine: Machine) -> None:
    """Stand in a plan for the fetching of a model that is not there yet."""
    raise NotImplementedError


@stage(FETCH, "model")
def _fetch_model(draft: Draft, checkpoint: Checkpoint, machine: Machine) -> None:
    """Make a transformers folder of the checkpoint; see `cfsd.model.fetching`."""
    from cfsd.model.fetching import fetch

    machine.settle()
    fetch(checkpoint, draft)


def check_model(checkpoint: Checkpoint) -> None:
    """Raise BadInput for a model that `fetch_model` would refuse; what the store holds was found usable before."""
    if checkpoint.kind in ("folder", "hub") and not checkpoint.is_fetched():
        from cfsd.model.fetching import examine

        examine(checkpoint)


def tokenizer_differences(base: Artifact, tuned: Artifact) -> list[str]:
    """Return, and say, where two models are put other prompts by their files: `cfsd.model.tokenizer_difference`."""
    from cfsd.model.tokenizer_difference import read_otherwise

    notes = read_otherwise(Store(home()), base, tuned)
    for note in notes:
        record.say(note)
    return notes
