"""The files of a report folder, and how to make them again from the trails that lie among them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cfsd.artifact import Artifact, Store
from cfsd.content import write_json
from cfsd.errors import BadInput
from cfsd.model_card import has_card, model_card
from cfsd.summary import Summary, Trail, summarise, write_summary

SCHEMA = 1
TRAILS = "trails.json"


class Kept(BaseModel):
    """All that a report is made from besides the store: what was run, under which title."""

    model_config = ConfigDict(frozen=True)

    title: str
    notes: tuple[str, ...] = ()
    trails: tuple[Trail, ...]


def keep(folder: Path, kept: Kept) -> Path:
    """Write what the report in `folder` is made from, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TRAILS, {"schema": SCHEMA, **kept.model_dump(mode="json")})
    return folder / TRAILS


def read_kept(folder: Path) -> Kept:
    """Return what the report in `folder` was made from. Raises BadInput."""
    file = folder / TRAILS
    if not file.is_file():
        raise BadInput(f"{folder} has no {TRAILS}; give a folder below reports/ of a data folder")
    try:
        content = json.loads(file.read_text())
        if isinstance(content, list):  # as they were kept at first, without a title
            return Kept(title=folder.name.rpartition("-")[0], trails=tuple(map(Trail.model_validate, content)))
        if content.pop("schema") != SCHEMA:
            raise ValueError("its schema is another one")
        return Kept.model_validate(content)
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise BadInput(f"{file} is not what a report of schema {SCHEMA} is made from: {error}") from error


def write_files(folder: Path, store: Store, kept: Kept) -> tuple[list[Summary], list[Path]]:
    """Write everything that people open, from artifacts alone; return the figures and the files, the page first.

    Raises BadInput where the store lacks an artifact.
    """
    from cfsd.figures import frontier_figure
    from cfsd.report import write_report

    summaries, (numbers, *cards) = write_numbers(folder, store, kept)
    page, frontier = folder / "report.html", folder / "frontier.png"
    write_report(page, store, kept.title, list(kept.trails), summaries, kept.notes)
    frontier_figure(summaries).savefig(frontier, dpi=150)
    return summaries, [page, numbers, frontier, *cards]


def write_numbers(folder: Path, store: Store, kept: Kept) -> tuple[list[Summary], list[Path]]:
    """Write trails, summary.json and the model cards; return the figures and the files but the trails.

    Raises BadInput where the store lacks an artifact.
    """
    _check_store(store, kept)
    trails = list(kept.trails)
    keep(folder, kept)
    summaries = [summarise(store, trail, trails) for trail in trails]
    files = [folder / "summary.json"]
    write_summary(files[0], summaries)
    cards = [(t, s) for t, s in zip(trails, summaries, strict=True) if has_card(t)]
    for (trail, summary), name in zip(cards, _card_names([trail for trail, _ in cards]), strict=True):
        files.append(folder / name)
        files[-1].write_text(model_card(store, trail, summary), encoding="utf-8")
    return summaries, files


def only_corpora(kept: Kept) -> bool:
    """Say whether nothing was trained or measured, so that the corpus page is all there is."""
    return not any("final" in trail.artifacts or trail.before.benchmarks for trail in kept.trails)


def write_corpus_files(folder: Path, store: Store, kept: Kept) -> Path:
    """Write the page that shows the corpora, and return it. Raises BadInput where the store lacks an artifact."""
    from cfsd.corpus_page import write_corpus_page

    _check_store(store, kept)
    keep(folder, kept)
    write_corpus_page(folder / "corpus.html", store, kept.title, {t.name: t.artifacts for t in kept.trails})
    return folder / "corpus.html"


def slug(title: str, empty: str = "run") -> str:
    """Return `title` as it may stand in the name of a file, a folder or a Prefect artifact; `empty` if nothing may."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or empty


def _card_names(trails: list[Trail]) -> list[str]:
    slugs = [slug(trail.name) for trail in trails]
    numbered = [f"{name}-{i}" if slugs.count(name) > 1 else name for i, name in enumerate(slugs)]
    return [f"model-card-{name}.md" for name in numbered]


def _check_store(store: Store, kept: Kept) -> None:
    needed: list[Artifact] = []
    for trail in kept.trails:
        sides = (trail.before, trail.after)
        scores = [s for side in sides for s in (*side.benchmarks.values(), *side.texts.values())]
        scores += [s for side in sides for s in (side.target, side.probe, side.target_divergence) if s]
        needed += [*trail.artifacts.values(), *scores, *(step.artifact for step in trail.steps)]
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
