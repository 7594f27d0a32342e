"""One adapter out of several: AdapterFusion, the mean, and the stack."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import FAMILIES, IDS, logits, perturb, text

import veneer
from veneer.errors import AdapterError, CorruptFile, FileError, MethodError, Overlap

PFEIFFER = veneer.BottleneckAdapter(width=4, placement="after_residual")


def with_adapters(model, *methods, names=("one", "two", "three"), where=None):
    """The model with one perturbed adapter for each method, each other than the last."""
    for number, (name, method) in enumerate(zip(names, methods, strict=False)):
        perturb(veneer.attach(model, method, where, name=name), scale=0.2 + 0.1 * number)
    return model


def shares_by_hand(delta, x, y):
    """(what each part adds, its share of the attention), as the paper writes it."""
    z = y if delta.placement == "serial" else x if delta.placement == "parallel" else x + y
    z = delta.norm(z) if delta.norm is not None else z
    changes = torch.stack([part(z) for part in delta.parts.values()], dim=-2)
    query, keys = F.linear(z, delta.query, delta.query_bias), changes @ delta.key.T
    return changes, torch.einsum("...d,...nd->...n", query, keys).softmax(-1)


@pytest.mark.parametrize("placement", ["serial", "parallel", "after_residual"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fusion_is_the_papers_attention(family, placement):
    method = veneer.BottleneckAdapter(width=4, placement=placement)
    model = with_adapters(FAMILIES[family].model(), method, method, method)
    fusion = veneer.fuse(model, ["one", "two", "three"])
    perturb(fusion)
    seen = []
    for claim in fusion.claims:
        claim.delta.register_forward_hook(lambda delta, args, out: seen.append((delta, *args, out)))
    logits(model, text())
    assert len(seen) == 2
    for delta, x, y, out in seen:
        changes, shares = shares_by_hand(delta, x, y)
        expected = y + torch.einsum("...n,...nd->...d", shares, changes @ delta.value.T)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
        assert shares.std() > 1e-4


def test_it_starts_from_the_parts_and_leaves_them_alone():
    """The shares sum to one and V is the identity, so the fusion of twins is their twin."""
    model = FAMILIES["bert"].model()
    one = veneer.attach(model, PFEIFFER, name="one")
    perturb(one)
    veneer.attach(model, PFEIFFER, name="two").load_state_dict(one.state_dict())
    twin = logits(model, text())
    parts = {name: adapter.state_dict() for name, adapter in veneer.adapters(model).items()}
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in parts.items()}
    fusion = veneer.fuse(model, ["one", "two"])
    torch.testing.assert_close(logits(model, text()), twin, rtol=1e-12, atol=1e-12)
    assert {key.rpartition(".")[2] for key, _ in fusion.named_parameters()} == {"query", "query_bias", "key", "value"}
    perturb(fusion)  # copies: the parts on the model stay
    assert all(torch.equal(before[name][key], tensor) for name, state in parts.items() for key, tensor in state.items())
    changed = logits(model, text())
    for name in ("one", "two"):
        veneer.detach(model, name)
    assert torch.equal(logits(model, text()), changed)


def test_fusion_learns_to_prefer_the_useful_one():
    """One part is trained to name the next id, the other is noise; the fusion must find out which is which."""
    torch.manual_seed(0)
    model = FAMILIES["llama"].model()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # otherwise every answer is the same
    ids, labels = IDS, (IDS * 7 + 3) % 64
    loss = lambda: F.cross_entropy(logits(model, text(ids)).flatten(0, 1), labels.flatten())  # noqa: E731

    def train(adapter, steps, rate):
        optimizer = torch.optim.Adam(adapter.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            term = adapter.regularization()
            (loss() + (0 if term is None else term)).backward()
            optimizer.step()
        return loss().item()

    method = veneer.BottleneckAdapter(width=16, placement="after_residual")
    good = train(veneer.attach(model, method, name="useful"), 150, 0.02)
    bad = veneer.attach(model, method, name="noise")
    perturb(bad, 0.3)
    with veneer.use(model, "noise"):
        noise = loss().item()
    fusion = veneer.fuse(model, ["useful", "noise"])
    before = loss().item()
    after = train(fusion, 100, 0.01)
    assert good < 0.5 < 2 < noise
    assert after < 0.5 * before
    seen = []
    for claim in fusion.claims:
        claim.delta.register_forward_hook(lambda delta, args, out: seen.append(shares_by_hand(delta, *args)[1]))
    logits(model, text(ids))
    useful = list(dict(fusion.claims[0].delta.parts)).index("useful")
    assert torch.stack(seen)[..., useful].mean() > 0.8


def test_the_regularization_is_the_distance_of_v_from_the_identity():
    model = with_adapters(FAMILIES["llama"].model(), PFEIFFER, PFEIFFER)
    fusion = veneer.fuse(model, ["one", "two"], method=veneer.AdapterFusion(regularization=0.5))
    assert fusion.regularization() == 0
    perturb(fusion)
    values = [tensor for key, tensor in fusion.state_dict().items() if key.endswith("value")]
    expected = sum(0.5 * (v - torch.eye(32)).pow(2).sum() for v in values)
    torch.testing.assert_close(fusion.regularization(), expected)
    veneer.detach(model, fusion)
    silent = veneer.fuse(model, ["one", "two"], method=veneer.AdapterFusion(regularization=0.0))
    assert silent.regularization() is None


def test_the_count_at_bert_bases_mlps():
    from transformers import BertConfig, BertForMaskedLM

    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig())
    for name in ("one", "two"):
        veneer.attach(model, veneer.BottleneckAdapter.pfeiffer(), name=name)
    fusion = veneer.fuse(model, ["one", "two"])
    assert sum(p.numel() for p in fusion.parameters()) == 21_242_880
    assert all(p.is_meta for p in fusion.parameters())


def test_a_folder_holds_the_parts_with_their_options(tmp_path):
    other = veneer.BottleneckAdapter(width=3, placement="after_residual", activation="gelu")
    model = with_adapters(FAMILIES["bert"].model(), PFEIFFER, other)
    fusion = veneer.fuse(model, ["one", "two"], also_train=["cls.predictions.transform"])
    perturb(fusion)
    expected = logits(model, text())
    veneer.save(fusion, tmp_path)
    (claim, _) = json.loads((tmp_path / "veneer.json").read_text())["claims"]
    assert claim["options"]["parts"]["two"]["method"] == "BottleneckAdapter"
    assert claim["options"]["parts"]["two"]["options"]["activation"] == "gelu"
    fresh = FAMILIES["bert"].model()
    loaded = veneer.load(fresh, tmp_path)
    assert loaded.claims[0].method == fusion.claims[0].method
    assert torch.equal(logits(fresh, text()), expected)


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ({"method": "Sorcery", "options": {}}, FileError, "uses the method 'Sorcery'"),
        ({"method": "BottleneckAdapter", "options": {"width": "x"}}, CorruptFile, r"BottleneckAdapter\(width='x'"),
        ({"method": "BottleneckAdapter"}, CorruptFile, "parts"),
        ("BottleneckAdapter", CorruptFile, "parts"),
    ],
)
def test_a_damaged_part_of_a_recipe_is_named(tmp_path, part, error, words):
    model = with_adapters(FAMILIES["llama"].model(), PFEIFFER, PFEIFFER)
    veneer.save(veneer.fuse(model, ["one", "two"]), tmp_path)
    recipe = json.loads((tmp_path / "veneer.json").read_text())
    recipe["claims"][0]["options"]["parts"]["one"] = part
    (tmp_path / "veneer.json").write_text(json.dumps(recipe))
    with pytest.raises(error, match=words):
        veneer.load(FAMILIES["llama"].model(), tmp_path)


def test_what_cannot_be_attended_over_is_refused():
    model = with_adapters(FAMILIES["llama"].model(), PFEIFFER, veneer.BottleneckAdapter(width=4), veneer.LoRA(rank=2))
    perturb(veneer.attach(model, PFEIFFER, "attention | mlp", name="both"))
    for name in ("first", "second"):
        veneer.attach(model, veneer.LoRA(rank=2), name=name)
    before = list(veneer.adapters(model))
    with pytest.raises(MethodError, match=r"different placements \(after_residual, serial\)"):
        veneer.fuse(model, ["one", "two"])
    with pytest.raises(AdapterError, match="'three' is not at those of 'one'"):
        veneer.fuse(model, ["one", "three"])
    with pytest.raises(AdapterError, match="'both' is not at those of 'one'"):
        veneer.fuse(model, ["one", "both"])
    with pytest.raises(MethodError, match="two or more bottleneck adapters"):
        veneer.fuse(model, ["first", "second"])
    with pytest.raises(MethodError, match="two or more bottleneck adapters"):
        veneer.attach(model, veneer.AdapterFusion(), name="empty")
    with pytest.raises(AdapterError, match="two or more different adapters"):
        veneer.fuse(model, ["one", "one"])
    with pytest.raises(AdapterError, match="how='stack' has no use for method"):
        veneer.fuse(model, ["one", "two"], how="stack", method=veneer.AdapterFusion())
    assert list(veneer.adapters(model)) == before


def test_the_average_is_the_mean_of_the_weights(tmp_path):
    model = with_adapters(FAMILIES["bert"].model(), PFEIFFER, PFEIFFER, PFEIFFER)
    states = [adapter.state_dict() for adapter in veneer.adapters(model).values()]
    mean = veneer.fuse(model, ["one", "two", "three"], how="average", name="mean")
    for key, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, sum(state[key] for state in states) / 3)
    assert all(p.requires_grad for p in mean.parameters())
    veneer.save(mean, tmp_path)
    fresh = FAMILIES["bert"].model()
    veneer.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, text()), logits(model, text()))


@pytest.mark.parametrize(
    ("method", "where"), [(veneer.BottleneckAdapter(width=5), None), (PFEIFFER, "attention"), (PFEIFFER, "*.1.mlp")]
)
def test_different_adapters_have_no_average(method, where):
    model = with_adapters(FAMILIES["llama"].model(), PFEIFFER)
    veneer.attach(model, method, where, name="other")
    with pytest.raises(AdapterError, match="'other' and 'one' differ"):
        veneer.fuse(model, ["one", "other"], how="average")


def test_a_stack_acts_as_its_parts_do_one_after_the_other(tmp_path):
    """Also where one method comes back after another, which a file must keep apart."""
    serial = veneer.BottleneckAdapter(width=4)
    model = with_adapters(FAMILIES["llama"].model(), serial, veneer.LoRA(rank=2), serial)
    veneer.activate(model, "one", "two", "three")
    expected = logits(model, text())
    stack = veneer.fuse(model, ["one", "two", "three"], how="stack", name="stack")
    torch.testing.assert_close(logits(model, text()), expected, rtol=1e-12, atol=1e-12)
    veneer.save(stack, tmp_path)
    fresh = FAMILIES["llama"].model()
    veneer.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, text()), logits(model, text()))
    reverse = veneer.fuse(model, ["three", "two", "one"], how="stack", name="reverse")
    assert (logits(model, text()) - expected).abs().max() > 1e-6
    assert len(reverse.claims) == len(stack.claims)


def test_a_stack_of_loras_is_one_file_of_pefts(tmp_path):
    model = with_adapters(FAMILIES["llama"].model(), veneer.LoRA(rank=2, alpha=4), veneer.LoRA(rank=3, alpha=6))
    veneer.activate(model, "one", "two")
    expected = logits(model, text())
    veneer.save(veneer.fuse(model, ["one", "two"], how="stack"), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    fresh = FAMILIES["llama"].model()
    veneer.load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh, text()), expected, rtol=1e-10, atol=1e-10)


def test_two_heads_do_not_stack():
    model = FAMILIES["vit"].model()
    for name in ("one", "two"):
        veneer.attach(model, PFEIFFER, name=name, also_train=["classifier"])
    with pytest.raises(Overlap, match=r"train classifier\.weight whole"):
        veneer.fuse(model, ["one", "two"], how="stack")


def saved_by_reference(tmp_path):
    """(model, fusion, its folder): two parts with folders of their own, and a third that is written with the fusion."""
    model = with_adapters(FAMILIES["bert"].model(), PFEIFFER, PFEIFFER, PFEIFFER)
    for name in ("one", "two"):
        perturb(veneer.adapters(model)[name])
        veneer.save(veneer.adapters(model)[name], tmp_path / name)
    fusion = veneer.fuse(model, ["one", "two", "three"])
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.1)
    veneer.save(fusion, tmp_path / "fusion", parts={"one": tmp_path / "one", "two": str(tmp_path / "two")})
    return model, fusion, tmp_path / "fusion"


def test_parts_saved_by_reference_are_not_written_again(tmp_path):
    model, fusion, folder = saved_by_reference(tmp_path)
    expected = logits(model, text())
    recipe = json.loads((folder / "veneer.json").read_text())
    assert {part: reference["folder"] for part, reference in recipe["parts"].items()} == {
        "one": "./../one",
        "two": "./../two",
    }
    written = load_file(folder / "veneer.safetensors")
    assert not any(".parts.one." in key or ".parts.two." in key for key in written)
    assert any(".parts.three." in key for key in written)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("one", "two", "fusion"):
        (tmp_path / name).rename(moved / name)
    fresh = FAMILIES["bert"].model()
    loaded = veneer.load(fresh, moved / "fusion")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in fusion.state_dict().items())
    assert torch.equal(logits(fresh, text()), expected)


def test_a_part_that_changed_is_named(tmp_path):
    model, fusion, folder = saved_by_reference(tmp_path)
    perturb(veneer.adapters(model)["two"])
    veneer.save(veneer.adapters(model)["two"], tmp_path / "two")
    with pytest.raises(CorruptFile, match=r"veneer\.safetensors is not the part 'two' that the fusion was saved with"):
        veneer.load(FAMILIES["bert"].model(), folder)
    with pytest.raises(AdapterError, match=r"The part 'two' in .* is not what the fusion was made of"):
        veneer.save(fusion, tmp_path / "again", parts={"two": tmp_path / "two"})
    assert not (tmp_path / "again").exists()
    for file in (tmp_path / "two").iterdir():
        file.unlink()
    (tmp_path / "two").rmdir()
    with pytest.raises(FileError, match=r"\.\./two, where a part of the fusion in .* lies, is gone"):
        veneer.load(FAMILIES["bert"].model(), folder)


def test_what_has_no_such_part_is_refused(tmp_path):
    _, fusion, _ = saved_by_reference(tmp_path)
    with pytest.raises(AdapterError, match=r"no part 'tow'\. Closest: two\. Its parts are one, three, two"):
        veneer.save(fusion, tmp_path / "again", parts={"tow": tmp_path / "two"})
    plain = veneer.attach(FAMILIES["llama"].model(), veneer.LoRA(rank=2))
    with pytest.raises(AdapterError, match="is no fusion, so it has no parts"):
        veneer.save(plain, tmp_path / "again", parts={"two": tmp_path / "two"})
    serial = veneer.attach(FAMILIES["llama"].model(), PFEIFFER)
    with pytest.raises(AdapterError, match="Only a fusion has parts"):
        veneer.save(serial, tmp_path / "again", parts={"two": tmp_path / "two"})
