"""Measure a model: benchmarks, texts, held-out target rows, divergence from the base on probe and target."""

from collections.abc import Mapping
from typing import Literal

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.show import OFF, Show
from cfsd.evaluate.spec import AlongSpec, EvaluateSpec
from cfsd.evaluate.text import Text
from cfsd.generate.spec import UNPROMPTED
from cfsd.machine import Machine
from cfsd.report.run_record import Scores
from cfsd.stages import (
    CHAT,
    EVALUATE,
    EVALUATE_CHAT,
    EVALUATE_PROBE,
    EVALUATE_PROMPTS,
    EVALUATE_TARGET,
    EVALUATE_TARGET_DIVERGENCE,
    EVALUATE_TEXT,
    SHOW,
)
from cfsd.store.artifact import Artifact, Draft
from tasks import record
from tasks._planned import Planned, planning
from tasks._stage import stage

# The role is in the key: a tuned model whose weights equal the base's is measured anew,
# or a comparison with learning rate 0 would compare one artifact with itself.
Role = Literal["base", "tuned"]


def check_benchmarks(base: Artifact, spec: EvaluateSpec, machine: Machine) -> None:
    """Check the prompts that are shown, and each benchmark that is going to be scored, documents included.

    A plan leaves out lm-eval's own, whose data it would have to download.

    Raises: BadInput, before anything is sampled; see `cfsd.evaluate.harness.check`.
    """
    if base.content and spec.show.has_own():
        from cfsd.evaluate.answers import check_own

        check_own(base, spec.show)
    is_plan, steps = planning.get() is not None, list[Planned]()
    token = planning.set(steps)
    try:
        evaluate_base(base, None, spec.model_copy(update={"texts": (), "show": Show.model_validate(OFF)}), machine)
    finally:
        planning.reset(token)
    due = [b for b, step in zip(spec.benchmarks, steps, strict=True) if not step.cached and b.needs_check()]
    if due := [benchmark for benchmark in due if not (is_plan and benchmark.is_hub())]:
        from cfsd.evaluate.harness.check import check_documents  # lm-eval takes seconds to import

        for benchmark in due:
            check_documents(benchmark)


def evaluate_base(base: Artifact, target: Artifact | None, spec: EvaluateSpec, machine: Machine) -> Scores:
    """Return the scores of the model before."""
    return _scores(base, base, target, spec, "base", machine)


def evaluate_tuned(
    base: Artifact, tuned: Artifact, target: Artifact | None, sampled: Mapping[str, Artifact], spec: EvaluateSpec,
    machine: Machine,
) -> Scores:  # fmt: skip
    """Return the scores of the model after, and its divergence from the one before.

    `sampled`: what it is measured along in each mode, as `tasks.generate.sample_along` returns it.
    """
    scores = _scores(base, tuned, target, spec, "tuned", machine)
    divergence = evaluate_target_divergence(base, tuned, target, spec.held_out_rows, machine) if target else None
    along = {name: _evaluate_along(name, base, tuned, rows, machine) for name, rows in sampled.items()}
    probed, chat = along.pop(UNPROMPTED), along.pop(CHAT, None)
    return scores.model_copy(update={"probe": probed, "chat": chat, "prompts": along, "target_divergence": divergence})


def _evaluate_along(mode: str, base: Artifact, tuned: Artifact, sampled: Artifact, machine: Machine) -> Artifact:
    if own := {UNPROMPTED: evaluate_probe, CHAT: evaluate_chats}.get(mode):
        return own(base, tuned, sampled, machine)
    return evaluate_prompts(base, tuned, sampled, mode, machine)


def _scores(
    base: Artifact, model: Artifact, target: Artifact | None, spec: EvaluateSpec, role: Role, machine: Machine
) -> Scores:  # fmt: skip
    return Scores(
        benchmarks={b.name: evaluate_benchmark(model, b, role, machine) for b in spec.benchmarks},
        texts={t.name: evaluate_text(model, t, t.name, role, machine) for t in spec.texts},
        target=evaluate_target(model, target, spec.held_out_rows, role, machine) if target else None,
        shown=show_answers(base, model, target, spec.show, role, machine) if spec.show.is_on() else None,
    )


@stage(EVALUATE, "scores", gpu=True)
def evaluate_benchmark(draft: Draft, model: Artifact, benchmark: Benchmark, role: Role, machine: Machine) -> None:
    """Score one benchmark; see `cfsd.evaluate.harness.score`."""
    from cfsd.evaluate.harness.score import score_benchmark

    score_benchmark(model, benchmark, draft, machine)
    remarks = draft.metadata.get("remarks")
    for line in remarks if isinstance(remarks, list) and role == "base" else ():
        record.say(f"benchmark {benchmark.name}: {line}")


@stage(EVALUATE_TEXT, "scores", gpu=True)
def evaluate_text(draft: Draft, model: Artifact, text: Text, name: str, role: Role, machine: Machine) -> None:
    """Measure how well the user's own text is predicted; see `cfsd.evaluate.perplexity`.

    `name` is the text's, which is not in its digest: figures are called by it, so that it is in the key here.
    """
    assert name == text.name
    from cfsd.evaluate.perplexity import score_text

    score_text(model, text, draft, machine)


@stage(EVALUATE_TARGET, "scores", gpu=True)
def evaluate_target(
    draft: Draft, model: Artifact, target: Artifact, max_rows: int | None, role: Role, machine: Machine
) -> None:
    """Score held-out responses; see `cfsd.model.likelihood`."""
    from cfsd.evaluate.stage import score_target

    score_target(model, target, max_rows, draft, machine)


def show_answers(
    base: Artifact, model: Artifact, target: Artifact | None, spec: Show, role: Role, machine: Machine
) -> Artifact:  # fmt: skip
    """Let a model answer the prompts that people read; the target is in the key only where its rows are shown."""
    return _show(base, model, spec, role, machine, target if spec.target else None)


@stage(SHOW, "scores", gpu=True)
def _show(
    draft: Draft, base: Artifact, model: Artifact, spec: Show, role: Role, machine: Machine,
    target: Artifact | None = None,
) -> None:  # fmt: skip
    """Answer the prompts that people read; see `cfsd.evaluate.answers`."""
    from cfsd.evaluate.answers import show

    show(base, model, target, spec, draft, machine)


def evaluate_probe(base: Artifact, tuned: Artifact, probe: Artifact, machine: Machine) -> Artifact:
    """Measure the divergence from the base on the probe."""
    return _evaluate_probe(base, tuned, probe, AlongSpec(), machine)


def evaluate_prompts(base: Artifact, tuned: Artifact, answers: Artifact, name: str, machine: Machine) -> Artifact:
    """Measure the divergence along the base's answers to the prompts that are called `name`, as are its figures."""
    return _evaluate_prompts(base, tuned, answers, AlongSpec(), name, machine)


def evaluate_chats(base: Artifact, tuned: Artifact, chats: Artifact, machine: Machine) -> Artifact:
    """Measure the divergence along the turns of chats that the base sampled."""
    return _evaluate_chats(base, tuned, chats, AlongSpec(), machine)


@stage(EVALUATE_CHAT, "scores", gpu=True)
def _evaluate_chats(
    draft: Draft, base: Artifact, tuned: Artifact, chats: Artifact, spec: AlongSpec, machine: Machine
) -> None:
    """Measure the divergence along the turns of chats; see `cfsd.evaluate.divergence`."""
    from cfsd.evaluate.divergence import score_chats

    score_chats(base, tuned, chats, draft, machine)


@stage(EVALUATE_PROBE, "scores", gpu=True)
def _evaluate_probe(
    draft: Draft, base: Artifact, tuned: Artifact, probe: Artifact, spec: AlongSpec, machine: Machine
) -> None:
    """Measure the divergence from the base on the probe; see `cfsd.evaluate.divergence`."""
    from cfsd.evaluate.divergence import score_probe

    score_probe(base, tuned, probe, draft, machine)


@stage(EVALUATE_PROMPTS, "scores", gpu=True)
def _evaluate_prompts(
    draft: Draft, base: Artifact, tuned: Artifact, answers: Artifact, spec: AlongSpec, name: str, machine: Machine
) -> None:
    """Measure the divergence along the base's answers to prompts; see `cfsd.evaluate.divergence`."""
    from cfsd.evaluate.divergence import score_prompts

    score_prompts(base, tuned, answers, name, draft, machine)


@stage(EVALUATE_TARGET_DIVERGENCE, "scores", gpu=True)
def evaluate_target_divergence(
    draft: Draft, base: Artifact, tuned: Artifact, target: Artifact, max_rows: int | None, machine: Machine
) -> None:
    """Measure the divergence from the base on held-out responses; see `cfsd.evaluate.divergence`."""
    from cfsd.evaluate.divergence import score_target_divergence

    score_target_divergence(base, tuned, target, max_rows, draft, machine)
