"""The champion in a real MLflow store: what is read back, that it moves once, and what a server that is away costs."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.flow_runs import resume_flow_run

from cfsd.baseline.file import Baseline, baseline_of, with_margins
from cfsd.errors import BadInput, CfsdError
from cfsd.recipe import Recipe
from cfsd.store.artifact import Artifact, Store
from cfsd.store.inventory import Limits, collectable, references
from flows._known_baseline import CHAMPION, known_baseline
from flows.approve import Decision, approve, decide
from tasks import record, registry
from tasks.record import client
from tasks.record.server import server
from tests.baseline.test_baseline import runs
from tests.conftest import ROOT

CARD = "---\nlibrary_name: transformers\n---\n# A card\n\nIt lost nothing.\n"
MODELS = [Artifact(kind="model", key=f"{number:016x}", content="c") for number in range(3)]


@pytest.fixture(scope="module", autouse=True)
def own_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A database of its own, asked anew: whether one was away before is remembered by the process."""
    there, uri = mlflow.get_tracking_uri(), f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(client.VARIABLE, uri)
        for memory in ("_asked", "_away"):
            patch.setattr(client, memory, [])
        _ask(uri)
        yield
    _ask(there)


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


def registered(recipe: Recipe, model: Artifact, figures: Baseline) -> int | None:
    with record.comparison("gate") as run_id:
        return registry.register(recipe.name, model, figures, run_id, card=CARD, verdict="PASS: all is well")


def promoted(recipe: Recipe, model: Artifact, figures: Baseline) -> int | None:
    version = registered(recipe, model, figures)
    assert version is not None
    return registry.promote(recipe.name, version)


def aliases(recipe: Recipe) -> dict[str, int]:
    (model,) = MlflowClient().search_registered_models(f"name = '{registry.model_name(recipe.name)}'")
    return {alias: int(version) for alias, version in model.aliases.items()}


def test_a_candidate_becomes_the_champion_when_a_person_says_so(recipe: Recipe, home: Path) -> None:
    assert registry.candidate(recipe.name) is None
    assert promoted(recipe, MODELS[0], made(recipe)) == 1
    assert registered(recipe, MODELS[1], made(recipe, 1)) == 2
    assert aliases(recipe) == {"candidate": 2, "champion": 1}
    waiting = registry.candidate(recipe.name)
    assert waiting and (waiting.version, waiting.verdict) == (2, "PASS: all is well")
    refused = decide(recipe.name, 2, Decision(approve=False, by="ada", reason="too early"))
    assert refused == "the champion stays: ada did not approve version 2: too early"
    late = decide(recipe.name, 1, Decision(approve=True, by="bob"))
    assert late == "the champion stays: bob approved version 1, but version 2 is the candidate by now"
    assert aliases(recipe)["champion"] == 1
    assert "approved by ada" in decide(recipe.name, 2, Decision(approve=True, by="ada"))
    assert aliases(recipe) == {"candidate": 2, "champion": 2}
    version = MlflowClient().get_model_version(registry.model_name(recipe.name), "2")
    assert version.tags["cfsd.approved_by"] == "ada" and version.tags["cfsd.verdict"] == "PASS: all is well"
    assert version.tags["cfsd.recipe"] == recipe.digest()
    assert version.description == f"model {MODELS[1].key} of the store\n\n# A card\n\nIt lost nothing."
    folder = MlflowClient().download_artifacts(str(version.run_id), "champion")
    assert (Path(folder) / "README.md").read_text() == CARD


@pytest.mark.slow
def test_a_flow_run_waits_for_the_person_who_approves(recipe: Recipe, home: Path, server: str) -> None:
    assert promoted(recipe, MODELS[0], made(recipe)) == 1
    assert registered(recipe, MODELS[1], made(recipe, 1)) == 2
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(approve, recipe.name, None, 120)
        run = paused_run()
        assert aliases(recipe)["champion"] == 1
        resume_flow_run(run.id, run_input={"approve": True, "by": "ada", "reason": ""})
        assert waiting.result(120) == f"champion of {registry.model_name(recipe.name)!r} is version 2, approved by ada"
    assert aliases(recipe)["champion"] == 2
    unanswered = approve(recipe.name, 2, 1)
    assert "nobody answered within 1 s" in unanswered and unanswered.endswith(f"approve {recipe.name} --by YOUR_NAME")


def paused_run() -> FlowRun:
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))
    end = time.monotonic() + 90
    with get_client(sync_client=True) as client:
        while not (found := client.read_flow_runs(flow_run_filter=FlowRunFilter(state=states))):
            assert time.monotonic() < end
            time.sleep(0.3)
    return found[0]


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


def test_another_recipes_champion_is_refused(recipe: Recipe, home: Path) -> None:
    """MLflow takes no slash, so that a/b and a-b share a registered model."""
    slashed, dashed = (recipe.model_copy(update={"name": name}) for name in ("a/b", "a-b"))
    assert promoted(dashed, MODELS[0], made(dashed)) == 1
    with pytest.raises(BadInput, match="the champion 'a-b' is the baseline of 'a-b', not of 'a/b'"):
        known_baseline(slashed, CHAMPION)


def test_the_same_model_asked_for_again_is_the_same_version(recipe: Recipe, home: Path) -> None:
    figures = made(recipe)
    later = figures.model_copy(update={"provenance": figures.provenance.model_copy(update={"date": "later"})})
    assert [promoted(recipe, MODELS[0], f) for f in (figures, later)] == [1, 1]
    assert promoted(recipe, MODELS[1], made(recipe, 1)) == 2
    assert promoted(recipe, MODELS[0], later) == 1  # the alias goes back, as when an older program passes again


def test_what_is_registered_is_kept_without_a_report(recipe: Recipe, home: Path, store: Store) -> None:
    model, other = (store.make("model", f"{number:016x}", lambda _: None)[0] for number in range(2))
    version = registered(recipe, model, made(recipe))
    assert [doomed.entry.key for doomed in collectable(store, Limits())] == [other.key]
    assert references(home)[model.kind, model.key] == [f"{registry.model_name(recipe.name)} version {version}"]


def test_a_server_that_is_away_is_told_from_a_missing_champion(recipe: Recipe, home: Path, nobody: None) -> None:
    figures = made(recipe)
    with pytest.raises(CfsdError, match="cannot be reached"):
        registry.champion(recipe.name)
    assert registry.register(recipe.name, MODELS[0], figures, "any") is None
    assert registry.register(recipe.name, MODELS[0], figures, None) is None
    assert registry.promote(recipe.name, 1) is None
    with pytest.raises(CfsdError, match="cannot be reached"):
        registry.candidate(recipe.name)


def test_a_successor_is_judged_by_the_margins_that_were_agreed(recipe: Recipe) -> None:
    known, fresh = made(recipe), made(recipe, 2)
    strict = {n: f.model_copy(update={"margin": 0.001}) for n, f in known.figures.items()}
    kept = with_margins(fresh, known.model_copy(update={"figures": strict}))
    assert {f.margin for f in kept.figures.values()} == {0.001}
    assert {n: f.values for n, f in kept.figures.items()} == {n: f.values for n, f in fresh.figures.items()}
