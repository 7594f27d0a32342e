"""FlatAdamW equals torch's AdamW bit for bit, goes on from its states, and stands what moves parameters."""

import copy
import io
import pickle

import pytest
import torch
from test_optim import ROWS, adapted, equal, equal_states, grouped, parameters, train
from tiny import llama, text
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import Trainer, TrainingArguments

import veneer
from veneer.errors import OptimizerError


def give_all(params, step):
    generator = torch.Generator().manual_seed(200 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_equals_adamw_bit_for_bit(dtype, some, monkeypatch):
    monkeypatch.setattr("veneer.optim.flat._PIECE", 1000)
    params, others = parameters(dtype), parameters(dtype)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    flat, plain = veneer.FlatAdamW(grouped(params), **options), torch.optim.AdamW(grouped(others), **options)
    for optimizer, held in ((flat, params), (plain, others)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for step in range(6):
            if some and step in (2, 3):
                train(optimizer, held, 1, first=step)
            else:
                give_all(held, step)
                optimizer.step()
            schedule.step()
    equal(params, others)
    equal_states({**flat.state_dict(), "param_groups": None}, {**plain.state_dict(), "param_groups": None})


@pytest.mark.parametrize("kind", [veneer.FlatAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("origin", [veneer.FlatAdamW, torch.optim.AdamW])
def test_states_go_both_ways(origin, kind):
    params = parameters()
    first = origin(grouped(params), lr=0.02)
    train(first, params, 2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    second = kind(grouped(copies))
    second.load_state_dict(torch.load(file, weights_only=True))
    train(first, params, 3, first=2)
    train(second, copies, 3, first=2)
    equal(params, copies)


def test_the_parameters_are_parts_of_a_buffer_and_remain_whole_tensors():
    params = parameters()
    flat = veneer.FlatAdamW(params)
    (weights,), (gradients,) = flat.parameters(), flat.gradients()
    assert len(weights) == len(gradients) == sum(p.numel() for p in params)
    weights.zero_()
    assert not any(p.any() for p in params)
    assert sum(p.untyped_storage().nbytes() for p in params) == weights.nbytes
    assert len(pickle.dumps(params)) < 2 * weights.nbytes + 20_000


def test_gradients_are_zeroed_and_clipped_in_their_buffer():
    params, others = parameters(), parameters()
    flat = veneer.FlatAdamW(params)
    give_all(params, 0)
    give_all(others, 0)
    norm = flat.clip_grad_norm_(0.5)
    wanted = torch.nn.utils.clip_grad_norm_(others, 0.5)
    torch.testing.assert_close(norm, wanted)
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    (buffer,) = flat.gradients()
    flat.zero_grad(set_to_none=False)
    assert not buffer.any()
    params[3].sum().backward()
    assert buffer.sum() == params[3].numel(), "backward adds into the buffer"
    flat.zero_grad()
    assert all(p.grad is None for p in params)


def run_trainer(kind, folder, resume=None, **options):
    model, adapter, groups = adapted()
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "seed": 1},
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, optimizers=(kind(groups, **options), None))
    trainer.train(resume_from_checkpoint=resume)
    return list(adapter.parameters())


def test_trainer_clips_saves_and_resumes_exactly(tmp_path):
    whole = run_trainer(veneer.FlatAdamW, tmp_path / "a")
    equal(whole, run_trainer(torch.optim.AdamW, tmp_path / "b"))
    saved = str(tmp_path / "a" / "checkpoint-3")
    equal(whole, run_trainer(veneer.FlatAdamW, tmp_path / "c", saved))
    equal(whole, run_trainer(torch.optim.AdamW, tmp_path / "d", saved))


def test_what_moves_parameters_is_noticed(tmp_path):
    """Other memory, files read into the adapter, a copy of model and optimizer, a pickle of the model."""
    ends = []
    for kind in (veneer.FlatAdamW, torch.optim.AdamW):
        model, adapter, groups = adapted()
        optimizer = kind(groups)

        def steps(count=2):
            for _ in range(count):
                model(**text(), labels=text()["input_ids"]).loss.backward()  # noqa: B023
                optimizer.step()  # noqa: B023
                optimizer.zero_grad()  # noqa: B023

        steps()
        veneer.save(adapter, tmp_path / kind.__name__)
        for parameter in adapter.parameters():
            parameter.data = parameter.data.clone()
        steps()
        veneer.swap(model, adapter, tmp_path / kind.__name__)
        steps()
        model, optimizer = copy.deepcopy((model, optimizer))
        adapter = veneer.adapters(model)["default"]
        steps()
        model = pickle.loads(pickle.dumps(model))
        adapter = veneer.adapters(model)["default"]
        optimizer = kind(adapter.parameter_groups(0.01, lora_plus_ratio=4))
        steps()
        ends.append(list(adapter.parameters()))
        veneer.detach(model, adapter)
    equal(*ends)


def test_a_graph_notices_that_a_step_changed_what_it_saved():
    weight = nn.Parameter(torch.ones(3))
    flat = veneer.FlatAdamW([weight])
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    flat.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_lie_in_a_buffer_is_updated_beside_it():
    params, others = parameters(), parameters()
    turned = [nn.Parameter(torch.arange(12.0).view(3, 4).t()) for _ in range(2)]
    with pytest.warns(UserWarning, match="1 of 12 parameters cannot lie in a flat buffer"):
        flat = veneer.FlatAdamW([*params, turned[0]])
    plain = torch.optim.AdamW([*others, turned[1]])
    for optimizer, held in ((flat, [*params, turned[0]]), (plain, [*others, turned[1]])):
        for step in range(3):
            give_all(held, step)
            optimizer.step()
    equal([*params, turned[0]], [*others, turned[1]])


def test_sharded_parameters_are_updated_beside_it(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard = lambda: nn.Parameter(distribute_tensor(torch.arange(6.0), mesh, [Replicate()]))  # noqa: E731
        one, other = shard(), shard()
        with pytest.warns(UserWarning, match="1 of 1 parameters cannot lie in a flat buffer"):
            flat = veneer.FlatAdamW([one])
        for optimizer, p in ((flat, one), (torch.optim.AdamW([other], foreach=True), other)):
            p.square().sum().backward()
            optimizer.step()
        assert torch.equal(one.full_tensor(), other.full_tensor())
    finally:
        torch.distributed.destroy_process_group()


def test_what_it_does_not_take_is_refused():
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = veneer.FlatAdamW([weight])
    weight.grad = torch.eye(3).to_sparse()
    with pytest.raises(OptimizerError, match="no sparse gradients"):
        optimizer.step()
    state = torch.optim.AdamW([weight], amsgrad=True).state_dict()
    optimizer.load_state_dict(state)
    weight.grad = None
    with pytest.raises(OptimizerError, match="has no amsgrad"):
        optimizer.step()


def test_it_goes_by_name():
    torch.manual_seed(0)
    model = llama()
    adapter = veneer.attach(model, veneer.LoRA(rank=2))
    optimizer = veneer.optimizer(adapter, "flat", lr=0.02, lora_plus_ratio=2, weight_decay=0.0, fused=True)
    assert isinstance(optimizer, veneer.FlatAdamW)
    assert len(optimizer.parameters()) == 2
    losses = []
    for _ in range(60):
        loss = model(**text(), labels=text()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
