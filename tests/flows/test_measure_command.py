"""How the words after `flows.measure` become settings."""

import pytest

from flows.measure import _named_prompts


@pytest.mark.parametrize(("given", "name", "path"), [
    ("a/support.jsonl.gz", "support", "a/support.jsonl.gz"),
    ("mine=a/support.jsonl", "mine", "a/support.jsonl"),
    ("mine=split=train/support.jsonl", "mine", "split=train/support.jsonl"),
])  # fmt: skip
def test_prompts_are_a_file_or_a_name_and_a_file(given: str, name: str, path: str) -> None:
    assert _named_prompts(given) == {"name": name, "prompts": path}
