"""A base with a chat template through the main flow: what is measured, kept, judged and shown of its chats."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfsd.baseline.file import baseline_of, guarded
from cfsd.baseline.measured import measured
from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.overrides import override, validated
from cfsd.recipe import Recipe
from cfsd.report.comparisons import comparisons_of
from cfsd.report.figures.frontier import frontier_figure
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import headline, summarise
from cfsd.report.table import summary_frame
from cfsd.report.verdict import verdict
from cfsd.statistics.gate import judge
from cfsd.store.artifact import Store
from flows._verdict import warnings
from tests.conftest import save_model, write_recipe

CPU = Machine(device="cpu", threads=1)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}b:{% endif %}"
)
SETTINGS = {"generate.rows": 0, "train.learning_rate": 3e-3, "probe.rows": 64, "probe.length": 60}


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    folder = save_model(tmp_path / "chatting")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Recipe.load(write_recipe(tmp_path, folder)).model_dump(mode="json")


def taken(content: dict[str, Any], **changes: Any) -> RunRecord:
    from flows.mitigate import mitigate

    return mitigate(validated(Recipe, override(content, SETTINGS | changes), "test"), CPU).only()


def baselines(run_record: RunRecord, home: Path, scale: float) -> Any:
    """Return a baseline near the run, its divergence in chats `scale` times the run's."""
    run = measured(Store(home), run_record)
    scaled = run | {"chat_kl": run["chat_kl"]._replace(sums=run["chat_kl"].sums * scale)}
    seeds = [{name: f._replace(sums=f.sums * (1 + 0.01 * k)) for name, f in scaled.items()} for k in range(-2, 3)]
    assert run_record.recipe
    return run, baseline_of(run_record.recipe, range(5), seeds, [1.0] * 5, replaces="")


def test_chats_are_measured_kept_judged_and_shown(
    content: dict[str, Any], home: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = taken(content)
    assert "text without a prompt and chats are measured" in capsys.readouterr().out
    stages = Counter(step.stage for step in plain.steps)
    assert stages["chat"] == stages["evaluate-chat"] == stages["probe"] == 1
    moved = summarise(Store(home), plain)
    assert moved.probe_kl and moved.chat_kl and moved.chats and moved.chats["moved"]["by_entropy"]
    assert moved.chats["rows"] + moved.chats["unanswered"] == 64
    figures = headline(moved)
    assert figures["chat_kl"] == moved.chat_kl["value"] and figures["chat_user_kl"] > 0

    budgets = {"unprompted": moved.probe_kl["value"], "chat": moved.chat_kl["value"] / 5}
    kept = taken(content, **{"merge.budget": budgets, "name": "kept"})
    assert "train" not in [step.stage for step in kept.steps if step.executed]
    assert {"control", "control chat", "chat"} <= set(kept.artifacts)
    assert kept.artifacts["control chat"].content != kept.artifacts["chat"].content
    run_records = [plain, kept]
    summaries = [summarise(Store(home), run_record, run_records) for run_record in run_records]
    found = summaries[1]
    assert found.chat_kl and found.budget and found.budget["alpha"] < 1
    assert found.chat_kl["value"] < 1.5 * budgets["chat"]  # control and probe are two samples of 64
    assert set(found.budget["modes"]) == {"unprompted", "chat"}
    assert found.budget["modes"]["unprompted"]["outcome"] == "kept"
    assert found.budget["modes"]["chat"]["ratio_before_merging"] > 3
    assert headline(found)["budget/chat/nats"] == budgets["chat"]

    comparisons = comparisons_of(Store(home), run_records)
    paired = comparisons.of("kept", "mine", "chat_kl")
    assert paired and paired.paired and paired.sign() == -1
    said = verdict(summaries, comparisons)
    assert "in chats moved" in said and "Budget of “kept”, unprompted, " in said and "; chat, " in said
    labels = list(summary_frame(summaries)["figure"])
    assert {"chat_kl, nats/token", "chat_user_kl, nats/token", "budget of chat_kl, nats/token"} <= set(labels)
    (axes,) = frontier_figure(summaries, ["probe_kl"]).axes
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none" and len(line.get_xdata()) == 1]
    assert "hollow: chat_kl" in axes.get_ylabel() and len(hollow) == 1 + 2  # the base, and each variant in chats
    assert sorted(float(np.asarray(line.get_ydata())[0]) for line in hollow)[1:] == pytest.approx(
        sorted(s.chat_kl["value"] for s in summaries if s.chat_kl)
    )

    run, baseline = baselines(plain, home, 1.0)
    assert baseline.figures["chat_kl"].margin_is == "factor"
    assert judge(guarded(baseline, [run, run])).outcome == "pass"
    worse = judge(guarded(baselines(plain, home, 0.5)[1], [run, run]))
    assert [f.name for f in worse.findings if f.outcome == "fail"] == ["chat_kl"]
    older = baseline.model_copy(update={"figures": {n: f for n, f in baseline.figures.items() if n != "chat_kl"}})
    assert judge(guarded(older, [run, run])).outcome == "pass"
    assert plain.recipe
    (note,) = [line for line in warnings(older, plain.recipe, [1.0], run) if "not guarded" in line]
    assert note == "not guarded, as the baseline does not know it: chat_kl (--update-baseline)"


def test_what_the_base_cannot_have_is_refused_before_anything_is_sampled(
    content: dict[str, Any], home: Path, server: str, recipe_file: Path
) -> None:
    bare = Recipe.load(recipe_file).model_dump(mode="json")
    for changes, message in (
        ({"probe.modes": ["unprompted", "chat"]}, "probe.modes names chat, but the base has no chat template"),
        ({"merge.budget": {"unprompted": 0.1, "chat": 0.1}}, "a budget is given for chat, but with this base"),
        (
            {
                "generate.rows": 8,
                "generate.source": "mixed",
                "generate.fractions": {"context-free": 0.5, "template": 0.5},
            },
            "this model has no chat template for rows to begin with",
        ),
    ):
        with pytest.raises(BadInput, match=message):
            taken(bare, **changes)
    with pytest.raises(BadInput, match="budget is given for support"):
        taken(content, **{"merge.budget": {"support": 0.1}})
    made = {folder.name for folder in (home / "store").glob("*")}
    assert "corpus" not in made, json.dumps(sorted(made))


BY_DIVERGENCE = {"generate.rows": 24, "generate.length": 24, "generate.top_logprobs": 4, "train.rehearsal.loss": "kl"}


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({}, "template"),
        ({"generate.source": "context-free"}, "context-free"),
        ({"train.rehearsal.loss": "nll"}, "context-free"),
        ({"train.rehearsal.budget": 0.1}, "context-free"),
        ({"generate.fill": True}, "context-free"),
        ({"generate.tail_samples": 0}, "context-free"),  # the drawn token alone says nothing of chats
        ({"train.methods.ewc": {"weight": 1, "rows": 8}}, "context-free"),
    ],
)
def test_source_auto_takes_chats_in_where_the_recipe_and_the_base_allow_it(
    content: dict[str, Any], home: Path, server: str, changes: dict[str, Any], source: str
) -> None:
    from flows.corpus import corpus

    explicit = {"generate.source": source}
    made = [
        corpus(validated(Recipe, override(content, BY_DIVERGENCE | changes | named), "test"), CPU).only()
        for named in ({}, explicit)
    ]
    keys = {run_record.artifacts["corpus"].key for run_record in made}
    assert len(keys) == 1 and made[0].artifacts["corpus"].metadata["source"] == source
    assert set(made[0].artifacts) == set(made[1].artifacts)


def test_source_auto_is_text_without_a_prompt_for_a_base_without_a_template(
    home: Path, server: str, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.corpus import corpus

    bare = Recipe.load(recipe_file).model_dump(mode="json")
    made = corpus(validated(Recipe, override(bare, BY_DIVERGENCE), "test"), CPU).only()
    assert made.artifacts["corpus"].metadata["source"] == "context-free"
    assert "generate: source auto is context-free here, as the base has no chat template" in capsys.readouterr().out
