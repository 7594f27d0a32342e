"""Devices by name, by memory, and this one."""

import pytest

from veneer.errors import PlanError
from veneer.plan.devices import CUDA_ALLOCATOR, GIB, MIB, device, names


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_device_is_found_by_what_people_and_drivers_call_it(said, name):
    assert device(said).name == name


def test_memory_alone_is_a_device():
    found = device("24GB")
    assert (found.memory, found.bandwidth, found.rate("bfloat16")) == (24 * GIB, None, None)
    assert device("512 MiB").memory == 512 * MIB


def test_every_device_has_what_a_plan_reads():
    for name in names():
        found = device(name)
        assert found.memory > GIB
        assert found.bandwidth > 1e11
        assert found.rate("float32") > 1e12
        assert found.source


def test_without_units_for_a_dtype_the_rate_is_that_of_float32():
    assert device("t4").rate("bfloat16") == device("t4").rate("float32")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("rtx-4900", "No device 'rtx-4900'. Closest: rtx-4090"),
        ("a100", "'a100' is one of several devices: a100-40gb, a100-80gb. Name one."),
        ("0GB", "holds nothing"),
    ],
)
def test_mistakes_are_told(said, words):
    with pytest.raises(PlanError, match=words):
        device(said)


def test_this_machine_has_rates_and_memory():
    found = device("auto")
    assert found.memory > GIB
    assert found.bandwidth > 0
    assert found.rate("float32") > 0


def test_the_allocator_rounds_as_torch_does():
    assert [CUDA_ALLOCATOR.tensor(size) for size in (1, 512, 513)] == [512, 512, 1024]
    sizes = (1, MIB, MIB + 1, 10 * MIB, 11 * MIB)
    assert [CUDA_ALLOCATOR.segment(size) // MIB for size in sizes] == [2, 2, 20, 10, 12]
