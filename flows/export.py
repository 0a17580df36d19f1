"""Export a model to publish: its weights, tokenizer and model card in a folder of its own.

python -m flows.export data/reports/demo-acfd8792 my-model --variant rehearse
"""

from pathlib import Path
from typing import Annotated

import typer

from flows._cli import Home, start
from tasks.report import export_model


def export_command(
    folder: Annotated[Path, typer.Argument(help="A folder below reports/ of a data folder")],
    to: Annotated[Path, typer.Argument(help="The folder to make; it must not exist, or be empty")],
    variant: Annotated[
        str | None, typer.Option(help="Which of the report's variants; needed if there are several")
    ] = None,
    home: Home = None,
) -> None:
    """Copy a trained model out of the store, with a README.md that says what it learned and forgot."""
    export_model(folder, to, variant)
    print(to)


if __name__ == "__main__":
    start(export_command)
