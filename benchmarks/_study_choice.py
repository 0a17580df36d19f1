"""Which source became the default: the rule that was written into the recipes of the study before they were run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from benchmarks._methods_grid import PLAIN
from benchmarks._result import markdown
from cfsd.report.table import by_variant

PARTS = ("sources", "sources-chats")
PAPER = "unprompted, 64 tokens"


def block(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield each source's mean logarithm of both divergences by part, and how it differs from the paper's form."""
    found = [_by_variant(parts[part]) for part in PARTS]
    rows = [["rehearsed", *PARTS, "both", f"less `{PAPER}`, paired by seed"]]
    for name in found[0]:
        if name == PLAIN:
            continue
        both, paper = (np.mean([of_part[which] for of_part in found], axis=0) for which in (name, PAPER))
        difference = "-" if name == PAPER else _paired(both - paper)
        rows.append([name, *(f"{of_part[name].mean():.3f}" for of_part in found), f"{both.mean():.3f}", difference])
    yield (
        "The rule was set before: of both parts the source with the smallest mean of log(probe_kl) and log(chat_kl); "
        f"where the pairs show no difference from `{PAPER}`, that stays. The interval is a 95 % t interval over the "
        "seeds' own differences, each the mean of both parts.\n"
    )
    yield markdown(rows)


def _by_variant(content: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return, for each variant, the mean of the two logarithms of every seed, in the order of the seeds."""
    divergences = ("probe_kl", "chat_kl")
    values = ((name, [figures[each]["value"] for each in divergences]) for name, figures in content["variants"].items())
    return {name: np.log(own).mean(axis=1) for name, own in by_variant(values).items()}


def _paired(differences: NDArray[Any]) -> str:
    count = len(differences)
    half = t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count)
    centre = differences.mean()
    return f"{centre:+.3f} [{centre - half:+.3f}, {centre + half:+.3f}]"
