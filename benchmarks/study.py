"""The study behind docs/results.md: comparisons on real models, each made again by the same command.

python -m benchmarks.study [PARTS] [--plan] [--seeds 2] [--base MODEL] [--home FOLDER] [--machine devices=2]
make study ARGS=--plan

Parts run in turn. Every training and every score is cached: interrupted, the same command goes on, and where all is
there nothing is executed. What a part found is in benchmarks/results/study/PART.json, with the keys of its artifacts;
`python -m benchmarks.study_results` makes the page and its figures from these files. With `--base` another model takes
the place of the recipes'; what is found on it is in PART@MODEL.json, and on a page beside it.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from pydantic import JsonValue

from benchmarks._methods_grid import RECIPES, replay_file, technical_documents, write_documents
from benchmarks._result import RESULTS, markdown
from benchmarks._study_base import fitted
from benchmarks._study_prediction import weight_distance
from cfsd.comparison import Comparison
from cfsd.errors import BadInput
from cfsd.estimate import rate_of
from cfsd.machine import Machine
from cfsd.machine import home as data_folder
from cfsd.recipe import Recipe
from cfsd.report.compared import Compared
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary
from cfsd.report.table import variant_of
from cfsd.store.artifact import Store
from flows._cli import Home, On, machine_of, start
from flows._conclude import Result
from flows._plan import Plan, costs, planned, seconds_of, walk
from flows._temporary_server import prefect_server
from flows.compare import compare
from flows.mitigate import mitigate, pipeline

FOUND = RESULTS / "study"
REAL_TEXT: dict[str, dict[str, JsonValue]] = {  # variants that read files which the command writes
    "real text, kl": {"generate.source": "replay"},
    "real text, nll": {"generate.source": "replay", "generate.top_logprobs": 0, "train.rehearsal.loss": "nll"},
}
REFERENCES = 2  # variants that come first, with which the page compares the others
OF_A_RUN = {"name", "seconds", "executed", "cached", "moved", "shown", "training"}  # of a summary: not in the file


class Part(NamedTuple):
    """A comparison of the study, and where its models come from."""

    question: str
    recipes: str  # the comparison, in deployments/recipes
    seeds: int
    taught_by: str = ""  # the recipe whose model is fine-tuned; empty: the comparison's own base
    base: str = ""  # in place of the recipes'
    real_text: Mapping[str, dict[str, JsonValue]] = {}  # variants beside those of the file
    at_equal_gain: bool = False  # whether its sweeps are compared where they have learned the same

    def teaching(self) -> Recipe | None:
        """Return the recipe of the model that is fine-tuned, None where that is the comparison's own base."""
        return Recipe.load(RECIPES / self.taught_by, self._based(self.base)) if self.taught_by else None

    def comparison(self) -> Comparison:
        """Return the comparison; its base is the taught model once that is there."""
        loaded, _ = fitted(self._loaded(self._taught() or self.base))
        if not self.real_text:
            return loaded
        write_documents(technical_documents(), real := replay_file("demo", data_folder() / "studies"))
        read: dict[str, JsonValue] = {"generate.replay": {"path": str(real)}}
        added = {name: changes | read for name, changes in self.real_text.items()}
        return loaded.model_copy(update={"variants": loaded.variants | added})

    def notes(self) -> list[str]:
        """Return what is done otherwise than the recipes say, as the base lacks something."""
        return fitted(self._loaded(self.base))[1]

    def plans(self, machine: Machine) -> list[Plan]:
        """Return what is done and left to do: a plan for each training."""
        recipes = [*filter(None, [self.teaching()]), *self.comparison().recipes().values()]
        return [walk(recipe, machine, pipeline) for recipe in recipes]

    def _loaded(self, base: str | Path | None) -> Comparison:
        return Comparison.load(RECIPES / self.recipes, self._based(base), self.seeds)

    @staticmethod
    def _based(base: str | Path | None) -> list[str]:
        return [f"base={base}"] if base else []

    def _taught(self) -> Path | None:
        if not (recipe := self.teaching()):
            return None
        with planned() as steps:
            run_record = pipeline(recipe, Machine())
        return Store(data_folder()).path(run_record.artifacts["final"]) if all(step.cached for step in steps) else None


PARTS = {
    "sources": Part("What should an aligned model rehearse?", "study-sources.yaml", 5),
    "sources-chats": Part("What should it rehearse where the target is chats?", "study-sources-chats.yaml", 5),
    "taught": Part("What holds a skill that was taught before?", "study-taught.yaml", 5, "study-teach.yaml"),
    "order": Part("Does the published order of methods hold here?", "study-order.yaml", 3, real_text=REAL_TEXT),
    "frontier": Part("What is lost at equal gain?", "study-frontier.yaml", 2, at_equal_gain=True),
    "frontier-chats": Part("What is lost at equal gain of chats?", "study-frontier-chats.yaml", 2, at_equal_gain=True),
    "ablations-tiny": Part("What does each setting do?", "study-ablations-tiny.yaml", 5),
    "ablations": Part("What does each setting do on a real model?", "study-ablations.yaml", 2),
}


def study_command(
    parts: Annotated[list[str] | None, typer.Argument(help="Some of the parts; without any, all")] = None,
    machine: On = [],  # noqa: B006
    home: Home = None,
    plan: Annotated[bool, typer.Option("--plan", help="List what is done, and what the rest takes")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Repeats per variant; default: the part's own")] = None,
    base: Annotated[
        str | None, typer.Option(help="A model in place of the recipes', as ./gemma-3-270m or org/name@revision")
    ] = None,
) -> None:
    """Make what docs/results.md shows, or say what is left of it."""
    if strange := [name for name in parts or [] if name not in PARTS]:
        raise BadInput(f"{', '.join(strange)}: no such part of the study; allowed: {', '.join(PARTS)}")
    on = machine_of(machine)
    for name in parts or PARTS:
        part = PARTS[name]._replace(base=base or "", seeds=seeds or PARTS[name].seeds)
        for note in part.notes():
            print(f"{name}: {note}", flush=True)
        (_print if plan else _run)(f"{name}@{_short(base)}" if base else name, part, on)


def _short(base: str) -> str:
    """Return what a model is called in the names of files."""
    return Path(base.partition("@")[0]).name


def _print(name: str, part: Part, machine: Machine) -> None:
    plans = part.plans(machine)
    rows = [["point", "stages left"]]
    rows += [[plan.recipe.name, str(left) if left else "done"] for plan in plans for left in [_left(plan)]]
    found = list(costs(plans, machine, rate_of(machine)))
    hours = seconds_of(found) / 3600 if any(map(_left, plans)) else 0
    done = sum(not _left(plan) for plan in plans)
    print(f"{name}: {part.question} {done} of {len(plans)} points are done, the rest takes about {hours:.1f} hours\n")
    print(markdown(rows), flush=True)


def _left(plan: Plan) -> int:
    return sum(not step.cached for step in plan.steps)


def _run(name: str, part: Part, machine: Machine) -> None:
    """Make all points of a part, and write what they show."""
    with prefect_server():
        if teaching := part.teaching():
            mitigate(teaching, machine)
        result = compare(part.comparison(), machine)
    FOUND.mkdir(parents=True, exist_ok=True)
    file = FOUND / f"{name}.json"
    file.write_text(json.dumps(_found(name, part, result), indent=1) + "\n")
    print(file, flush=True)


def _found(name: str, part: Part, result: Result) -> dict[str, Any]:
    pairs = zip(result.summaries, result.run_records, strict=True)
    return {
        "command": _command(name.partition("@")[0], part),
        "question": part.question,
        "recipes": part.recipes,
        "variants": {summary.name: _variant(summary, run_record) for summary, run_record in pairs},
        "comparisons": [entry.model_dump(mode="json") for entry in _with_a_reference(result)],
        "matched": [entry.model_dump(mode="json") for entry in result.comparisons.matched if part.at_equal_gain],
    }


def _command(name: str, part: Part) -> str:
    seeds = f" --seeds {part.seeds}" if part.seeds != PARTS[name].seeds else ""
    return f"python -m benchmarks.study {name}{part.base and f' --base {part.base}'}{seeds}"


def _with_a_reference(result: Result) -> Iterator[Compared]:
    """Yield the pairs with a variant that comes first: of 45 variants, all pairs would be megabytes."""
    names = dict.fromkeys(variant_of(summary.name) for summary in result.summaries)
    references = {*islice(names, REFERENCES)}
    yield from (entry for entry in result.comparisons.entries if references & {entry.one, entry.other})


def _variant(summary: Summary, run_record: RunRecord) -> dict[str, Any]:
    after = run_record.after
    scores = {**after.benchmarks, "target": after.target, "probe_kl": after.probe, "chat_kl": after.chat}
    made = {"model": run_record.artifacts["final"], **scores, "target_divergence": after.target_divergence}
    keys = {role: f"{artifact.kind} {artifact.key}" for role, artifact in made.items() if artifact}
    training = {name: (summary.training or {}).get(name) for name in ("steps", "tokens", "rehearsal_tokens")}
    training |= {"corpus_tokens": run_record.artifacts["corpus"].metadata.get("tokens", 0)}
    base, final = (Store(data_folder()).path(run_record.artifacts[role]) for role in ("base", "final"))
    added = {"keys": keys, "training": training, "weight_distance": weight_distance(base, final)}
    return summary.model_dump(mode="json", exclude=OF_A_RUN) | added


if __name__ == "__main__":
    start(study_command)
