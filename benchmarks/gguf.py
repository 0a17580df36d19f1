"""A model of a GGUF file as a folder to be a base, for the study on Gemma 3 270M: `benchmarks.study --base FOLDER`.

python -m benchmarks.gguf FILE FOLDER

A quantised file is rounded: for work of your own, take the model that it was converted from.
"""

from pathlib import Path
from typing import Annotated

import typer

from cfsd.errors import BadInput
from cfsd.model.gguf import write_plain
from cfsd.store.new_folder import new_folder
from flows._cli import start


def gguf_command(
    file: Annotated[Path, typer.Argument(help="The GGUF file")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the model")],
) -> None:
    """Write the model in a GGUF file as a plain folder of float32 weights."""
    if not file.is_file():
        raise BadInput(f"{str(file)!r} is not a file; give a model's GGUF file")
    with new_folder(folder) as part:
        write_plain(file, part)
    print(folder)


if __name__ == "__main__":
    start(gguf_command)
