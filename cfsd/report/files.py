"""The files of a report folder, and how to make them again from the trails that lie among them."""

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cfsd.errors import BadInput
from cfsd.report.corpus.page import write_corpus_page
from cfsd.report.figures.frontier import frontier_figure
from cfsd.report.model_card import has_card, model_card
from cfsd.report.place import slug
from cfsd.report.report_page import write_report
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from cfsd.report.summary import Summary, write_summary
from cfsd.store.artifact import Artifact, Store
from cfsd.store.digests import write_json

SCHEMA = 1
RUN_RECORDS = "trails.json"


class Kept(BaseModel):
    """All that a report is made from besides the store: what was run, under which title."""

    model_config = ConfigDict(frozen=True)

    title: str
    notes: tuple[str, ...] = ()
    run_records: tuple[RunRecord, ...]


def keep(folder: Path, kept: Kept) -> Path:
    """Write what the report in `folder` is made from, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_RECORDS, {"schema": SCHEMA, **kept.model_dump(mode="json")})
    return folder / RUN_RECORDS


def read_kept(folder: Path) -> Kept:
    """Return what the report in `folder` was made from. Raises BadInput."""
    file = folder / RUN_RECORDS
    if not file.is_file():
        raise BadInput(f"{folder} has no {RUN_RECORDS}; give a folder below reports/ of a data folder")
    try:
        content = json.loads(file.read_text())
        if isinstance(content, list):  # as they were kept at first, without a title
            return Kept(title=folder.name.rpartition("-")[0], run_records=tuple(map(RunRecord.model_validate, content)))
        if content.pop("schema") != SCHEMA:
            raise ValueError("its schema is another one")
        return Kept.model_validate(content)
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise BadInput(f"{file} is not what a report of schema {SCHEMA} is made from: {error}") from error


def write_files(folder: Path, store: Store, kept: Kept) -> tuple[list[Summary], list[Path]]:
    """Write everything that people open, from artifacts alone; return the figures and the files, the page first.

    Raises BadInput where the store lacks an artifact.
    """
    summaries, (numbers, *cards) = write_numbers(folder, store, kept)
    page, frontier = folder / "report.html", folder / "frontier.png"
    write_report(page, store, kept.title, list(kept.run_records), summaries, kept.notes)
    frontier_figure(summaries).savefig(frontier, dpi=150)
    return summaries, [page, numbers, frontier, *cards]


def write_numbers(folder: Path, store: Store, kept: Kept) -> tuple[list[Summary], list[Path]]:
    """Write trails, summary.json and the model cards; return the figures and the files but the trails.

    Raises BadInput where the store lacks an artifact.
    """
    _check_store(store, kept)
    run_records = list(kept.run_records)
    keep(folder, kept)
    summaries = [summarise(store, run_record, run_records) for run_record in run_records]
    files = [folder / "summary.json"]
    write_summary(files[0], summaries)
    cards = [(t, s) for t, s in zip(run_records, summaries, strict=True) if has_card(t)]
    for (run_record, summary), name in zip(cards, _card_names([run_record for run_record, _ in cards]), strict=True):
        files.append(folder / name)
        files[-1].write_text(model_card(store, run_record, summary), encoding="utf-8")
    return summaries, files


def only_corpora(kept: Kept) -> bool:
    """Say whether nothing was trained or measured, so that the corpus page is all there is."""
    return not any("final" in run_record.artifacts or run_record.before.benchmarks for run_record in kept.run_records)


def write_corpus_files(folder: Path, store: Store, kept: Kept) -> Path:
    """Write the page that shows the corpora, and return it. Raises BadInput where the store lacks an artifact."""
    _check_store(store, kept)
    keep(folder, kept)
    write_corpus_page(folder / "corpus.html", store, kept.title, {t.name: t.artifacts for t in kept.run_records})
    return folder / "corpus.html"


def _card_names(run_records: list[RunRecord]) -> list[str]:
    slugs = [slug(run_record.name) for run_record in run_records]
    numbered = [f"{name}-{i}" if slugs.count(name) > 1 else name for i, name in enumerate(slugs)]
    return [f"model-card-{name}.md" for name in numbered]


def _check_store(store: Store, kept: Kept) -> None:
    needed: list[Artifact] = []
    for run_record in kept.run_records:
        sides = (run_record.before, run_record.after)
        scores = [s for side in sides for s in (*side.benchmarks.values(), *side.texts.values())]
        scores += [s for side in sides for s in (side.target, side.probe, side.target_divergence) if s]
        needed += [*run_record.artifacts.values(), *scores, *(step.artifact for step in run_record.steps)]
    check_artifacts(store, needed)


def check_artifacts(store: Store, needed: Iterable[Artifact]) -> None:
    """Raise BadInput if an artifact is gone. Of models the weights are not needed, only manifest and metrics."""
    places = {f"{artifact.kind} {artifact.key}": store.path(artifact) for artifact in needed}
    gone = [name for name, place in places.items() if not (place / "manifest.json").is_file()]
    if gone:
        more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
        raise BadInput(
            f"the data folder {store.home} lacks {', '.join(gone[:5])}{more}, which the report is made from; "
            "give the data folder of the run with --home, or run its recipe again"
        )
