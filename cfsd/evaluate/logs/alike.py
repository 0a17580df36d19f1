"""Were two models measured alike? Everything in which their logs differ, in one message."""

from collections.abc import Iterator
from typing import Any

from cfsd.errors import BadInput
from cfsd.evaluate.logs.folder import Conditions, Log, LoggedModel
from cfsd.evaluate.logs.rows import Asked, Logged, read

SHOWN = 40  # characters of a setting, or around the first difference of two prompts
MUST_AGREE = ("metric", "per", "higher_is_better", "chance", "filters")  # `per` is of perplexities alone


def check_alike(base: LoggedModel, tuned: LoggedModel) -> dict[str, Logged]:
    """Return what the logs of the model before say, by benchmark.

    Raises: BadInput that names every benchmark of one model only, and every setting, document and prompt in which the
        two differ; and as `cfsd.evaluate.logs.rows.read`.
    """
    found, unlike = {}, dict[str, list[str]]()
    for name in _measured_on_both(base, tuned):
        one, other = base.log(name), tuned.log(name)
        try:
            before, after = read(one), read(other)
        except BadInput as error:  # the others may still be compared, and are named
            unlike[name] = [str(error).removeprefix(f"benchmark {name}: ")]
            continue
        found[name] = before
        if different := list(_differences(one, other, before, after)):
            unlike[name] = different
    said = [
        *_on_one_only(base, tuned),
        *(f"benchmark {name}: {line}" for name, lines in unlike.items() for line in lines),
    ]
    if said:
        raise BadInput(_message(said, [name for name in found if name not in unlike]))
    return found


def _measured_on_both(base: LoggedModel, tuned: LoggedModel) -> list[str]:
    return [log.name for log in base.logs if log.name in tuned.names()]


def _on_one_only(base: LoggedModel, tuned: LoggedModel) -> Iterator[str]:
    for role, own, other in (("base", base, tuned), ("tuned", tuned, base)):
        if only := [name for name in own.names() if name not in other.names()]:
            yield f"measured on the {role} model only: {', '.join(only)}"


def _message(said: list[str], alike: list[str]) -> str:
    rest = f", or compare those that agree: {' '.join(f'--benchmark {name}' for name in alike)}" if alike else ""
    listed = "".join(f"\n  {line}" for line in said)
    return (
        f"the two models were not measured alike:{listed}\nmeasure both with one lm-eval, the same tasks and settings"
        f"{rest}"
    )


def _differences(base: Log, tuned: Log, before: Logged, after: Logged) -> Iterator[str]:
    for name, field in Conditions.model_fields.items():
        one, other = getattr(base.conditions, name), getattr(tuned.conditions, name)
        if one != other and not (name == "window" and None in (one, other)):  # not every model of lm-eval says it
            yield f"its {field.description} is {_apart(one, other)}"
    shares = before.metadata["kind"] != after.metadata["kind"]  # one has answers that are right in part
    for name in MUST_AGREE:
        one, other = before.metadata.get(name), after.metadata.get(name)
        if one != other and not (name == "chance" and shares and None in (one, other)):
            yield f"its {name.replace('_', ' ')} is {_apart(one, other)}"
    yield from _of_documents(before, after)


def _of_documents(before: Logged, after: Logged) -> Iterator[str]:
    one, other = (_asked(side) for side in (before, after))
    for role, own, others in (("base", one, other), ("tuned", other, one)):
        if only := [key for key in own if key not in others]:
            yield f"{len(only)} of {len(own)} documents were scored for the {role} model only (first: {only[0][1]})"
    both = [key for key in one if key in other]
    if changed := [key for key in both if one[key].document != other[key].document]:
        yield f"{len(changed)} of {len(both)} documents are others (doc_hash; first: {changed[0][1]})"
        return  # so prompts and answers are others, too
    if changed := [key for key in both if one[key].prompt != other[key].prompt]:
        texts = [_prompt(side, changed[0]) for side in (before, after)]
        apart = "" if None in texts else _first_difference(*texts)
        yield f"{len(changed)} of {len(both)} prompts (prompt_hash; first: document {changed[0][1]}) are others{apart}"
    if changed := [key for key in both if one[key].target != other[key].target]:
        yield f"{len(changed)} of {len(both)} right answers (target_hash; first: document {changed[0][1]}) are others"


def _asked(side: Logged) -> dict[tuple[str, Any], Asked]:
    """Return what was asked, as the first filter has it; the others have the same documents."""
    first = side.metadata["filters"][0]
    return {key: asked for key, asked in side.asked.items() if key[0] == first}


def _prompt(side: Logged, key: tuple[str, Any]) -> Any:
    """Return the prompt of a document, None of one to which the metric does not apply."""
    return next((row["prompt"] for row in side.rows if (row["filter"], row["doc_id"]) == key), None)


def _first_difference(one: str, other: str) -> str:
    at = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(map(len, (one, other)))
    )
    begin = max(0, at - SHOWN // 2)
    before, after = (repr(text[begin : begin + SHOWN]) for text in (one, other))
    return f": …{before}… (base) and …{after}… (tuned)" if before != after else ""


def _apart(one: Any, other: Any) -> str:
    """Return two settings, of long ones what surrounds their first difference."""
    texts = ["none" if value in (None, "", [], {}) else str(value) for value in (one, other)]
    if max(map(len, texts)) > SHOWN:
        return f"another{_first_difference(*texts)}"
    return f"{texts[0]} (base) and {texts[1]} (tuned)"
