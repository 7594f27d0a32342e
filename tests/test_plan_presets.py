"""Models by name: what is built has the published number of parameters."""

import pytest

from veneer.counting import count_parameters
from veneer.errors import PlanError
from veneer.plan import presets
from veneer.seams import loading


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_has_the_published_parameters(name):
    config = presets.preset(name)
    model = loading.without_weights(config, loading.class_of(config))
    assert config.architectures == [type(model).__name__]
    published = presets.published(name)
    exact = published % 10**6 != 0
    assert count_parameters(model).total == pytest.approx(published, abs=0 if exact else published / 200)


def test_a_family_alone_is_its_usual_size():
    assert presets.preset("gpt2").n_layer == 12
    assert presets.preset("Mistral").hidden_size == 4096


def test_a_family_without_a_usual_size_lists_them():
    with pytest.raises(PlanError, match=r"^No model 'llama'. Of this family there are: llama:7b, llama:13b"):
        presets.preset("llama")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(PlanError, match="Closest: qwen3:32b"):
        presets.preset("qwen-3:32b")
    with pytest.raises(PlanError, match="Of this family there are: mistral:7b"):
        presets.preset("mistral:8b")
