"""logps.py as on a GPU: its blocks, its kernels and its transfers, with tensors of the CPU or without data.

python -m pytest tests/test_logps_gpu.py
"""

from collections import Counter

import pytest
import torch
from helpers.logps import random_rows, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from training import logps
from training.logps import (
    TokenLogps,
    Tuning,
    install_head,
    model_inputs,
    on_device,
    response_logps,
)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors of the CPU are treated as a GPU's are."""
    monkeypatch.setattr(logps, "CPU", logps.GPU)


def test_the_device_chooses():
    assert logps.tuning("cpu") == logps.CPU == Tuning(rows=512, tile=4096, keep=True, multiple=1)
    assert logps.tuning("cuda:1") == logps.tuning(torch.device("cuda")) == logps.GPU


@pytest.mark.parametrize("responses", [1, 2])
def test_a_gpu_gives_the_values_and_gradients_of_a_cpu(responses, monkeypatch):
    model, rows, found = install_head(tiny("qwen2")), random_rows(4, responses), []
    for tuning in logps.CPU, logps.GPU:
        monkeypatch.setattr(logps, "CPU", tuning)
        model.zero_grad()
        values = response_logps(model, rows)
        (values * torch.arange(1, 1 + len(values))).sum().backward()
        found.append((values.detach(), [parameter.grad for parameter in model.parameters()]))
    (values, gradients), (other_values, other_gradients) = found
    assert torch.allclose(values, other_values, atol=1e-5)
    assert all((a - b).norm() < 1e-5 * a.norm() for a, b in zip(gradients, other_gradients))


class Operations(TorchDispatchMode):
    """Counts the operations on tensors; `pinned` and `copies` between devices, the latter with their settings."""

    def __init__(self):
        super().__init__()
        self.counts, self.copies = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function), kwargs or {}
        self.counts[name] += 1
        if name == "aten._pin_memory.default":  # which tensors without data do not have
            return args[0]
        result = function(*args, **kwargs)
        if torch.is_tensor(result) and any(torch.is_tensor(arg) and arg.device != result.device for arg in args):
            self.copies.append((name, kwargs.get("non_blocking")))
        return result


# What changes how a tensor is read or asks about it, and launches no kernel.
QUESTIONS = "prim. aten.promote aten.empty aten.detach aten.view aten.slice aten.select aten.unsqueeze aten.permute"


NO_KERNELS = (*QUESTIONS.split(), "aten.expand")


def test_the_output_layer_launches_few_kernels_on_a_gpu(capsys):
    """2,000 response tokens with Qwen2's vocabulary, forward and backward together."""
    kernels = {}
    for name, tuning in (("CPU", logps.CPU), ("GPU", logps.GPU)):
        with FakeTensorMode():
            hidden = torch.empty(2000, 1536, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(151_936, 1536, dtype=torch.bfloat16, requires_grad=True)
            labels = torch.empty(2000, dtype=torch.long)
            with Operations() as operations:
                TokenLogps.apply(hidden, weight, None, labels, torch.bfloat16, tuning).sum().backward()
        assert {"aten.mm.out", "aten.mm.default", "aten.scatter_add_.default"} <= operations.counts.keys()
        kernels[name] = sum(n for name, n in operations.counts.items() if not name.startswith(NO_KERNELS))
    with capsys.disabled():
        print(
            f" [kernels for 2,000 tokens, in a GPU's blocks and in a CPU's: {kernels['GPU']}, {kernels['CPU']:,}] ",
            end="",
        )
    assert kernels["GPU"] <= 150 and kernels["CPU"] > 5000


def test_all_layers_share_one_mask_of_the_compute_dtype(as_on_a_gpu):
    class Attention(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("aten._scaled_dot_product"):
                mask = kwargs["attn_mask"]
                self.seen.append((args[0].dtype, mask.dtype, mask.untyped_storage().data_ptr(), args[0].shape[2] % 8))
            return function(*args, **(kwargs or {}))

    model, rows = install_head(tiny("qwen2")), random_rows(2)
    for context, dtype in (
        (torch.autocast("cpu", enabled=False), torch.float32),
        (torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
    ):
        with Attention() as attention, context:
            attention.seen = []
            response_logps(model, rows)
        first, second = attention.seen  # of two layers
        assert first == second and first[:2] == (dtype, dtype) and first[3] == 0


def test_a_batch_arrives_as_it_left():
    batch = {
        "yes": torch.tensor([True, False, True]),
        "ids": torch.arange(6).view(2, 3),
        "values": torch.tensor([1.5, -torch.inf, 3e-45]),
        "more": torch.tensor([[7]]),
        "rows": ["not a tensor"],
    }
    arrived = on_device(batch, "cpu")
    assert arrived.keys() == batch.keys() and arrived["rows"] is batch["rows"]
    for name in ("yes", "ids", "values", "more"):
        assert arrived[name].dtype == batch[name].dtype and torch.equal(arrived[name], batch[name])


def test_a_batch_goes_to_a_gpu_in_one_transfer_that_nothing_waits_for():
    batch = model_inputs(install_head(tiny("qwen2")), random_rows(3), "cuda:0") | {"weight": torch.ones(3)}
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations:
        arrived = on_device(batch, "cuda:0")
    assert operations.counts["aten._pin_memory.default"] == 1
    assert operations.copies == [("aten._to_copy.default", True)]
    assert {value.device.type for value in arrived.values() if torch.is_tensor(value)} == {"cuda"}
    assert arrived["weight"].dtype == torch.float32 and arrived["labels"].dtype == torch.int64


def test_a_pass_reads_no_value_and_takes_none_from_the_program(as_on_a_gpu):
    """Tensors without data have no values: whatever reads one raises."""
    rows = random_rows(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = install_head(tiny("qwen2"))
        batch = on_device(model_inputs(model, rows, "cpu"), "cpu")
        with Operations() as operations:
            logps.batch_logps(model, batch).sum().backward()
            assert "aten.lift_fresh.default" not in operations.counts
            torch.tensor([1.0])
            assert "aten.lift_fresh.default" in operations.counts
    assert operations.counts["aten.mm.out"] == 2 and model.lm_head.weight.grad is not None
