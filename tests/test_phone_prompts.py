"""The recordings of a telephone exchange: what their table says, and that none held out is repeated in training."""

import pytest

from veneer.errors import MissingSample
from veneer.samples import phone_prompts
from veneer.samples.phone_prompts import Prompt

TABLE = """\
; Core Asterisk Sounds in English

activated: Activated.
beep: [this is a simple beep tone]
descending-2tone: <beep decending>
digits/17: seventeen
dir-multi1: Press ...
letters/at: at [@]
vm-intro: Please leave your message after the tone.  When done hang up. (simple tone sound plays)
vm-login: Comedian Mail.  Mailbox?
"""


def test_the_table_is_read_as_whisper_writes():
    assert list(phone_prompts.prompts(TABLE.splitlines())) == [
        Prompt("activated.wav", "Activated."),
        Prompt("digits/17.wav", "Seventeen."),
        Prompt("dir-multi1.wav", "Press."),
        Prompt("letters/at.wav", "At."),
        Prompt("vm-intro.wav", "Please leave your message after the tone. When done hang up."),
        Prompt("vm-login.wav", "Comedian Mail. Mailbox?"),
    ]


def test_what_says_the_same_or_half_of_it_is_on_one_side():
    texts = [f"Please press {number} to hear message {number} again." for number in range(30)]
    texts += ["Goodbye.", "goodbye", "Press 7 to hear message 7 again, please.", "Nothing of that."]
    found = [Prompt(f"{number}.wav", text) for number, text in enumerate(texts)]
    for seed in range(5):
        train, held_out = phone_prompts.split(found, held_out=12, seed=seed)
        assert phone_prompts.split(found, held_out=12, seed=seed) == (train, held_out)
        judged = {prompt.file for prompt in held_out}
        assert {"30.wav", "31.wav"} <= judged or judged.isdisjoint({"30.wav", "31.wav"})
        assert len({prompt.text.lower().strip(".") for prompt in held_out}) == 12
        trained = {prompt.file for prompt in train}
        assert trained.isdisjoint(judged)
        assert "33.wav" in trained | judged
        # "please press 7 to", "press 7 to hear", "7 to hear message", ... are those of "Please press 7 ..." but for two
        assert ("7.wav" in judged and "32.wav" not in judged) <= ("32.wav" not in trained)


def test_a_machine_without_apt_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingSample, match=r"asterisk-core-sounds-en=1\.6\.1-1 is a package of Debian's"):
        phone_prompts.folder()
