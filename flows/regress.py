"""Did forgetting get worse? A recipe, trained anew with fresh seeds, against what its baseline came to.

python -m flows.regress deployments/recipes/tiny.yaml           exit code 0 pass, 1 worse, 3 cannot tell
python -m flows.regress deployments/recipes/tiny.yaml --update-baseline
"""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from cfsd.artifact import Store
from cfsd.baseline import (
    Baseline,
    baseline_of,
    guarded,
    measured,
    other_documents,
    provenance,
    read_baseline,
    write_baseline,
)
from cfsd.errors import CfsdError
from cfsd.gate import LEAST_SEEDS, USUAL_SEEDS, Finding, Judgement, judge
from cfsd.machine import Machine, home
from cfsd.recipe import Recipe, override, validated
from cfsd.summary import Trail
from flows._conclude import conclude, report_folder
from flows.mitigate import mitigate
from tasks import record

BASELINES = Path("deployments") / "baselines"
RESEEDED = ("generate", "select", "mix", "train")  # all that is random after the documents are chosen
SLOWER = 1.5  # times the baseline's slowest training, from where on it is said
CANNOT_TELL = "Cannot tell"
WORDS = {"fail": "FAIL", "pass": "PASS", "cannot tell": "CANNOT TELL"}
Seeds = Annotated[int, Field(ge=1)]


class GotWorse(CfsdError):
    """The gate's FAIL, for callers of the flow in Python; its text is the verdict."""


@flow(name="regress", flow_run_name="{recipe.name}", validate_parameters=True)
def regress(
    recipe: Recipe,
    baseline: str | None = None,
    seeds: Seeds | None = None,
    update_baseline: bool = False,
    machine: Machine = Machine(),  # noqa: B008
) -> State[Any]:
    """Train the recipe with seeds that the baseline has not, and judge every guarded figure.

    The state is Failed where something got worse, with the verdict for its message, Completed, or Completed
    with the name `Cannot tell`. With `update_baseline` the recipe's own figures become the baseline.
    """
    file = baseline_file(recipe, baseline)
    known = read_baseline(file) if file.is_file() or not update_baseline else None
    first = 0 if update_baseline or known is None else max(known.seeds) + 1
    numbers = range(first, first + (seeds or (LEAST_SEEDS if update_baseline else USUAL_SEEDS)))
    title = f"{recipe.name} gate"
    with record.comparison(title) as run_id:
        trails = [
            mitigate(reseeded(recipe, number), machine).model_copy(update={"name": f"{recipe.name} seed={number}"})
            for number in numbers
        ]
        conclude(title, trails, [run_id])
        runs = [measured(Store(home()), trail) for trail in trails]
        seconds = [trained_seconds(trail) for trail in trails]
        if update_baseline or known is None:
            made = baseline_of(recipe, numbers, runs, seconds, replaces=_from(known) if known else "")
            write_baseline(file, made)
            return _told(title, trails, run_id, f"baseline of {len(numbers)} seeds written to {file}", _listed(made))
        judgement = judge(guarded(known, runs))
        notes = warnings(known, recipe, seconds, other_documents(known, runs[0]))
        sentence = sentence_of(judgement, known)
        return _told(title, trails, run_id, sentence, _table(judgement, known, recipe, notes), judgement)


def baseline_file(recipe: Recipe, given: str | None) -> Path:
    """Return where the baseline of `recipe` is: as given, else by the recipe's name."""
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-") or "recipe"
    return Path(given) if given else BASELINES / f"{slug}.json"


def reseeded(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe with the seed `number` for corpus, order and training.

    Target split and probe stay: what is measured on must be the same. A corpus of its own belongs to every
    seed, because another machine samples another one, too.
    """
    seeds = {f"{part}.seed": number for part in RESEEDED}
    changed = override(recipe.model_dump(mode="json"), {**seeds, "name": f"{recipe.name}: seed={number}"})
    return validated(Recipe, changed, f"seed {number}")


def trained_seconds(trail: Trail) -> float:
    """Return what training took when it ran."""
    return float(Store(home()).manifest(trail.artifacts["tuned"])["seconds"])


def warnings(known: Baseline, recipe: Recipe, seconds: Sequence[float], others: Sequence[str]) -> list[str]:
    """Return what readers of the verdict must know, none of which decides it."""
    notes = [f"changed in the recipe: {change}" for change in changes(known, recipe)]
    now = provenance(recipe).versions
    notes += [
        f"{name} is {now[name]}, was {was}" for name, was in known.provenance.versions.items() if now.get(name) != was
    ]
    if others:
        notes.append(f"not on the documents of the baseline, so less sharp: {', '.join(others)}")
    before, after = max(known.training_seconds, default=0.0), statistics.fmean(seconds)
    if before and after > SLOWER * before:
        notes.append(f"slower: training took {after:.0f} s, at most {before:.0f} s in the baseline (only a warning)")
    return notes


def changes(known: Baseline, recipe: Recipe) -> list[str]:
    """Return the fields in which the recipe is not the baseline's, `field: old -> new`."""
    before, after = (record.flattened(content) for content in (known.recipe, recipe.model_dump(mode="json")))
    skip = {"name", "seed"} | {f"{part}.seed" for part in RESEEDED}
    names = [name for name in {**before, **after} if name not in skip and before.get(name) != after.get(name)]
    return [f"{name}: {before.get(name, 'absent'):.60} -> {after.get(name, 'absent'):.60}" for name in names]


def sentence_of(judgement: Judgement, known: Baseline) -> str:
    """Return the verdict in a sentence: what got worse, by how much, since when."""
    since = f"since the baseline of {_from(known)}"
    named = [finding for finding in judgement.findings if finding.outcome == judgement.outcome]
    if judgement.outcome == "pass":
        return f"PASS: none of {len(named)} figures got worse by its margin {since}"
    if judgement.outcome == "fail":
        worse = "; ".join(f"{f.name} by {_shown(f.worsening, f)} (margin {_shown(f.margin, f)})" for f in named)
        return f"FAIL: got worse {since}: {worse}"
    open_ = "; ".join(
        f"{f.name} (worse by {_bounds(f)}, margin {_shown(f.margin, f)}; needs {f.needed})" for f in named
    )
    return f"CANNOT TELL {since}: {open_}"


def _from(known: Baseline) -> str:
    return f"{known.provenance.date} (commit {known.provenance.commit})"


def _shown(value: float, finding: Finding) -> str:
    return f"{value * 100:.3g} points" if finding.unit == "fraction" else f"{value:.3g} {finding.unit}"


def _bounds(finding: Finding) -> str:
    scale = 100 if finding.unit == "fraction" else 1
    return f"{finding.low * scale:.3g} to {_shown(finding.high, finding)}"


def _table(judgement: Judgement, known: Baseline, recipe: Recipe, notes: Sequence[str]) -> str:
    rows = [
        f"| {f.name} | {_shown(f.before, f)} | {_shown(f.after, f)} | {_shown(f.worsening, f)} | {_bounds(f)} "
        f"| {_shown(f.margin, f)} | {f.p_value:.2g}{' (significant)' if f.significant else ''} "
        f"| {WORDS[f.outcome]}{f': needs {f.needed}' if f.needed else ''} |"
        for f in judgement.findings
    ]
    now = provenance(recipe)
    return "\n".join(
        [
            "| figure | baseline | now | worse by | 90 % interval | margin | p | verdict |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            *(f"* {note}" for note in notes),
            f"* baseline: {len(known.seeds)} seeds, {_from(known)}, recipe {known.provenance.recipe_digest}",
            f"* now: commit {now.commit}, recipe {now.recipe_digest}",
            "* FAIL: worse by more than the margin, and significant after Holm's correction at 1 % of all figures. "
            "PASS: the whole interval is below the margin.",
        ]
    )


def _listed(made: Baseline) -> str:
    rows = [
        f"| {name} | {statistics.fmean(f.values):.4g} | {statistics.stdev(f.values):.3g} | {f.margin:.3g} | {f.unit} |"
        for name, f in made.figures.items()
    ]
    head = ["| figure | mean | deviation between seeds | margin | unit |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"* {_from(made)}, recipe {made.provenance.recipe_digest}"])


def _told(
    title: str, trails: list[Trail], run_id: str | None, sentence: str, body: str, judgement: Judgement | None = None
) -> State[Any]:
    """Show the verdict on the terminal, in Prefect and in MLflow, and return the flow's state."""
    folder = report_folder(title, trails)
    files = [folder / "verdict.md", *([folder / "verdict.json"] if judgement else [])]
    files[0].write_text(f"# {title}\n\n{sentence}\n\n{body}\n")
    if judgement:
        files[1].write_text(judgement.model_dump_json(indent=1))
    record.conclusion(run_id, None, files)
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    create_markdown_artifact(files[0].read_text(), key=f"{slug}-verdict", description=sentence)
    record.say(f"{body}\n\n{sentence}")
    record.say(str(files[0]))
    if judgement and judgement.outcome == "fail":
        return Failed(message=sentence, data=GotWorse(sentence))
    return Completed(message=sentence, name=CANNOT_TELL if judgement and judgement.outcome != "pass" else None)


if __name__ == "__main__":
    from flows._cli import regress_command, start

    start(regress_command)
