"""Reject corpus rows, with reasons; by default none."""

from cfsd.artifact import Artifact, Draft
from cfsd.filter import FilterSpec, filter_rows
from cfsd.machine import Machine
from tasks._stage import stage


@stage("filter", "corpus")
def filter_corpus(draft: Draft, corpus: Artifact, spec: FilterSpec, machine: Machine) -> None:
    """Part the corpus into accepted rows and rejects; see `cfsd.filter`."""
    filter_rows(draft.store.path(corpus), spec, draft)
