"""Sample from the base model: the rehearsal corpus, and the probe by which forgetting is measured."""

from collections.abc import Callable, Mapping

from cfsd.errors import BadInput
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.generate.prompts import Prompts
from cfsd.generate.spec import AUTO, CHATS, UNPROMPTED, GenerateSpec, ProbeSpec
from cfsd.machine import Machine, home
from cfsd.model.checkpoint import lacks_chat_template
from cfsd.recipe import Recipe
from cfsd.spec import CONTROL_SEEDS, WATCHED_SEEDS, seed_of
from cfsd.stages import CHAT, GENERATE, PROBE, PROMPTS
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.train.spec import Watched, WatchSpec
from tasks import record
from tasks._cluster import sampler_of
from tasks._planned import planning
from tasks._stage import stage

Say = Callable[[str], object]


@stage(PROBE, "corpus", gpu=True)
def sample_probe(draft: Draft, base: Artifact, spec: ProbeSpec, machine: Machine) -> None:
    """Sample the held-out probe, which all variants on this base share; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import probe

    with sampler_of(machine) as sampler:
        probe(base, spec, draft, machine, sampler)


@stage(CHAT, "corpus", gpu=True)
def sample_chats(draft: Draft, base: Artifact, spec: ProbeSpec, machine: Machine) -> None:
    """Sample chats, the user's turn and the answer, for measuring only; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import chat

    with sampler_of(machine) as sampler:
        chat(base, spec, draft, machine, sampler)


@stage(PROMPTS, "corpus", gpu=True)
def sample_answers(draft: Draft, base: Artifact, prompts: Prompts, machine: Machine) -> None:
    """Let the base answer the user's prompts, for measuring only; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import answers

    with sampler_of(machine) as sampler:
        answers(base, prompts, draft, machine, sampler)


def modes_of(base: Artifact, probe: ProbeSpec, say: Say = lambda _: None) -> dict[str, ProbeSpec | Prompts]:
    """Return the settings of every mode's sample by the mode's name, and say what `auto` stands for with this base.

    Chats are planned for a base that is not fetched yet, unless it is known to have no chat template.

    Raises:
        BadInput: The base cannot have a mode that the user named.
    """
    found: dict[str, ProbeSpec | Prompts] = {}
    for mode in probe.modes:
        own = probe.of(mode)
        found[UNPROMPTED if mode.name == AUTO else mode.name] = own
        if mode.name == CHAT:
            _check_chat(base, own)
        if mode.name == AUTO and not lacks_chat_template(base):
            try:
                _check_chat(base, own)
            except BadInput as error:
                say(f"probe: text without a prompt is measured, chats are not: {error}")
            else:
                found[CHAT] = own
                say("probe: text without a prompt and chats are measured, as the base has a chat template")
    return found


def _check_chat(base: Artifact, spec: ProbeSpec | Prompts) -> None:
    from cfsd.generate.sources import check_chat

    assert isinstance(spec, ProbeSpec)
    if base.content:
        check_chat(base, spec, Store(home()))


def corpus_settings(base: Artifact, recipe: Recipe) -> GenerateSpec:
    """Return the settings of the recipe's corpus, with what `generate.source: auto` stands for with this base."""
    return recipe.corpus(with_chats=recipe.generate.source == AUTO and not _why_no_chats(base, recipe.generate.length))


def _why_no_chats(base: Artifact, length: int) -> str:
    """Return why no row can begin with the base's chat template, empty if rows can."""
    if lacks_chat_template(base):
        return "the base has no chat template"
    try:
        _check_template(base, length)
    except BadInput as error:
        return str(error)
    return ""


def _check_template(base: Artifact, length: int) -> None:
    from cfsd.generate.sources import check_template

    if base.content:
        check_template(base, length, Store(home()))


def check_source(base: Artifact, recipe: Recipe) -> GenerateSpec:
    """Return the settings of the recipe's corpus, and say what `generate.source: auto` stands for.

    Raises BadInput where the base has no chat template for a source that needs one.
    """
    settings = corpus_settings(base, recipe)
    if settings.rows and CHATS in settings.sources():
        _check_template(base, settings.length)
    if settings.rows and settings.source != recipe.generate.source and planning.get() is None:
        why = recipe.why_no_chats() or _why_no_chats(base, settings.length)
        record.say(f"generate: source auto is {settings.source} here{why and f', as {why}'}")
    return settings


def check_modes(base: Artifact, probe: ProbeSpec) -> tuple[str, ...]:
    """Return the modes that are measured with this base, and say what `auto` stands for. Raises BadInput."""
    return tuple(modes_of(base, probe, record.say if planning.get() is None else lambda _: None))


def sample_along(base: Artifact, probe: ProbeSpec, machine: Machine) -> dict[str, Artifact]:
    """Sample all that divergences are measured along, by the name of the mode."""
    return {name: _sampled(base, name, own, machine) for name, own in modes_of(base, probe).items()}


def _sampled(base: Artifact, mode: str, spec: ProbeSpec | Prompts, machine: Machine) -> Artifact:
    if isinstance(spec, Prompts):
        return sample_answers(base, spec, machine)
    return (sample_chats if mode == CHAT else sample_probe)(base, spec, machine)


def sample_watched(
    base: Artifact, target: Artifact, probe: ProbeSpec, watch: WatchSpec, evaluate: EvaluateSpec, machine: Machine
) -> Watched | None:  # fmt: skip
    """Return what the training is watched on, if it is: rows like the probe's, but others, and what `watch` names.

    What is watched may stop the training, so it must not be the probe.
    """
    if not watch.every:
        return None
    spec = ProbeSpec(rows=watch.rows, length=probe.length, seed=seed_of(probe, WATCHED_SEEDS))
    benchmarks = tuple(benchmark for benchmark in evaluate.benchmarks if benchmark.name in watch.benchmarks)
    return Watched(sample=sample_probe(base, spec, machine), target=target, benchmarks=benchmarks)


def sample_control(
    base: Artifact, probe: ProbeSpec, budgets: Mapping[str, float], machine: Machine
) -> dict[str, Artifact]:  # fmt: skip
    """Sample what decides which alpha keeps the budgets, by mode: as many rows as are judged by, but others.

    The probe judges whether a budget was kept, so it must not decide alpha.
    """
    modes = modes_of(base, probe)
    others = {name: modes[name].model_copy(update={"seed": seed_of(modes[name], CONTROL_SEEDS)}) for name in budgets}
    controls = {name: _sampled(base, name, own, machine) for name, own in others.items()}
    for name, control in controls.items():
        if control.content and control.metadata.get("unanswered") == control.metadata["rows"]:
            raise BadInput(
                f"none of {control.metadata['rows']} chats has an answer within {others[name].length} tokens, by which "
                "a budget of chats could be kept; raise probe.length, or give the budget as {unprompted: nats}"
            )
    return controls


def generate_corpus(
    base: Artifact, target: Artifact, spec: GenerateSpec, machine: Machine, earlier: tuple[Artifact, ...] = ()
) -> Artifact:  # fmt: skip
    """Sample the rehearsal corpus; the target is in its key only where its prompts are continued."""
    return _generate(base, target if "contextual" in spec.sources() else None, spec, machine, earlier or None)


@stage(GENERATE, "corpus", gpu=True)
def _generate(
    draft: Draft, base: Artifact, target: Artifact | None, spec: GenerateSpec, machine: Machine,
    earlier: tuple[Artifact, ...] | None = None,
) -> None:  # fmt: skip
    """Sample or read the rows of every source; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import generate

    with sampler_of(machine) as sampler:
        generate(base, target, spec, draft, machine, sampler, earlier or ())
