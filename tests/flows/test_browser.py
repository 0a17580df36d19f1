"""A new user in a browser: a recipe by name, one value changed, the run watched, MLflow, two runs compared, the report.

CFSD_SCREENSHOTS=docs/how-to/images python -m pytest -m slow tests/flows/test_browser.py     writes the docs' pictures
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.served import Served, served

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]
SECONDS = 600  # for a run of tiny on a busy machine
Page = Any
Shot = Callable[[str], None]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("clean") / "home") as pages:
        yield pages


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    sync_api.expect.set_options(timeout=240_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 820})
        page.set_default_timeout(240_000)
        yield page
        browser.close()


@pytest.fixture
def shot(page: Page, tmp_path: Path) -> Shot:
    """Take a picture of the page: for the docs where the environment names a folder."""
    folder = Path(os.environ.get("CFSD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def take(name: str) -> None:
        page.wait_for_timeout(1500)  # what moves comes to rest
        page.screenshot(path=folder / f"{name}.png")

    return take


def open_form(page: Page, pages: Served) -> None:
    page.goto(pages.url("prefect"))
    page.get_by_role("link", name="Deployments", exact=True).first.click()
    page.get_by_role("link", name="mitigate", exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_label("recipe").first.click()
    page.get_by_role("option", name="tiny", exact=True).click()
    page.get_by_label("Threads (Optional)").fill("1")
    page.get_by_label("Epochs (Optional)").fill("2")


def submit(page: Page, pages: Served) -> str:
    """Submit the form, as often as it takes: the first click after a correction only takes the error away."""
    end = time.monotonic() + 120
    while not page.url.endswith("tab=Runs"):
        assert time.monotonic() < end, page.inner_text("body")
        page.get_by_role("button", name="Submit").click()
        page.wait_for_timeout(4000)
    [run, *_] = runs_of_mitigate(pages)
    return str(run["id"])


def test_a_wrong_value_is_said_beside_its_field_and_no_run_exists(page: Page, pages: Served, shot: Shot) -> None:
    open_form(page, pages)
    shot("prefect-form")
    page.get_by_label("Learning rate (Optional)").fill("-1")
    page.get_by_role("button", name="Submit").click()
    sync_api.expect(page.get_by_text("-1 is less than or equal to the minimum of 0").first).to_be_visible()
    assert runs_of_mitigate(pages) == []


@pytest.fixture(scope="module")
def runs(page: Page, pages: Served) -> list[dict[str, Any]]:
    """Two runs of tiny from the form, which differ in the learning rate."""
    started = []
    for rate in ("0.002", "0.004"):
        open_form(page, pages)
        page.get_by_label("Learning rate (Optional)").fill(rate)
        started.append(submit(page, pages))
    page.goto(f"{pages.url('prefect')}/v2/runs/flow-run/{started[0]}")
    sync_api.expect(page.get_by_text("Completed").first).to_be_visible(timeout=SECONDS * 1000)
    return [pages.ended(run, SECONDS) for run in started]


def test_a_run_from_the_form_completes_and_leads_to_the_report(
    page: Page, pages: Served, runs: list[dict[str, Any]], shot: Shot
) -> None:
    assert [run["state"]["type"] for run in runs] == ["COMPLETED", "COMPLETED"]
    assert {"model:tiny", "target:tiny_target.jsonl"} <= set(runs[0]["tags"])
    page.goto(f"{pages.url('prefect')}/v2/runs/flow-run/{runs[0]['id']}?tab=Artifacts")
    page.get_by_role("tab", name="Artifacts").click()
    sync_api.expect(page.get_by_text("tiny-result")).to_be_visible()
    sync_api.expect(page.get_by_text("PROGRESS").first).to_be_visible()
    shot("prefect-run")
    [result] = [a for a in pages.api("/artifacts/filter", of_run(runs[0]["id"])) if a["key"] == "tiny-result"]
    page.goto(f"{pages.url('prefect')}/v2/artifacts/artifact/{result['id']}")
    sync_api.expect(page.get_by_role("cell", name="target loss, nats/token")).to_be_visible()
    shot("prefect-result")
    page.go_back()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("link", name="tiny-result").first.click()
    page.wait_for_url("**/artifacts/key/tiny-result")
    page.get_by_role("link", name="report", exact=True).first.click()
    page.wait_for_url("**/reports/**")
    sync_api.expect(page.get_by_role("heading", name="Figures")).to_be_visible()
    assert page.url.startswith(f"{pages.url('reports')}/reports/tiny-")
    shot("report")


def test_a_training_step_in_mlflow_is_worth_opening(
    page: Page, pages: Served, runs: list[dict[str, Any]], shot: Shot
) -> None:
    open_variants(page, pages)
    page.get_by_role("link", name="tiny", exact=True).last.click()  # the first of the two, which made the corpus, too
    training = page.get_by_role("link", name="train", exact=True)
    sync_api.expect(training).to_have_count(2)  # in the description, which opens a tab of its own, and below it
    training.last.click()
    sync_api.expect(page.get_by_text("Parent run", exact=True)).to_be_visible()
    for words in ("Datasets", "Logged models", "Parameters"):
        sync_api.expect(page.get_by_text(words).first).to_be_visible()
    sync_api.expect(page.get_by_role("cell", name="learning_rate", exact=True)).to_be_visible()
    text = page.inner_text("body")
    assert re.search(r"Datasets\n+model \([0-9a-f]{16}\)", text) and not re.search(r"Logged models\n+—", text), text
    shot("mlflow-training")
    page.get_by_role("tab", name="Artifacts").click()
    for file in ("manifest.json", "metrics.jsonl"):
        sync_api.expect(page.get_by_text(file).first).to_be_visible()
    shot("mlflow-training-artifacts")


def test_two_runs_compared_show_what_differs_and_nothing_else(
    page: Page, pages: Served, runs: list[dict[str, Any]], shot: Shot
) -> None:
    open_variants(page, pages)
    boxes = page.get_by_label(re.compile("Press Space to toggle row selection"))
    boxes.first.wait_for()
    for number in (0, 1):
        boxes.nth(number).check()
    shot("mlflow-runs")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("Show diff only").first.click()
    shot("mlflow-compare")
    text = page.inner_text("body")
    [parameters] = re.findall(r"\nParameters\n+Show diff only\n(.*?)\nMetrics\n", text, re.DOTALL)
    name, *values = parameters.split("\t")
    assert name.strip() == "train.learning_rate" and {value.strip() for value in values} == {"0.002", "0.004"}


def runs_of_mitigate(pages: Served) -> list[dict[str, Any]]:
    """Return the runs of this flow alone, the last first: the schedules of others have runs of tomorrow."""
    wanted = {"flows": {"name": {"any_": ["mitigate"]}}, "sort": "EXPECTED_START_TIME_DESC"}
    return list(pages.api("/flow_runs/filter", wanted))


def of_run(flow_run: str) -> dict[str, Any]:
    return {"flow_runs": {"id": {"any_": [flow_run]}}}


def open_variants(page: Page, pages: Served) -> None:
    """Open the address that docs/how-to/compare-in-mlflow.md names."""
    view = "workflowType=machine_learning&viewStateShareKey=variants"
    page.goto(f"{pages.url('mlflow')}/#/experiments/1/runs?{view}")
    page.get_by_role("link", name="tiny", exact=True).first.wait_for()
    if (close := page.get_by_label("Close", exact=True)).count():
        close.first.click()  # the assistant, which takes a third of the page
