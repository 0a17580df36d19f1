"""What a run came to: the figures that people compare and the files that they open."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfsd.report.summary import Summary
from tasks.record.client import tracked


def conclusion(run_id: str | None, figures: Mapping[str, float], files: list[Path]) -> None:
    """Put figures and files on a variant's or a comparison's run."""
    if run_id is None:
        return
    if figures:
        tracked(lambda server: server.log_figures(run_id, figures))
    for file in files:
        tracked(lambda server, file=file: server.log_artifact(run_id, str(file)))  # type: ignore[misc]


def headline(summary: Summary) -> dict[str, float]:
    """Return the figures of a summary by metric name, bounds of intervals beside them."""
    from cfsd.report.training import training_figures

    figures: dict[str, Any] = {
        "target/gain": summary.target_gain,
        "target/accuracy_gain": summary.target_accuracy_gain,
        "forgetting/probe_kl": summary.probe_kl,
        "forgetting/target_divergence": summary.target_divergence,
        **{f"forgetting/{n}/nats_per_token": t["per_token"]["forgetting"] for n, t in summary.texts.items()},
        "forgetting/mean": summary.mean_forgetting,
        **{f"forgetting/{name}": b["forgetting"] for name, b in summary.benchmarks.items()},
    }
    flat = {f"target/{k}": v for k, v in summary.target.items()}
    for name, b in summary.benchmarks.items():
        flat |= {f"base/{name}/{b['metric']}": b["base"], f"eval/{name}/{b['metric']}": b["tuned"]}
    for name, figure in figures.items():
        for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            if figure and figure[part] is not None:
                flat[name + suffix] = figure[part]
    return flat | training_figures(summary)
