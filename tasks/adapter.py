"""Merge an adapter into its base, so that the two can be measured as one model."""

from cfsd.machine import Machine
from cfsd.model.adapter import Adapter
from cfsd.stages import MERGE_ADAPTER
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import inherited, stage


@stage(MERGE_ADAPTER, "model")
def merge_adapter(draft: Draft, base: Artifact, adapter: Adapter, machine: Machine) -> None:
    """Make a whole model of an adapter and its base; see `cfsd.model.adapter_merging`."""
    from cfsd.model.adapter_merging import merge

    machine.settle()
    merged = merge(draft.store.path(base), adapter, draft.folder)
    draft.metadata |= inherited(base) | merged
