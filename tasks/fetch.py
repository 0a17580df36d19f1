"""Bring a model into the store: linked, downloaded, dequantised or, for `tiny`, made from its committed weights."""

from cfsd.machine import Machine
from cfsd.model.checkpoint import Checkpoint
from cfsd.stages import FETCH
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


def fetch_model(checkpoint: Checkpoint, machine: Machine) -> Artifact:
    """Make a transformers folder of the checkpoint; a plan knows of one that is not made if it has a chat template."""
    base = _fetch_model(checkpoint, machine)
    known = {} if base.content else {"chat_template": checkpoint.has_chat_template()}
    return base.model_copy(update={"metadata": base.metadata | known})


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
