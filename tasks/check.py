"""Check the corpus against the base before anything is trained on it."""

from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from cfsd.stages import CHECK
from cfsd.store.artifact import Artifact, Draft
from tasks import record
from tasks._stage import stage


def check_corpus(
    base: Artifact, probe: Artifact, corpus: Artifact, mixture: Artifact, spec: GenerateSpec, machine: Machine
) -> Artifact | None:
    """Return the artifact of the checks; None where the corpus has no context-free rows."""
    if not spec.rows or "context-free" not in spec.sources():
        return None
    checked = _check(base, probe, corpus, mixture, machine)
    failed = checked.metadata.get("failed")
    for name, what in failed.items() if isinstance(failed, dict) else ():
        record.say(f"the corpus fails the check of its {name}: {what}")
    return checked


@stage(CHECK, "check", gpu=True)
def _check(
    draft: Draft, base: Artifact, probe: Artifact, corpus: Artifact, mixture: Artifact, machine: Machine
) -> None:
    """Compare first tokens, likelihood and beginnings with the base's own; see `cfsd.evaluate.corpus_check`."""
    from cfsd.evaluate.corpus_check import check

    check(base, probe, corpus, mixture, draft, machine)
