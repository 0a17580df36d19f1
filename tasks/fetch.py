"""Bring a model into the store: linked, downloaded, dequantised, made from committed weights, or an adapter merged."""

from cfsd.machine import Machine
from cfsd.model.adapter import Adapter
from cfsd.model.checkpoint import Checkpoint
from cfsd.stages import FETCH, MERGE_ADAPTER
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


@stage(FETCH, "model")
def fetch_model(draft: Draft, checkpoint: Checkpoint, machine: Machine) -> None:
    """Make a transformers folder of the checkpoint; see `cfsd.model.fetching`."""
    from cfsd.model.fetching import fetch

    machine.settle()
    fetch(checkpoint, draft)


@stage(MERGE_ADAPTER, "model")
def merge_adapter(draft: Draft, base: Artifact, adapter: Adapter, machine: Machine) -> None:
    """Make a whole model of an adapter and its base; see `cfsd.model.adapter_merging`."""
    from cfsd.model.adapter_merging import merge

    machine.settle()
    draft.metadata |= base.metadata | merge(draft.store.path(base), adapter, draft.folder, machine.resolved_device())
