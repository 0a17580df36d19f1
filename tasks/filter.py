"""Reject corpus rows, with reasons; by default none."""

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.filter.spec import FilterSpec
from cfsd.machine import Machine
from cfsd.stages import FILTER
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


def filter_corpus(
    corpus: Artifact, target: Artifact, evaluate: EvaluateSpec, spec: FilterSpec, machine: Machine
) -> Artifact:
    """Divide the corpus into accepted rows and rejects; see `cfsd.filter.stage`.

    Target and benchmarks count only if the spec compares with them, and then by their documents, not by how they
    are scored.
    """
    if spec.overlap_words is None:
        return _filter(corpus, None, None, spec, machine)
    documents = tuple(Benchmark(name=b.name, folder=b.folder, task=b.task) for b in evaluate.benchmarks)
    return _filter(corpus, target, EvaluateSpec(benchmarks=documents), spec, machine)


@stage(FILTER, "corpus")
def _filter(
    draft: Draft,
    corpus: Artifact,
    target: Artifact | None,
    benchmarks: EvaluateSpec | None,
    spec: FilterSpec,
    machine: Machine,
) -> None:
    """Reject rows by the rules of `spec`."""
    from cfsd.filter.stage import filter_rows

    texts = None
    if target and benchmarks:
        from cfsd.evaluate.harness.documents import held_back_texts  # lm-eval takes seconds to import

        texts = held_back_texts(draft.store.path(target), benchmarks.benchmarks)
    filter_rows(draft.store.path(corpus), spec, draft, texts)
