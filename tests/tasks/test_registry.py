"""The champion in a real MLflow store: what is read back, that it moves once, and what a server that is away costs."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from cfsd.baseline.file import Baseline, baseline_of, with_margins
from cfsd.errors import CfsdError
from cfsd.recipe import Recipe
from cfsd.store.artifact import Artifact
from tasks import record, registry
from tasks.record import client
from tasks.record.server import server
from tests.baseline.test_baseline import runs
from tests.conftest import ROOT

MODELS = [Artifact(kind="model", key=f"{number:016x}", content="c") for number in range(3)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose model nobody has registered, and whose name MLflow takes neither slash nor colon of."""
    shipped = Recipe.load(ROOT / "deployments" / "recipes" / "tiny.yaml")
    return shipped.model_copy(update={"name": f"one/two: {tmp_path.name}"})


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An MLflow server that does not answer."""
    there = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(client, "_away", [])
    _ask("http://127.0.0.1:9")
    yield
    _ask(there)


def _ask(uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    server.cache_clear()


def made(recipe: Recipe, seed: int = 0) -> Baseline:
    return baseline_of(recipe, range(5), runs(5, seed), [10.0] * 5, replaces="")


def promoted(recipe: Recipe, model: Artifact, figures: Baseline) -> int | None:
    with record.comparison("gate") as run_id:
        return registry.promote(recipe.name, model, figures, run_id)


def test_the_champion_is_read_back_and_each_passed_model_is_a_version(recipe: Recipe, home: Path) -> None:
    assert registry.champion(recipe.name) is None
    first, second = made(recipe), made(recipe, 1)
    assert promoted(recipe, MODELS[0], first) == 1
    assert registry.champion(recipe.name) == first
    assert promoted(recipe, MODELS[1], second) == 2
    assert registry.champion(recipe.name) == second
    version = MlflowClient().get_model_version_by_alias(registry.model_name(recipe.name), "champion")
    assert version.version == 2 and version.tags["cfsd.model"] == MODELS[1].key
    assert float(version.tags["cfsd.target_gain"]) == pytest.approx(1.0, abs=0.1)


def test_the_same_model_asked_for_again_is_the_same_version(recipe: Recipe, home: Path) -> None:
    figures = made(recipe)
    later = figures.model_copy(update={"provenance": figures.provenance.model_copy(update={"date": "later"})})
    assert [promoted(recipe, MODELS[0], f) for f in (figures, later)] == [1, 1]
    assert promoted(recipe, MODELS[1], made(recipe, 1)) == 2
    assert promoted(recipe, MODELS[0], later) == 1  # the alias goes back, as when an older program passes again


def test_a_server_that_is_away_is_told_from_a_missing_champion(recipe: Recipe, home: Path, nobody: None) -> None:
    figures = made(recipe)
    with pytest.raises(CfsdError, match="cannot be reached"):
        registry.champion(recipe.name)
    assert registry.promote(recipe.name, MODELS[0], figures, "any") is None
    assert registry.promote(recipe.name, MODELS[0], figures, None) is None


def test_a_successor_is_judged_by_the_margins_that_were_agreed(recipe: Recipe) -> None:
    known, fresh = made(recipe), made(recipe, 2)
    strict = {n: f.model_copy(update={"margin": 0.001}) for n, f in known.figures.items()}
    kept = with_margins(fresh, known.model_copy(update={"figures": strict}))
    assert {f.margin for f in kept.figures.values()} == {0.001}
    assert {n: f.values for n, f in kept.figures.items()} == {n: f.values for n, f in fresh.figures.items()}
