"""Budgets of divergence: are they met and used up, and what do they cost on the target?

python -m benchmarks.budgets tiny|demo [--seeds N] [--home FOLDER] [--quick]
make bench PART=budgets

Plain fine-tuning says how far the model moves (probe_kl); then rehearsal by `kl` from stored distributions with 1/8,
1/4 and 1/2 of that as its budget, which merging with the base keeps. On `tiny` the target contradicts a skill of the
base, so that learning it costs divergence. The probe is enlarged until half of each interval is at most 10 % of the
value.
"""

import json
import math
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks._methods_grid import (
    NO_CORPUS,
    PLAIN,
    STORED,
    Changes,
    Study,
    conflict_file,
    study_of,
    write_conflict,
)
from benchmarks._methods_run import Runner, in_one_flow
from benchmarks.methods import Name
from cfsd.errors import NotFinite
from cfsd.machine import home
from cfsd.report.budget import WIDEST
from cfsd.report.compared import Compared
from cfsd.report.comparisons import comparisons_of
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from cfsd.report.summary import Summary
from cfsd.report.table import shown, variant_of
from cfsd.report.training import metrics_of
from flows._cli import Home, start

SHARES = (0.125, 0.25, 0.5)
MAX_TRIES = 3  # of larger probes
AIM = 0.9 * WIDEST


def budgets_command(
    name: Annotated[Name, typer.Argument(help="tiny: five string skills; demo: SmolLM2-135M")] = Name.tiny,
    seeds: Annotated[int, typer.Option(min=1, help="How often: the order of rows and the training differ")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One epoch: to try the script")] = False,
    home: Home = None,
) -> None:
    """Train with three budgets and say which were met, which were tight and what they cost."""
    study = study_of(name, _folder())
    study = study.quick(_folder()) if quick else study
    write_conflict(conflict_file(_folder()))
    in_one_flow(f"budgets-{study.name}", lambda: _study(study, seeds))


def _folder() -> Path:
    return home() / "studies"


def _study(study: Study, seeds: int) -> None:
    runner = Runner(seeds * (1 + len(SHARES)), study.machine)
    rows = []
    for seed in range(seeds):
        rows += _budgets_of(study, runner, seed)
        _tell(study, rows)


def _budgets_of(study: Study, runner: Runner, seed: int) -> list[dict[str, Any]]:
    plain = _measured(study, runner, study.budgets | NO_CORPUS, seed, PLAIN)
    moved = _summary(runner, plain, []).probe_kl
    assert moved
    print(f"{PLAIN}: probe_kl {shown(moved)}", flush=True)
    run_records = {PLAIN: plain}
    for share in SHARES:
        label = f"budget {share:g} of {PLAIN}"
        # rounded: the budget is in the key, and the last bits of a measured figure need not come again
        budget = {"train.rehearsal.budget": float(f"{share * moved['value']:.4g}")}
        run_records[label] = _measured(study, runner, STORED | study.budgets | budget, seed, label)
    summaries = {
        label: _summary(runner, run_record, list(run_records.values())) for label, run_record in run_records.items()
    }
    comparisons = comparisons_of(runner.store, list(run_records.values()))
    rows = [{"seed": seed, **_row(runner, label, run_records[label], summaries[label])} for label in run_records]
    for smaller, row in zip(list(run_records.values())[1:], rows[2:], strict=False):
        larger = run_records[row["run"]]
        found = comparisons.of(variant_of(larger.name), variant_of(smaller.name), "target_gain")
        row["gain_over_smaller_budget"] = found.model_dump(mode="json") if found else None
    return rows


def _measured(study: Study, runner: Runner, changes: Changes, seed: int, label: str) -> RunRecord:
    """Train once, and measure on ever larger probes until the interval is narrow enough to judge."""
    for attempt in range(1, MAX_TRIES + 1):
        run_record = runner.run(study.recipe(changes, seed, f"{label} seed={seed}"))
        if run_record is None:
            raise NotFinite(f"{label}: no budget can be judged; lower train.learning_rate")
        figure = _summary(runner, run_record, []).probe_kl
        assert figure and figure["low"] is not None
        width = (figure["high"] - figure["low"]) / 2 / figure["value"]
        if width <= WIDEST or attempt == MAX_TRIES:
            return run_record
        rows = math.ceil(changes["probe.rows"] * (width / AIM) ** 2)
        print(f"{label}: half of the interval is {width:.0%} of the value; the probe gets {rows} rows", flush=True)
        changes = changes | {"probe.rows": rows}
        runner.total += 1
    raise AssertionError("the last attempt returns")


def _summary(runner: Runner, run_record: RunRecord, run_records: list[RunRecord]) -> Summary:
    return summarise(runner.store, run_record, run_records)


def _row(runner: Runner, label: str, run_record: RunRecord, summary: Summary) -> dict[str, Any]:
    weights = list(metrics_of(runner.store, run_record.artifacts["tuned"]).get("train/rehearsal_weight", {}).values())
    known = summary.budget or {}
    return {
        "run": label,
        "budget": known.get("nats"),
        "probe_kl": summary.probe_kl,
        "ratio": known.get("ratio"),
        **{name: known.get(name) for name in ("outcome", "binding", "tight")},
        "weight_start": weights[0] if weights and known else None,
        "weight_end": weights[-1] if weights and known else None,
        **{name: known.get(name) for name in ("ratio_before_merging", "alpha")},
        "target_gain": summary.target_gain,
        "target_gain_cost": known.get("target_gain_cost"),
        "probe_rows": run_record.artifacts["probe"].metadata["rows"],
        "most_row_views": run_record.artifacts["tuned"].metadata.get("most_row_views"),
        "steps": run_record.artifacts["tuned"].metadata["steps"],
    }


def _tell(study: Study, rows: list[dict[str, Any]]) -> None:
    text, notes = markdown(rows), [_note(seed, rows) for seed in sorted({row["seed"] for row in rows})]
    print("\n" + text + "\n" + "\n".join(notes), flush=True)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": study.machine.threads}
    found = {"part": f"budgets-{study.name}", "machine": machine, "rows": rows, "notes": notes}
    study.results.mkdir(parents=True, exist_ok=True)
    file = study.results / f"budgets-{study.name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(text + "\n" + "\n".join(f"* {note}" for note in notes) + "\n")
    print(file, flush=True)


def _note(seed: int, rows: list[dict[str, Any]]) -> str:
    """Return what each larger budget's target gain is above the next smaller one's, paired by row."""
    found = [Compared.model_validate(c) for r in rows if r["seed"] == seed and (c := r.get("gain_over_smaller_budget"))]
    steps = [f"{shown(c.figure())} ({'differs' if c.sign() else 'not shown to differ'})" for c in found]
    return f"seed {seed}: target gain above that of the next smaller budget: {', '.join(steps) or 'not compared'}."


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table; outcome and tight as in docs/summary.md.

    "as trained" is the divergence before merging with the base, of the budget, on the control sample.
    """
    head = [
        "seed",
        "run",
        "budget",
        "probe_kl",
        "of the budget",
        "outcome",
        "tight",
        "λ, first to last",
        "as trained",
        "alpha",
        "target gain",
        "given up",
    ]
    lines = [head, ["--:", "---", *["--:"] * (len(head) - 2)]]
    for row in rows:
        path = "-" if row["weight_end"] is None else f"{row['weight_start']:.3g} to {row['weight_end']:.3g}"
        budget = "-" if row["budget"] is None else f"{row['budget']:.4g}"
        ratio = "-" if row["ratio"] is None else shown(row["ratio"])
        judged = [row["outcome"] or "-", {True: "yes", False: "no", None: "-"}[row["tight"]]]
        cost = "-" if row["target_gain_cost"] is None else shown(row["target_gain_cost"])
        gain = [shown(row["target_gain"]), cost]
        merged = ["-" if row[k] is None else f"{row[k]:.2f}" for k in ("ratio_before_merging", "alpha")]
        lines.append(
            [str(row["seed"]), row["run"], budget, shown(row["probe_kl"]), ratio, *judged, path, *merged, *gain]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    start(budgets_command)
