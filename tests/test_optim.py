"""PagedAdamW equals torch's AdamW bit for bit, within its window, and goes on from its states; the choice by name."""

import copy
import gc
import io
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import llama, text
from torch import nn
from transformers import Trainer, TrainingArguments

import veneer
from veneer.errors import OptimizerError
from veneer.optim import stores
from veneer.optim.choosing import paged_share

WINDOW = 4096
SIZES = [(), (0,), (1,), (7,), (63,), (64,), (65,), (3, 5, 7), (129, 31), (8, 4096), (10007,)]
"""Odd ones, one of no elements, and some that are larger than the window."""


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Temporary states lie in the test's own folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def grouped(params):
    """Two groups, the second faster and with another decay, as LoRA+ has them."""
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 0.16, "weight_decay": 0.0, "betas": (0.8, 0.99)}]


def give_gradients(params, step):
    """New ones, and none at all for some at each step; the third parameter waits for step 2."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        rests = (number + step) % 4 == 0 or (number == 3 and step < 2)
        p.grad = None if rests else gradient


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()


def equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one, other), f"{tuple(one.shape)} {one.dtype} differs"


def equal_states(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for number, state in one["state"].items():
        assert state.keys() == other["state"][number].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, other["state"][number][key]), (number, key)
            assert tensor.stride() == other["state"][number][key].stride()


@pytest.mark.parametrize("window", [WINDOW, 5000, 1 << 20])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_it_equals_adamw_bit_for_bit(dtype, window):
    params, others = parameters(dtype), parameters(dtype)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    paged = veneer.PagedAdamW(grouped(params), window=window, **options)
    plain = torch.optim.AdamW(grouped(others), **options)
    for optimizer, held in ((paged, params), (plain, others)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for step in range(6):
            train(optimizer, held, 1, first=step)
            schedule.step()
    equal(params, others)
    equal_states(paged.state_dict(), plain.state_dict())


def test_every_option_of_a_group_acts():
    params, others = parameters(), parameters()
    groups = lambda held: [{"params": held[:6], "maximize": True}, {"params": held[6:], "lr": torch.tensor(0.1)}]  # noqa: E731
    train(veneer.PagedAdamW(groups(params), window=WINDOW), params, 3)
    train(torch.optim.AdamW(groups(others)), others, 3)
    equal(params, others)


def layouts():
    """Dense in memory, but not in the order of their dimensions."""
    base = torch.arange(24 * 18 * 6, dtype=torch.float32).sin()
    image = base.view(6, 18, 6, 4).to(memory_format=torch.channels_last)
    return [
        nn.Parameter(base.view(24, 108).clone().t()),
        nn.Parameter(image),
        nn.Parameter(base.view(1, 2592).clone().t()),
    ]


def test_layouts_are_kept():
    params, others = layouts(), layouts()
    paged, plain = veneer.PagedAdamW(params, window=WINDOW), torch.optim.AdamW(others)
    for optimizer, held in ((paged, params), (plain, others)):
        for p in held:
            p.grad = p.detach().contiguous().cos()
        optimizer.step()
    equal(params, others)
    equal_states(paged.state_dict(), plain.state_dict())
    again = layouts()
    other = veneer.PagedAdamW(again, window=WINDOW)
    other.load_state_dict(plain.state_dict())
    equal_states(other.state_dict(), plain.state_dict())


def test_memory_of_the_host_serves_as_a_file_does(monkeypatch):
    """What accelerators get, tried on the CPU."""
    monkeypatch.setattr(veneer.PagedAdamW, "_store", lambda self, device: stores.HostStore(device, self.window))
    params, others = parameters(), parameters()
    paged, plain = veneer.PagedAdamW(grouped(params), window=WINDOW), torch.optim.AdamW(grouped(others))
    train(paged, params, 3)
    train(plain, others, 3)
    equal_states(paged.state_dict(), plain.state_dict())
    extra = [nn.Parameter(torch.ones(5000)) for _ in range(2)]
    paged.add_param_group({"params": extra[:1]})
    plain.add_param_group({"params": extra[1:]})
    train(paged, [*params, extra[0]], 3, first=3)
    train(plain, [*others, extra[1]], 3, first=3)
    equal([*params, extra[0]], [*others, extra[1]])


def test_a_closure_runs_with_gradients_and_its_loss_comes_back():
    weight = nn.Parameter(torch.ones(3))
    optimizer = veneer.PagedAdamW([weight])

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (weight < 1).all()


# Resuming


@pytest.mark.parametrize("kind", [veneer.PagedAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("origin", [veneer.PagedAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_go_both_ways(origin, kind, dtype):
    """From AdamW, to AdamW, through a file; what had no gradient yet has no state, whatever was there before."""
    params = parameters(dtype)
    first = origin(grouped(params), lr=0.02)
    train(first, params, 2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    file.seek(0)
    second = kind(grouped(copies))
    for p in copies:
        p.grad = torch.zeros_like(p)
    second.step()
    with torch.no_grad():
        for one, other in zip(copies, params, strict=True):
            one.copy_(other)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(first, params, 3, first=2)
    train(second, copies, 3, first=2)
    equal(params, copies)
    assert second.param_groups[0]["lr"] == 0.02


def test_states_of_a_fused_adamw_go_on_unfused():
    params = parameters()
    fused = torch.optim.AdamW(params, fused=True)
    train(fused, params, 2)
    state = copy.deepcopy(fused.state_dict())
    ends = []
    for kind in (veneer.PagedAdamW, torch.optim.AdamW):
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = kind(copies)
        optimizer.load_state_dict(copy.deepcopy(state))
        assert optimizer.param_groups[0]["fused"] is (None if kind is veneer.PagedAdamW else True)
        optimizer.param_groups[0]["fused"] = None
        train(optimizer, copies, 2, first=2)
        ends.append(copies)
    equal(*ends)
    assert optimizer.state_dict()["state"][1]["step"] == 3, "the second rests at step 3"


def test_its_own_state_can_be_loaded_again():
    """As accelerate does when it takes an optimizer over."""
    params, others = parameters(), parameters()
    paged, plain = veneer.PagedAdamW(params, window=WINDOW), torch.optim.AdamW(others)
    train(paged, params, 2)
    train(plain, others, 2)
    paged.load_state_dict(paged.state_dict())
    train(paged, params, 2, first=2)
    train(plain, others, 2, first=2)
    equal(params, others)


def test_another_optimizer_that_took_the_state_leaves_ours_alone():
    params, others = parameters(), parameters()
    paged = veneer.PagedAdamW(params, window=WINDOW)
    train(paged, params, 2)
    plain = torch.optim.AdamW(others)
    plain.load_state_dict(paged.state_dict())
    before = copy.deepcopy(paged.state_dict())
    train(plain, others, 2)
    after = paged.state_dict()
    for number, state in before["state"].items():
        equal((state["exp_avg"], state["exp_avg_sq"]), (after["state"][number][k] for k in ("exp_avg", "exp_avg_sq")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["param_groups"][0].update(amsgrad=True), "has no amsgrad"),
        (lambda d: d["state"][3].pop("exp_avg"), "goes on from states of AdamW"),
        (lambda d: d["state"][3].update(exp_avg=torch.zeros(2, 2)), r"shapes \[\(2, 2\), \(7,\)\]"),
        (lambda d: d["state"].update({3: {"state1": torch.zeros(7)}}), "This state has state1"),
    ],
)
def test_what_it_cannot_go_on_from_is_refused_before_anything_changes(change, words):
    params = parameters()
    optimizer = veneer.PagedAdamW(params)
    train(optimizer, params, 3)
    good = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(good)
    change(bad)
    with pytest.raises(OptimizerError, match=words):
        optimizer.load_state_dict(bad)
    equal_states(optimizer.state_dict(), good)


# Files


def files_in(folder):
    """Sizes on disk of the files of this process that lie in the folder, with a name or without."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    found = [link for link in links if os.path.lexists(link) and os.readlink(link).startswith(str(folder))]
    return [os.stat(link).st_blocks * 512 for link in found]


def test_its_file_is_gone_with_it(tmp_path):
    weight = nn.Parameter(torch.zeros(1 << 18))
    optimizer = veneer.PagedAdamW([weight], folder=tmp_path)
    assert not list(tmp_path.iterdir()), "it has a name, and would be left behind by a process that is killed"
    (size,) = files_in(tmp_path)
    assert size >= 2 * weight.nbytes, "the blocks are not there"
    del optimizer
    gc.collect()
    assert not files_in(tmp_path)


def test_a_full_disk_is_noticed_before_training(tmp_path):
    """A limit of 1 MB on every file stands for the disk."""
    large = nn.Parameter(torch.zeros(1_000_000))
    small = nn.Parameter(torch.zeros(1000))
    optimizer = veneer.PagedAdamW([small], folder=tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        words = f"needs 8,000,000 bytes in {tmp_path} for .*, where [0-9,]+ are free: File too large. Free some"
        with pytest.raises(OptimizerError, match=words):
            veneer.PagedAdamW([large], folder=tmp_path)
        with pytest.raises(OptimizerError, match=words):
            optimizer.add_param_group({"params": [large]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sum(files_in(tmp_path)) < 1_000_000, "what was taken before the disk was full is not given back"
    small.grad = torch.ones(1000)
    large.grad = torch.ones(1_000_000)
    optimizer.step()
    assert small.all()
    assert not large.any()


def test_without_posix_fallocate_writing_takes_the_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr("veneer.optim.stores.sys.platform", "darwin")
    store = stores.FileStore(torch.device("cpu"), WINDOW, tmp_path)
    store.grow(10_000)
    assert len(store.buffer()) == 10_000
    assert files_in(tmp_path)[0] >= 10_000


def test_a_folder_that_is_not_there():
    with pytest.raises(OptimizerError, match="cannot make a file in /nowhere: No such file"):
        veneer.PagedAdamW([nn.Parameter(torch.zeros(3))], folder="/nowhere")


def test_a_file_that_was_cut_short(tmp_path):
    store = stores.FileStore(torch.device("cpu"), WINDOW, tmp_path)
    store.grow(128)
    os.truncate(store._file.fileno(), 64)
    with pytest.raises(OptimizerError, match="was cut short"):
        store.read([(0, 128)])


@pytest.mark.parametrize(("variable", "expected"), [("/elsewhere", "/elsewhere"), (None, "/var/tmp")])
def test_where_temporary_states_lie(variable, expected, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", variable or "/tmp")
    if variable is None:
        monkeypatch.delenv("TMPDIR")
    assert stores.scratch() == expected


MEMORY = """
import sys, torch, veneer

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def train(build, sizes):
    params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    with open("/proc/self/clear_refs", "w") as peak_of:
        peak_of.write("5")  # from now on
    before, optimizer = peak(), build(params)
    for _ in range(2):
        optimizer.step()
    grown, own = peak() - before, anonymous()
    torch.save(optimizer.state_dict(), sys.argv[1] + "/saved.pt")
    print(grown, anonymous() - own)

paged = lambda params: veneer.PagedAdamW(params, window=2**20, folder=sys.argv[1])
sizes = [10_000_001, *[100_003] * 50]
train(paged, [300_000])  # so that all code is loaded
train(paged, sizes)
train(torch.optim.AdamW, sizes)
"""


def test_memory_stays_within_the_window(tmp_path):
    """The growth of a process's highest resident size, pages of files and all; AdamW's shows that it is seen."""
    states = 2 * 4 * (10_000_001 + 50 * 100_003)
    ran = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    _, (grown, saving), (plain, _) = (map(int, line.split()) for line in ran.stdout.splitlines())
    assert grown < 4 * 2**20, "a window of 1 MiB, and what one step computes"
    assert saving < 4 * 2**20, "saving has the moments in the process's own memory"
    assert plain > 0.9 * states


# With others


ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(16 * 6).view(16, 6) % 60 + 2]


def adapted():
    """A tiny Llama with LoRA, its adapter, and LoRA+ groups."""
    torch.manual_seed(0)
    model = llama()
    adapter = veneer.attach(model, veneer.LoRA(rank=4), where="attention.q | mlp.up")
    return model, adapter, adapter.parameter_groups(0.01, lora_plus_ratio=4)


def run_trainer(kind, folder, resume=None, **options):
    model, adapter, groups = adapted()
    optimizer = kind(groups, **options)
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "seed": 1},
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return list(adapter.parameters())


def test_trainer_saves_and_resumes_exactly(tmp_path):
    whole = run_trainer(veneer.PagedAdamW, tmp_path / "a", window=WINDOW)
    equal(whole, run_trainer(torch.optim.AdamW, tmp_path / "b"))
    saved = str(tmp_path / "a" / "checkpoint-3")
    equal(whole, run_trainer(veneer.PagedAdamW, tmp_path / "c", saved, window=WINDOW))
    equal(whole, run_trainer(torch.optim.AdamW, tmp_path / "d", saved))


def test_accelerate_takes_it():
    trained = []
    for kind in (veneer.PagedAdamW, torch.optim.AdamW):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, adapter, groups = adapted()
        model, optimizer = accelerator.prepare(model, kind(groups))
        for row in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(**text(), labels=text()["input_ids"]).loss * (row + 1))
                accelerator.clip_grad_norm_(adapter.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        trained.append(list(adapter.parameters()))
    equal(*trained)


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_copied(act):
    with pytest.raises(OptimizerError, match="cannot be copied or pickled"):
        act(veneer.PagedAdamW([nn.Parameter(torch.zeros(3))]))


class Kind(torch.Tensor):
    """Some subclass."""


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (torch.zeros(3).as_subclass(Kind), "not a Kind"),
        (torch.zeros(4, 4).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(4, 4)[:, ::2], r"shape \(4, 2\) and strides \(4, 2\)"),
    ],
)
def test_what_it_cannot_page(parameter, words):
    with pytest.raises(OptimizerError, match=words):
        veneer.PagedAdamW([parameter.requires_grad_()])


def test_other_refusals():
    weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(OptimizerError, match="at least 4096 bytes"):
        veneer.PagedAdamW([weight], window=4095)
    optimizer = veneer.PagedAdamW([weight])
    weight.grad = torch.eye(3).to_sparse()
    with pytest.raises(OptimizerError, match="no sparse gradients"):
        optimizer.step()
    other = nn.Parameter(torch.zeros(5))
    other.grad = torch.zeros(5)
    optimizer.param_groups[0]["params"] = [other]
    with pytest.raises(OptimizerError, match=r"shape \(5,\) was put into"):
        optimizer.step()


# By name


@pytest.mark.parametrize("name", ["adamw", "paged", "adamw-8bit"])
def test_each_trains(name):
    torch.manual_seed(0)
    model = llama()
    adapter = veneer.attach(model, veneer.LoRA(rank=128), where="mlp")  # 4,096 elements: from there on 8 bits
    optimizer = veneer.optimizer(adapter, name, lr=0.02, lora_plus_ratio=2, weight_decay=0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.04]
    losses = []
    for _ in range(20):
        loss = model(**text(), labels=text()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    kinds = {state["state1"].dtype for state in optimizer.state.values() if "state1" in state}
    assert kinds == ({torch.uint8} if name == "adamw-8bit" else set())


def test_a_name_that_is_not_there():
    _, adapter, _ = adapted()
    with pytest.raises(OptimizerError, match=r"no optimizer 'page'. Closest: paged"):
        veneer.optimizer(adapter, "page", lr=1e-3)


def test_bitsandbytes_pages_nothing_on_a_cpu():
    _, adapter, _ = adapted()
    with pytest.raises(
        OptimizerError, match=r"nothing on a CPU.*100,000 elements or more: 0.0% of what 'default' trains"
    ):
        veneer.optimizer(adapter, "paged-bitsandbytes", lr=1e-3)


def test_bitsandbytes_says_what_it_pages():
    """On the meta device, which is no CPU either; its classes ask for CUDA at the first step only."""
    model = nn.Sequential(nn.Linear(50_000, 8), nn.Linear(8, 50_000)).to("meta")
    adapter = veneer.attach(model, veneer.LoRA(rank=2), where="*")
    share = paged_share(adapter)
    assert share == 200_000 / (200_000 + 32)
    adapter = veneer.attach(model, veneer.LoRA(rank=1), where="0 | 1", name="second")
    assert paged_share(adapter) == 0
    with pytest.warns(UserWarning, match="100,000 elements or more: 0.0% of what 'second' trains; other states stay"):
        optimizer = veneer.optimizer(adapter, "paged-bitsandbytes", lr=1e-3)
    assert optimizer.is_paged


def test_without_bitsandbytes_another_is_named(monkeypatch):
    _, adapter, _ = adapted()
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(OptimizerError, match=r"'adamw-8bit' needs bitsandbytes. Install it, or take 'paged'"):
        veneer.optimizer(adapter, "adamw-8bit", lr=1e-3)


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    guide = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    names = {"veneer": veneer, "model": llama(), "batch": {**text(), "labels": text()["input_ids"]}}
    blocks = re.findall(r"^```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, "docs/memory.md", "exec"), names)
    assert len(blocks) == 2
    assert all(parameter.any() for parameter in names["adapter"].parameters())
