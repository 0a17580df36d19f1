"""Baseline: what the seeds of a recipe came to, with where that comes from; JSON that a team commits."""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

from cfsd.errors import BadInput
from cfsd.machine import COUNTED_PACKAGES
from cfsd.overrides import validated
from cfsd.recipe import Recipe
from cfsd.statistics.figures import FRACTION, MEAN, NATS, SKEWED
from cfsd.statistics.gate import (
    LEAST_SEEDS,
    LEAST_VALUE,
    Guarded,
    as_factor,
    document_noise,
    document_variance,
    margin_factor_of,
    margin_of,
)

LEAST_MARGIN = {NATS: 0.005, FRACTION: 0.01}  # below this nobody would act
DIGITS = 6
EDITED = 1e-4  # of a margin: rounding is less
NUMBERS = re.compile(r"\[\s+([-+.,\deE\s]*?)\s+\]")
REMEDY = "correct it, or make it anew: --update-baseline"


class UnreadableBaseline(BadInput):
    """A file or a champion's figures that are no baseline, or were edited to what cannot be."""


class Measured(NamedTuple):
    """One figure of one run: sum(sums)/sum(counts), document by document in a fixed order."""

    unit: str
    higher_is_better: bool
    reach: float  # by how much one document may change: 1 of a score from 0 to 1; 0: any amount, as of nats
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    documents: str  # digest of which documents these are
    correction: float | None = None  # 1/(1 - chance) where it counts for the mean
    metric: str = ""  # of a benchmark

    @property
    def value(self) -> float:
        """Return the figure."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def least_spread(self) -> float:
        """Return what one document is worth, by which seeds may be apart although a few of them agree by chance."""
        return self.reach / len(self.sums)


def _mean_parts(runs: Sequence[dict[str, Measured]]) -> dict[str, float]:
    """Return the weight of every benchmark in the mean of chance-corrected forgetting."""
    corrections = [{name: m.correction for name, m in run.items() if m.correction is not None} for run in runs]
    known = set.intersection(*map(set, corrections)) if corrections else set()
    return {name: correction / len(known) for name, correction in corrections[0].items() if name in known}


class Documents(BaseModel):
    """What a figure's documents were, and what each came to, as the mean over seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    sums: tuple[FiniteFloat, ...]
    counts: tuple[FiniteFloat, ...]
    noise: FiniteFloat = Field(description="cfsd.statistics.gate.document_noise, of one seed")


class BaselineFigure(BaseModel):
    """A guarded figure; `margin` may be edited by hand: the worsening that a team lets pass.

    With `margin_is: difference` it is a difference of means in `unit`; with `margin_is: factor`, that of the figures
    in SKEWED, it is how many times the (geometric) mean may be the baseline's: 1.5 is half as much again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str
    metric: str = ""  # of a benchmark; empty, too, in files of before it was kept
    higher_is_better: bool
    margin: FiniteFloat = Field(ge=0)
    margin_is: Literal["difference", "factor"] = "difference"
    least_spread: FiniteFloat = Field(0.0, ge=0)
    values: tuple[FiniteFloat, ...] = Field(min_length=LEAST_SEEDS, description="One per seed")
    documents: Documents | None = None  # None: made of other figures
    parts: dict[str, float] = {}  # figure -> its weight here


class Provenance(BaseModel):
    """Where a baseline comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    commit: str
    date: str
    recipe_digest: str
    versions: dict[str, str]
    machine: str
    replaces: str = ""  # commit and date of the baseline that this one took the place of


class Baseline(BaseModel):
    """Every guarded figure of a recipe over its seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    name: str
    provenance: Provenance
    recipe: dict[str, JsonValue]
    seeds: tuple[int, ...] = Field(min_length=LEAST_SEEDS)
    training_seconds: tuple[FiniteFloat, ...] = ()
    figures: dict[str, BaselineFigure] = Field(min_length=1)
    said: tuple[str, ...] = Field((), exclude=True, description="What a reader must know of how the file was read")

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, content: Any) -> Any:
        """Read margins of SKEWED figures, which were differences in version 1, as the factors that they came to."""
        if not isinstance(content, dict) or content.get("version") != 1 or not isinstance(content.get("figures"), dict):
            return content
        figures, said = dict(content["figures"]), []
        for name in SKEWED & set(figures):
            old = BaselineFigure.model_validate(figures[name])
            factor = _short(as_factor(old.values, old.margin))
            figures[name] = {**figures[name], "margin": factor, "margin_is": "factor"}
            said.append(
                f"the margin of {name}, {old.margin:g} {old.unit} in a baseline of version 1, is read as the factor "
                f"{factor:.3g} that it is of the baseline's mean"
            )
        return content | {"version": 2, "figures": figures, "said": said}

    @model_validator(mode="after")
    def _margins_are_of_their_kind(self) -> Self:
        for name, figure in self.figures.items():
            if name in SKEWED and (figure.margin_is != "factor" or figure.margin < 1):
                raise ValueError(
                    f"{name} is judged by ratios: set margin_is to factor, and margin to how many times the baseline's "
                    f"mean passes, 1 or more, such as 1.5 (given {figure.margin:g}, {figure.margin_is})"
                )
            if name not in SKEWED and figure.margin_is != "difference":
                raise ValueError(f"{name} may be below 0: set margin_is to difference, and margin in {figure.unit}")
        return self

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for name, figure in self.figures.items():
            if len(figure.values) != len(self.seeds):
                raise ValueError(f"{name} has {len(figure.values)} values for {len(self.seeds)} seeds")
            if gone := sorted(set(figure.parts) - set(self.figures)):
                raise ValueError(f"{name} is made of {', '.join(gone)}, which are not among its figures")
        return self

    def edited_margins(self) -> set[str]:
        """Return the figures whose margin is another than the one that their values make."""
        return {
            name
            for name, figure in self.figures.items()
            if not math.isclose(figure.margin, _own_margin(name, figure), rel_tol=EDITED)
        }

    def check_measured(self, names: Iterable[str]) -> None:
        """Raise BadInput unless every guarded figure is among `names`, or made of those."""
        if lacking := sorted({name for name, figure in self.figures.items() if not figure.parts} - set(names)):
            raise BadInput(
                f"the baseline {self.name!r} guards {', '.join(lacking)}, which this recipe does not measure; "
                "measure it, or accept the change with --update-baseline"
            )

    def check_same(self, run: dict[str, Measured]) -> None:
        """Raise BadInput where a figure of `run` is of another metric than the baseline's of that name."""
        for name, figure in self.figures.items():
            if (fresh := run.get(name)) is None:
                continue
            sides = (figure.metric, fresh.metric) if figure.metric and fresh.metric else (figure.unit, fresh.unit)
            self._check_alike(name, *sides)

    def check_metrics(self, metrics: Mapping[str, str | None]) -> None:
        """Raise BadInput, before anything is trained, where figures are to be of other metrics than the baseline's.

        `metrics` are those that a recipe names, None: the benchmark's own, which is known once it is measured.
        """
        for name, metric in metrics.items():
            if metric and name in self.figures and self.figures[name].metric:
                self._check_alike(name, self.figures[name].metric, metric)

    def _check_alike(self, name: str, known: str, fresh: str) -> None:
        if known != fresh:
            raise BadInput(
                f"the baseline {self.name!r} has {name} as {known}, and this recipe measures it as {fresh}; set the "
                "metric back, or accept the change with --update-baseline"
            )


def baseline_of(
    recipe: Recipe, seeds: Sequence[int], runs: Sequence[dict[str, Measured]], seconds: Sequence[float], replaces: str
) -> Baseline:
    """Return the baseline that the runs of `seeds` make. Raises BadInput below 5 seeds."""
    if len(runs) < LEAST_SEEDS:
        raise BadInput(f"a baseline of {len(runs)} seeds; {LEAST_SEEDS} or more are needed: set --seeds {LEAST_SEEDS}")
    figures = {name: _figure(name, [run[name] for run in runs]) for name in runs[0]}
    if parts := _mean_parts(runs):
        figures[MEAN] = _mean(figures, parts)
    return Baseline(
        name=recipe.name,
        provenance=provenance(recipe, replaces),
        recipe=recipe.model_dump(mode="json"),
        seeds=tuple(seeds),
        training_seconds=tuple(round(value, 1) for value in seconds),
        figures=figures,
    )


def with_margins(baseline: Baseline, known: Baseline, names: Iterable[str] | None = None) -> Baseline:
    """Return `baseline` with the margins of `known`, those of `names` alone if given.

    So what follows a champion is not judged more mildly, and what a team decided outlives a new baseline.
    """
    kept = {*known.figures} if names is None else {*names}
    figures = {
        name: figure.model_copy(update={"margin": known.figures[name].margin}) if name in kept else figure
        for name, figure in baseline.figures.items()
    }
    return baseline.model_copy(update={"figures": figures})


def _figure(name: str, runs: Sequence[Measured]) -> BaselineFigure:
    first, values = runs[0], [_short(run.value) for run in runs]
    sums = np.stack([run.sums for run in runs])
    spread = _short(max(run.least_spread for run in runs))
    return BaselineFigure(
        unit=first.unit,
        metric=first.metric,
        higher_is_better=first.higher_is_better,
        margin=_margin(name, first.unit, values, spread, len(first.sums)),
        margin_is="factor" if name in SKEWED else "difference",
        least_spread=spread,
        values=tuple(values),
        documents=Documents(
            digest=first.documents,
            sums=tuple(map(_short, sums.mean(axis=0))),
            counts=tuple(map(_short, first.counts)),
            noise=_short(document_noise(sums, first.counts)),
        ),
    )


def _mean(figures: dict[str, BaselineFigure], parts: dict[str, float]) -> BaselineFigure:
    weighted = np.array([weight * np.array(figures[name].values) for name, weight in parts.items()])
    values = [_short(value) for value in weighted.sum(axis=0)]
    spread = _short(float(np.linalg.norm([w * figures[name].least_spread for name, w in parts.items()])))
    return BaselineFigure(
        unit=FRACTION, higher_is_better=False, margin=_margin(MEAN, FRACTION, values, spread), least_spread=spread,
        values=tuple(values), parts=parts,
    )  # fmt: skip


def _own_margin(name: str, figure: BaselineFigure) -> float:
    documents = len(figure.documents.sums) if figure.documents else None
    return _margin(name, figure.unit, figure.values, figure.least_spread, documents)


def _margin(name: str, unit: str, values: Sequence[float], spread: float, documents: int | None = None) -> float:
    """Return the margin that a figure of these `values` has if nobody edits it; without `documents`, one of a mean."""
    least = LEAST_MARGIN.get(unit, LEAST_MARGIN[FRACTION] * spread * (documents or 1))
    if documents is not None:
        least = max(least, 2 * spread)
    if name in SKEWED:
        return _short(margin_factor_of(values, least=least))
    return _short(margin_of(values, least=least, least_spread=spread))


def guarded(baseline: Baseline, runs: Sequence[dict[str, Measured]]) -> list[Guarded]:
    """Return what the gate is to judge: every figure of the baseline. Raises BadInput where one is not measured."""
    for run in runs:
        baseline.check_measured(run)
        baseline.check_same(run)
    return [_guarded(baseline, name, runs) for name in baseline.figures]


def _guarded(baseline: Baseline, name: str, runs: Sequence[dict[str, Measured]]) -> Guarded:
    figure = baseline.figures[name]
    parts = figure.parts or {name: 1.0}
    return Guarded(
        name=name,
        baseline=figure.values,
        fresh=tuple(sum(weight * run[part].value for part, weight in parts.items()) for run in runs),
        document_variance=sum(weight**2 * _variance(baseline, part, runs) for part, weight in parts.items()),
        num_documents=min(len(runs[0][part].sums) for part in parts),
        same_documents=not {*parts} & {*other_documents(baseline, runs[0])},
        as_ratio=name in SKEWED,
        least_spread=max(figure.least_spread, 0.0 if figure.parts else runs[0][name].least_spread),
        **figure.model_dump(include={"unit", "higher_is_better", "margin"}),
    )


def _variance(baseline: Baseline, name: str, runs: Sequence[dict[str, Measured]]) -> float:
    """Return the part of the documents in the variance of the change, of its logarithm for figures in SKEWED."""
    known, first = baseline.figures[name].documents, runs[0][name]
    if known is None:
        return 0.0
    before, after = np.array(known.sums), np.mean([run[name].sums for run in runs], axis=0)
    noise = known.noise * (1 / len(runs) + 1 / len(baseline.seeds))
    if name in SKEWED:  # a change of the logarithm is one of the share, to first order
        means = [
            max(float(sums.sum() / np.sum(counts)), LEAST_VALUE)
            for sums, counts in ((before, known.counts), (after, first.counts))
        ]
        before, after, noise = before / means[0], after / means[1], noise / means[0] ** 2
    if known.digest == first.documents:
        return document_variance(before, after, first.counts, noise=noise)
    sides = ((before, known.counts), (after, first.counts))
    return sum(document_variance(np.zeros(len(sums)), sums, counts) for sums, counts in sides)


def other_documents(baseline: Baseline, run: dict[str, Measured]) -> list[str]:
    """Return the figures whose documents are not the baseline's, as where the base or a data set changed."""
    figures = baseline.figures.items()
    return [name for name, f in figures if f.documents and name in run and f.documents.digest != run[name].documents]


def provenance(recipe: Recipe, replaces: str = "") -> Provenance:
    """Return where what is made now comes from."""
    return Provenance(
        commit=commit_here(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        recipe_digest=recipe.digest(),
        versions={"python": platform.python_version(), **{name: version(name) for name in COUNTED_PACKAGES}},
        machine=f"{platform.system()} {platform.machine()}",
        replaces=replaces,
    )


def commit_here() -> str:
    """Return the git commit of this code, `+` after it where files differ from it; "unknown" outside of git."""
    folder = Path(__file__).parent.parent
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in `path`. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"there is no baseline at {path}; make it with --update-baseline, or name another: --baseline")
    return parsed(path.read_bytes(), str(path))


def parsed(text: bytes | str, where: str) -> Baseline:
    """Return the baseline that `text` from `where` holds. Raises UnreadableBaseline."""
    try:
        return validated(Baseline, json.loads(text), f"baseline {where}")
    except ValueError as error:  # no JSON, or no text
        raise UnreadableBaseline(f"baseline {where} is not JSON: {error}\n{REMEDY}") from error
    except BadInput as error:
        raise UnreadableBaseline(f"{error}\n{REMEDY}") from error


def check_place(path: Path) -> None:
    """Raise BadInput where no baseline can be written, or where another kind of file would be replaced by it."""
    folder = next(place for place in path.absolute().parents if place.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise BadInput(f"a baseline cannot be written to {path}: {folder} is not a folder that can be written to")
    if path.exists() and not (path.is_file() and path.suffix == ".json"):
        raise BadInput(f"{path} is there and is no baseline; give a file that is new or ends in .json")


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write `baseline` so that a reader sees an old or a new file, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(as_text(baseline))
    temporary.replace(path)


def as_text(baseline: Baseline) -> str:
    """Return `baseline` as JSON, lists of numbers on one line each."""
    text = baseline.model_dump_json(indent=1)
    return NUMBERS.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"


def _short(value: float) -> float:
    return float(f"{float(value):.{DIGITS}g}")
