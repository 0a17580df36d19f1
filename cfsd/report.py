"""The report: what each variant learned and forgot, as an HTML file, as a table, in words.

Made from the artifacts of a store alone. The page is `report.html.j2`; it loads nothing from anywhere.
"""

import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from cfsd.artifact import Artifact, Store
from cfsd.journal import read_metrics
from cfsd.summary import Scores, Summary, Trail, table

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

Fig = dict[str, Any]  # value, low, high, unit: a `cfsd.forgetting.Figure` as a Summary holds it

POINTS = 100  # percentage points in a fraction of 1
POWER = 2.8 / 1.96  # from half a 95 % interval to the change found with 80 % power at 5 %
UNMOVED = 1e-6  # nats per token; float32 logits give as much for a model against itself
SAMPLES = 20
MOST_WORSE, MOST_BETTER = 3, 1  # items shown per benchmark
FACTS = 8
TEMPLATE = "report.html.j2"
CURVES = {"target": "train/target_loss", "rehearsal": "train/rehearsal_loss"}
CURVE_POINTS = 150
ROLES = ("final", "tuned", "mixture", "target", "kept", "corpus", "probe", "base")
MADE_FROM = {  # an artifact whose first source is not there came from outside
    "final": ("tuned", "base"),
    "tuned": ("mixture", "base"),
    "mixture": ("target", "kept"),
    "kept": ("corpus",),
    "target": ("base",),
    "corpus": ("base",),
    "probe": ("base",),
}  # fmt: skip


# --- numbers as text ---------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return `value` with three significant digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e6:
        return f"{value:.2e}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def shown(figure: Fig, factor: float = 1) -> str:
    """Return a figure times `factor` as `0.123 [0.101, 0.148]`, or without brackets if it has no interval."""
    value, low, high = (None if figure[k] is None else number(figure[k] * factor) for k in ("value", "low", "high"))
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def variant_of(name: str) -> str:
    """Return the variant that `name` is a repeat of: "rehearse" for "rehearse seed=3"."""
    return name.partition(" seed=")[0]


class Unit(NamedTuple):
    """How a benchmark's scores and losses are shown, and by what they are multiplied for that."""

    score: str
    lost: str
    factor: float


def unit_of(benchmark: dict[str, Any]) -> Unit:
    """Return the unit of a `BenchmarkForgetting`: percent for shares, else its own."""
    unit = benchmark["forgetting"]["unit"]
    return Unit("%", "points", POINTS) if unit == "fraction" else Unit(unit, unit, 1)


# --- the table ---------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One row of the table, as text; `marks` says per variant "worse", "better" or nothing for certain."""

    label: str
    base: str
    cells: list[str]
    marks: list[str]
    is_part: bool = False  # of the row above it


def lines_of(summaries: list[Summary]) -> list[Line]:
    """Return the table's rows; figures that no variant has are left out."""
    targets = [s.target for s in summaries]
    found = [
        _scores("target loss, nats/token", [(t.get("base_loss"), t.get("tuned_loss")) for t in targets]),
        _figures("  gain, nats/token", [s.target_gain for s in summaries], better=1),
        _scores(
            "target exact, %",
            [(t.get("base_accuracy"), t.get("tuned_accuracy")) for t in targets],
            POINTS,
        ),
        _figures("  gain, points", [s.target_accuracy_gain for s in summaries], POINTS, better=1),
        _figures("probe_kl, nats/token", [s.probe_kl for s in summaries]),
        _figures("mean forgetting, points", [s.mean_forgetting for s in summaries], POINTS, better=-1),
    ]
    for name in dict.fromkeys(name for s in summaries for name in s.benchmarks):
        results = [s.benchmarks.get(name) for s in summaries]
        first = next(result for result in results if result)
        unit = unit_of(first)
        pairs = [(r["base"], r["tuned"]) if r else (None, None) for r in results]
        metric = "" if unit.score == first["metric"] else f"{first['metric']}, "
        found.append(_scores(f"{name}: {metric}{unit.score}", pairs, unit.factor))
        lost = [r["forgetting"] if r else None for r in results]
        found.append(_figures(f"  lost, {unit.lost}", lost, unit.factor, better=-1))
    return [line for line in found if any(line.cells)]


def _scores(label: str, pairs: list[tuple[float | None, float | None]], factor: float = 1) -> Line:
    bases = [base for base, _ in pairs if base is not None]
    cells = []
    for base, tuned in pairs:
        text = "" if tuned is None else number(tuned * factor)
        if base is not None and base != bases[0]:  # not the base model, or the rows, of the first variant
            text = f"{number(base * factor)} → {text}"
        cells.append(text)
    return Line(label, number(bases[0] * factor) if bases else "", cells, ["" for _ in cells])


def _figures(label: str, figures: list[Fig | None], factor: float = 1, better: int = 0) -> Line:
    cells = ["" if figure is None else shown(figure, factor) for figure in figures]
    marks = [{1: "better", -1: "worse"}.get(better * _sign(figure), "") for figure in figures]
    return Line(label.strip(), "", cells, marks, label.startswith(" "))


def _sign(figure: Fig | None) -> int:
    """Return 1 or -1 where the whole interval is on that side of 0, else 0."""
    if figure is None or figure["low"] is None:
        return 0
    return int(figure["low"] > 0) - int(figure["high"] < 0)


def summary_frame(summaries: list[Summary]) -> "pd.DataFrame":
    """Return the table as text: a row per figure, columns `figure`, `base` and one per variant."""
    import pandas as pd

    rows, main = [], ""
    for line in lines_of(summaries):
        if line.is_part:
            rows.append([f"{main}: {line.label}", line.base, *line.cells])
        else:
            rows.append([line.label, line.base, *line.cells])
            main = re.split("[:,]", line.label)[0]
    return pd.DataFrame(rows, columns=["figure", "base", *(s.name for s in summaries)], dtype=object)


def print_summary(summaries: list[Summary], console: "Console") -> None:
    """Print the table and the verdict; on a narrow console in parts, with intervals on lines of their own."""
    from rich.text import Text

    _print_table(summaries, console)
    console.print(Text(verdict(summaries)))


def _print_table(summaries: list[Summary], console: "Console") -> None:
    from rich.measure import Measurement

    unlimited = console.options.update(width=100_000)
    for between in (" [", "\n["):
        printed = _rich_table(summaries, between)
        if Measurement.get(console, unlimited, printed).maximum <= console.width or len(summaries) == 1:
            console.print(printed)
            return
    middle = len(summaries) // 2
    _print_table(summaries[:middle], console)
    _print_table(summaries[middle:], console)


def _rich_table(summaries: list[Summary], between: str) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    printed = Table("", box=box.SIMPLE_HEAD)
    for name in ("base", *(s.name for s in summaries)):
        printed.add_column(Text(name), justify="right", overflow="fold")
    for line in lines_of(summaries):
        printed.add_row(
            Text("  " * line.is_part + line.label),
            line.base,
            *(Text(cell.replace(" [", between)) for cell in line.cells),
        )
    return printed


# --- the verdict -------------------------------------------------------------------------------------------


def verdict(summaries: list[Summary]) -> str:
    """Return what was learned and forgotten in two or three sentences, within what the intervals allow.

    Repeats of a variant count as one, whose interval holds all of theirs.
    """
    variants: dict[str, list[Summary]] = {}
    for summary in summaries:
        variants.setdefault(variant_of(summary.name), []).append(summary)
    if len(variants) == 1:
        learned = _learned(summaries)
        subject = "It" if learned else f"“{variant_of(summaries[0].name)}”"
        said = [learned, _forgot(summaries, subject), _moved(summaries)]
    else:
        forgot = _compared(variants, "mean_forgetting", "forgot less", "points on average", POINTS)
        moved = _compared(variants, "probe_kl", "moved less from the base model", "nats per token")
        said = [
            forgot,
            moved,
            _compared(variants, "target_gain", "learned more of the target", "nats per token"),
        ]
    return " ".join(sentence for sentence in said if sentence)


def _over_seeds(repeats: list[Summary], name: str) -> Fig | None:
    figures = [figure for s in repeats if (figure := getattr(s, name)) is not None]
    if not figures or len(figures) < len(repeats):
        return None
    lows, highs = [f["low"] for f in figures], [f["high"] for f in figures]
    value = sum(f["value"] for f in figures) / len(figures)
    whole = None not in lows
    return {"value": value, "low": min(lows) if whole else None, "high": max(highs) if whole else None}


def _learned(summaries: list[Summary]) -> str:
    gain, target, name = _over_seeds(summaries, "target_gain"), summaries[0].target, summaries[0].name
    if gain is None:
        return ""
    by = f"{shown(gain)} nats per token"
    if _sign(gain) <= 0:
        found = "became worse at the target itself" if _sign(gain) else "was not found to have learned the target"
        return f"“{variant_of(name)}” {found}: the gain in held-out loss is {by}."
    exact = [number(target[f"{role}_accuracy"] * POINTS) for role in ("base", "tuned")]
    return (
        f"“{variant_of(name)}” became better at the target: its loss on held-out rows fell by {by}, "
        f"and the rows it answers exactly went from {exact[0]} to {exact[1]} %."
    )


def _forgot(summaries: list[Summary], subject: str) -> str:
    mean, benchmarks = _over_seeds(summaries, "mean_forgetting"), summaries[0].benchmarks
    if not benchmarks:
        return ""
    over = f"{len(benchmarks)} benchmark{'s' if len(benchmarks) > 1 else ''}"
    worse = [f"{name} ({_change(found)})" for name, found in benchmarks.items() if _sign(found["forgetting"]) > 0]
    if mean is None:
        return f"{subject} became worse at {_and(worse)}." if worse else f"No forgetting was found on {over}."
    points = f"{shown(mean, POINTS)} points on average over {over}"
    if _sign(mean) > 0:
        surely = f"; worse by itself: {_and(worse)}" if worse else ""
        return f"{subject} forgot: it lost {points}{surely}."
    alone = f" Worse by itself: {_and(worse)}." if worse else ""
    if _sign(mean) < 0:
        return f"{subject} forgot nothing on the whole: it lost {points}, so it gained.{alone}"
    return f"No forgetting was found: it lost {points}{_power(summaries)}.{alone}"


def _change(benchmark: dict[str, Any]) -> str:
    unit = unit_of(benchmark)
    return f"{number(benchmark['base'] * unit.factor)} → {number(benchmark['tuned'] * unit.factor)} {unit.score}"


def _moved(summaries: list[Summary]) -> str:
    kl = _over_seeds(summaries, "probe_kl")
    if kl is None:
        return ""
    moved = "did not move" if kl["value"] <= UNMOVED else f"moved by {shown(kl)} nats per token"
    return f"On text that the base model writes unprompted, the tuned model's predictions {moved}."


def _power(summaries: list[Summary]) -> str:
    drops = [drop for s in summaries if (drop := detectable_mean(s)) is not None]
    if not drops:
        return ""
    if max(drops) >= 1:
        return "; with so few documents no drop could have been told from chance"
    return f"; a mean drop of {number(max(drops) * POINTS)} points would have been found with 80 % probability"


def detectable_mean(summary: Summary) -> float | None:
    """Return the smallest mean forgetting (a fraction) found with 80 % power at 5 %; None if it is not known.

    The benchmarks' own, each stretched by its chance correction, add up as independent errors do.
    """
    squares = []
    for found in summary.benchmarks.values():
        corrected, raw, own = (found[k] for k in ("chance_corrected", "forgetting", "detectable"))
        if corrected is None:
            continue
        if corrected["low"] is None:
            return None
        width = corrected["high"] - corrected["low"]
        drop = width / 2 * POWER if own is None else own * width / (raw["high"] - raw["low"])
        squares.append(drop**2)
    return math.sqrt(sum(squares)) / len(squares) if squares else None


def _compared(variants: dict[str, list[Summary]], figure: str, did: str, unit: str, factor: float = 1) -> str:
    """Say which variant `did`; for certain only against those whose interval lies apart from its own."""
    known = {name: f for name, repeats in variants.items() if (f := _over_seeds(repeats, figure))}
    if len(known) < 2:
        return ""
    up = 1 if figure == "target_gain" else -1
    best = max(known, key=lambda name: up * float(known[name]["value"]))
    apart = {name: f for name, f in known.items() if _sign_of_difference(known[best], f) == up}
    near = {name: f for name, f in known.items() if name not in apart and name != best}
    own = f"{shown(known[best], factor)} {unit}"
    if not apart:
        return f"No variant certainly {did} than another; the lead of “{best}” ({own}) is within the intervals."
    others = _and([f"“{name}”" for name in apart])
    nearest = shown(max(apart.values(), key=lambda f: up * float(f["value"])), factor)
    bound = {1: "at most ", -1: "at least "}[up] if len(apart) > 1 else ""
    said = f"“{best}” {did} than {others}: {own} against {bound}{nearest}"
    if near:
        said += f" (not told apart from {_and([f'“{name}”' for name in near])})"
    if figure == "mean_forgetting" and _sign(known[best]) <= 0:
        said += f". No forgetting was found in “{best}”{_power(variants[best])}"
    return f"{said}."


def _sign_of_difference(one: Fig, other: Fig) -> int:
    """Return 1 or -1 where the interval of `one` lies wholly above or below that of `other`, else 0."""
    if one["low"] is None or other["low"] is None:
        return 0
    return int(one["low"] > other["high"]) - int(one["high"] < other["low"])


def _and(names: list[str], most: int = 4) -> str:
    *first, last = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return f"{', '.join(first)} and {last}" if first else last


# --- the page ----------------------------------------------------------------------------------------------


def write_report(
    path: Path,
    store: Store,
    title: str,
    trails: list[Trail],
    summaries: list[Summary],
    notes: list[str] | None = None,
) -> None:
    """Write the report of one to twenty variants to `path`; what was not measured is left out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "shown": shown, "visible": _visible, "clip": _clip}
    samples_of, samples = _samples(store, trails)
    page = environment.get_template(TEMPLATE).render(
        title=title,
        verdict=verdict(summaries),
        notes=notes or [],
        summaries=summaries,
        lines=lines_of(summaries),
        unit_of=unit_of,
        drawn=_drawn(store, trails, summaries),
        flips={trail.name: _flips(store, trail) for trail in trails},
        samples_of=samples_of,
        samples=samples,
        dropped=_dropped(store, trails),
        lineage={trail.name: _lineage(trail) for trail in trails},
        recipes=_recipes(trails),
        costs=_costs(trails),
        versions=_versions(store, trails),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _drawn(store: Store, trails: list[Trail], summaries: list[Summary]) -> dict[str, dict[str, Any]]:
    """Return the figures of each section as SVG, which the template may trust."""
    from markupsafe import Markup

    from cfsd import figures

    measured = [name for name in figures.QUANTITIES if figures.frontier_points(summaries, name)]
    sections = {
        "frontier": {name: figures.frontier_figure(summaries, [name]) for name in measured},
        "forest": figures.forest_figures(summaries),
        "curves": figures.curve_figures(_curves(store, trails)),
    }
    return {
        section: {
            name: Markup(figures.svg_of(f, f"{section} {name}", f"{section}: {name}")) for name, f in drawn.items()
        }
        for section, drawn in sections.items()
    }


def _curves(store: Store, trails: list[Trail]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Return the losses of training, each averaged over blocks of steps where there are many steps."""
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for trail in trails:
        if "tuned" not in trail.artifacts:
            continue
        records = [r for r in read_metrics(store.path(trail.artifacts["tuned"])) if r["name"] in CURVES.values()]
        for loss, metric in CURVES.items():
            if found := [(r["step"], r["value"]) for r in records if r["name"] == metric]:
                curves.setdefault(loss, {})[trail.name] = _in_blocks(found)
    return curves


def _in_blocks(found: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = -(-len(found) // CURVE_POINTS)
    blocks = [found[i : i + size] for i in range(0, len(found), size)]
    steps, values = ([sum(pair[k] for pair in block) / len(block) for block in blocks] for k in (0, 1))
    return steps, values


def _flips(store: Store, trail: Trail) -> dict[str, list[dict[str, Any]]]:
    """Return per benchmark a few items whose score changed: first worse, then better, most changed first.

    As in the figures, an answer counts as the benchmark's first filter reads it.
    """
    found = {}
    for name, before in trail.before.benchmarks.items():
        base, tuned = (table(store, scores, "scores") for scores in (before, trail.after.benchmarks[name]))
        facts: dict[str, Any] = before.facts
        base = base[base["filter"] == facts["filters"][0]]
        joined = base.merge(tuned, on=["filter", "doc_id"], suffixes=("_base", "_tuned"))
        sign = 1 if facts["higher_is_better"] else -1
        joined["worse"] = sign * (joined["value_base"] - joined["value_tuned"]) / joined["count_base"]
        joined = joined.sort_values("worse", ascending=False, kind="stable")
        joined["change"] = joined["worse"].gt(0).map({True: "worse", False: "better"})
        joined["binary"] = facts["kind"] == "binary"
        parts = [joined[joined["worse"] > 0].head(MOST_WORSE), joined[joined["worse"] < 0].tail(MOST_BETTER)]
        if items := [item for part in parts for item in part.to_dict("records")]:
            found[name] = items
    return found


def _samples(store: Store, trails: list[Trail]) -> tuple[str, list[dict[str, Any]]]:
    """Return the first variant with a corpus and its first rows, each with its mean log-probability."""
    for trail in trails:
        for role in ("kept", "corpus"):
            artifact = trail.artifacts.get(role)
            if artifact and (rows := list(islice(_rows(store.path(artifact), "corpus"), SAMPLES))):
                for row in rows:
                    logprobs = row["logprobs"][1:]
                    row["tokens"], row["mean"] = len(logprobs), sum(logprobs) / max(1, len(logprobs))
                return trail.name, rows
    return "", []


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    from cfsd.rows import batches

    for batch in batches(folder, name):
        yield from batch.to_pylist()


def _dropped(store: Store, trails: list[Trail]) -> list[dict[str, Any]]:
    """Return per target and corpus what was kept of it, what was not, and why, with the variants it is of."""
    found: dict[str, dict[str, Any]] = {}
    for trail in trails:
        for role, reasons in (("target", "dropped"), ("corpus", ""), ("kept", "rejected")):
            artifact = trail.artifacts.get(role)
            if artifact is None or artifact.facts.get("rows") == 0:  # plain fine-tuning
                continue
            entry = found.setdefault(f"{role} {artifact.key}", {"role": role, "facts": artifact.facts, "variants": []})
            entry["reasons"] = artifact.facts.get(reasons) or {}
            entry["examples"] = list(islice(_rows(store.path(artifact), "rejects"), 5)) if role == "kept" else []
            entry["variants"].append(trail.name)
    return list(found.values())


def _lineage(trail: Trail) -> dict[str, Any]:
    """Return the tree of what the variant's model was made from, and what was measured on base and tuned."""
    placed: set[str] = set()

    def node(role: str) -> dict[str, Any]:
        artifact = trail.artifacts[role]
        roles = [other for other in ROLES if trail.artifacts.get(other) == artifact] or [role]
        described = _described(artifact, ", ".join(roles))
        if role in placed:
            return described | {"facts": "as above"}
        placed.update(roles)
        parents = MADE_FROM.get(roles[-1], ())
        if not parents or parents[0] not in trail.artifacts:
            return described
        return described | {"made_from": [node(parent) for parent in parents if parent in trail.artifacts]}

    roots = [node(role) for role in (*ROLES, *trail.artifacts) if role in trail.artifacts and role not in placed]
    return {"roots": roots, "scores": [*_scores_of(trail.before, "base"), *_scores_of(trail.after, "tuned")]}


def _scores_of(scores: Scores, role: str) -> Iterator[dict[str, Any]]:
    for name, artifact in scores.benchmarks.items():
        yield _described(artifact, f"{role} on {name}")
    for name, found in (
        ("held-out target rows", scores.target),
        ("the probe, against the base", scores.probe),
    ):
        if found:
            yield _described(found, f"{role} on {name}")


def _described(artifact: Artifact, role: str) -> dict[str, Any]:
    plain = {k: v for k, v in artifact.facts.items() if isinstance(v, int | float | str) and v != ""}
    facts = [f"{k} {_fact(v)}" for k, v in islice(plain.items(), FACTS)]
    return {
        "role": role,
        "kind": artifact.kind,
        "key": artifact.key,
        "facts": ", ".join(facts),
        "made_from": [],
    }


def _fact(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value}"
    return f"{value:,}" if isinstance(value, int) else number(value)


def _recipes(trails: list[Trail]) -> dict[str, dict[str, str]]:
    """Return each recipe's digest and YAML: the first in full, of the others what differs from it."""
    found: dict[str, dict[str, str]] = {}
    first: dict[str, Any] = {}
    for trail in trails:
        if not trail.recipe:
            continue
        flat = dict(_flat(trail.recipe))
        changed = {k: flat.get(k) for k in flat | first if first and flat.get(k) != first.get(k)}
        text = yaml.safe_dump(changed if first else trail.recipe, sort_keys=False, allow_unicode=True, width=88)
        found[trail.name] = {
            "digest": trail.digest,
            "yaml": text if changed or not first else "the same",
            "of": next(iter(found), ""),
        }
        first = first or flat
    return found


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _costs(trails: list[Trail]) -> list[dict[str, Any]]:
    """Return a row per artifact of the steps: seconds, tokens, for whom it was made and who found it."""
    found: dict[str, dict[str, Any]] = {}
    for trail in trails:
        for step in trail.steps:
            fresh = {
                "stage": step.stage,
                "key": step.artifact.key,
                "seconds": step.seconds,
                "made": [],
                "found": [],
            }
            entry = found.setdefault(f"{step.stage} {step.artifact.key}", fresh)
            entry["tokens"] = step.artifact.facts.get("tokens")
            entry["made" if step.executed else "found"].append(trail.name)
    return list(found.values())


def _versions(store: Store, trails: list[Trail]) -> dict[str, str]:
    """Return what the artifacts were made with; several values where they differ."""
    values: dict[str, dict[str, None]] = {}
    artifacts = {a.key: a for t in trails for a in (*t.artifacts.values(), *(step.artifact for step in t.steps))}
    for artifact in artifacts.values():
        for name, value in store.manifest(artifact).get("environment", {}).items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(found) for name, found in values.items()}


def _visible(text: str) -> str:
    """Return `text` with control characters as pictures of themselves, so that no page swallows them."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)


def _clip(text: str, start: int, end: int) -> str:
    """Return at most `start` first and `end` last characters of `text`."""
    return text if len(text) <= start + end + 5 else f"{text[:start]} […] {text[len(text) - end :]}"
