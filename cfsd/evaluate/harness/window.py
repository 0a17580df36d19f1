"""What has room in the model's context: documents that are cut are counted and said, those without tokens refused."""

from collections.abc import Sequence

from cfsd.errors import BadInput


class Window:
    """Looks at the lengths, in tokens, of what one benchmark asks. lm-eval cuts what is too long at its beginning."""

    def __init__(self, name: str, max_length: int) -> None:
        """Begin without documents; the model's context holds `max_length` tokens."""
        self.name, self.max_length = name, max_length
        self.documents: list[int] = []
        self.cut: set[int] = set()

    def begin(self, documents: list[int]) -> None:
        """Set the numbers of the documents that the next requests belong to, in their order."""
        self.documents = documents

    def check_pairs(self, lengths: Sequence[tuple[int, int]]) -> None:
        """Take the lengths of prompts and of the answers after them.

        Raises: BadInput for an answer that has no tokens, or does not fit by itself.
        """
        for document, (prompt, answer) in zip(self.documents, lengths, strict=True):
            if not answer:
                raise self._mistake(document, "an answer comes to no token in the model's vocabulary")
            if answer > self.max_length:
                raise self._mistake(document, f"an answer has {answer} tokens, the model's context {self.max_length}")
            if prompt + answer > self.max_length + 1:
                self.cut.add(document)

    def check_texts(self, lengths: Sequence[int], written: int) -> None:
        """Take the lengths of whole texts, or of prompts after which `written` tokens are written.

        Raises: BadInput for one without tokens.
        """
        for document, length in zip(self.documents, lengths, strict=True):
            if not length:
                raise self._mistake(document, "its text comes to no token in the model's vocabulary")
            if written and length > self.max_length - written:  # a whole text is read in several windows instead
                self.cut.add(document)

    def said(self) -> list[str]:
        """Return a line about the documents that were cut, if there are any."""
        if not self.cut:
            return []
        return [
            f"{len(self.cut)} of {len(set(self.documents))} documents are longer than the model's context of "
            f"{self.max_length} tokens and were cut at their beginning (the first is document {min(self.cut)}); "
            "lower num_fewshot or max_gen_toks, or take a model with a longer context"
        ]

    def _mistake(self, document: int, what: str) -> BadInput:
        return BadInput(f"benchmark {self.name}, document {document}: {what}; correct its text, or leave it out")
