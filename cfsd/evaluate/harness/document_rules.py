"""What a document must have so that lm-eval's score of it means something. lm-eval itself takes most of it on trust."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

HINTS = {  # what lm-eval makes of numbers where there are choices
    "doc_to_target": ' (a number written as text becomes one as "{{field}}")',
    "doc_to_text": ' (a bare number is taken for that of a choice; a text that is a number needs more: "{{field}} =")',
}
FIELD = re.compile(r"\s*{{\s*[\w.]+\s*}}\s*")  # a template of one field
SHOWN = 80  # characters of a value in a message


class Unusable(ValueError):
    """What is wrong with one document."""


class Absent(ValueError):
    """A template prints a field that the document has not."""


def printed(value: Any) -> Any:
    """Return what a template prints. Raises Absent for None: lm-eval prints the word."""
    if value is None:
        raise Absent("null or missing")
    return value


def whole_choices(doc_to_choice: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `doc_to_choice` that raises Unusable for anything but a list of texts."""

    def checked(task: Any, document: Any, setting: Any = None) -> Any:
        choices = doc_to_choice(task, document, setting)
        _check_choices(choices)
        return choices

    return checked


def check_document(task: Any, document: Any, *, example: bool = False) -> None:
    """Raise Unusable for a document, or for an `example` of few, whose text, target or choices cannot be used.

    Where the task has a process_results of its own, what it makes of the target is its own affair.
    """
    other = task.fewshot_cfg if example else task.config
    choices = None
    if task.config.doc_to_choice is not None:
        choices = _read("doc_to_choice", task.doc_to_choice, document, other.doc_to_choice)
    text = _read("doc_to_text", task.doc_to_text, document, other.doc_to_text)
    target = _read("doc_to_target", task.doc_to_target, document, other.doc_to_target)
    if task.multiple_input:
        _check_index("doc_to_text", text, choices or [], several=False)
    elif not isinstance(text, str):
        raise Unusable(f"its doc_to_text is {_shown(text)}, not text; {_remedy(document)}")
    if (
        example
        and choices is None
        and not isinstance(target[0] if isinstance(target, list) and target else target, str)
    ):
        raise Unusable(f"its doc_to_target is {_shown(target)}, not text; {_remedy(document)}")
    is_free = callable(task.config.process_results) and not example
    if task.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling") or task.multiple_input:
        _check_text(target, document)
    elif not is_free:
        _check_target(task, target, choices, document)


def repeated_choice(task: Any, document: Any) -> bool:
    """Return whether two choices of a document are the same: of these the first is always taken as the model's."""
    choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else []
    return len(set(choices)) < len(choices)


def taken_as_number(task: Any, document: Any) -> bool:
    """Return whether a field that a template writes as the right answer is one choice's text and another's number."""
    if task.OUTPUT_TYPE != "multiple_choice" or not FIELD.fullmatch(str(task.config.doc_to_target)):
        return False
    choices, target = task.doc_to_choice(document), task.doc_to_target(document)
    return isinstance(target, int) and str(target) in choices and choices[target] != str(target)


def unknown_field(task: Any) -> str | None:
    """Return what is wrong where a setting is one word that names no field: lm-eval would take it for a text.

    A doc_to_target of one word is a mistake only where it resembles a field: one right answer for all is possible.
    """
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        value = getattr(task.config, name)
        if not isinstance(value, str) or not value.isidentifier() or value in task.features:
            continue
        if name != "doc_to_target" or get_close_matches(value, task.features):
            return (
                f"{name} is {value!r}, which is no field of its documents ({', '.join(task.features)}); correct it, "
                f"or write a text that is the same in every document as a template: \"{{{{'{value}'}}}}\""
            )
    return None


def _read(name: str, read: Callable[..., Any], document: Any, setting: Any) -> Any:
    try:
        return read(document, setting)
    except Unusable:
        raise
    except Absent as error:
        raise Unusable(f"its {name} prints a field that it has not; {_remedy(document)}") from error
    except Exception as error:
        raise Unusable(f"its {name} cannot be made") from error


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list) or not choices:
        raise Unusable(f"its doc_to_choice is {_shown(choices)}; it needs a list of texts")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str):
            hint = "; in YAML, yes, no, on and off are texts only in quotes" if isinstance(choice, bool) else ""
            raise Unusable(f"its choice {number} is {_shown(choice)}, not text{hint}")
        if not choice:
            raise Unusable(f"its choice {number} is empty")


def _check_target(task: Any, target: Any, choices: list[str] | None, document: Any) -> None:
    several = bool(task.multiple_target)
    if several != isinstance(target, list):
        kinds = ("is a list", "is not") if isinstance(target, list) else ("is no list", "is")
        raise Unusable(f"its doc_to_target {kinds[0]}, and that of document 0 {kinds[1]}; make all of one kind")
    if choices is not None and target is not None:
        _check_index("doc_to_target", target, choices, several=several)
    elif target is None or target == [] or (isinstance(target, list) and None in target):
        raise Unusable(f"its doc_to_target is {_shown(target)}, so that it has no right answer; {_remedy(document)}")


def _check_index(name: str, value: Any, choices: list[str], *, several: bool) -> None:
    """Check the number of the right choice, or its text; with `several` a list of numbers."""
    for part in value if several else [value]:
        if isinstance(part, str) and part in choices and not several and name == "doc_to_target":
            continue
        if not isinstance(part, int) or not 0 <= part < len(choices):
            hint = HINTS[name] if str(part).isdigit() else ""
            raise Unusable(
                f"its {name} is {_shown(value)}, and its choices are {_shown(choices)}: it needs the number of the "
                f"right one, from 0 to {len(choices) - 1}, or its text{hint}"
            )


def _check_text(target: Any, document: Any) -> None:
    if not isinstance(target, str) or not target:
        raise Unusable(f"its doc_to_target is {_shown(target)}, and it must be text to be scored; {_remedy(document)}")


def _remedy(document: Any) -> str:
    absent = [name for name, value in document.items() if value is None] if isinstance(document, dict) else []
    return f"null or missing are: {', '.join(absent)}" if absent else 'a number becomes text as "{{field}} ="'


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
