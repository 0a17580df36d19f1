"""What a sequence of targets learned and lost, in two sentences, within what the intervals allow."""

from collections.abc import Sequence

from cfsd.report.sequence.measured import Remains
from cfsd.report.table import POINTS, number, shown, sign_of
from cfsd.report.verdict import listed, quoted, two_sentences
from cfsd.statistics.continual import Continual


def learned_and_lost(remains: Remains) -> list[str]:
    """Return what was learned, stage by stage, and what was lost of the earlier targets and of the first base."""
    return [_learned(remains), _lost(remains)]


def _learned(remains: Remains) -> str:
    names, count = remains.losses.targets, len(remains.losses.targets)
    signs = [sign_of(figure.model_dump()) for figure in remains.learned]
    sure = [t for t in range(count) if signs[t] > 0]
    open_ = [names[t] for t in range(count) if signs[t] <= 0]
    if not sure:
        return f"None of the {count} targets was found to have been learned at its own stage."
    who = f"Each of the {count} targets was learned at its own stage"
    if open_:
        were = "were learned, each at its own stage" if len(sure) > 1 else "was learned at its own stage"
        who = f"Of {count} targets, {quoted(names[t] for t in sure)} {were}"
    ends = [(f"of “{names[t]}”", f"from {_loss(remains, t, t)} to {_loss(remains, t + 1, t)}") for t in sure]
    falls = listed([f"{name} fell {end}" if t == 0 else f"that {name} {end}" for t, (name, end) in enumerate(ends)])
    but = f"; {quoted(open_)} {'were' if len(open_) > 1 else 'was'} not found to be" if open_ else ""
    return f"{who}: the held-out loss {falls} nats per token{but}."


def _loss(remains: Remains, stage: int, target: int) -> str:
    score = remains.losses.matrix[stage][target]
    return "?" if score is None else number(-score)


def _lost(remains: Remains) -> str:
    last = remains.since_base[-1]
    renamed = last.model_copy(update={"name": "the last model"})
    said = [sentence.replace("“the last model”", "the last model") for sentence in two_sentences([renamed])]
    of_base = "; ".join(f"{sentence[:1].lower()}{sentence[1:-1]}" for sentence in said)
    against = f"; against the first base, {of_base}" if of_base else ""
    return f"{_of_targets(remains)}{against}."


def _of_targets(remains: Remains) -> str:
    losses, last = remains.losses, len(remains.losses.targets)
    transfer = losses.backward_transfer
    if transfer is None:
        return "There is no earlier target to lose"
    by = f"backward transfer {shown(transfer.model_dump())} nats per token"
    sign = sign_of(transfer.model_dump())
    if transfer.low is None:
        found = "Held-out rows are too few to say whether the earlier targets were lost"
    elif sign == 0:
        found = "No change of the earlier targets was found on the whole"
    else:
        found = f"The earlier targets became {'worse' if sign < 0 else 'better'}"
    moved = [j for j in _largest(remains) if sign_of(remains.changed[j].model_dump())]
    cases = [f"“{losses.targets[j]}” {_loss(remains, j + 1, j)} → {_loss(remains, last, j)}" for j in moved]
    return f"{found}: {by}{f' (held-out loss of {listed(cases)}{_exactly(remains, moved)})' if cases else ''}"


def _largest(remains: Remains) -> list[int]:
    """Return the earlier targets, those that changed most first."""
    return sorted(range(len(remains.changed)), key=lambda j: -abs(remains.changed[j].value))


def _exactly(remains: Remains, moved: Sequence[int]) -> str:
    """Return how the share of rows answered exactly changed, where one target alone is spoken of."""
    if len(moved) != 1:
        return ""
    exact, j = remains.exact, moved[0]
    shares = [_share(exact, j + 1, j), _share(exact, len(exact.targets), j)]
    return f", answered exactly {shares[0]} → {shares[1]} %"


def _share(exact: Continual, stage: int, target: int) -> str:
    score = exact.matrix[stage][target]
    return "?" if score is None else number(score * POINTS)
