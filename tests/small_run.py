"""A tiny model and rows of every kind of task that a recipe trains, for the tests of runs; and runs that are killed."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from test_train import byte_tokenizer, tiny
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import veneer
from veneer.samples import smollm2


def make(folder: Path) -> Path:
    """Models and rows in a folder, with a recipe of a few steps."""
    tokenizer = byte_tokenizer()
    smollm2.save(smollm2.Chat(tiny(tokenizer), tokenizer), folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(
        folder / "bert"
    )
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                  decoder_start_token_id=0, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    for name in ("bert", "t5"):
        tokenizer.save_pretrained(folder / name)
    write(folder / "chats.jsonl", ({"prompt": f"thou {n}", "completion": f"you {n}"} for n in range(60)))
    write(folder / "classes.jsonl", ({"text": f"{'good' if n % 2 else 'bad'} {n}", "label": n % 2} for n in range(60)))
    write(folder / "numbers.jsonl", ({"text": f"row {n}", "label": n / 10} for n in range(60)))
    write(folder / "pairs.jsonl", ({"source": f"thou {n}", "target": f"you {n}"} for n in range(60)))
    (folder / "recipe.yaml").write_text(
        f"model: {folder}/model\nmethod: {{LoRA: {{dropout: 0.1}}}}\ndata: chats.jsonl\n"
        "training: {steps: 6, batch_size: 4, learning_rate: 1e-2, checkpoint_every: 2, trackers: []}\n"
        f"evaluation: {{every: 3}}\noutput: {folder}/out\n"
    )
    return folder / "recipe.yaml"


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def started(recipe: Path, output: Path) -> int:
    """The process of a run, forked off a process that has trained nothing yet, so that it is there at once."""
    child = os.fork()
    if child:
        return child
    try:
        veneer.train(recipe, [f"output={output}", "training.steps=20", "evaluation.every=10"], resume=True)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def finished(recipe: Path, output: Path) -> float:
    """Run to the end; how long that took in seconds."""
    start = time.monotonic()
    if os.waitpid(started(recipe, output), 0)[1]:
        raise SystemExit(1)
    return time.monotonic() - start


def killed(recipe: Path, output: Path, kills: int, within: float, seed: int) -> int:
    """Start a run and kill it at a random moment, so many times, then let it finish; how often it was killed."""
    chance, done = random.Random(seed), 0
    while done < kills:
        child, deadline = started(recipe, output), time.monotonic() + chance.uniform(0.2, 1.0) * within
        while time.monotonic() < deadline and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.005)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):  # it was faster: once more, from its beginning
            shutil.rmtree(output)
        else:
            done += 1
    finished(recipe, output)
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe, folder, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    print(killed(recipe, folder / "killed", kills, finished(recipe, folder / "undisturbed"), seed))
