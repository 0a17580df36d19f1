"""Bring a model into the store: linked, downloaded, dequantised or, for `tiny`, unpacked."""

from cfsd.artifact import Draft
from cfsd.checkpoint import Checkpoint, fetch
from cfsd.machine import Machine
from tasks._stage import stage


@stage("fetch", "model")
def fetch_model(draft: Draft, checkpoint: Checkpoint, machine: Machine) -> None:
    """Make a transformers folder of the checkpoint; see `cfsd.checkpoint`."""
    machine.settle()
    fetch(checkpoint, draft)
