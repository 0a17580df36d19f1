"""A GGUF file becomes a folder that can be a base."""

from pathlib import Path

import pytest

from benchmarks.gguf import gguf_command
from cfsd.errors import BadInput
from cfsd.model.checkpoint import SMOLLM2, Checkpoint
from cfsd.model.fetching import smollm2_folder


def test_a_folder_that_is_there_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a file; give a model's GGUF file"):
        gguf_command(tmp_path / "absent.gguf", tmp_path / "new")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BadInput, match="not an empty folder; give another one"):
        gguf_command(tmp_path / "model.gguf", tmp_path)


@pytest.mark.slow
def test_the_packaged_model_is_written_as_a_base(tmp_path: Path) -> None:
    gguf_command(smollm2_folder() / SMOLLM2, tmp_path / "new")
    base = Checkpoint(kind="folder", path=str(tmp_path / "new"))
    base.check()
    assert base.has_chat_template() and [*tmp_path.iterdir()] == [tmp_path / "new"]
