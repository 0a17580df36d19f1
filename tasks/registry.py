"""What the gate compares: the figures of a run, and the champion, which is the model version that passed last.

What passes is registered as the candidate; only the gate, or a person whom it asks, makes a candidate the champion.
Weights are not copied: a version names the artifact in the store. It carries its verdict and its model card; its
figures are `champion/baseline.json` in the run of the gate.
"""

import re
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from cfsd.baseline.file import Baseline, Measured, as_text, parsed
from cfsd.errors import BadEnvironment
from cfsd.machine import home
from cfsd.report.run_record import RunRecord
from cfsd.spec import digest_of
from cfsd.store.artifact import Artifact, Store
from cfsd.store.inventory import keep_registered
from tasks.record import tracked

ALIAS, CANDIDATE = "champion", "candidate"
FILE, CARD = "champion/baseline.json", "champion/README.md"
DESCRIPTION_LENGTH, TAG_LENGTH = 5000, 5000  # what MLflow's tables take
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


class Candidate(NamedTuple):
    """What is registered: a model with the figures that the gate judged, its card and the verdict."""

    model: Artifact
    figures: Baseline
    card: str
    verdict: str


class Registered(NamedTuple):
    """A version of a registered model, with the gate's run and verdict."""

    version: int
    run_id: str
    verdict: str


def guarded_figures(run_record: RunRecord) -> dict[str, Measured]:
    """Return the figures of a run that the gate guards, by name; see `cfsd.baseline.measured`."""
    from cfsd.baseline.measured import measured

    return measured(Store(home()), run_record)


def champion(recipe_name: str) -> Baseline | None:
    """Return the figures of the champion, None if there is none. Raises BadEnvironment where MLflow is away."""
    name = model_name(recipe_name)
    text = tracked(lambda client: _read(client, name))
    if text is None:
        raise BadEnvironment(
            "the champion's figures are in MLflow, which cannot be reached; nothing was run. Start it (make up), or "
            "compare with a file: --baseline deployments/baselines/NAME.json"
        )
    return parsed(text, f"champion of {name}") if text else None


def register(
    recipe_name: str, model: Artifact, figures: Baseline, run_id: str | None, *, card: str = "", verdict: str = ""
) -> int | None:
    """Register `model` as the candidate and return its version, the same for the same model and figures.

    `run_id` is the gate's run, `card` the model card in Markdown. None where MLflow cannot be reached; the same call
    does it later.
    """
    if run_id is None:
        return None
    name, made = model_name(recipe_name), Candidate(model, figures, card, verdict)
    version = tracked(lambda client: _candidate(client, name, made, run_id))
    if version is not None:
        keep_registered(home(), model, f"{name} version {version}")
    return version


def candidate(recipe_name: str) -> Registered | None:
    """Return the version that waits to become the champion, None if there is none. Raises BadEnvironment."""
    found = tracked(lambda client: _version(client, model_name(recipe_name), CANDIDATE))
    if found is None:
        raise BadEnvironment("candidates are in MLflow, which cannot be reached; start it (make up)")
    return found[0] if found else None


def promote(recipe_name: str, version: int, approved_by: str = "") -> int | None:
    """Make a version the champion and return it; None where MLflow cannot be reached.

    `approved_by`: the person who said so, where one was asked. If another version became the candidate while they
    thought about it, that one is returned, and the champion stays.
    """
    return tracked(lambda client: _promote(client, model_name(recipe_name), version, approved_by))


def model_name(recipe_name: str) -> str:
    """Return the name of the registered model: the recipe's, without the characters that MLflow refuses."""
    return re.sub(r"[/:']", "-", recipe_name)


def _version(client: Any, name: str, alias: str) -> list[Registered]:
    """Return the version with an alias, in a list that is empty where there is none."""
    models = client.search_registered_models(f"name = '{name}'")
    if not models or alias not in models[0].aliases:
        return []
    version = client.get_model_version(name, str(models[0].aliases[alias]))
    return [Registered(int(version.version), str(version.run_id), version.tags.get("cfsd.verdict", ""))]


def _read(client: Any, name: str) -> str:
    if not (found := _version(client, name, ALIAS)):
        return ""
    with TemporaryDirectory() as folder:
        return Path(client.download_artifacts(found[0].run_id, FILE, folder)).read_text()


def _candidate(client: Any, name: str, made: Candidate, run_id: str) -> int:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Fine-tuned by cfsd; the gate moves the alias champion")
    figures = digest_of(made.figures.model_dump(mode="json")["figures"])
    mark = {"cfsd.model": made.model.key, "cfsd.figures": figures}
    known = [v for v in client.search_model_versions(f"name = '{name}'") if mark.items() <= v.tags.items()]
    version = int(known[0].version) if known else _register(client, name, made, run_id, mark)
    client.set_registered_model_alias(name, CANDIDATE, str(version))
    return version


def _promote(client: Any, name: str, version: int, approved_by: str) -> int:
    if approved_by:
        if (waiting := _version(client, name, CANDIDATE)) and waiting[0].version != version:
            return waiting[0].version
        client.set_model_version_tag(name, str(version), "cfsd.approved_by", approved_by)
    client.set_registered_model_alias(name, ALIAS, str(version))
    return version


def _register(client: Any, name: str, made: Candidate, run_id: str, mark: dict[str, str]) -> int:
    client.log_text(run_id, as_text(made.figures), FILE)
    if made.card:
        client.log_text(run_id, made.card, CARD)
    means = {f"cfsd.{name}": f"{fmean(f.values):.6g}" for name, f in made.figures.figures.items()}
    source = made.figures.provenance
    tags = mark | means | {"cfsd.recipe": source.recipe_digest, "cfsd.commit": source.commit}
    if made.verdict:
        tags["cfsd.verdict"] = made.verdict[:TAG_LENGTH]
    said = f"{made.model.kind} {made.model.key} of the store\n\n{FRONT_MATTER.sub('', made.card)}".strip()
    model_id = client.model_of(made.model)
    # a server refuses paths outside a run's artifacts; a logged model leads to the run that trained it
    where = f"models:/{model_id}" if model_id else f"runs:/{run_id}/{Path(FILE).parent}"
    version = client.create_model_version(
        name, where, run_id=run_id, tags=tags, description=said[:DESCRIPTION_LENGTH], model_id=model_id
    )
    return int(version.version)
