"""What a sequence of targets learned and lost, in two sentences, within what the intervals allow."""

from cfsd.report.sequence.retention import Retention
from cfsd.report.table import POINTS, number, shown, sign_of
from cfsd.report.verdict import listed, quoted, two_sentences
from cfsd.statistics.continual import Continual


def learned_and_lost(retention: Retention) -> list[str]:
    """Return what was learned, stage by stage, and what was lost of the earlier targets and of the first base."""
    last = retention.since_base[-1].model_copy(update={"name": "the last model"})
    sentences = [sentence.replace("“the last model”", "the last model") for sentence in two_sentences([last])]
    of_base = "; ".join(f"{sentence[:1].lower()}{sentence[1:-1]}" for sentence in sentences)
    against = f"; against the first base, {of_base}" if of_base else ""
    return [_learned(retention), f"{_lost_of_targets(retention)}{against}."]


def _learned(retention: Retention) -> str:
    names, T = retention.losses.targets, len(retention.losses.targets)
    is_learned = [sign_of(figure.model_dump()) > 0 for figure in retention.learned]
    learned = [t for t in range(T) if is_learned[t]]
    others = [names[t] for t in range(T) if not is_learned[t]]
    if not learned:
        return f"None of the {T} targets was found to have been learned at its own stage."
    were = "was learned at its own stage" if len(learned) == 1 else "were learned, each at its own stage"
    losses = listed([f"“{names[t]}” {_change(retention.losses, t, t, t + 1, -1)}" for t in learned])
    but = f"; {quoted(others)} {'was' if len(others) == 1 else 'were'} not found to be" if others else ""
    return f"{len(learned)} of {T} targets {were}: held-out loss of {losses} nats per token{but}."


def _lost_of_targets(retention: Retention) -> str:
    transfer, T = retention.losses.backward_transfer, len(retention.losses.targets)
    if transfer is None:
        return "There is no earlier target to lose"
    sign = sign_of(transfer.model_dump())
    said = f"The earlier targets became {'worse' if sign < 0 else 'better'}"
    if transfer.low is None:
        said = "Held-out rows are too few to say whether the earlier targets were lost"
    elif sign == 0:
        said = "No change of the earlier targets was found on the whole"
    by_size = sorted(range(T - 1), key=lambda j: -abs(retention.changed[j].value))
    changed = [j for j in by_size if sign_of(retention.changed[j].model_dump())]
    said += f": backward transfer {shown(transfer.model_dump())} nats per token"
    if not changed:
        return said
    cases = listed([f"“{retention.losses.targets[j]}” {_change(retention.losses, j, j + 1, T, -1)}" for j in changed])
    if len(changed) == 1:
        cases += f", answered exactly {_change(retention.exact, changed[0], changed[0] + 1, T, POINTS)} %"
    return f"{said} (held-out loss of {cases})"


def _change(scores: Continual, target: int, before: int, after: int, factor: float) -> str:
    """Return the scores of one target after two stages, times `factor`."""
    values = [scores.matrix[stage][target] for stage in (before, after)]
    return " → ".join("?" if value is None else number(factor * value) for value in values)
