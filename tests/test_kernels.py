"""Which kernel serves on a GPU: the faster that gives the reference's numbers, or the one that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from veneer.errors import PlaceError
from veneer.ops import kernels, lora

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Nothing chosen, nothing asked for."""
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr(kernels, "_asked", None)


@pytest.fixture
def here(monkeypatch):
    """The CPU in the role of a GPU with Triton."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "missing", lambda: None)


class Ways:
    """A kernel and a reference with known numbers, counted, and timed by a clock that says what it is told."""

    def __init__(self, monkeypatch, kernel=1.0, reference=1.0, took=(1e-3, 2e-3)):
        self.calls = {"kernel": 0, "reference": 0}
        self.timed = []
        numbers = {"kernel": kernel, "reference": reference}
        times = dict(zip(self.calls, took, strict=True))

        def way(name):
            def run():
                self.calls[name] += 1
                if isinstance(numbers[name], Exception):
                    raise numbers[name]
                return torch.full((3,), numbers[name])

            run.named = name
            return run

        self.kernel, self.reference = way("kernel"), way("reference")

        def seconds(run, device):
            self.timed.append(run.named)
            slower = 10 if self.timed.count(run.named) == 1 else 1  # as a first call is; the least counts
            return times[run.named] * slower

        monkeypatch.setattr(kernels, "seconds", seconds)

    def __call__(self, *sizes):
        return kernels.faster(("down", CPU, *sizes), self.kernel, self.reference)


@pytest.mark.parametrize("took", [(1e-3, 2e-3), (3e-3, 2e-3)])
def test_the_faster_is_taken_and_kept_for_its_kind(took, monkeypatch):
    ways = Ways(monkeypatch, took=took)
    ways(16)
    assert ways.timed == ["kernel", "reference"] * kernels.ROUNDS, "by turns"
    best = "kernel" if took[0] < took[1] else "reference"
    before = dict(ways.calls)
    for _ in range(3):
        ways(16)
    assert ways.calls == {**before, best: before[best] + 3}
    (choice,) = kernels.choices()
    assert choice.kernel == {"kernel": "triton", "reference": "reference"}[best]
    assert str(choice) == f"down on cpu, 16: {choice.kernel} ({took[0] * 1e3:.3f} ms against {took[1] * 1e3:.3f})"
    ways(32)
    assert len(ways.timed) == 4 * kernels.ROUNDS, "another kind is tried anew"
    assert len(kernels.choices()) == 2


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (1.1, "is 0.1 off the reference"),
        (float("nan"), "is nan off"),
        (RuntimeError("no\nptxas"), r"RuntimeError: .*no"),
    ],
)
def test_what_gives_other_numbers_or_does_not_run_is_passed_over_aloud(kernel, words, monkeypatch):
    ways = Ways(monkeypatch, kernel=kernel)
    with pytest.warns(UserWarning, match=rf"Triton kernel for down on cpu, 16 .*{words}.* torch's own operations"):
        assert torch.equal(ways(16), torch.ones(3))
    assert torch.equal(ways(16), torch.ones(3))
    assert ways.calls == {"kernel": 1, "reference": 3}
    assert str(kernels.choices()[0]) == "down on cpu, 16: reference (Triton's does not serve)"


def test_memory_that_does_not_suffice_is_for_the_caller(monkeypatch):
    ways = Ways(monkeypatch, kernel=torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        ways(16)
    assert not kernels.choices()


def test_numbers_that_say_nothing_decide_nothing(monkeypatch):
    """As a scaler of losses makes them at first."""
    ways = Ways(monkeypatch, reference=float("inf"))
    assert ways(16).isinf().all()
    assert ways.calls["kernel"] == 0
    assert not kernels.choices()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    ways = Ways(monkeypatch)
    ways(16)
    assert ways.calls == {"kernel": 0, "reference": 1}


def test_what_is_asked_for_runs_untried(here, monkeypatch):
    ways = Ways(monkeypatch, kernel=5.0)
    assert kernels.request("triton") is None
    assert torch.equal(ways(16), torch.full((3,), 5.0))
    assert kernels.request("reference") == "triton"
    ways(16)
    assert ways.calls == {"kernel": 1, "reference": 1}
    assert not ways.timed
    assert not kernels.wanted("down", [torch.ones(1)])
    assert kernels.request(None) == "reference"
    assert kernels.wanted("down", [torch.ones(1)])


def test_what_cannot_be_is_refused(here, monkeypatch):
    with pytest.raises(PlaceError, match=r"no kernel 'tritn'. Choose 'triton', 'reference'"):
        kernels.request("tritn")
    tensors = [torch.ones(1, dtype=torch.float64)]
    assert not kernels.wanted("down", tensors), "float64 is the reference's"
    kernels.request("triton")
    with pytest.raises(
        PlaceError, match=r"down of Triton, which was asked for by name, cannot run: it has no torch\.fl"
    ):
        kernels.wanted("down", tensors)
    monkeypatch.setattr(kernels, "missing", lambda: "there is no GPU")
    with pytest.raises(PlaceError, match=r"cannot run here: there is no GPU\. Ask for none"):
        kernels.request("triton")


def test_what_torch_must_look_into_is_its_own(here):
    x, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
    assert not kernels.wanted("down", [x, parameter]), "a graph is made of it"
    with torch.no_grad():
        assert kernels.wanted("down", [x, parameter])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not kernels.wanted("down", [fake])
    with FlopCounterMode(display=False):
        assert not kernels.wanted("down", [x]), "it would be counted as nothing"
    seen = []
    torch.func.vmap(lambda x: (seen.append(kernels.wanted("down", [x])), x)[1])(x)
    assert seen == [False]


def test_sizes_share_a_choice_up_to_the_next_power_of_two(here, monkeypatch):
    monkeypatch.setattr(kernels, "seconds", lambda way, device: 1.0)
    kinds = []
    monkeypatch.setattr(kernels, "faster", lambda kind, kernel, reference: (kinds.append(kind), reference())[1])
    pytest.importorskip("triton", reason="Triton is not installed: nothing to choose between.")
    with torch.no_grad():
        for tokens, rank, dtype in [
            (3, 8, torch.float32),
            (4, 7, torch.float32),
            (5, 8, torch.float32),
            (3, 8, torch.bfloat16),
        ]:
            lora.down(torch.ones(tokens, 6, dtype=dtype), torch.ones(rank, 6), dtype)
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3
    assert [kernels.counted(number) for number in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]


def test_a_kernel_that_finds_no_gpu_is_passed_over_where_it_is_only_tried(here):
    pytest.importorskip("triton", reason="Triton is not installed: nothing to try.")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which it would run")
    x, A = torch.ones(3, 6), torch.ones(2, 6)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"down on cpu.* does not run"):
        assert torch.equal(lora.down(x, A, x.dtype), x @ A.T)
