"""Whether an answer does what was asked: one function for each kind of check, and the scores made of them.

A check is written as `kind` or `kind: argument`. Numbers are `3`, `1-2`, `-20` (at most) or `20-` (at least); several
words are separated by ` | `. Words are compared whole and without regard to case.

Source: Zhou et al. 2023, arXiv:2311.07911, 2.2: strict and loose accuracy. Differs: kinds, rules and prompts are the
project's; an answer must also be about the subject (`about`) where a text that is always the same could pass.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

QUOTES = "\"'“”\u2018\u2019«»"
ABBREVIATIONS = "".join(rf"(?<!\b{word}\.)" for word in ("Mr", "Mrs", "Ms", "Dr", "St"))
SENTENCE_END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?][{QUOTES})])){ABBREVIATIONS}\s+|\n+")
BULLET, NUMBERED = re.compile(r"\s*[-*•]\s+\S"), re.compile(r"\s*(\d+)[.)]\s+\S")
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
LISTED = 3  # words of one item of a list in a line: more are a sentence
COMMON = {  # words that most sentences of a language have
    "English": "the of and to in is that it was for on are with as his they be at this have from or had by not but "
    "what all were we when your can said there an which she do how their if will up about out i you my me a he has "
    "its am hello",
    "French": "le la les un une des du de et est sont à au aux en dans pour avec sur que qui ne pas je tu il elle nous "
    "vous ils elles mon ma mes ton son sa ses ce cette très mais ou où suis ai avez bonjour merci j'ai c'est beau a "
    "peux aime fait salut",
    "Spanish": "el la los las un una unos de del y es son en a al por para con que no se yo tú él ella nosotros mi mis "
    "tu su sus este esta muy pero o está están estoy me te gusta mucho como cómo qué hola gracias hay amigo soy lo tal",
    "German": "der die das den dem des ein eine einen einem einer und ist sind in im am zu zum zur für mit auf von "
    "dass nicht ich du er sie es wir ihr mein meine sein sehr aber oder habe hat bin läuft spielt hallo danke auch",
    "Italian": "il lo la i gli le un una uno di del della e è sono in nel nella a al per con che non io tu lui lei noi "
    "voi mio mia suo sua questo questa molto ma o mi piace ho ha ciao grazie buona buono cibo anche",
}


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 or 0 as strict and as loose accuracy of the answer in `results`, by the names of lm-eval's ifeval."""
    (answer,) = results
    strict = all(passes(check, answer) for check in document["checks"])
    loose = all(any(passes(check, text) for text in loosened(answer)) for check in document["checks"])
    return {"prompt_level_strict_acc": float(strict), "prompt_level_loose_acc": float(loose)}


def passes(check: str, answer: str) -> bool:
    """Return whether `answer` has the property; an empty one has none."""
    kind, _, argument = check.partition(": ")
    return bool(answer.strip()) and CHECKS[kind](answer.strip(), argument)


def loosened(answer: str) -> Iterator[str]:
    """Yield the answer as it stands and without its first line, its last and both, each also without asterisks."""
    lines = answer.strip().split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part).strip()
        yield from (text, text.replace("*", ""))


def within(count: int, argument: str) -> bool:
    """Return whether `count` is the number, or in the range, that `argument` says."""
    least, dash, most = argument.partition("-")
    return int(least or 0) <= count <= (int(most) if most else count if dash else int(least))


def words(text: str) -> list[str]:
    """Return the parts between white space that have a letter or a digit."""
    return [part for part in text.split() if any(map(str.isalnum, part))]


def sentences(text: str) -> list[str]:
    """Return the sentences, which a line break also ends."""
    return [part for part in SENTENCE_END.split(text) if words(part)]


def filled_lines(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def numbered_items(text: str) -> int:
    """Return the number of lines `1.`, `2.`, … or 0 if the numbers are others."""
    numbers = [int(found[1]) for line in text.splitlines() if (found := NUMBERED.match(line))]
    return len(numbers) if numbers == list(range(1, len(numbers) + 1)) else 0


def listed_items(text: str) -> int:
    """Return the number of short items between commas, or 0 if the text is another."""
    items = text.rstrip(".").split(",")
    return 0 if "\n" in text or any(not 1 <= len(words(item)) <= LISTED for item in items) else len(items)


def occurrences(text: str, phrase: str) -> int:
    """Return how often `phrase` occurs, in whole words."""
    edges = [r"\b" if part.isalnum() else "" for part in (phrase[0], phrase[-1])]
    return len(re.findall(rf"{edges[0]}{re.escape(phrase)}{edges[1]}", text, re.IGNORECASE))


def has_stem(text: str, stem: str) -> bool:
    """Return whether a word begins with `stem`."""
    return bool(re.search(rf"\b{re.escape(stem)}", text, re.IGNORECASE))


def starts(text: str, phrase: str) -> bool:
    """Return whether the text begins with `phrase`, quotation marks and asterisks aside."""
    return bool(re.match(rf"{re.escape(phrase)}(?!\w)", text.lstrip(QUOTES + "* "), re.IGNORECASE))


def ends(text: str, phrase: str) -> bool:
    """Return whether the text ends with `phrase`; after a word punctuation may follow."""
    closing = QUOTES + "* " + (".,;:!?" if phrase[-1].isalnum() else "")
    return bool(re.search(rf"(?<!\w){re.escape(phrase)}$" if phrase[0].isalnum() else rf"{re.escape(phrase)}$",
                          text.rstrip(closing), re.IGNORECASE))  # fmt: skip


def is_exactly(text: str, wanted: str) -> bool:
    """Return whether the text is `wanted`, in quotation marks or not."""
    return wanted in (text, text.strip(QUOTES))


def is_one_of(text: str, options: str) -> bool:
    """Return whether the text is one of the words, in quotation marks or with a full stop or not."""
    return text.strip(QUOTES + ".!* ").casefold() in options.casefold().split(" | ")


def is_number(text: str) -> bool:
    """Return whether the text is a number in digits, with a full stop or not."""
    return bool(re.fullmatch(r"[-+]?\d+([.,]\d+)*\.?", text))


def occurs_times(text: str, argument: str) -> bool:
    """Return whether a phrase occurs as often as the number behind it in `argument`."""
    phrase, _, count = argument.rpartition(" ")
    return occurrences(text, phrase) == int(count)


def is_json(text: str, keys: str) -> bool:
    """Return whether the text is a JSON object with these keys, in a code block or not."""
    fenced = FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(keys.split(" | ")) <= set(value)


def is_in_language(text: str, language: str) -> bool:
    """Return whether more of the common words of `language` than of any other occur in the text, and two at least."""
    found = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower().replace("\u2019", "'"))
    counts = {name: sum(word in common.split() for word in found) for name, common in COMMON.items()}
    own = counts.pop(language)
    return own >= 2 and own > max(counts.values())


def is_quoted(text: str) -> bool:
    """Return whether double quotation marks stand around the text and nowhere within."""
    plain = text.replace("“", '"').replace("”", '"')
    return len(plain) > 2 and plain[0] == plain[-1] == '"' and '"' not in plain[1:-1]


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "words": lambda text, number: within(len(words(text)), number),
    "sentences": lambda text, number: within(len(sentences(text)), number),
    "paragraphs": lambda text, number: within(len(re.split(r"\n\s*\n", text)), number),
    "lines": lambda text, number: within(len(filled_lines(text)), number),
    "bullets": lambda text, number: within(sum(bool(BULLET.match(line)) for line in text.splitlines()), number),
    "numbered": lambda text, number: within(numbered_items(text), number),
    "list": lambda text, number: within(listed_items(text), number),
    "lower case": lambda text, _: text.lower() == text != text.upper(),
    "upper case": lambda text, _: text.upper() == text != text.lower(),
    "includes": lambda text, phrases: all(occurrences(text, phrase) for phrase in phrases.split(" | ")),
    "excludes": lambda text, phrases: not any(occurrences(text, phrase) for phrase in phrases.split(" | ")),
    "starts": starts,
    "ends": ends,
    "exactly": is_exactly,
    "one of": is_one_of,
    "number": lambda text, _: is_number(text),
    "times": occurs_times,
    "json": is_json,
    "language": is_in_language,
    "quoted": lambda text, _: is_quoted(text),
    "about": lambda text, stems: any(has_stem(text, stem) for stem in stems.split(" | ")),
}
