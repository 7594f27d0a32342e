"""A tiny model and rows of every kind of task that a recipe trains, for the tests of runs; and runs that are killed."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy
import torch
from PIL import Image
from scipy.io import wavfile
from test_train import byte_tokenizer, tiny
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

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
    seeing(folder)
    hearing(folder, tokenizer)
    write(folder / "chats.jsonl", ({"prompt": f"thou {n}", "completion": f"you {n}"} for n in range(60)))
    write(folder / "classes.jsonl", ({"text": f"{'good' if n % 2 else 'bad'} {n}", "label": n % 2} for n in range(60)))
    write(folder / "numbers.jsonl", ({"text": f"row {n}", "label": n / 10} for n in range(60)))
    write(folder / "pairs.jsonl", ({"source": f"thou {n}", "target": f"you {n}"} for n in range(60)))
    write(
        folder / "preferences.jsonl",
        ({"prompt": f"thou {n}", "chosen": f" you {n}", "rejected": f" ye {n}"} for n in range(60)),
    )
    (folder / "recipe.yaml").write_text(
        f"model: {folder}/model\nmethod: {{LoRA: {{dropout: 0.1}}}}\ndata: chats.jsonl\n"
        "training: {steps: 6, batch_size: 4, learning_rate: 1e-2, checkpoint_every: 2, trackers: []}\n"
        f"evaluation: {{every: 3}}\noutput: {folder}/out\n"
    )
    return folder / "recipe.yaml"


def seeing(folder: Path) -> None:
    """A ViT without a head, and images of two shades in one folder a class."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for number in range(40):
        place = folder / "images" / ("dark", "light")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number % 2 * 200 + number,) * 3).save(place / f"{number}.png")


def hearing(folder: Path, tokenizer) -> None:
    """A Whisper that hears one second, and tones with what they are called."""
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder / "whisper")
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    start, end = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=32, max_source_positions=50, max_target_positions=32,
        decoder_start_token_id=start, bos_token_id=start, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=None, begin_suppress_tokens=None, **sides,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder / "whisper")
    (folder / "tones").mkdir()
    for number in range(40):
        tone = numpy.sin(numpy.arange(8000) / 16000 * 2 * numpy.pi * (300 + 300 * (number % 2)) + number)
        wavfile.write(folder / "tones" / f"{number}.wav", 16000, tone.astype("float32"))
    write(folder / "speech.jsonl", ({"audio": f"tones/{n}.wav", "text": ("low", "high")[n % 2]} for n in range(40)))


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
