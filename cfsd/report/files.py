"""The files of a report folder, and how to make them again from the run records that lie among them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from cfsd.errors import BadInput
from cfsd.report.compared import Comparisons
from cfsd.report.comparisons import comparisons_of
from cfsd.report.corpus.page import write_corpus_page
from cfsd.report.figures.frontier import frontier_figure
from cfsd.report.figures.shown import shown_figure
from cfsd.report.model_card import has_card, model_card
from cfsd.report.place import RUN_RECORDS, card_name
from cfsd.report.report_page import write_report
from cfsd.report.run_record import RunRecord
from cfsd.report.shown import shown_answers
from cfsd.report.summarise import summarise
from cfsd.report.summary import Summary, write_summary
from cfsd.store.artifact import Artifact, Store
from cfsd.store.digests import write_json

SCHEMA = 1
OLD_FILE = "trails.json"
Part = TypeVar("Part", bound=BaseModel)
OLD_ROLES = {"chosen": "selected_target", "kept": "filtered", "selected": "selected_corpus"}


class ReportSource(BaseModel):
    """All that a report is made from besides the store: what was run, under which title."""

    model_config = ConfigDict(frozen=True)

    title: str
    notes: tuple[str, ...] = ()
    run_records: tuple[RunRecord, ...]


def keep(folder: Path, kept: ReportSource) -> Path:
    """Write what the report in `folder` is made from, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_RECORDS, {"schema": SCHEMA, **kept.model_dump(mode="json")})
    return folder / RUN_RECORDS


def read_kept(folder: Path) -> ReportSource:
    """Return what the report in `folder` was made from. Raises BadInput."""
    files = [folder / name for name in (RUN_RECORDS, OLD_FILE) if (folder / name).is_file()]
    if not files:
        raise BadInput(f"{folder} has no {RUN_RECORDS}; give a folder below reports/ of a data folder")
    return read_part(files[0], ReportSource)


def read_part(file: Path, model: type[Part]) -> Part:
    """Return what `file` of a report folder holds, written by this version or an older one. Raises BadInput."""
    try:
        content = with_present_names(json.loads(file.read_text()))
        if isinstance(content, list):  # the first reports kept no title
            content = {"schema": SCHEMA, "title": file.parent.name.rpartition("-")[0], "run_records": content}
        if content.pop("schema") != SCHEMA:
            raise ValueError("its schema is another one")
        if "trails" in content:
            content["run_records"] = content.pop("trails")
        return model.model_validate(content)
    except (ValueError, KeyError, AttributeError) as error:
        raise BadInput(f"{file} is not what a report of schema {SCHEMA} is made from: {error}") from error


def with_present_names(content: Any) -> Any:
    """Return JSON that an older version wrote with the names that fields and roles have now."""
    if isinstance(content, list):
        return [with_present_names(entry) for entry in content]
    if not isinstance(content, dict):
        return content
    if "facts" in content and "content" in content:  # an artifact
        return {"metadata" if name == "facts" else name: value for name, value in content.items()}
    present = {name: value if name == "recipe" else with_present_names(value) for name, value in content.items()}
    if artifacts := present.get("artifacts"):
        present["artifacts"] = {OLD_ROLES.get(role, role): artifact for role, artifact in artifacts.items()}
    return present


class Numbers(NamedTuple):
    """The figures of all variants, and of each against the others."""

    summaries: list[Summary]
    comparisons: Comparisons


def write_files(folder: Path, store: Store, kept: ReportSource) -> tuple[Numbers, list[Path]]:
    """Write everything that people open, from artifacts alone; return the figures and the files, the page first.

    Raises BadInput where the store lacks an artifact.
    """
    found, (numbers, *cards) = write_numbers(folder, store, kept)
    page, frontier = folder / "report.html", folder / "frontier.png"
    write_report(page, store, kept.title, list(kept.run_records), *found, notes=kept.notes)
    frontier_figure(found.summaries).savefig(frontier, dpi=150)
    pictures = [frontier]
    if sections := shown_answers(store, kept.run_records):
        pictures.append(folder / "answers.png")
        shown_figure(sections[0]).savefig(pictures[-1], dpi=150)
    return found, [page, numbers, *pictures, *cards]


def write_numbers(folder: Path, store: Store, kept: ReportSource) -> tuple[Numbers, list[Path]]:
    """Write run records, summary.json and model cards; return the figures and the files but the run records.

    Raises BadInput where the store lacks an artifact.
    """
    check_store(store, kept)
    run_records = list(kept.run_records)
    keep(folder, kept)
    summaries = [summarise(store, run_record, run_records) for run_record in run_records]
    comparisons = comparisons_of(store, run_records)
    files = [folder / "summary.json"]
    write_summary(files[0], summaries, comparisons.entries, comparisons.matched)
    cards = [(r, s) for r, s in zip(run_records, summaries, strict=True) if has_card(r)]
    names = [card_name(run_record.name) for run_record, _ in cards]
    for i, (run_record, summary) in enumerate(cards):
        number = f"-{i}" if names.count(names[i]) > 1 else ""
        files.append((folder / names[i]).with_stem(Path(names[i]).stem + number))
        files[-1].write_text(model_card(store, run_record, summary, comparisons), encoding="utf-8")
    return Numbers(summaries, comparisons), files


def only_corpora(kept: ReportSource) -> bool:
    """Say whether nothing was trained or measured, so that the corpus page is all there is."""
    return not any("final" in run_record.artifacts or run_record.before.benchmarks for run_record in kept.run_records)


def write_corpus_files(folder: Path, store: Store, kept: ReportSource) -> Path:
    """Write the page that shows the corpora, and return it. Raises BadInput where the store lacks an artifact."""
    check_store(store, kept)
    keep(folder, kept)
    write_corpus_page(folder / "corpus.html", store, kept.title, {r.name: r.artifacts for r in kept.run_records})
    return folder / "corpus.html"


def check_store(store: Store, kept: ReportSource) -> None:
    """Raise BadInput where the store lacks an artifact of the report."""
    scores = [scores for r in kept.run_records for side in (r.before, r.after) for scores in side.artifacts()]
    made = [artifact for r in kept.run_records for artifact in r.made()]
    check_artifacts(store, [*made, *scores])


def check_artifacts(store: Store, needed: Iterable[Artifact]) -> None:
    """Raise BadInput if an artifact is gone. Of models the weights are not needed, only manifest and metrics."""
    named = {f"{artifact.kind} {artifact.key}": artifact for artifact in needed}
    gone = [name for name, artifact in named.items() if not store.has_manifest(artifact)]
    if gone:
        more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
        raise BadInput(
            f"the data folder {store.home} lacks {', '.join(gone[:5])}{more}, which the report is made from; "
            "give the data folder of the run with --home, or run its recipe again"
        )
