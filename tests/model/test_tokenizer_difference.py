"""Equal weights with other tokenizer files score differently: that is said, and what changes nothing is not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cfsd.model.tokenizer_difference import read_otherwise
from cfsd.store.artifact import Store
from tests.conftest import fetched
from tests.inputs import CHAT, save
from tests.model.folders import change_json

FILE = "chat_template.jinja"


def terse(folder: Path) -> None:
    template = (folder / FILE).read_text()
    (folder / FILE).write_text(template.replace("<|turn|>", "<|turn|>terse ", 1))


def commented(folder: Path) -> None:
    (folder / FILE).write_text("{# as it was #}" + (folder / FILE).read_text())


def endless(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=[0, 3])


def bare(folder: Path) -> None:
    (folder / FILE).unlink()


@pytest.mark.parametrize(
    ("change", "part"),
    [(commented, ""), (bare, ""), (terse, "chat template"), (endless, "list of end tokens")],
)
def test_what_may_change_scores_of_equal_weights_is_said(
    change: Callable[[Path], None], part: str, store: Store, tmp_path: Path
) -> None:
    for name in ("base", "tuned"):
        save(tmp_path / name, CHAT)
    change(tmp_path / "tuned")
    models = [fetched(store, tmp_path / name) for name in ("base", "tuned")]
    said = read_otherwise(store, *models)
    assert len(said) == bool(part) and all(f"another {part}" in line for line in said)
