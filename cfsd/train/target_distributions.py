"""Stage store-target: the base's distribution at each token of the target's responses, in the form of a corpus.

The samples outside the likeliest tokens stand for these, whichever text the tokens before are: a target's responses are
nothing that the base wrote, and a drawn token alone would give another sum.
"""

from cfsd.data.corpus_table import corpus_table
from cfsd.generate.token_choice import tail_points
from cfsd.machine import Machine
from cfsd.model.likelihood import token_logprobs
from cfsd.model.loading import load_for_measuring, load_tokenizer
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import blocks, corpus_schema, num_rows, shard_path, write_shard
from cfsd.train.methods.method import AlongSpec

BLOCK = 64  # rows in memory, and what a kill can cost
COLUMNS = ["row_id", "token_ids", "supervised"]
STREAM = "along the target"  # of random numbers


def store_target(base: Artifact, target: Artifact, spec: AlongSpec, draft: Draft, machine: Machine) -> None:
    """Write the table, a row per row of `train` in its order; tokens of prompts have nothing.

    Raises NotFinite naming the row.
    """
    machine.settle()
    model = load_for_measuring(draft.store, base, machine.resolved_device())
    folder, tokenizer = draft.store.path(target), load_tokenizer(draft.store.path(base))
    vocabulary, total = model.config.get_text_config().vocab_size, num_rows(folder, "train")
    top = min(spec.top_logprobs, vocabulary)
    schema = corpus_schema(top, vocabulary, spec.tail_samples)
    tokens = 0
    for index, (first, block) in enumerate(blocks(folder, "train", COLUMNS, BLOCK)):
        rows = block.to_pylist()
        tokens += sum(sum(row["supervised"]) for row in rows)
        if not shard_path(draft.folder, "corpus", index).exists():
            texts = [row["token_ids"] for row in rows]
            points = [tail_points(0, STREAM, first + i, len(text), spec.tail_samples) for i, text in enumerate(texts)]
            found = token_logprobs(
                model, texts, (), top_logprobs=top, tail_points=points, max_tokens=machine.micro_batch_tokens,
                where=f"rows {first} to {first + len(rows)} of the target",
            )  # fmt: skip
            samples = {row["row_id"]: s.only(row["supervised"]) for row, s in zip(rows, found, strict=True)}
            table = corpus_table(samples, tokenizer, schema, source="target", shard=index, seed=0)
            write_shard(draft.folder, "corpus", index, table)
        draft.journal.progress(first + len(rows), total, "rows")
    draft.metadata |= {"rows": total, "tokens": tokens}
