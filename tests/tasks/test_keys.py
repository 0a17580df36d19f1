"""Every stage's key, as the code before the packages computed it: a data folder made then is cached now."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsd.data.target import Target
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.show import Show
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.evaluate.text import Text
from cfsd.filter.spec import FilterSpec
from cfsd.generate.prompts import Prompts
from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.machine import Machine
from cfsd.merge.spec import MergeSpec
from cfsd.mix.spec import MixSpec
from cfsd.model.checkpoint import Checkpoint
from cfsd.select.spec import SelectSpec
from cfsd.store.artifact import Artifact
from cfsd.train.methods import Methods
from cfsd.train.spec import TrainSpec, Watched
from tasks._planned import Planned, planning
from tasks._stage import counted
from tasks.check import check_corpus
from tasks.evaluate import (
    evaluate_benchmark,
    evaluate_probe,
    evaluate_prompts,
    evaluate_target,
    evaluate_target_divergence,
    evaluate_text,
    show_answers,
)
from tasks.fetch import fetch_model
from tasks.filter import filter_corpus
from tasks.fisher import estimate_fisher
from tasks.generate import generate_corpus, sample_answers, sample_probe
from tasks.merge import fit_alpha, merge_model
from tasks.mix import mix_rows
from tasks.select import embed_rows, select_corpus, select_target
from tasks.target import prepare_target, rewrite_target
from tasks.train import OfBase, train_model
from tasks.weigh import store_target, weigh_target
from tests.conftest import ROOT


def artifact(name: str, kind: str = "corpus") -> Artifact:
    return Artifact(kind=kind, key=name, content=name, metadata={"rows": 9, "train_rows": 9})


BASE, TUNED, MIXTURE = (artifact(name, "model") for name in ("base", "tuned", "mixture"))
TARGET, CORPUS, FISHER, LOSSES = (
    artifact("target", "target"),
    artifact("corpus"),
    artifact("fisher"),
    artifact("losses"),
)
PROBE = artifact("probe")
ROWS = ROOT / "deployments" / "recipes" / "tiny_target.jsonl"
ON = Machine(device="cpu", threads=1)
PROMPTS = Prompts(name="some", path=str(ROWS))
TRAIN = TrainSpec(seed=0)
READING = TrainSpec.model_validate({"seed": 0, "rehearsal": {"loss": "kl"}})
EWC = Methods.model_validate({"ewc": {"weight": 1.0, "rows": 4}})
MEASURED = EvaluateSpec(benchmarks=(Benchmark(name="facts"),), held_out_rows=5)
WATCHING = TrainSpec.model_validate({"seed": 0, "watch": {"every": 5, "benchmarks": ["facts"]}})
WATCHED = Watched(sample=PROBE, target=TARGET, benchmarks=MEASURED.benchmarks)
UNTESTED = Watched(sample=PROBE, target=TARGET)
FLOW = MixSpec(seed=0, flow="sample")

CALLS: dict[str, Callable[[], Any]] = {
    "fetch": lambda: fetch_model(Checkpoint(kind="tiny"), ON),
    "target": lambda: prepare_target(BASE, Target(path=str(ROWS), seed=0), ON),
    "probe": lambda: sample_probe(BASE, ProbeSpec(seed=0), ON),
    "prompts": lambda: sample_answers(BASE, PROMPTS, ON),
    "generate": lambda: generate_corpus(BASE, TARGET, GenerateSpec(seed=0, source="context-free"), ON),
    "generate contextual": lambda: generate_corpus(BASE, TARGET, GenerateSpec(seed=0, source="contextual"), ON),
    "filter": lambda: filter_corpus(CORPUS, TARGET, MEASURED, FilterSpec(), ON),
    "filter overlap": lambda: filter_corpus(CORPUS, TARGET, MEASURED, FilterSpec(overlap_words=8), ON),
    "embed": lambda: embed_rows(BASE, TARGET, ON),
    "select random target": lambda: select_target(BASE, TARGET, SelectSpec(target_rows=4, method="random", seed=0), ON),
    "select random corpus": lambda: select_corpus(BASE, CORPUS, SelectSpec(corpus_rows=4, method="random", seed=0), ON),
    "weigh": lambda: weigh_target(BASE, TARGET, FLOW, Methods(), ON),
    "mix": lambda: mix_rows(TARGET, CORPUS, None, MixSpec(seed=0), ON),
    "mix with losses": lambda: mix_rows(TARGET, CORPUS, LOSSES, FLOW, ON),
    "check": lambda: check_corpus(BASE, PROBE, CORPUS, MIXTURE, GenerateSpec(seed=0), ON),
    "fisher": lambda: estimate_fisher(BASE, CORPUS, EWC, ON),
    "train": lambda: train_model(BASE, MIXTURE, CORPUS, OfBase(), None, TRAIN, ON),
    "train on the corpus": lambda: train_model(BASE, MIXTURE, CORPUS, OfBase(), None, READING, ON),
    "train with a Fisher matrix": lambda: train_model(BASE, MIXTURE, CORPUS, OfBase(FISHER), None, TRAIN, ON),
    "train watched": lambda: train_model(BASE, MIXTURE, CORPUS, OfBase(), WATCHED, WATCHING, ON),
    "train watched, Fisher": lambda: train_model(BASE, MIXTURE, CORPUS, OfBase(FISHER), UNTESTED, TRAIN, ON),
    "budget": lambda: fit_alpha(BASE, TUNED, {"unprompted": PROBE}, MergeSpec(budget=0.1), ON),
    "merge": lambda: merge_model(BASE, TUNED, MergeSpec(alpha=0.5), ON),
    "evaluate": lambda: evaluate_benchmark(BASE, Benchmark(name="facts"), "base", ON),
    "evaluate-target": lambda: evaluate_target(BASE, TARGET, 5, "tuned", ON),
    "evaluate-target of all rows": lambda: evaluate_target(BASE, TARGET, None, "base", ON),
    "evaluate-probe": lambda: evaluate_probe(BASE, TUNED, PROBE, ON),
    "evaluate-prompts": lambda: evaluate_prompts(BASE, TUNED, PROBE, "support", ON),
    "evaluate-target-divergence": lambda: evaluate_target_divergence(BASE, TUNED, TARGET, None, ON),
    "show": lambda: show_answers(BASE, TUNED, TARGET, Show(), "tuned", ON),
    "show without the target's": lambda: show_answers(BASE, BASE, TARGET, Show(target=0), "base", ON),
}  # fmt: skip

# by commit c7c18a9; but fetch, target, train and evaluate-probe, whose versions were raised, show, which is newer, mix
# and evaluate-prompts, which count what they did not (decision 0051)
KEYS = {
    "fetch": ["fetch f32271f74fdc68c4"],
    "target": ["target ecd9e847a9c52e4d"],
    "probe": ["probe 50996de128da15ef"],
    "prompts": ["prompts 3aed71aa2d1ccb24"],
    "generate": ["generate 8e96ca5510a52fa8"],
    "generate contextual": ["generate 3bb6d55d1bcf1c0c"],
    "filter": ["filter 651f77b8c7961602"],
    "filter overlap": ["filter b3bf281f4f6208b2"],
    "embed": ["embed a7acd6ee85e32510"],
    "select random target": ["select a6dab0ea6c1ad78f"],
    "select random corpus": ["select fc4b61277e01d4e5"],
    "weigh": ["weigh eee4b60306b061c6"],
    "mix": ["mix 267e324801612d3d"],
    "mix with losses": ["mix ef891323f77f913f"],
    "check": ["check 6567315b1b644deb"],
    "fisher": ["fisher aeac4180025cc97f"],
    "train": ["train 9c7af6701b665fbc"],
    "train on the corpus": ["train 22876dfb1de79d22"],
    "train with a Fisher matrix": ["train 0ccfcbd8d44320d0"],
    "train watched": ["train 4d61b7e97d64802c"],
    "train watched, Fisher": ["train 3edc2747c81b0d99"],
    "budget": ["budget 49d78d67dca08dda"],
    "merge": ["merge b64d77836f32cdd5"],
    "evaluate": ["evaluate 427910de53ad6fc3"],
    "evaluate-target": ["evaluate-target c45a93ed2c27b7e3"],
    "evaluate-target of all rows": ["evaluate-target 3cb428d26440aa31"],
    "evaluate-probe": ["evaluate-probe 4a57a8538bc01100"],
    "evaluate-prompts": ["evaluate-prompts 129bb90d2f64a530"],
    "evaluate-target-divergence": ["evaluate-target-divergence 4e38dbd243509bfa"],
    "show": ["show 8d627ee4641b9b42"],
    "show without the target's": ["show e969283840b2e741"],
}


def planned(call: Any) -> list[str]:
    """Return the stages that a call would take, each with its key."""
    steps: list[Planned] = []
    token = planning.set(steps)
    try:
        call()
    finally:
        planning.reset(token)
    return [f"{step.stage} {step.key}" for step in steps]


@pytest.mark.parametrize("name", CALLS)
def test_a_key_is_what_it_was(name: str, home: Path) -> None:
    assert planned(CALLS[name]) == KEYS[name]


def test_an_optional_input_is_in_the_key_unless_it_is_none() -> None:
    def work(draft: Any, *, needed: Any, optional: Any = None, machine: Any) -> None: ...

    signature = inspect.signature(work)
    assert counted(signature, {"needed": None, "optional": None, "machine": ON}) == (None,)
    assert counted(signature, {"needed": None, "optional": 0, "machine": ON}) == (None, 0)


ALONG = artifact("along", "along")


def trained_with(methods: dict[str, Any], losses: Artifact | None, along: Artifact | None) -> list[str]:
    spec = TrainSpec.model_validate({"seed": 0, "methods": methods})
    return planned(lambda: train_model(BASE, MIXTURE, CORPUS, OfBase(None, losses, along), None, spec, ON))


def test_what_the_base_says_of_the_target_is_in_the_key_only_where_a_method_reads_it(home: Path) -> None:
    assert trained_with({}, LOSSES, ALONG) == KEYS["train"]
    weighed, held = {"stm": {"threshold": 3}}, {"target_divergence": {"weight": 0.1}}
    live = {"target_divergence": {"weight": 0.1, "reference": "base"}}
    for methods, read in ((weighed, (True, False)), (held, (False, True)), (live, (False, False))):
        whole = trained_with(methods, LOSSES, ALONG)
        others = trained_with(methods, artifact("other"), ALONG), trained_with(methods, LOSSES, BASE)
        assert tuple(other != whole for other in others) == read


def test_stages_of_methods_run_only_where_they_are_asked_for(home: Path) -> None:
    off, on = MixSpec(seed=0), {"stm": {"threshold": 3}, "target_divergence": {"weight": 0.1}}
    methods = Methods.model_validate(on)
    assert planned(lambda: weigh_target(BASE, TARGET, off, Methods(), ON)) == []
    assert planned(lambda: weigh_target(BASE, TARGET, off, methods, ON)) == KEYS["weigh"]
    assert planned(lambda: store_target(BASE, TARGET, Methods(), ON)) == []
    assert [step.split()[0] for step in planned(lambda: store_target(BASE, TARGET, methods, ON))] == ["store-target"]
    read = Target(path=str(ROWS), seed=0)
    assert planned(lambda: rewrite_target(BASE, TARGET, read.rewriting(), ON)) == []
    own = Target(path=str(ROWS), seed=0, rewrite="self")
    assert planned(lambda: prepare_target(BASE, own.as_given(), ON)) == KEYS["target"]
    assert len(planned(lambda: rewrite_target(BASE, TARGET, own.rewriting(), ON))) == 1


def test_what_figures_are_called_by_is_in_the_key(home: Path, tmp_path: Path) -> None:
    """Equal texts, or answers to equal prompts, under another name have figures of another name."""
    (tmp_path / "mine.txt").write_text("a text")
    one, other = (Text(name=name, path=str(tmp_path / "mine.txt")) for name in ("one", "other"))
    assert one.digest() == other.digest()
    texts = [planned(lambda text=text: evaluate_text(BASE, text, text.name, "base", ON)) for text in (one, other)]
    prompts = [planned(lambda name=name: evaluate_prompts(BASE, TUNED, PROBE, name, ON)) for name in ("one", "other")]
    assert texts[0] != texts[1] and prompts[0] != prompts[1]
