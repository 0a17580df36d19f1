"""A report made again, from the artifacts of the data folder alone: nothing is computed on a model.

python -m flows.report data/reports/demo-acfd8792 --to again
"""

from pathlib import Path
from typing import Annotated

import typer

from cfsd.machine import home as data_folder
from cfsd.store.artifact import Store
from flows._cli import Home, start


def report_command(
    folder: Annotated[Path, typer.Argument(help="A folder below reports/ of a data folder")],
    to: Annotated[Path | None, typer.Option(help="Where to write; default: the same folder")] = None,
    home: Home = None,
) -> None:
    """Make the pages of a run again: report, summary.json, figure and model cards."""
    from cfsd.report.files import only_corpora, read_kept, write_corpus_files, write_files
    from cfsd.report.sequence.files import read_measured, write_sequence_files

    kept, store, measured = read_kept(folder), Store(data_folder()), read_measured(folder)
    if measured:
        files = write_sequence_files(to or folder, store, kept, measured)[1]
    elif only_corpora(kept):
        files = [write_corpus_files(to or folder, store, kept)]
    else:
        files = write_files(to or folder, store, kept)[1]
    for file in files:
        print(file)


if __name__ == "__main__":
    start(report_command)
