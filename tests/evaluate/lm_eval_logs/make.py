"""Write the logs of this folder, with the lm-eval that is installed: `python make.py FOLDER`.

A random model of two layers, the same for every version, is asked about the tasks in `tasks/` by lm-eval's command
line. What the logs say of the machine is cut out, nothing else is changed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
TASKS = ("both", "prose", "sums", "checks")
LETTERS = "abcdefghijklmnopqrstuvwxyz =."
OF_THE_MACHINE = ("pretty_env_info", "date", "git_hash", "upper_git_hash")


def save_model(folder: Path) -> None:
    """Write a random model with a vocabulary of characters and weights that do not depend on torch's version."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<eos>", *LETTERS])}, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(LETTERS) + 1, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
                   eos_token_id=0)
    )  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64) + 7 * number
            parameter.copy_((torch.sin(steps * 12.9898) * 0.4).view_as(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Measure the model and keep the logs."""
    to = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place) / "model")
        command = [
            sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=model", "--device", "cpu",
            "--tasks", ",".join(TASKS), "--include_path", "tasks", "--output_path", str(to), "--log_samples",
            "--batch_size", "4",
        ]  # fmt: skip
        shutil.copytree(HERE / "tasks", Path(place) / "tasks")
        for data in (HERE / "tasks").glob("*.jsonl"):
            shutil.copy(data, place)  # paths in the YAML start from the working directory
        if version("lm_eval") == "0.4.3":  # groups had no settings of their own yet
            (Path(place) / "tasks" / "both.yaml").write_text("group: both\ntask: [words, last_word]\n")
        subprocess.run(command, cwd=place, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    for file in to.rglob("results_*.json"):
        content = json.loads(file.read_text())
        kept = {name: value for name, value in content.items() if name not in OF_THE_MACHINE}
        file.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
