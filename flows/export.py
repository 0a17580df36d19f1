"""Export what other programs read: a model to publish, with its card, or a corpus for another trainer.

python -m flows.export data/reports/demo-acfd8792 my-model --variant rehearse
python -m flows.export corpus data/store/corpus/KEY --to my-corpus --format trl
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cfsd.integrations import Format
from flows._cli import Home, start
from tasks.report import export_corpus, export_model


def export_command(
    folder: Annotated[Path, typer.Argument(help="A folder below reports/ of a data folder; or the word corpus")],
    to: Annotated[Path, typer.Argument(help="The folder to make; it must not exist, or be empty")],
    variant: Annotated[
        str | None, typer.Option(help="Which of the report's variants; needed if there are several")
    ] = None,
    home: Home = None,
) -> None:
    """Copy a trained model out of the store, with a README.md that says what it learned and forgot.

    For a corpus in the form of another trainer: python -m flows.export corpus --help
    """
    export_model(folder, to, variant)
    print(to)


def export_corpus_command(
    corpus: Annotated[str, typer.Argument(help="The folder of a corpus, or its key in the store")],
    to: Annotated[Path, typer.Option(help="The folder to make; it must not exist, or be empty")],
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="trl: input_ids and labels; axolotl: also for its KD plugin; llama-factory: text"
        ),
    ] = "trl",
    jsonl: Annotated[bool, typer.Option("--jsonl", help="JSON lines in place of Parquet")] = False,
    home: Home = None,
) -> None:
    """Write a corpus in the form that another trainer reads: the tokens that were sampled are learned, no others."""
    for line in export_corpus(corpus, to, form, jsonl):
        print(line)
    print(to)


if __name__ == "__main__":
    start(export_corpus_command, "corpus") if sys.argv[1:2] == ["corpus"] else start(export_command)
