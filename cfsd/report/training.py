"""What happened while a model was trained: curves, worst moments and costs, read from its artifact alone."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cfsd.generate.spec import UNPROMPTED
from cfsd.report.run_record import RunRecord
from cfsd.report.table import POINTS, sweep_of
from cfsd.statistics.figures import FRACTION, NATS
from cfsd.statistics.null_band import null_band
from cfsd.store.artifact import Artifact, Store
from cfsd.store.journal import read_metrics
from cfsd.train.spec import WATCH, WATCH_ERROR

ALONG = "rehearsal kl along"
CURVE_POINTS = 150  # a longer curve is averaged over neighbouring steps
LOSS_WORDS = ("loss", "perplexity", "nll", "bits", "brier")  # in the name of a metric that is better when lower
COST_METADATA = (
    "steps", "tokens", "target_tokens", "rehearsal_tokens", "peak_memory", "most_row_views", "stopped_at_step",
)  # fmt: skip

Series = dict[int, float]  # step -> value
Line = tuple[list[float], list[float]]  # steps, values


class Panel(NamedTuple):
    """One figure of training: a line per trained model, under the name of its first variant.

    `levels` are the budgets to be drawn across it, by the same names; `bands` reach from the worse of a line's two ends
    to where its worst moment may lie by chance.
    """

    name: str
    label: str
    lines: dict[str, Line]
    is_log: bool = False
    levels: dict[str, float] = {}
    bands: dict[str, tuple[float, float]] = {}


def metrics_of(store: Store, artifact: Artifact) -> dict[str, Series]:
    """Return each metric of the artifact's training by step, in order; values that are not numbers are left out."""
    metrics: dict[str, Series] = {}
    for record in read_metrics(store.path(artifact, weights=False)):
        if math.isfinite(record["value"]):
            metrics.setdefault(record["name"], {})[record["step"]] = record["value"]
    return {name: dict(sorted(series.items())) for name, series in metrics.items()}


def training_of(store: Store, run_record: RunRecord) -> dict[str, Any] | None:
    """Return what training cost: seconds, and what is known of `COST_METADATA`."""
    tuned = run_record.artifacts.get("tuned")
    if tuned is None or "steps" not in tuned.metadata:
        return None  # a model that came from outside
    costs = {name: tuned.metadata[name] for name in COST_METADATA if tuned.metadata.get(name) is not None}
    final = run_record.artifacts.get("final", tuned)  # merged, it was rounded anew
    costs |= {name: final.metadata[name] for name in ("rounding_undid",) if name in final.metadata}
    alone = {step.artifact.key: step.seconds for step in run_record.steps}
    return {
        "seconds": float(store.manifest(tuned)["seconds"]), "seconds_of_all_steps": sum(alone.values()), **costs,
        **_weights(store, run_record),
    }  # fmt: skip


def _weights(store: Store, run_record: RunRecord) -> dict[str, float]:
    """Return the final λ of token means, as we train, and of whole strings, as in the paper's formula.

    Source: Bansal and Sanghavi 2025, arXiv:2505.13811, whose sum is over strings. `string_weight` = λ x mean
    target tokens of a row / mean rehearsal tokens of a row.
    """
    mixture = run_record.artifacts.get("mixture")
    weight = last_weight(store, run_record)
    if weight is None or mixture is None or not mixture.metadata.get("rehearsal_tokens"):
        return {}
    counts: dict[str, Any] = mixture.metadata
    target, rehearsal = (counts[f"{source}_tokens"] / counts[f"{source}_rows"] for source in ("target", "rehearsal"))
    return {"rehearsal_weight": weight, "string_weight": weight * target / rehearsal}


def last_weight(store: Store, run_record: RunRecord) -> float | None:
    """Return the weight of rehearsal in the last step of training; None where none was recorded."""
    weights = metrics_of(store, run_record.artifacts["tuned"]).get("train/rehearsal_weight", {})
    return next(reversed(weights.values()), None)


def stability_gap(store: Store, run_record: RunRecord) -> dict[str, dict[str, Any]] | None:
    """Return per watched measure its value at the start, at its worst and at the end of training.

    `gap`: by how much the worst moment was worse than both the start and the end, at least 0. `looks`: how often it was
    measured. `null_band`: what 95 % of gaps stay below where nothing was lost on the way; None for a training that did
    not record the errors of its looks.
    Source: De Lange et al. 2022, arXiv:2205.13452. Differs: counted from the worse of the two ends, so that a
    measure that only ever improves, or only ever worsens, has no gap.
    """
    if "tuned" not in run_record.artifacts:
        return None
    metrics = metrics_of(store, run_record.artifacts["tuned"])
    gaps = {}
    for name, series in metrics.items():
        if not name.startswith(WATCH):
            continue
        unit, higher_is_better = _reading_of(name, run_record)
        sign = -1 if higher_is_better else 1
        worst_step = max(series, key=lambda step: sign * series[step])
        start, final = next(iter(series.values())), next(reversed(series.values()))
        gap = min(sign * (series[worst_step] - end) for end in (start, final))
        measure = name.removeprefix(WATCH)
        band = _null_band(series, metrics.get(f"{WATCH_ERROR}{measure}", {}))
        gaps[measure] = {
            "start": start, "worst": series[worst_step], "worst_step": worst_step, "final": final, "gap": gap,
            "null_band": band, "looks": len(series), "unit": unit, "higher_is_better": higher_is_better,
        }  # fmt: skip
    return gaps or None


def _null_band(series: Series, errors: Series) -> float | None:
    """Return the null band of the looks between the first and the last; None where an error of one is not known."""
    between = list(series)[1:-1]
    return null_band([errors[step] for step in between]) if set(between) <= set(errors) and errors else None


def _band(gap: dict[str, Any], factor: float) -> tuple[float, float] | None:
    """Return the worse of both ends and how far beyond it chance alone may lead; None without a known band."""
    if gap["null_band"] is None:
        return None
    worst, sign = (min, -1) if gap["higher_is_better"] else (max, 1)
    end = worst(gap["start"], gap["final"])
    return end * factor, (end + sign * gap["null_band"]) * factor


def _reading_of(name: str, run_record: RunRecord) -> tuple[str, bool]:
    """Return the unit of `watch/probe_kl` or `watch/<benchmark>/<metric>`, and whether more is better."""
    benchmark, _, metric = name.removeprefix(WATCH).rpartition("/")
    if not benchmark:
        return NATS, False
    if scored := run_record.before.benchmarks.get(benchmark):
        metadata = scored.metadata
        is_share = metadata["kind"] == "binary" or (metadata["kind"] == "mean" and metadata["chance"] is not None)
        return FRACTION if is_share else metric, bool(metadata["higher_is_better"])
    is_loss = any(word in metric for word in LOSS_WORDS)
    return (metric, False) if is_loss else (FRACTION, True)


def names_of_models(run_records: Sequence[RunRecord]) -> dict[str, str]:
    """Return for the first variant of each trained model what to call the model in a figure.

    Variants that share a model, such as the points of a sweep over `merge.alpha`, share its curve.
    """
    sharing: dict[str, list[str]] = {}
    for run_record in run_records:
        if "tuned" in run_record.artifacts:
            sharing.setdefault(run_record.artifacts["tuned"].key, []).append(run_record.name)
    return {
        names[0]: ", ".join(dict.fromkeys(map(_family, names))) if names[1:] else names[0] for names in sharing.values()
    }


def _family(name: str) -> str:
    sweep = sweep_of(name)
    return f"{sweep.family}{sweep.repeat}" if sweep else name


def panels_of(store: Store, run_records: Sequence[RunRecord]) -> list[Panel]:
    """Return the figures of training that there is anything to draw in."""
    named = names_of_models(run_records)
    first = {run_record.name: run_record for run_record in run_records if run_record.name in named}
    metrics = {name: metrics_of(store, run_record.artifacts["tuned"]) for name, run_record in first.items()}
    budgets = {name: budget for name, run_record in first.items() if (budget := run_record.budgets().get(UNPROMPTED))}
    forms = {name: _form(run_record) for name, run_record in first.items()}

    def lines(metric: str, factor: float = 1, form: str = "") -> dict[str, Line]:
        alike = [name for name in first if metric in metrics[name] and form in ("", forms[name])]
        return {name: in_blocks(metrics[name][metric], factor) for name in alike}

    gaps = {name: stability_gap(store, run_record) or {} for name, run_record in first.items()}

    def watched(measure: str, factor: float = 1) -> dict[str, Any]:
        bands = {name: _band(own[measure], factor) for name, own in gaps.items() if measure in own}
        return {"lines": lines(f"{WATCH}{measure}", factor), "bands": {n: band for n, band in bands.items() if band}}

    loss, weights = "train/rehearsal_loss", lines("train/rehearsal_weight")
    panels = [
        Panel("target", "target loss, nats per token", lines("train/target_loss")),
        Panel("rehearsal nll", "rehearsal loss, nats per token", lines(loss, form="nll")),
        Panel("rehearsal kl", "rehearsal divergence, nats per token", lines(loss, form="kl")),
        Panel(ALONG, "divergence along the rehearsed rows, nats per token", lines(loss, form=ALONG)),
        Panel("weight", "rehearsal weight λ (log scale)", _moving(weights), is_log=True),
        Panel("divergence", "moving mean of the divergence, nats per token", lines("train/divergence_estimate"),
              levels=budgets),
        Panel("probe_kl", "watched probe_kl, nats per token", **watched("probe_kl"), levels=budgets),
        Panel("target_loss", "watched target loss, nats per token", **watched("target_loss")),
    ]  # fmt: skip
    for metric in dict.fromkeys(m for own in metrics.values() for m in own if m.startswith(WATCH) and m.count("/") > 1):
        benchmark, _, name = metric.removeprefix(WATCH).rpartition("/")
        unit, _ = _reading_of(metric, next(r for n, r in first.items() if metric in metrics[n]))
        label, factor = (f"{benchmark}: {name}, %", POINTS) if unit == FRACTION else (f"{benchmark}: {name}", 1)
        panels.append(Panel(metric, label, **watched(metric.removeprefix(WATCH), factor)))
    return [panel for panel in panels if panel.lines]


def _form(run_record: RunRecord) -> str:
    """Return nll, kl, or ALONG where the divergence is along rows that are no sample of the base's text."""
    recipe = run_record.recipe
    if recipe is None or recipe.train.rehearsal.loss == "nll":
        return "nll"
    sampled = run_record.artifacts.get("corpus")
    with_chats = sampled is not None and sampled.metadata.get("source", "context-free") != "context-free"
    return ALONG if recipe.bends(with_chats=with_chats) else "kl"


def _moving(weights: dict[str, Line]) -> dict[str, Line]:
    """Return the lines that are above 0 throughout; none where none of them moves: the recipe says that already."""
    positive = {name: line for name, line in weights.items() if min(line[1]) > 0}
    return positive if any(max(values) > min(values) for _, values in positive.values()) else {}


def in_blocks(series: Series, factor: float = 1) -> Line:
    """Return steps and values times `factor`, averaged over blocks where there are more than CURVE_POINTS."""
    points = list(series.items())
    size = -(-len(points) // CURVE_POINTS)
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    steps, values = ([sum(pair[k] for pair in block) / len(block) for block in blocks] for k in (0, 1))
    return steps, [value * factor for value in values]
