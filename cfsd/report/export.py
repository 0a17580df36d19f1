"""A folder to publish: weights, tokenizer and model card, all of them files of its own."""

import shutil
from pathlib import Path

from cfsd.errors import BadInput
from cfsd.model.folder import payload_of
from cfsd.report.comparisons import comparisons_of
from cfsd.report.files import ReportSource, check_store
from cfsd.report.model_card import has_card, model_card
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from cfsd.store.artifact import Store
from cfsd.store.new_folder import new_folder


def chosen(kept: ReportSource, variant: str | None) -> RunRecord:
    """Return the variant called so, or the only one that was trained. Raises BadInput naming those there are."""
    trained = {run_record.name: run_record for run_record in kept.run_records if has_card(run_record)}
    if not trained:
        raise BadInput(f"“{kept.title}” trained no model; only what was trained can be exported")
    if variant is None and len(trained) == 1:
        return next(iter(trained.values()))
    if variant not in trained:
        asked = "no variant is named" if variant is None else f"there is no variant {variant!r}"
        raise BadInput(f"{asked}; give one of: {', '.join(map(repr, trained))}")
    return trained[variant]


def export(store: Store, kept: ReportSource, run_record: RunRecord, to: Path) -> None:
    """Copy the variant's final model to the new folder `to` and write its card there as README.md.

    Copies, not links: whoever edits a published folder must not reach into the store.

    Raises:
        BadInput: `to` exists and is not empty, or the store lacks what another variant, which the card compares, is
            measured by.
        StoreError: the model is gone or damaged.
    """
    with new_folder(to) as part:
        model = run_record.artifacts["final"]
        store.verify(model)
        check_store(store, kept)
        summary, comparisons = summarise(store, run_record, kept.run_records), comparisons_of(store, kept.run_records)
        card = model_card(store, run_record, summary, comparisons)
        for name, file in payload_of(store.path(model)).items():
            (part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, part / name)  # a base's weights may be links: what they lead to is copied
        (part / "README.md").write_text(card, encoding="utf-8")
