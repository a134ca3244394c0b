"""The peak memory of a training step on GPUs, found without one: tensors without data, processes that do not exist.

    python benchmarks/memory.py                                                   the table of docs/machines.md
    python benchmarks/memory.py --policies 1.5B --ranks 4 --lengths 2047          one line of it
    python benchmarks/memory.py --policies path/to/model --ranks 4 --pairs 4      of another model: its config.json

What runs is the project's own: `load_model`, accelerate's preparation with the project's FSDP policy, and the forward
path of training with what it takes on a GPU. Each tensor's size is counted and none is filled. Left out are what the
CUDA context and NCCL take, and what the allocator leaves unused: plan with 85 % of a card.

Goals (Qwen2-1.5B on 4 GPUs, a pair of 2 x 2,047 tokens): at most 21 GiB a GPU, 9 with gradient checkpointing.
"""

import tempfile
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed
from common import SHAPES, make_config

from training import logps
from training.models import load_model, sharded_precision
from utils import StageError, check_at_least, run, split_list

GIB = 2**30


def peak(
    policy: str,
    ranks: int,
    prompt: int,
    response: int,
    pairs: int = 1,
    gradient_checkpointing: bool = False,
    sharding: str = "full",
) -> int:
    """Bytes that a process of training has allocated at most, on a GPU under FSDP 2 in bfloat16.

    Args:
        policy: a name of common.SHAPES, or a directory with a config.json.
        ranks: processes.
        prompt, response: tokens of the prompt, and of each of the two responses.
        pairs: of a forward pass.
        gradient_checkpointing: recompute activations.
        sharding: full, or optimizer: parameters and gradients are whole until the last pass of an update.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    rows = [([5] * prompt, [[6] * response, [7] * response])] * pairs
    with processes(ranks) as mesh, as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        model = prepare(policy, mesh, gradient_checkpointing)
        # The trainer's is fused; of that one the tensors without data show more memory than it has.
        optimizer = torch.optim.AdamW(model.parameters(), fused=False, foreach=False)
        tracker = FSDPMemTracker(model, optimizer)

        if sharding == "optimizer":
            model.set_reshard_after_forward(False)

        def backward(last):
            model.set_requires_gradient_sync(last or sharding == "full")
            model.set_reshard_after_backward(last or sharding == "full")
            logps.response_logps(model, rows, "cpu").sum().backward()

        with tracker:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # from here on the optimiser has its state, as after an update
            if sharding == "optimizer":
                optimizer.zero_grad()
                backward(False)
            backward(True)  # beside the gradients of an earlier pass
        return max(sum_of["Total"] for sum_of in tracker.get_tracker_snapshot("peak").values())


def prepare(policy, mesh, gradient_checkpointing):
    """The model as training has it under FSDP 2."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    with tempfile.TemporaryDirectory() as folder:
        if policy in SHAPES:
            make_config(policy).save_pretrained(folder)
        model = load_model(folder if policy in SHAPES else policy, True, gradient_checkpointing)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=sharded_precision(),
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=("ranks",)),
        mixed_precision="bf16",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


@contextmanager
def processes(count):
    """The mesh of a process group in which this process is the only one that exists."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,), mesh_dim_names=("ranks",))
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def as_on_a_gpu():
    """Tensors of the CPU are treated as a GPU's are: this torch may have none for GPUs."""
    cpu, logps.CPU = logps.CPU, logps.GPU
    try:
        yield
    finally:
        logps.CPU = cpu


def main(
    policies: str = "1.5B,7B,8B",
    ranks: str = "1,4,8",
    lengths: str = "400,2047",
    prompt: int = 1,
    pairs: int = 1,
    sharding: str = "full",
):
    """Print a table of peaks in GiB a GPU, without and with gradient checkpointing.

    Args:
        policies: 1.5B, 7B and 8B, or directories with a config.json
        ranks: numbers of GPUs
        lengths: tokens of each of the two responses of a pair
        prompt: tokens of the prompt
        pairs: of a forward pass
        sharding: full, or optimizer: parameters and gradients are whole until the last pass of an update
    """
    check_at_least(1, prompt=prompt, pairs=pairs)
    if sharding not in ("full", "optimizer"):
        raise StageError(f"--sharding should be full or optimizer, got {sharding}")
    numbers = [int(number) for number in split_list(ranks)]
    heads = "".join(f" {number} GPU{'s' if number > 1 else ''} |" for number in numbers)
    print(f"| policy | tokens of a pair | checkpointing |{heads}")
    print("|" + "---|" * (3 + len(numbers)))
    for policy in split_list(policies):
        for length in map(int, split_list(lengths)):
            for checkpointing in (False, True):
                found = [peak(policy, number, prompt, length, pairs, checkpointing, sharding) for number in numbers]
                print(
                    f"| {policy} | {prompt} + 2 x {length:,} | {'yes' if checkpointing else 'no'} |"
                    + "".join(f" {value / GIB:.1f} |" for value in found),
                    flush=True,
                )


if __name__ == "__main__":
    run(main)
