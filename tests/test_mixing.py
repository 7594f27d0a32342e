"""Rows under many adapters in batched products, adapters swapped in from files, and graphs that both leave alone."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, llama, perturb
from torch import nn
from torch._dynamo.testing import CompileCounter

import veneer
from veneer import errors, mixing
from veneer.ops import lora_cpu

EXACT = {"rtol": 1e-9, "atol": 1e-9}
METHODS = {
    "a": veneer.LoRA(rank=2),
    "b": veneer.LoRA(rank=5, alpha=3.0),
    "c": veneer.LoRA(rank=1, use_rslora=True),
    "d": veneer.LoRA(rank=4, init="pissa"),
    "e": veneer.LoRAFA(rank=3),
    "f": veneer.AdaLoRA(total_steps=10),
}
ROWS = ["a", ("b", "d"), None, "a", ("f", "a", "c"), "e", "a", "b"]


@pytest.fixture
def products(monkeypatch):
    """Counts the batched products, so that a test knows that rows were served together."""
    made = []
    plain = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: (made.append(len(args[0])), plain(*args))[1])
    return made


def many(where="linear", methods=METHODS):
    torch.manual_seed(0)
    model = llama().double().eval()
    for number, (name, method) in enumerate(methods.items()):
        torch.manual_seed(number)
        perturb(veneer.attach(model, method, where, name=name), 0.2 + 0.1 * number)
    return model


def ids(rows=8, length=5):
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(model, rows=None, batch=None):
    batch = ids() if batch is None else batch
    if rows is None:
        return model(input_ids=batch).logits
    with veneer.use(model, rows=rows):
        return model(input_ids=batch).logits


def alone(model, rows, batch):
    out = []
    for number, row in enumerate(rows):
        names = () if row is None else (row,) if isinstance(row, str) else row
        with veneer.use(model, *names):
            out.append(model(input_ids=batch[number : number + 1]).logits)
    return torch.cat(out)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("where", ["linear", "attention.q | mlp.down"])
def test_rows_of_all_ranks_and_stacks_equal_rows_alone(where, length, products):
    model = many(where)
    batch = ids(length=length)
    mixed = answer(model, ROWS, batch)
    assert products
    torch.testing.assert_close(mixed, alone(model, ROWS, batch), **EXACT)
    with veneer.use(model):
        torch.testing.assert_close(mixed[2], model(input_ids=batch[2:3]).logits[0], **EXACT)


def test_roles_of_a_fused_projection_and_several_pairs_of_one_adapter(products):
    """GPT-2's q and v are columns of one weight, and two methods may stand at one place."""
    model = FAMILIES["gpt2"].model()
    perturb(veneer.attach(model, veneer.LoRA(rank=2), "attention.q | attention.v", name="one"), 0.3)
    both = (veneer.LoRA(rank=2), veneer.LoRAFA(rank=1))
    perturb(veneer.attach(model, {"attention.v": both, "mlp": veneer.LoRA(rank=1)}, name="two"), 0.2)
    rows = ["one", ("one", "two"), None]
    batch = ids(3)
    mixed = answer(model, rows, batch)
    assert products
    torch.testing.assert_close(mixed, alone(model, rows, batch), **EXACT)


def test_where_one_acts_otherwise_rows_are_served_apart(products):
    methods = {"a": veneer.LoRA(rank=2), "i": veneer.IA3(), "v": veneer.VeRA(rank=3), "d": veneer.DoRA(rank=2)}
    model = many("mlp.up", methods)
    rows = [("a", "i"), "v", "d", None, "a"]
    torch.testing.assert_close(answer(model, rows, ids(5)), alone(model, rows, ids(5)), **EXACT)
    assert not products
    rows = ["a", None, "a", None, "a"]  # who rests does not matter
    torch.testing.assert_close(answer(model, rows, ids(5)), alone(model, rows, ids(5)), **EXACT)
    assert products


def test_dropout_is_each_adapters_own(products):
    model = many("mlp.up", {"a": veneer.LoRA(rank=2, dropout=0.5), "b": veneer.LoRA(rank=2)}).train()
    answer(model, ["a", "b"], ids(2))
    assert not products
    answer(model.eval(), ["a", "b"], ids(2))
    assert products


def test_uneven_tiles_take_few_rows_more_than_there_are():
    pair = torch.ones(1, 3), torch.ones(2, 1)
    served = {"a": list(range(9)), **{name: [number] for number, name in enumerate("bcdef", 9)}}
    tiles = mixing._Tiles.of(dict.fromkeys(served, pair), served, torch.device("cpu"))
    assert tiles.A.shape == (3 + 5, 1, 3)
    assert len(tiles.taken) == 3 * 8
    assert tiles.rows.tolist() == list(range(14))


def test_stacks_follow_the_numbers_and_are_not_made_twice(products, monkeypatch):
    model = many("mlp.up", {"a": veneer.LoRA(rank=2), "b": veneer.LoRA(rank=3)})
    one = veneer.adapters(model)["a"]
    made = []
    plain = mixing._padded
    monkeypatch.setattr(mixing, "_padded", lambda pairs: (made.append(1), plain(pairs))[1])
    rows = ["a", "b", None]
    with veneer.use(model, rows=rows):
        first = model(input_ids=ids(3)).logits
        count = len(made)
        assert torch.equal(model(input_ids=ids(3)).logits, first)
        assert len(made) == count > 0
        for parameter in one.parameters():
            parameter.mul_(2.0)
        second = model(input_ids=ids(3)).logits
    assert (second[0] - first[0]).abs().max() > 1e-4
    torch.testing.assert_close(second, alone(model, rows, ids(3)), **EXACT)
    model.float()
    assert answer(model, rows, ids(3)).dtype == torch.float32


@pytest.fixture
def in_c(monkeypatch):
    """Counts the modules at which C served the rows."""
    if lora_cpu.missing():
        pytest.skip(lora_cpu.missing())
    made = []
    plain = lora_cpu.Mixed.beside
    count = lambda self, x, y: (found := plain(self, x, y), made.append(found is not None))[0]  # noqa: E731
    monkeypatch.setattr(lora_cpu.Mixed, "beside", count)
    return made


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_in_c_rows_of_all_ranks_and_stacks_equal_rows_alone(dtype, near, length, in_c, products):
    model = many().to(dtype)
    for adapter in veneer.adapters(model).values():
        for claim in adapter.claims:
            claim.delta.float()
    found = answer(model, ROWS, ids(length=length))
    torch.testing.assert_close(found, alone(model, ROWS, ids(length=length)), rtol=near, atol=near)
    assert in_c
    assert all(in_c)
    assert not products


def test_in_c_beams_and_numbers_that_change_are_served(in_c):
    model = many("linear", {"a": veneer.LoRA(rank=2), "b": veneer.LoRA(rank=3), "d": veneer.LoRA(rank=4, init="pissa")})
    model.float()
    rows = ["a", "d", None, ("a", "b")]
    near = {"rtol": 1e-4, "atol": 1e-5}
    with veneer.use(model, rows=rows):
        twice = model(input_ids=ids(4).repeat_interleave(2, 0)).logits
        torch.testing.assert_close(twice[::2], model(input_ids=ids(4)).logits, **near)
        for change in (lambda p: p.mul_(1.5), lambda p: setattr(p, "data", p.data * 1.5)):
            before = model(input_ids=ids(4)).logits
            for adapter in veneer.adapters(model).values():
                for parameter in adapter.parameters():
                    change(parameter)
            after = model(input_ids=ids(4)).logits
            assert all((after[row] - before[row]).abs().max() > 1e-4 for row in (0, 1, 3))
            assert torch.equal(after[2], before[2])
            torch.testing.assert_close(after, alone(model, rows, ids(4)), **near)
    assert in_c
    assert all(in_c)


def test_training_and_evaluating_in_turn():
    model = many("mlp.up", {"a": veneer.LoRA(rank=2), "b": veneer.LoRA(rank=3)})
    rows = ["a", "b", None]
    veneer.activate(model, rows=rows)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = answer(model, batch=ids(3))
    for _ in range(2):
        model(input_ids=ids(3)).logits.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = answer(model, batch=ids(3))
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, alone(model, rows, ids(3)), **EXACT)
        before = after


def test_a_check_sees_what_is_served_together():
    model = many("mlp.up", {"a": veneer.LoRA(rank=2), "b": veneer.LoRA(rank=3)})
    veneer.activate(model, rows=["a", "b", None])
    answer(model, batch=ids(3))
    assert veneer.check(model, {"input_ids": ids(3)}) == []


def test_merging_within_a_mix_acts_once():
    model = many("mlp.up", {"a": veneer.LoRA(rank=2), "b": veneer.LoRA(rank=3)})
    rows = [("a", "b"), "a"]
    wanted = alone(model, rows, ids(2))
    veneer.activate(model, rows=rows)
    veneer.merge(model, "a")
    torch.testing.assert_close(answer(model, batch=ids(2)), wanted, rtol=1e-6, atol=1e-6)
    veneer.unmerge(model, "a")
    torch.testing.assert_close(answer(model, batch=ids(2)), wanted, **EXACT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_stacks_of_their_own(copied):
    model = many("mlp.up", {"a": veneer.LoRA(rank=2), "b": veneer.LoRA(rank=3)})
    veneer.activate(model, rows=["a", "b", None])
    before = answer(model, batch=ids(3))
    twin = copied(model)
    for parameter in veneer.adapters(twin)["a"].parameters():
        parameter.data.zero_()
    assert not torch.equal(answer(twin, batch=ids(3)), before)
    assert torch.equal(answer(model, batch=ids(3)), before)


# Compiled


def test_a_compiled_model_sees_another_mix_and_another_adapter_without_compiling_again(tmp_path):
    model = many("linear", {"a": veneer.LoRA(rank=2), "b": veneer.LoRA(rank=5, alpha=2.0), "c": veneer.LoRA(rank=2)})
    for name in ("a", "c"):
        veneer.save(veneer.adapters(model)[name], tmp_path / name)
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    batch = ids(4)

    def run(rows):
        with veneer.use(model, rows=rows):
            mixed = compiled(input_ids=batch).logits
        torch.testing.assert_close(mixed, alone(model, rows, batch), **EXACT)
        return mixed

    first = run(["a", "b", None, "a"])
    assert counter.frame_count == 1
    for rows in (["b", "b", "c", None], ["a"] * 4, [None] * 4, ["c", "a", "b", "b"]):
        run(rows)
    veneer.swap(model, "a", tmp_path / "c")
    assert not torch.equal(run(["a", "b", None, "a"])[0], first[0])
    assert counter.frame_count == 1, "a mix or an adapter was compiled for itself"
    run(["a", ("b", "c"), None, "a"])
    deeper = counter.frame_count
    run([("a", "b"), "c", ("c", "a"), None])
    run(["a", "b", None, "a"])
    assert counter.frame_count == deeper <= 2
    torch.compiler.reset()


# Swapping


def saved(folder, rank=2, seed=0, method=veneer.LoRA, where="linear"):
    model = llama().double()
    torch.manual_seed(seed)
    adapter = veneer.attach(model, method(rank=rank), where)
    perturb(adapter, 0.1 * (seed + 1))
    return veneer.save(adapter, folder)


@pytest.mark.parametrize("kind", ["veneer", "peft", "own tensors"])
def test_swapping_equals_loading(tmp_path, kind):
    method = veneer.HiRA if kind == "own tensors" else veneer.LoRA
    folders = [saved(tmp_path / str(seed), seed=seed, method=method) for seed in range(4)]
    if kind == "peft":
        for folder in folders:
            (folder / "veneer.json").unlink()
    torch.manual_seed(0)
    model = llama().double().eval()
    slot = veneer.load(model, folders[0], name="slot")
    parameters = [id(p) for p in slot.parameters()], [p.data_ptr() for p in slot.parameters()]
    for folder in (folders[1], folders[2], folders[3], folders[1]):
        assert veneer.swap(model, "slot", folder) is slot
        torch.manual_seed(0)
        other = llama().double().eval()
        loaded = veneer.load(other, folder)
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(slot.state_dict()[key], tensor), key
        assert torch.equal(answer(model), answer(other))
    assert slot.refill is not None
    assert parameters == ([id(p) for p in slot.parameters()], [p.data_ptr() for p in slot.parameters()])


def test_a_slot_that_moved_is_filled_where_it_is(tmp_path):
    folders = [saved(tmp_path / str(seed), seed=seed) for seed in range(3)]
    model = llama().double()
    slot = veneer.load(model, folders[0])
    veneer.swap(model, slot, folders[1])
    assert slot.refill is not None
    for parameter in slot.parameters():
        parameter.data = parameter.data.clone()
    twin = copy.deepcopy(model)
    veneer.swap(model, slot, folders[2])
    wanted = veneer.load(llama().double(), folders[2]).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in slot.state_dict().items())
    before = veneer.load(llama().double(), folders[1]).state_dict()
    other = veneer.adapters(twin)["default"].state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.items())


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    good = [saved(tmp_path / f"good{seed}", seed=seed) for seed in range(2)]
    model = llama().double()
    slot = veneer.load(model, good[0], name="slot")
    veneer.swap(model, slot, good[1])
    before = {key: tensor.clone() for key, tensor in slot.state_dict().items()}

    def refused(folder, error, words):
        with pytest.raises(error, match=words):
            veneer.swap(model, slot, folder)
        assert all(torch.equal(tensor, before[key]) for key, tensor in slot.state_dict().items())

    refused(saved(tmp_path / "rank", rank=3), errors.AdapterError, r"holds LoRA\(rank=3.*other options than Adapter")
    refused(saved(tmp_path / "where", where="mlp"), errors.AdapterError, "at other places")
    refused(tmp_path, errors.FileError, "holds no adapter")
    broken = shutil.copytree(good[0], tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(broken, errors.CorruptFile, "holds NaN")
    file.write_bytes(file.read_bytes()[:-8])
    refused(broken, errors.CorruptFile, "truncated or no safetensors")
    save_file(dict(list(load_file(good[0] / file.name).items())[1:]), file)
    refused(broken, errors.CorruptFile, "missing")
    recipe = json.loads((good[0] / "veneer.json").read_text())
    recipe["claims"][0]["options"]["alpha"] = 3.0
    other = shutil.copytree(good[0], tmp_path / "alpha")
    (other / "veneer.json").write_text(json.dumps(recipe))
    refused(other, errors.AdapterError, "other options")
    veneer.merge(model, slot)
    with pytest.raises(errors.AdapterError, match="merged into the weights"):
        veneer.swap(model, slot, good[0])


def test_what_is_saved_in_another_form_is_loaded_instead(tmp_path):
    model = llama().double()
    method = veneer.PrefixTuning(length=2, reparameterization=True)
    slot = veneer.attach(model, method, name="slot")
    veneer.save(slot, tmp_path / "prefix")
    with pytest.raises(errors.AdapterError, match="holds more than is saved of it"):
        veneer.swap(model, slot, tmp_path / "prefix")


def test_a_module_whose_output_is_not_batched_by_rows():
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("a", "b"):
        perturb(veneer.attach(model, veneer.LoRA(rank=1), "0", name=name))
    with (
        pytest.raises(errors.RoutingError, match="rows names 2 rows but a batch of 3 reached 0"),
        veneer.use(model, rows=["a", "b"]),
    ):
        model(torch.ones(3, 4))
