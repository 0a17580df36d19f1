"""The baseline that a gate judges by: a file, or the figures of MLflow's champion."""

from pathlib import Path

from cfsd.baseline.file import Baseline, UnreadableBaseline, check_place, read_baseline
from cfsd.errors import BadInput
from cfsd.generate.spec import AUTO
from cfsd.recipe import Recipe
from cfsd.report.place import slug
from cfsd.stages import CHAT
from tasks import registry

BASELINES = Path("deployments") / "baselines"
CHAMPION = "champion"  # in place of a file: the figures of the model version with this alias


def known_baseline(recipe: Recipe, given: str | None, *, needed: bool = True) -> Baseline | None:
    """Return the baseline to judge by or, where it is not `needed`, the one to replace, if there is one to be read.

    Raises:
        BadInput: There is none but it is needed, or it guards a figure that the recipe does not measure; the file
            with the recipe's name is another recipe's; or a new one cannot be written where it is to be.
    """
    if not needed and given != CHAMPION:
        check_place(baseline_file(recipe, given))
    try:
        known = _read(recipe, given, needed=needed)
    except UnreadableBaseline:
        if needed:
            raise
        return None
    if known and given in (None, CHAMPION) and known.name != recipe.name:
        place = f"the champion {registry.model_name(recipe.name)!r}" if given else str(baseline_file(recipe, given))
        raise BadInput(
            f"{place} is the baseline of {known.name!r}, not of {recipe.name!r}; name a file of this recipe's own "
            "(--baseline FILE), or rename the recipe"
        )
    if known and needed:
        benchmarks = {f"forgetting/{benchmark.name}": benchmark.metric for benchmark in recipe.evaluate.benchmarks}
        chats = {"chat_kl"} if {AUTO, CHAT} & {mode.name for mode in recipe.probe.modes} else set()
        known.check_measured({"target_gain", "probe_kl"} | chats | benchmarks.keys())
        known.check_metrics(benchmarks)
    return known


def _read(recipe: Recipe, given: str | None, *, needed: bool) -> Baseline | None:
    if given == CHAMPION:
        known = registry.champion(recipe.name)
        if known is None and needed:
            raise BadInput(
                f"MLflow has no champion of {recipe.name!r} yet; make the first one: "
                "--baseline champion --update-baseline"
            )
        return known
    file = baseline_file(recipe, given)
    return read_baseline(file) if needed or file.is_file() else None


def baseline_file(recipe: Recipe, given: str | None) -> Path:
    """Return the file of the recipe's baseline: the given one, else the one with the recipe's name."""
    return Path(given) if given else BASELINES / f"{slug(recipe.name, 'recipe')}.json"
