"""Several targets in turn: the R matrix and the figures that are computed from it, with their definitions.

Sources disagree in sign and denominator, so no figure here comes without its definition.
Stage 0 is the base, stage t the model after training through target t; T targets in all.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, FiniteFloat

from cfsd.statistics.figures import Figure, figure_of, mean_of
from cfsd.statistics.forgetting import BenchmarkForgetting
from cfsd.statistics.intervals import Floats

OF_TARGETS = {
    "matrix": "R[t, j]: held-out score of target j after training through target t; t = 0 is the base. Losses count "
    "as minus the loss, so that more is better.",
    "backward_transfer": "1/(T-1) * sum over j < T of (R[T, j] - R[j, j]); negative: earlier targets became worse.",
    "average_forgetting": "1/(T-1) * sum over j < T of (max of R[l, j] over the stages 1 <= l < T at which it was "
    "measured, minus R[T, j]) (Chaudhry et al. 2018); positive: worse than at its best. The best of several is above "
    "its own mean by chance, so that this figure is above 0 on average even where nothing was lost.",
}
OF_GENERAL = {
    "final": "general benchmark: score at stage 0 minus score at stage T, sign turned so that positive is worse.",
    "worst": "general benchmark: the largest of (score at stage 0 minus score at stage t) over 1 <= t <= T, positive "
    "is worse. As the largest of T it is above 0 by chance, and has no interval.",
}


class Continual(BaseModel):
    """The R matrix of the targets and its figures, which are None where T is 1.

    `matrix`: T+1 rows of T scores, more is better, None where not measured. `transfer`, `forgetting`: the terms of
    the two sums, one for each target but the last. `definitions`: one for every figure, to be printed with it.
    """

    model_config = ConfigDict(frozen=True)

    targets: tuple[str, ...]
    unit: str
    matrix: tuple[tuple[float | None, ...], ...]
    transfer: tuple[FiniteFloat, ...]
    forgetting: tuple[FiniteFloat, ...]
    backward_transfer: Figure | None
    average_forgetting: Figure | None
    definitions: dict[str, str] = OF_TARGETS


class Stability(BaseModel):
    """One general benchmark over the stages; `scores` from stage 0 to T, `worst` at stage `worst_stage`."""

    model_config = ConfigDict(frozen=True)

    benchmark: str
    metric: str
    scores: tuple[FiniteFloat, ...]
    final: Figure
    worst: FiniteFloat
    worst_stage: int
    definitions: dict[str, str] = OF_GENERAL


def continual(
    targets: Sequence[str],
    scores: ArrayLike,
    *,
    higher_is_better: bool,
    unit: str,
    changes: Sequence[Figure] = (),
) -> Continual:
    """Return how well earlier targets are remembered, from `scores`: stages 0 to T by targets 1 to T, or NaN.

    Every target is needed from its own stage on. `changes`: R[T, j] - R[j, j] for each target but the last, positive
    = better, paired over its held-out rows. They give backward transfer its interval, the targets' rows being
    independent. Average forgetting has none, since it picks the best stage by the same rows.

    Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840 section 2 (R, backward transfer); Chaudhry et al. 2018,
    arXiv:1801.10112 section 3 (forgetting).
    Differs: a stage 0 row is in the matrix and never counts; stages before the target's own count where measured.

    Raises: ValueError for a shape other than (T+1, T), a missing score, or changes that are not those of `scores`.
    """
    R = _checked(targets, scores) * (1.0 if higher_is_better else -1.0)
    last = len(targets)
    transfer = np.array([R[last, j] - R[j + 1, j] for j in range(last - 1)])
    lost = np.array([np.nanmax(R[1:last, j]) - R[last, j] for j in range(last - 1)])
    return Continual(
        targets=tuple(targets),
        unit=unit,
        matrix=tuple(tuple(None if np.isnan(score) else float(score) + 0.0 for score in row) for row in R),
        transfer=tuple(transfer + 0.0),
        forgetting=tuple(lost + 0.0),
        backward_transfer=_backward_transfer(transfer, changes, unit) if last > 1 else None,
        average_forgetting=figure_of(lost.mean(), None, unit) if last > 1 else None,
    )


def _checked(targets: Sequence[str], scores: ArrayLike) -> Floats:
    R, last = np.asarray(scores, dtype=np.float64), len(targets)
    if not last or R.shape != (last + 1, last):
        raise ValueError(
            f"scores have the shape {R.shape}; {last} targets need {(last + 1, last)}: stages 0 to T by targets"
        )
    needed = np.tril(np.ones((last + 1, last), dtype=bool), -1)
    missing = np.argwhere((needed & ~np.isfinite(R)) | np.isinf(R))
    if len(missing):
        stage, target = missing[0]
        raise ValueError(
            f"the score of target {targets[target]} at stage {stage} is {R[stage, target]}; every target is scored "
            f"from its own stage on ({len(missing)} such in all)"
        )
    return R


def _backward_transfer(transfer: Floats, changes: Sequence[Figure], unit: str) -> Figure:
    if not changes:
        return figure_of(transfer.mean(), None, unit)
    values = np.array([change.value for change in changes])
    if values.shape != transfer.shape or not np.allclose(values, transfer, rtol=1e-4, atol=1e-6):
        raise ValueError(f"changes {values} are not R[T, j] - R[j, j] of the scores, {transfer} (positive = better)")
    mean = mean_of(changes, unit)
    return figure_of(transfer.mean(), None, unit) if mean.low is None else mean


def stability(stages: Sequence[BenchmarkForgetting]) -> Stability:
    """Return how one general benchmark held, from its comparison with the base at each of the stages 1 to T.

    The base's score is that on the last stage's documents: a metric that does not apply to some answers compares
    other documents at each stage.

    Raises: ValueError without stages, or for several benchmarks or metrics.
    """
    kinds = {(stage.benchmark, stage.metric) for stage in stages}
    if len(kinds) != 1:
        raise ValueError(f"{len(stages)} stages of {len(kinds)} kinds {sorted(kinds)}; give one benchmark and metric")
    lost = [stage.forgetting.value for stage in stages]
    worst = int(np.argmax(lost))
    return Stability(
        benchmark=stages[0].benchmark,
        metric=stages[0].metric,
        scores=(stages[-1].base, *(stage.tuned for stage in stages)),
        final=stages[-1].forgetting,
        worst=lost[worst],
        worst_stage=worst + 1,
    )


def described(figures: Continual | Stability) -> str:
    """Return the figures as lines of text, each with its definition."""
    lines = [f"{name}: {_shown(figures, name)}\n  {text}" for name, text in figures.definitions.items()]
    title = figures.benchmark if isinstance(figures, Stability) else f"{len(figures.targets)} targets, {figures.unit}"
    return "\n".join([title, *lines])


def _shown(figures: Continual | Stability, name: str) -> str:
    value = getattr(figures, name)
    if name == "matrix":
        rows = (" ".join("-" if score is None else f"{score:.4g}" for score in row) for row in value)
        return "".join(f"\n  stage {stage}: {row}" for stage, row in enumerate(rows))
    if value is None:
        return "none with a single target"
    if name == "worst" and isinstance(figures, Stability):
        return f"{value:.4g} at stage {figures.worst_stage}"
    interval = "" if value.low is None else f" ({value.low:.4g} to {value.high:.4g})"
    return f"{value.value:.4g}{interval} {value.unit}"
