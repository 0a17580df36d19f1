"""One rank of a training with rehearsal over DDP on CPUs: what `test_rehearsal.py` starts twice."""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from cfsd.model.loading import load_model
from tests.integrations.test_rehearsal import Ordered, arguments
from tests.train.test_train import BATCH, collate


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Target rows; with two processes each takes every other batch."""

    def __init__(self, rows: list) -> None:  # type: ignore[type-arg]
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        marked = zip(row.token_ids, row.supervised, strict=True)
        return {"input_ids": row.token_ids, "labels": [token if counted else -100 for token, counted in marked]}


if __name__ == "__main__":
    request = torch.load(sys.argv[1], weights_only=False)
    sizes = {"per_device_train_batch_size": BATCH // 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    args = TrainingArguments(**arguments(Path(request["folder"]), **sizes))
    trainer = Ordered(
        model=load_model(request["base"], "cpu", "float32"), args=args, train_dataset=Rows(request["rows"]),
        data_collator=collate, corpus=request["corpus"], rehearsal_tokens=request["tokens"],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    if args.should_save:
        (Path(request["folder"]) / "log.json").write_text(json.dumps(trainer.state.log_history))
