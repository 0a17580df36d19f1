"""Make a report again from the artifacts of the data folder alone; nothing is computed on a model.

python -m flows.report data/reports/demo-acfd8792 --to again
"""

from pathlib import Path
from typing import Annotated

import typer

from flows._cli import Home, start
from tasks.report import rewrite


def report_command(
    folder: Annotated[Path, typer.Argument(help="A folder below reports/ of a data folder")],
    to: Annotated[Path | None, typer.Option(help="Where to write; default: the same folder")] = None,
    home: Home = None,
) -> None:
    """Make the pages of a run again: report, summary.json, figure and model cards."""
    for file in rewrite(folder, to or folder):
        print(file)


if __name__ == "__main__":
    start(report_command)
