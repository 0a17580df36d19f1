"""Summary: what one variant learned and forgot, joined from its artifacts; and the same for MLflow."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cfsd.evaluate.corpus_check import warnings_of
from cfsd.generate.spec import UNPROMPTED
from cfsd.report.budget import budget_of
from cfsd.report.corpus.view import corpus_warnings
from cfsd.report.measures import MEASURES, ScoreTables, figure_of
from cfsd.report.moved import bins_along
from cfsd.report.run_record import RunRecord, Scores, Step
from cfsd.report.shown import counted
from cfsd.report.summary import Summary, with_bounds
from cfsd.report.training import stability_gap, training_of
from cfsd.stages import CHAT
from cfsd.statistics.texts import text_forgetting
from cfsd.statistics.units import figure_of_units
from cfsd.store.artifact import Artifact, Store

SIZES = ("rows", "tokens", "unanswered", "reasoning", "unfinished")  # in the metadata of a divergence along answers
ENDINGS = ("max_gen_toks", "at_limit", "unfinished", "left_out")  # in the metadata of scores
WORTH_SAYING = 0.05  # share of answers
MAX_SAID = 3  # of lm-eval's own warnings


def summarise(store: Store, run_record: RunRecord, run_records: Sequence[RunRecord] = ()) -> Summary:
    """Return the figures of `run_record`, computed from its score tables and the metrics of its training.

    Among `run_records`, those of the same comparison, is the plain variant that a budget's cost is counted against.
    """
    before, after, tables = run_record.before, run_record.after, ScoreTables(store, run_record)
    figures = {measure.name: measure.figure(tables) for measure in MEASURES}
    answers = answers_of(before.benchmarks, after.benchmarks)
    summary = Summary(
        name=run_record.name,
        digest=run_record.digest,
        **{name: figure.model_dump() if figure else None for name, figure in figures.items()},
        target=_target_means(before, after),
        texts={name: text_forgetting(name, *sides) for name, sides in tables.texts.items()},
        prompts=_prompts(store, after, tables),
        chats=_chats(store, after.chat),
        moved=bins_along(store, after.probe),
        benchmarks={b.benchmark: b.model_dump(mode="json") for b in tables.benchmarks},
        answers=answers["answers"],
        evaluation_warnings=[*answers["evaluation_warnings"], *_target_warnings(run_record)],
        shown=counted(store, before, after),
        corpus_warnings=_corpus_warnings(run_record),
        stability_gap=stability_gap(store, run_record),
        training=training_of(store, run_record),
        seconds=_seconds(run_record.steps),
        executed=[f"{step.stage} {step.artifact.key}" for step in run_record.steps if step.executed],
        cached=[f"{step.stage} {step.artifact.key}" for step in run_record.steps if not step.executed],
    )
    measured = {UNPROMPTED: summary.probe_kl, CHAT: summary.chat_kl} | {n: o["kl"] for n, o in summary.prompts.items()}
    return summary.model_copy(update={"budget": budget_of(store, run_record, run_records, measured)})


def _chats(store: Store, scores: Artifact | None) -> dict[str, Any] | None:
    sizes = _sizes(scores) if scores else {}
    return sizes | {"moved": bins_along(store, scores)} if scores else None


def _prompts(store: Store, after: Scores, tables: ScoreTables) -> dict[str, dict[str, Any]]:
    units = {column: tables.on_prompts(column) for column in ("kl", "reverse_kl")}
    found = {}
    for name, scores in after.prompts.items():
        figures = {column: figure_of_units([of[name]]) for column, of in units.items()}
        dumped = {c: figure.within(0, math.inf).model_dump() if figure else None for c, figure in figures.items()}
        found[name] = {**_sizes(scores), **dumped, "moved": bins_along(store, scores)}
    return found


def _sizes(scores: Artifact) -> dict[str, Any]:
    return {size: scores.metadata[size] for size in SIZES if size in scores.metadata}


def _corpus_warnings(run_record: RunRecord) -> list[str]:
    sources = {"corpus": corpus_warnings, "checked": warnings_of}
    artifacts = run_record.artifacts
    return [line for role, read in sources.items() if role in artifacts for line in read(artifacts[role].metadata)]


def _target_warnings(run_record: RunRecord) -> list[str]:
    target = run_record.artifacts.get("target")
    seen = target.metadata.get("held_out_seen") if target else None
    if target is None or not seen:
        return []
    return [
        f"{seen} of {target.metadata['held_out_rows']} held-out rows have an answer that training has too, after the "
        "same words: the target gain is larger than what was learned"
    ]


def _target_means(before: Scores, after: Scores) -> dict[str, float]:
    if before.target is None or after.target is None:
        return {}
    sides = (("base", before.target.metadata), ("tuned", after.target.metadata))
    return {f"{role}_{name}": float(str(side[name])) for role, side in sides for name in ("loss", "accuracy")}


def _seconds(steps: Iterable[Step]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for step in steps:
        if step.executed:
            seconds[step.stage] = round(seconds.get(step.stage, 0.0) + step.seconds, 3)
    return seconds


def answers_of(before: Mapping[str, Artifact], after: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return how answers ended and what else may make a score other than it looks: two fields of a summary."""
    answers, said = {}, []
    for name, base in before.items():
        scores = {"base": base.metadata, "tuned": after[name].metadata}
        endings = {role: {n: m[n] for n in ENDINGS if n in m} for role, m in scores.items()}
        if written := {role: ends for role, ends in endings.items() if ends}:
            answers[name] = written
        said += [f"{name}: {warning}" for role, metadata in scores.items() for warning in _warnings(role, metadata)]
        said += [f"{name}: {warning}" for warning in _decoded_otherwise(*scores.values())]
        said += [f"{name}: {warning}" for warning in _on_one_only(scores)]
    return {"answers": answers, "evaluation_warnings": list(dict.fromkeys(said))}


def _decoded_otherwise(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[str]:
    """Yield that answers were written by other rules, which may be all that a difference shows."""
    own = base.get("decoding", {}), tuned.get("decoding", {})
    if own[0] != own[1]:
        said = [", ".join(f"{name}={value}" for name, value in one.items()) or "none" for one in own]
        yield (
            f"answers were decoded by each checkpoint's own generation_config.json, and these differ (base: {said[0]}; "
            f"tuned: {said[1]}); give both folders the same one"
        )


def _on_one_only(scores: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield what holds for one model's scores alone, such as documents that its shorter context cut."""
    remarks = {role: list(metadata.get("remarks", ())) for role, metadata in scores.items()}
    for role, other in (("base", "tuned"), ("tuned", "base")):
        yield from (f"of the {role} model alone: {line}" for line in remarks[role] if line not in remarks[other])


def _warnings(role: str, metadata: Mapping[str, Any]) -> Iterator[str]:
    if (share := metadata.get("at_limit", 0)) > WORTH_SAYING and not metadata.get("limit_is_meant"):
        yield (
            f"{share:.0%} of the {role} model's answers were cut off at {metadata['max_gen_toks']} tokens "
            "(raise the benchmark's max_gen_toks)"
        )
    if (share := metadata.get("unfinished", 0)) > WORTH_SAYING:
        yield f"{share:.0%} of the {role} model's answers never came out of their reasoning and count as empty"
    if left_out := metadata.get("left_out"):
        yield f"the metric does not apply to {left_out} of the {role} model's answers, which are left out"
    yield from (f"lm-eval: {said}" for said in list(metadata.get("warnings", ()))[:MAX_SAID])


def headline(summary: Summary) -> dict[str, float]:
    """Return the figures that people compare, by the name of their metric in MLflow, with the bounds of intervals."""
    measures = {measure.mlflow: figure_of(summary, measure.name) for measure in MEASURES if measure.mlflow}
    figures = {f"forgetting/{n}/nats_per_token": t["per_token"]["forgetting"] for n, t in summary.texts.items()}
    figures |= {f"forgetting/{name}/prompts_kl": own["kl"] for name, own in summary.prompts.items()}
    figures |= {f"forgetting/{name}": b["forgetting"] for name, b in summary.benchmarks.items()}
    flat: dict[str, float] = {}
    for name, figure in (measures | figures).items():
        flat |= with_bounds(name, figure)
    flat |= {f"target/{name}": value for name, value in summary.target.items()}
    for name, b in summary.benchmarks.items():
        # Steps log a perplexity under its own name, and the figures here are its logarithm per token.
        unit = b["forgetting"]["unit"]
        metric = unit.replace("/", "_per_") if unit.startswith("nats") else b["metric"]
        flat |= {f"base/{name}/{metric}": b["base"], f"eval/{name}/{metric}": b["tuned"]}
    return flat | _of_training(summary)


def _of_training(summary: Summary) -> dict[str, float]:
    costs = summary.training or {}
    flat = {f"training/{name}": float(value) for name, value in costs.items()}
    if "seconds_of_all_steps" in costs:
        flat["minutes"] = round(costs["seconds_of_all_steps"] / 60, 2)
    for name, watched in (summary.stability_gap or {}).items():
        flat |= {f"stability_gap/{name}": watched["gap"], f"worst/{name}": watched["worst"]}
        if watched["null_band"] is not None:
            flat[f"stability_gap_band/{name}"] = watched["null_band"]
    for name, value in (summary.budget or {}).items():
        if name == "outcome" and value != "cannot tell":
            flat["budget/kept"] = float(value == "kept")
        elif isinstance(value, bool | int | float):
            flat[f"budget/{name}"] = float(value)
        elif name == "modes":
            for mode, own in value.items():
                flat |= with_bounds(f"budget/{mode}/ratio", own["ratio"]) | {f"budget/{mode}/nats": own["nats"]}
        elif isinstance(value, dict):
            flat |= with_bounds(f"budget/{name}", value)
    return flat
