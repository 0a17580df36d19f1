"""What the gate compares: the figures of a run, and the champion, which is the model version that passed last.

Only the gate moves the champion. Weights are not copied: a version names the artifact in the store, and its figures are
`champion/baseline.json` in the run of the gate.
"""

import re
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from cfsd.baseline.file import Baseline, Measured, as_text, parsed
from cfsd.errors import BadEnvironment
from cfsd.machine import home
from cfsd.report.run_record import RunRecord
from cfsd.spec import digest_of
from cfsd.store.artifact import Artifact, Store
from tasks.record import tracked

ALIAS = "champion"
FILE = "champion/baseline.json"


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


def promote(recipe_name: str, model: Artifact, figures: Baseline, run_id: str | None) -> int | None:
    """Make `model` the champion and return its version, registered once for the same model and figures.

    None where MLflow cannot be reached; the same call does it later. `run_id` is the gate's run.
    """
    if run_id is None:
        return None
    return tracked(lambda client: _promote(client, model_name(recipe_name), model, figures, run_id))


def model_name(recipe_name: str) -> str:
    """Return the name of the registered model: the recipe's, without the characters that MLflow refuses."""
    return re.sub(r"[/:']", "-", recipe_name)


def _read(client: Any, name: str) -> str:
    models = client.search_registered_models(f"name = '{name}'")
    if not models or ALIAS not in models[0].aliases:
        return ""
    run_id = client.get_model_version(name, str(models[0].aliases[ALIAS])).run_id
    with TemporaryDirectory() as folder:
        return Path(client.download_artifacts(str(run_id), FILE, folder)).read_text()


def _promote(client: Any, name: str, model: Artifact, figures: Baseline, run_id: str) -> int:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Fine-tuned by cfsd; the gate moves the alias champion")
    mark = {"cfsd.model": model.key, "cfsd.figures": digest_of(figures.model_dump(mode="json")["figures"])}
    known = [v for v in client.search_model_versions(f"name = '{name}'") if mark.items() <= v.tags.items()]
    version = int(known[0].version) if known else _register(client, name, model, figures, run_id, mark)
    client.set_registered_model_alias(name, ALIAS, str(version))
    return version


def _register(client: Any, name: str, model: Artifact, figures: Baseline, run_id: str, mark: dict[str, str]) -> int:
    client.log_text(run_id, as_text(figures), FILE)
    means = {f"cfsd.{name}": f"{fmean(f.values):.6g}" for name, f in figures.figures.items()}
    source = figures.provenance
    tags = mark | means | {"cfsd.recipe": source.recipe_digest, "cfsd.commit": source.commit}
    folder = f"runs:/{run_id}/{Path(FILE).parent}"  # a server refuses paths outside a run's artifacts
    made = client.create_model_version(
        name, folder, run_id=run_id, tags=tags, description=f"{model.kind} {model.key} of the store"
    )
    return int(made.version)
