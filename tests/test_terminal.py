"""Training and talking in a terminal, as a person sees both: `veneer` in tmux, keys typed and the screen read."""

import re
import shutil
import tempfile
from pathlib import Path

import pytest
import small_run
import terminal
from rich.console import Console

import veneer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed, which draws the screens"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.fixture
def start():
    """Starts `veneer WORDS` in a terminal, which ends with the test."""
    opened = []

    def begin(*words, columns):
        folder = Path(tempfile.mkdtemp(prefix="veneer-"))
        opened.append(terminal.Terminal(folder, *words, columns=columns))
        return opened[-1]

    yield begin
    for each in opened:
        each.close()
        shutil.rmtree(each.socket.parent)


def bars(screen):
    return [line for line in screen.splitlines() if line.startswith("training ")]


def test_progress_is_one_line_and_ctrl_c_leaves_a_checkpoint_to_go_on_from(recipe, tmp_path, start):
    long = ("training.steps=80", "evaluation.every=80", "training.checkpoint_every=80", f"output={tmp_path / 'out'}")
    training = start("train", recipe, *long, columns=100)
    seen = training.until(r"training .* ([1-9]\d*)/80 loss \d+\.\d+  \d+\.\d GiB  [\d,]+ tokens/s  time left \d")
    training.press("C-c")
    stopped = training.until(r"Stopped by SIGINT after step (\d+) of 80")
    assert int(seen[1]) <= int(stopped[1]) < 80
    assert training.ended() == 130
    assert len(bars(training.screen())) == 1, training.screen()  # each step is drawn over the one before
    assert "Traceback" not in training.screen()

    again = start("train", tmp_path / "out" / "recipe.yaml", "--resume", columns=80)
    assert again.ended() == 0
    assert "Going on from" in again.screen()
    assert len(bars(again.screen())) == 1, again.screen()
    assert re.search(r"^training .* 80/80 loss .* time left 0:00:00$", again.screen(), re.MULTILINE)
    assert re.search(r"loss +│ \S+ +│ \S+", again.screen())
    assert (tmp_path / "out" / "adapter" / "recipe.yaml").exists()


def test_an_adapter_talks_and_the_keys_edit_what_is_asked(recipe, tmp_path, start):
    veneer.train(recipe, [f"output={tmp_path / 'out'}", "training.steps=30"], console=Console(quiet=True))
    chat = start("generate", tmp_path / "out" / "adapter", "--max-new-tokens", 4, columns=120)
    chat.until(r"/quit ends it\.\n>")
    chat.type("thou 3")
    answer = chat.until(r"> thou 3\n(.+)\n>")[1]
    chat.type("/base")
    assert chat.until(r"> /base\n(.+)\n>")[1] != answer
    chat.type("/reset")
    chat.until(r"> /reset\nThe conversation is forgotten\.\n>")
    for shown in ("/reset", "/base", "thou 3"):
        chat.press("Up")
        chat.until(rf"forgotten\.\n> {shown}\n")
    chat.press("BSpace")
    chat.type("3")
    assert chat.until(r"forgotten\.\n> thou 3\n(.+)\n>")[1] == answer  # asked as if for the first time
    chat.press("C-d")
    assert chat.ended() == 0
    assert "Traceback" not in chat.screen()
