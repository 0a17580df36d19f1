"""The model card: a README.md in the hub's format that states what was measured, for people who publish a model."""

import re
from pathlib import PurePath
from typing import Any

import yaml

from cfsd.report.costs import versions_of
from cfsd.report.lineage import lineage, lines_of_tree
from cfsd.report.recipe_text import readable_yaml
from cfsd.report.rendering import rendered
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, forgotten_of, number, shown, unit_of
from cfsd.report.training import nested, rehearsal_of
from cfsd.report.verdict import verdict, warnings
from cfsd.statistics.discoveries import DEFINITION, finding
from cfsd.store.artifact import Store
from cfsd.train.methods import Methods

TEMPLATE = "model_card.md.j2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
METRIC_TYPES = {"acc": "accuracy", "acc_norm": "accuracy", "word_perplexity": "perplexity"}  # the hub's names
SETTINGS = ("learning_rate", "epochs", "schedule", "warmup_fraction", "weight_decay", "precision", "seed")


def has_card(run_record: RunRecord) -> bool:
    """Say whether the variant's model was trained here, so that there is something to tell of it."""
    return "tuned" in run_record.artifacts and "final" in run_record.artifacts


def model_card(store: Store, run_record: RunRecord, summary: Summary) -> str:
    """Return the card of the variant's final model, from its artifacts alone; no path of this machine is in it."""
    recipe = _without_paths(run_record.recipe)
    return rendered(
        TEMPLATE,
        metadata=yaml.safe_dump(_metadata(recipe, summary), sort_keys=False, allow_unicode=True),
        name=_line(summary.name),
        base=_base(recipe) or "A language model",
        target=_target(recipe),
        rehearsed=_rehearsed(run_record),
        said=_line(verdict([summary])),
        warnings=warnings([summary]),
        rows=_rows(summary),
        tested=any(benchmark["p_value"] is not None for benchmark in summary.benchmarks.values()),
        control=DEFINITION,
        training=_training(recipe, run_record, summary),
        lineage="\n".join(lines_of_tree(lineage(run_record)["roots"])),
        versions=versions_of(store, [run_record]),
        digest=run_record.digest,
        recipe=readable_yaml(recipe),
    )


def _metadata(recipe: dict[str, Any], summary: Summary) -> dict[str, Any]:
    """Return the fields that the hub reads. `base_model` only where the base has a name there."""
    base = nested(recipe, "base")
    on_hub = {"hub": base.get("name"), "smollm2": SMOLLM2}.get(str(base.get("kind")))
    results = [_result(name, found) for name, found in summary.benchmarks.items()]
    return {
        **({"base_model": on_hub, "base_model_relation": "finetune"} if on_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cfsd", "rehearsal", "catastrophic-forgetting"],
        **({"model-index": [{"name": summary.name, "results": results}]} if results else {}),
    }


def _result(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return one benchmark for `model-index`; perplexities are given as what was measured, nats per token."""
    loss = unit_of(found).score == "nats/token"
    kind = "nats_per_token" if loss else METRIC_TYPES.get(found["metric"], found["metric"])
    label = "nats per token" if loss else found["metric"]
    metric = {"type": kind, "value": round(found["tuned"], 6), "name": f"{label} (base: {found['base']:.4g})"}
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": re.sub(r"[^\w./-]+", "-", name), "name": name},
        "metrics": [metric],
    }


def _base(recipe: dict[str, Any]) -> str:
    base = nested(recipe, "base")
    if base.get("kind") == "smollm2":
        return f"{SMOLLM2} (from its Q4_1 weights)"
    if base.get("kind") == "hub":
        return f"{base.get('name')} at commit {base.get('revision')}"
    return {"tiny": "The tiny model of cfsd", "folder": f"The model {base.get('path')}"}.get(str(base.get("kind")), "")


def _target(recipe: dict[str, Any]) -> str:
    target = nested(recipe, "target")
    return str(target.get("name") or target.get("path") or target.get("kind") or "a target of its owner's")


def _rehearsed(run_record: RunRecord) -> str:
    """Return what was rehearsed, in words; empty for plain fine-tuning."""
    corpus = run_record.artifacts.get("selected_corpus") or run_record.artifacts.get("filtered")
    if corpus is None or not corpus.metadata.get("rows") or _weightless(run_record):
        return ""
    made = run_record.artifacts.get("corpus", corpus).metadata
    biased = f", not an exact sample of it: {made['biased']}" if made.get("biased") else ""
    kind = str(made.get("source") or "context-free")
    text = {"replay": "documents given (replay)", "mixed": "text, partly sampled from the base model, partly given"}
    return f"{corpus.metadata['rows']:,} rows of {text.get(kind, f'{kind} text sampled from the base model')}{biased}"


def _weightless(run_record: RunRecord) -> bool:
    """Say whether rehearsal rows were read with a weight of 0 throughout."""
    known = rehearsal_of(run_record)
    return known.get("weight") == 0 and not known.get("final_weight") and known.get("budget") is None


def _rows(summary: Summary) -> list[list[str]]:
    rows = []
    if summary.target_gain:
        loss = [number(summary.target[f"{role}_loss"]) for role in ("base", "tuned")]
        rows.append(["target: held-out loss, nats/token", *loss, f"gain {shown(summary.target_gain)}"])
    if summary.target_accuracy_gain:
        exact = [number(POINTS * summary.target[f"{role}_accuracy"]) for role in ("base", "tuned")]
        rows.append(["target: exact, %", *exact, f"gain {shown(summary.target_accuracy_gain, POINTS)} points"])
    if summary.probe_kl:
        rows.append(["probe_kl, nats/token", "0", shown(summary.probe_kl), ""])
    if summary.mean_forgetting:
        lost = f"lost {shown(summary.mean_forgetting, POINTS)} points"
        rows.append(["mean forgetting, less guessing", "", "", lost])
    for entry in forgotten_of(summary):
        found = summary.benchmarks[entry.benchmark]
        unit = unit_of(found)
        scores = [number(found[role] * unit.factor) for role in ("base", "tuned")]
        change = f"lost {shown(found['forgetting'], unit.factor)} {unit.lost}: {finding(entry)}"
        label = f"{entry.benchmark}: {entry.metric}, {unit.score}, {entry.num_documents} documents"
        rows.append([label, *scores, change])
    for name, text in summary.texts.items():
        found = text["per_token"]
        losses = [number(found[role]) for role in ("base", "tuned")]
        rows.append([f"{name}: loss, nats/token", *losses, f"lost {shown(found['forgetting'])}"])
    return rows


def _training(recipe: dict[str, Any], run_record: RunRecord, summary: Summary) -> list[tuple[str, str]]:
    """Return the settings and costs that people ask for first; the recipe holds all of them."""
    train, rehearsal = nested(recipe, "train"), rehearsal_of(run_record)
    costs = summary.training or {}
    found = [(name.replace("_", " "), train.get(name)) for name in SETTINGS]
    if _rehearsed(run_record):
        found += [(f"rehearsal {name}", rehearsal.get(name)) for name in ("loss", "weight", "budget")]
    for name, method in Methods.model_validate(nested(train, "methods")).by_name().items():
        found.append((name, getattr(method, method.strength)))
    fitted = (summary.budget or {}).get("alpha")
    alpha = nested(recipe, "merge").get("alpha", 1) if fitted is None else fitted
    found.append(("merged with the base, weight of the tuned", None if alpha == 1 else f"{alpha:.3g}"))
    found += [(name.replace("_", " "), costs.get(name)) for name in ("steps", "target_tokens", "rehearsal_tokens")]
    found.append(("training, seconds", number(costs["seconds"]) if "seconds" in costs else None))
    return [
        (label, f"{value:,}" if isinstance(value, int) else str(value)) for label, value in found if value is not None
    ]


def _without_paths(content: Any) -> Any:
    """Return `content` with absolute paths cut to their last part: a card is for everyone, a path is not."""
    if isinstance(content, dict):
        return {name: _without_paths(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value) for value in content]
    if isinstance(content, str) and re.match(r"(/|~|[A-Za-z]:\\)\S", content) and not re.search(r"[\n{]", content):
        return PurePath(content.replace("\\", "/")).name
    return content


def _line(text: str) -> str:
    return " ".join(text.split())
