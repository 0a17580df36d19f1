"""The model card: a README.md in the hub's format that states what was measured, for people who publish a model."""

import re
from pathlib import PurePath
from typing import Any

import yaml

from cfsd.generate.spec import CONTEXT_FREE, WORDS
from cfsd.report.compared import NOTHING, Comparisons
from cfsd.report.differences import lines_against
from cfsd.report.lineage import lineage, lines_of_tree
from cfsd.report.measures import MEASURES, figure_of
from cfsd.report.provenance import versions_of
from cfsd.report.recipe_text import readable_yaml
from cfsd.report.rendering import rendered
from cfsd.report.run_record import RunRecord
from cfsd.report.shown import shown_answers
from cfsd.report.summary import Summary
from cfsd.report.table import forgotten_of, number, unit_of, variant_of
from cfsd.report.verdict import joined, verdict, warnings
from cfsd.statistics import differences
from cfsd.statistics.discoveries import DEFINITION, finding
from cfsd.store.artifact import Store

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
METRIC_TYPES = {"acc": "accuracy", "acc_norm": "accuracy", "word_perplexity": "perplexity"}  # the hub's names
PATHS = ("path", "folder", "prompts")  # fields that may hold a path of this machine
SETTINGS = ("learning_rate", "epochs", "schedule", "warmup_fraction", "weight_decay", "precision", "seed")


def has_card(run_record: RunRecord) -> bool:
    """Say whether the variant's model was trained here, so that there is something to tell of it."""
    return "tuned" in run_record.artifacts and "final" in run_record.artifacts


def model_card(store: Store, run_record: RunRecord, summary: Summary, comparisons: Comparisons = NOTHING) -> str:
    """Return the card of the variant's final model, from its artifacts alone; no path of this machine is in it."""
    recipe = _without_paths(run_record.recipe.model_dump(mode="json")) if run_record.recipe else {}
    return rendered(
        "model_card.md.j2",
        front_matter=yaml.safe_dump(_front_matter(recipe, summary), sort_keys=False, allow_unicode=True),
        summary=summary,
        base=_base(recipe),
        target=_target(recipe),
        rehearsed=_rehearsed(run_record),
        verdict=verdict([summary]),
        against=lines_against(variant_of(summary.name), comparisons, only_found=False),
        warnings=warnings([summary]),
        measures=[(m, figure) for m in MEASURES if m.label and (figure := figure_of(summary, m.name))],
        benchmarks=[(entry, summary.benchmarks[entry.benchmark], finding(entry)) for entry in forgotten_of(summary)],
        unit_of=unit_of,
        answered=[item for section in shown_answers(store, [run_record]) for item in section.items],
        control=DEFINITION,
        how_compared=differences.DEFINITION,
        training=_training(run_record, summary),
        lineage="\n".join(lines_of_tree(lineage(run_record)["roots"])),
        versions=versions_of(store, [run_record]),
        digest=run_record.digest,
        recipe=readable_yaml(recipe),
    )


def _front_matter(recipe: dict[str, Any], summary: Summary) -> dict[str, Any]:
    """Return the fields that the hub reads. `base_model` only where the base has a name there."""
    base = recipe.get("base", {})
    on_hub = {"hub": base.get("name"), "smollm2": SMOLLM2}.get(base.get("kind"))
    results = [_result(name, scores) for name, scores in summary.benchmarks.items()]
    return {
        **({"base_model": on_hub, "base_model_relation": "finetune"} if on_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cfsd", "rehearsal", "catastrophic-forgetting"],
        **({"model-index": [{"name": summary.name, "results": results}]} if results else {}),
    }


def _result(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Return one benchmark for `model-index`; perplexities are given as what was measured, nats per token."""
    kind, label = METRIC_TYPES.get(scores["metric"], scores["metric"]), scores["metric"]
    if unit_of(scores).score == "nats/token":
        kind, label = "nats_per_token", "nats per token"
    metric = {"type": kind, "value": round(scores["tuned"], 6), "name": f"{label} (base: {scores['base']:.4g})"}
    dataset = {"type": re.sub(r"[^\w./-]+", "-", name), "name": name}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [metric]}


def _base(recipe: dict[str, Any]) -> str:
    base = recipe.get("base", {})
    names = {
        "smollm2": f"{SMOLLM2} (from its Q4_1 weights)",
        "hub": f"{base.get('name')} at commit {base.get('revision')}",
        "tiny": "The tiny model of cfsd",
        "folder": f"The model {base.get('path')}",
    }
    return names.get(base.get("kind"), "A language model")


def _target(recipe: dict[str, Any]) -> str:
    target = recipe.get("target", {})
    return str(target.get("name") or target.get("path") or target.get("kind") or "a target of its owner's")


def _rehearsed(run_record: RunRecord) -> str:
    """Return what was rehearsed, in words; empty for plain fine-tuning and for a rehearsal of weight 0."""
    corpus = run_record.artifacts.get("selected_corpus") or run_record.artifacts.get("filtered")
    is_weightless = run_record.recipe is not None and run_record.recipe.train.rehearsal.weight == 0
    if corpus is None or not corpus.metadata.get("rows") or is_weightless:
        return ""
    sampled = run_record.artifacts.get("corpus", corpus).metadata
    biased = f", not an exact sample of it: {sampled['biased']}" if sampled.get("biased") else ""
    source: Any = sampled.get("source") or CONTEXT_FREE
    fractions = run_record.recipe.generate.fractions if run_record.recipe and source == "mixed" else {source: 1.0}
    return f"{corpus.metadata['rows']:,} rows of {joined([WORDS[part] for part in sorted(fractions)])}{biased}"


def _training(run_record: RunRecord, summary: Summary) -> dict[str, Any]:
    """Return the settings and costs that people ask for first, None where unknown; the recipe holds all of them."""
    recipe, costs = run_record.recipe, summary.training or {}
    shown: dict[str, Any] = {}
    alpha = (summary.budget or {}).get("alpha")
    if recipe is not None:
        settings = recipe.train.model_dump(mode="json")
        shown |= {name.replace("_", " "): settings[name] for name in SETTINGS}
        if _rehearsed(run_record):
            shown |= {f"rehearsal {name}": settings["rehearsal"][name] for name in ("loss", "weight", "budget")}
        for name, method in recipe.train.methods.by_name().items():
            shown[name] = ", ".join(f"{k} {v}" for k, v in method.model_dump(exclude_defaults=True).items())
        alpha = recipe.merge.alpha if alpha is None else alpha
    shown["merged with the base, weight of the tuned"] = None if alpha in (1, None) else f"{alpha:.3g}"
    shown |= {name.replace("_", " "): costs.get(name) for name in ("steps", "target_tokens", "rehearsal_tokens")}
    return shown | {"training, seconds": number(costs["seconds"]) if "seconds" in costs else None}


def _without_paths(content: Any, field: str = "") -> Any:
    """Return `content` with the absolute paths of its PATHS cut to their last part: a card is for everyone."""
    if isinstance(content, dict):
        return {name: _without_paths(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value, field) for value in content]
    if field in PATHS and isinstance(content, str) and re.match(r"/|~|[A-Za-z]:\\", content):
        return PurePath(content.replace("\\", "/")).name
    return content
