"""What the run of a finished step holds, the same whether it was followed live or is replayed from its artifact."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow.parquet as pq

from cfsd.report.run_record import RunRecord
from cfsd.stages import GENERATE, TRAIN
from cfsd.store.artifact import LOG, Artifact, Store
from cfsd.store.digests import write_json
from cfsd.store.journal import METRICS
from cfsd.store.manifest import MANIFEST
from cfsd.store.tables import shards
from tasks.record.description import NOTE
from tasks.record.server import RECORDED
from tasks.record.step_run import IN_BRIEF, StepRun

if TYPE_CHECKING:
    from tasks.record.server import Server

ALL = "everything"  # of the tag RECORDED
SAMPLE_ROWS, SCORE_ROWS = 20, 500  # of a corpus to read; of a table of scores
FIRST = ("text", "prompt", "answer")  # columns to read, before those that say where it is from
TABLES = "mlflow.loggedArtifacts"  # by which MLflow's pages know a file for a table


def fill(server: "Server", run_id: str, store: Store, step: StepRun, artifact: Artifact) -> None:
    """Put artifacts, figures, the model and a description on the run of a finished step; last the mark that they are.

    Done again it comes to the same: what a kill left half done is completed.
    """
    seconds = float(store.manifest(artifact)["seconds"])
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_contents(folder, store, step, artifact)
        tables = [{"path": path.name, "type": "table"} for path in sorted(folder.glob("table-*.json"))]
        server.log_artifacts(run_id, place)
    numbers = {n: v for n in IN_BRIEF if isinstance(v := artifact.metadata.get(n), int | float)}
    if artifact.kind == "model":
        server.log_model(run_id, step, artifact, store.place(artifact).as_uri(), numbers)
    said = f"Made `{artifact.kind} {artifact.key}` in {seconds:,.1f} s; it is `store/{artifact.kind}/{artifact.key}`."
    tags = {NOTE: said, RECORDED: ALL} | ({TABLES: json.dumps(tables)} if tables else {})
    server.log_all(run_id, figures=numbers | {"seconds": seconds}, tags=tags)


def write_contents(folder: Path, store: Store, step: StepRun, artifact: Artifact) -> None:
    """Write the files of a step's run into `folder`: manifest, settings, log, and what there is to look at."""
    made = store.path(artifact, weights=False)
    for name in (MANIFEST, METRICS, LOG):
        if (made / name).is_file():
            shutil.copyfile(made / name, folder / name)
    write_json(folder / "settings.json", step.settings())
    for name, rows in _tables(made, artifact.kind):
        rows.to_json(folder / f"table-{name}.json", orient="split", index=False)
    if step.stage == GENERATE and artifact.metadata.get("rows"):
        from cfsd.report.corpus.page import write_corpus_page  # with transformers: a cached run does not come here

        roles = {"corpus": artifact, "base": step.inputs["base"]}
        write_corpus_page(folder / "corpus.html", store, f"corpus {artifact.key}", {"corpus": roles})
    if step.stage == TRAIN:
        for name, figure in _curves(store, artifact).items():
            figure.savefig(folder / f"curve-{name.replace(' ', '-').replace('/', '-')}.png", dpi=110)


def _tables(made: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield the tables that people read, by name: the first rows, without lists of numbers."""
    limit = {"corpus": SAMPLE_ROWS, "scores": SCORE_ROWS}.get(kind, 0)
    names = sorted({path.name.rpartition("-")[0] for path in made.glob("*.parquet")}) if limit else []
    for name in names:
        file = pq.ParquetFile(next(iter(shards(made, name))))
        columns = [field.name for field in file.schema_arrow if not hasattr(field.type, "value_type")]
        columns.sort(key=lambda column: column not in FIRST)
        batch = next(file.iter_batches(batch_size=limit, columns=columns), None)
        yield name, pd.DataFrame(columns=columns) if batch is None else batch.to_pandas()[columns]


def _curves(store: Store, artifact: Artifact) -> dict[str, Any]:
    from cfsd.report.figures.curves import curve_figures
    from cfsd.report.training import panels_of

    run_records = [RunRecord(name=TRAIN, artifacts={"tuned": artifact})]
    return curve_figures(panels_of(store, run_records), [TRAIN], {TRAIN: TRAIN})
