"""A model of a GGUF file as a folder to be a base, for the study on Gemma 3 270M: `benchmarks.study --base FOLDER`.

python -m benchmarks.gguf FILE FOLDER

A quantised file is rounded: for work of your own, take the model that it was converted from.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from cfsd.errors import BadInput
from cfsd.model.gguf import write_plain
from flows._cli import start


def gguf_command(
    file: Annotated[Path, typer.Argument(help="The GGUF file")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the model")],
) -> None:
    """Write the model in a GGUF file as a plain folder of float32 weights."""
    if not file.is_file():
        raise BadInput(f"{str(file)!r} is not a file; give a model's GGUF file")
    if folder.exists():
        raise BadInput(f"{str(folder)!r} is there already; give a new folder")
    with TemporaryDirectory(dir=folder.absolute().parent) as draft:  # nothing half done is taken for a model
        write_plain(file, made := Path(draft, folder.name))
        made.rename(folder)
    print(folder)


if __name__ == "__main__":
    start(gguf_command)
