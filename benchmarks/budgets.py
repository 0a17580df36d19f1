"""Budgets of divergence: are they kept and used up, and what do they cost on the target?

python -m benchmarks.budgets tiny|demo [--seeds N] [--home FOLDER] [--quick]
make bench PART=budgets

Plain fine-tuning says how far the model moves (probe_kl); then rehearsal by `kl` from stored distributions with 1/8,
1/4 and 1/2 of that as its budget, which merging with the base keeps. On `tiny` the target contradicts a skill of the
base, so that learning it costs divergence. The probe is enlarged until its interval decides whether a budget was kept.
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
from benchmarks._methods_run import Runner, changed_machine, in_one_flow
from benchmarks.methods import Name
from cfsd.errors import NotFinite
from cfsd.machine import home
from cfsd.report.compared import Compared
from cfsd.report.comparisons import comparisons_of
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from cfsd.report.summary import Summary
from cfsd.report.table import shown, variant_of
from cfsd.report.training import metrics_of
from flows._cli import Home, On, start

SHARES = (0.125, 0.25, 0.5)
MAX_TRIES, MAX_TIMES = 3, 8  # of larger probes, and how many times larger each


def budgets_command(
    name: Annotated[Name, typer.Argument(help="tiny: five string skills; demo: SmolLM2-135M")] = Name.tiny,
    seeds: Annotated[int, typer.Option(min=1, help="How often: the order of rows and the training differ")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One epoch: to try the script")] = False,
    machine: On = [],  # noqa: B006
    home: Home = None,
) -> None:
    """Train with three budgets and say which were kept, which were used up and what they cost."""
    study = study_of(name, _folder())
    study = study.quick(_folder()) if quick else study
    study = study._replace(machine=changed_machine(study.machine, machine))
    write_conflict(conflict_file(_folder()))
    in_one_flow(f"budgets-{study.name}", lambda: _study(study, seeds))


def _folder() -> Path:
    return home() / "studies"


def _study(study: Study, seeds: int) -> None:
    rows = []
    with Runner(seeds * (1 + len(SHARES)), study.machine) as runner:
        for seed in range(seeds):
            rows += _budgets_of(study, runner, seed)
            _tell(study, rows)


def _budgets_of(study: Study, runner: Runner, seed: int) -> list[dict[str, Any]]:
    (plain,) = _measured(study, runner, {PLAIN: study.budgets | NO_CORPUS}, seed).values()
    moved = _summary(runner, plain, []).probe_kl
    assert moved
    print(f"{PLAIN}: probe_kl {shown(moved)}", flush=True)
    # rounded: the budget is in the key, and the last bits of a measured figure need not come again
    budgets = {f"budget {share:g} of {PLAIN}": float(f"{share * moved['value']:.4g}") for share in SHARES}
    wanted = {label: STORED | study.budgets | {"train.rehearsal.budget": nats} for label, nats in budgets.items()}
    run_records = {PLAIN: plain} | _measured(study, runner, wanted, seed)
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


def _measured(study: Study, runner: Runner, wanted: dict[str, Changes], seed: int) -> dict[str, RunRecord]:
    """Train each once, and measure on ever larger probes until it is decided whether its budget, if any, was kept."""
    run_records = dict[str, RunRecord]()
    for attempt in range(1, MAX_TRIES + 1):
        recipes = [study.recipe(changes, seed, f"{label} seed={seed}") for label, changes in wanted.items()]
        for label, run_record in zip(list(wanted), runner.run_all(recipes), strict=True):
            if run_record is None:
                raise NotFinite(f"{label}: no budget can be judged; lower train.learning_rate")
            run_records[label], changes = run_record, wanted.pop(label)
            needs = (_summary(runner, run_record, []).budget or {}).get("needs")
            if needs is not None and attempt < MAX_TRIES:
                rows = math.ceil(changes["probe.rows"] * min(max(2.0, 1.2 * needs), MAX_TIMES))
                print(f"{label}: the interval does not decide; the probe gets {rows} rows", flush=True)
                wanted[label] = changes | {"probe.rows": rows}
                runner.total += 1
        if not wanted:
            break
    return run_records


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
        **{name: known.get(name) for name in ("outcome", "tight", "binding", "needs")},
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
    """Return the table; kept: probe_kl's interval at most 1.1 x the budget; used up: all of it above 0.8 x.

    "as trained" is the divergence before merging with the base, of the budget, on the control sample.
    """
    head = [
        "seed",
        "run",
        "budget",
        "probe_kl",
        "of the budget",
        "outcome",
        "used up",
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
