"""The end of a run: the figures that people compare and the files that they open."""

from collections.abc import Mapping
from pathlib import Path

from tasks.record.client import tracked


def conclusion(run_id: str | None, figures: Mapping[str, float], files: list[Path]) -> None:
    """Put figures and files on a variant's or a comparison's run."""
    if run_id is None:
        return
    if figures:
        tracked(lambda server: server.log_figures(run_id, figures))
    for file in files:
        tracked(lambda server, file=file: server.log_artifact(run_id, str(file)))  # type: ignore[misc]
