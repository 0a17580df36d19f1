"""Interpolate between base and tuned, with a given weight or the largest that keeps a budget of divergence."""

from collections.abc import Mapping
from typing import Any

from cfsd.machine import Machine
from cfsd.merge.spec import MergeSpec
from cfsd.stages import BUDGET, MERGE
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import inherited, stage


def fit_alpha(
    base: Artifact, tuned: Artifact, controls: Mapping[str, Artifact], spec: MergeSpec, machine: Machine
) -> Artifact | None:
    """Return the largest alpha that keeps every budget, in the metadata of its artifact; None without a budget.

    `controls`: the sample of each mode that has a budget, in the order of the modes.
    """
    if not controls:
        return None
    first, *further = controls.values()
    return _fit_alpha(base, tuned, first, spec, machine, tuple(further) or None)


@stage(BUDGET, "scores", gpu=True)
def _fit_alpha(
    draft: Draft, base: Artifact, tuned: Artifact, control: Artifact, spec: MergeSpec, machine: Machine,
    further: tuple[Artifact, ...] | None = None,
) -> None:  # fmt: skip
    """Find the largest alpha that keeps every budget; see `cfsd.merge.budget`."""
    from cfsd.merge.budget import keep_budget

    keep_budget(base, tuned, (control, *(further or ())), spec, draft, machine)


def merge_model(base: Artifact, tuned: Artifact, decided: Artifact | MergeSpec, machine: Machine) -> Artifact:
    """Return the tuned model itself at alpha 1, else the interpolation; `decided` holds the given or fitted alpha."""
    return tuned if _alpha(decided) == 1 else _merge(base, tuned, decided, machine)


@stage(MERGE, "model")
def _merge(draft: Draft, base: Artifact, tuned: Artifact, decided: Artifact | MergeSpec, machine: Machine) -> None:
    """Make (1 - alpha) x base + alpha x tuned."""
    from cfsd.merge.stage import merge
    from cfsd.model.loading import release_models

    alpha = _alpha(decided)
    assert alpha is not None
    machine.settle()
    release_models()
    found = merge(draft.store.path(base), draft.store.path(tuned), alpha, draft.folder, machine.resolved_device())
    draft.metadata |= inherited(base) | found


def _alpha(decided: Artifact | MergeSpec) -> float | None:
    """Return the tuned model's weight; None in a plan, where it is not fitted yet."""
    known: Any = decided.alpha if isinstance(decided, MergeSpec) else decided.metadata.get("alpha")
    return None if known is None else float(known)
