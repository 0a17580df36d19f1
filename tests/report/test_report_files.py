"""A report folder: made again from the run records in it, the same; and a model taken out of the store to publish."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cfsd.errors import BadInput, StoreError
from cfsd.report.export import chosen, export
from cfsd.report.files import RUN_RECORDS, ReportSource, keep, read_kept, write_files
from cfsd.report.place import LONGEST, slug
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Artifact
from cfsd.store.new_folder import new_folder
from tests.conftest import ROOT, fetched
from tests.report.test_report import SELECTED, World

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}


def test_titles_keep_places_of_their_own() -> None:
    assert slug("v2 ж=0.5") != slug("v2 ф=0.5") and slug("demo v2: (x)") == "demo-v2-x"
    long = [slug(f"{'x' * LONGEST} seed={n}") for n in (5, 6)]
    assert long[0] != long[1] and all(len(name) <= LONGEST and slug(name) == name for name in long)
    assert slug("数学") != slug("поэзия") and slug("!!") == "run"


def test_a_report_is_made_again_from_what_lies_in_it(world: World, tmp_path: Path) -> None:
    kept = ReportSource(title="Three", notes=("A note",), run_records=tuple(world.variants()))
    _, files = write_files(tmp_path / "first", world.store, kept)
    names = ["report.html", "summary.json", "frontier.png", "model-card-finetune.md", "model-card-rehearse.md",
             "model-card-rehearse-more.md"]  # fmt: skip
    assert [file.name for file in files] == names
    write_files(tmp_path / "again", world.store, read_kept(tmp_path / "first"))
    assert content(tmp_path / "again") == content(tmp_path / "first")
    assert "A note" in files[0].read_text()


def test_records_kept_before_titles_were_can_be_read(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "demo-tiny-12345678"
    folder.mkdir()
    run_records = [run_record.model_dump(mode="json") for run_record in world.variants()]
    (folder / "trails.json").write_text(json.dumps(run_records))
    kept = read_kept(folder)
    assert kept.title == "demo-tiny" and list(kept.run_records) == world.variants()


def test_a_report_of_an_older_version_can_be_made_again(world: World, tmp_path: Path) -> None:
    """Its file was trails.json, artifacts had facts, and three roles had other names."""
    full = world.variants()[1]
    scores = full.before.benchmarks | {"facts": full.before.benchmarks["cap"]}  # a benchmark may have any name
    full = full.model_copy(update={"before": full.before.model_copy(update={"benchmarks": scores})})
    roles = {"selected_target": world.artifact("target", "part", SELECTED), "selected_corpus": world.kept}
    run_record = full.model_copy(update={"artifacts": full.artifacts | roles})
    measured = run_record.model_copy(update={"name": "measured", "recipe": None})
    old = {"selected_target": "chosen", "filtered": "kept", "selected_corpus": "selected"}

    def as_it_was(record: RunRecord) -> object:
        written = record.model_dump(mode="json") | {
            "recipe": record.recipe.model_dump(mode="json") if record.recipe else {}
        }
        artifacts = {old.get(role, role): artifact for role, artifact in written["artifacts"].items()}
        return json.loads(json.dumps(written | {"artifacts": artifacts}).replace('"metadata": {', '"facts": {'))

    trails = {"schema": 1, "title": "t", "notes": ["n"], "trails": [as_it_was(run_record), as_it_was(measured)]}
    (tmp_path / "trails.json").write_text(json.dumps(trails))
    assert read_kept(tmp_path) == ReportSource(title="t", notes=("n",), run_records=(run_record, measured))


@pytest.mark.parametrize(
    "text, said", [("{", "is not what a report"), ('{"schema": 99}', "schema is another"), (None, "has no")]
)
def test_another_folder_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / RUN_RECORDS).write_text(text)
    with pytest.raises(BadInput, match=said):
        read_kept(tmp_path)


def test_what_the_store_lacks_is_named_before_anything_is_written(tmp_path: Path) -> None:
    world = World(tmp_path / "data")
    run_record = world.variants()[1]
    shutil.rmtree(world.store.path(run_record.after.benchmarks["cap"]))
    with pytest.raises(BadInput, match=f"lacks scores {run_record.after.benchmarks['cap'].key}"):
        write_files(tmp_path / "out", world.store, ReportSource(title="t", run_records=(run_record,)))
    assert not (tmp_path / "out").exists()


def test_at_a_terminal(tmp_path: Path) -> None:
    world = World(tmp_path / "data")
    keep(tmp_path / "run", ReportSource(title="Again", run_records=(world.variants()[1],)))

    def call(flow: str, *words: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", f"flows.{flow}", *map(str, words), "--home", str(world.store.home)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)

    made = call("report", tmp_path / "run", "--to", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert [Path(line).parent for line in made.stdout.splitlines()] == [tmp_path / "out"] * 4
    assert "<title>Again</title>" in (tmp_path / "out" / "report.html").read_text()
    refused = call("export", tmp_path / "run", tmp_path / "model")
    assert refused.returncode == 2 and "is not a model" in refused.stderr  # this world's models are only names


# --- export ----------------------------------------------------------------------------------------------------------


def trained(world: World, model: Artifact, name: str = "rehearse") -> RunRecord:
    run_record = world.trained(name, right=80, loss=0.6, kl=0.05)
    return run_record.model_copy(update={"artifacts": run_record.artifacts | {"final": model}})


def test_an_exported_model_loads_and_is_nobody_elses(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = World(tmp_path / "data")
    model = fetched(world.store, model_folder)  # its weights are links to outside of the store
    kept = ReportSource(title="t", run_records=(trained(world, model),))
    export(world.store, kept, chosen(kept, None), tmp_path / "out" / "mine")
    folder = tmp_path / "out" / "mine"
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in folder.iterdir())
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert not (folder / "manifest.json").exists() and [p.name for p in folder.parent.iterdir()] == ["mine"]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert loaded.num_parameters() > 0 and tokenizer("ab").input_ids
    (folder / "config.json").write_text("{}")  # editing the copy leaves the store whole
    world.store.verify(model)


def test_a_model_is_exported_into_an_empty_working_directory(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, here = World(tmp_path / "data"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    kept = ReportSource(title="t", run_records=(trained(world, fetched(world.store, model_folder)),))
    export(world.store, kept, chosen(kept, None), Path())
    assert Path("README.md").exists() and Path("model.safetensors").exists()  # by the process that is in it
    assert not list(tmp_path.glob(".*")) and not list(here.glob(".*"))


def test_an_empty_folder_may_be_a_disk_of_its_own(tmp_path: Path) -> None:
    (to := tmp_path / "mounted").mkdir()
    (to / ".part").mkdir()  # of an export that was killed
    with new_folder(to) as part:
        assert part.parent == to  # nothing is moved from another disk
        (part / "model").write_text("whole")
    assert [path.name for path in to.iterdir()] == ["model"]
    with pytest.raises(BadInput, match="is not an empty folder"), new_folder(to):
        pass


def test_an_export_asks_which_and_overwrites_nothing(world: World, tmp_path: Path) -> None:
    kept = ReportSource(title="t", run_records=tuple(world.variants()))
    with pytest.raises(BadInput, match="give one of: 'finetune', 'rehearse', 'rehearse more'"):
        chosen(kept, None)
    with pytest.raises(BadInput, match="no variant 'x'"):
        chosen(kept, "x")
    assert chosen(kept, "rehearse").name == "rehearse"
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(BadInput, match="not an empty folder"):
        export(world.store, kept, kept.run_records[0], tmp_path)
    measured = kept.run_records[0].model_copy(update={"artifacts": {"base": world.base, "final": world.base}})
    with pytest.raises(BadInput, match="trained no model"):
        chosen(ReportSource(title="t", run_records=(measured,)), None)


def test_a_damaged_model_is_not_published(tmp_path: Path) -> None:
    world = World(tmp_path / "data")
    run_record = world.variants()[0]
    (world.store.path(run_record.artifacts["final"]) / "name.txt").write_text("another one")
    with pytest.raises(StoreError, match="damaged"):
        export(world.store, ReportSource(title="t", run_records=(run_record,)), run_record, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keeping_makes_the_folder_and_leaves_nothing_else(world: World, tmp_path: Path) -> None:
    file = keep(tmp_path / "deep" / "folder", ReportSource(title="t", run_records=()))
    assert read_kept(file.parent) == ReportSource(title="t", run_records=())
    assert [path.name for path in file.parent.iterdir()] == [RUN_RECORDS]
