"""Models under accelerate: what a stored log-probability and a trained one have in common.

Both take the same way: `start_accelerator`, `load_model`, examples in `micro_batches` that `local_batches` deals to the
processes, and `training.logps.response_logps` on each of them. Models come as directories: a stage resolves the names
that it was given once, with `data_utils.resolve_model`.
"""

import contextlib
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from torch import nn

from data_utils import check_weights
from training.logps import install_head
from training.memory import gpu_memory, shard_within_nodes
from utils import StageError, first_line, log
from workers.local import die_with_parent

# For which processes wait for each other. NCCL's own ten minutes end a run in which the first process alone loads or
# writes a large model. A process that dies is noticed by the launcher, and does not need them.
PATIENCE = timedelta(hours=2)


def start_accelerator(seed: int, model_dir: str = "", **settings) -> Accelerator:
    """The Accelerator of this process, as `accelerate launch` or its absence says; seeds all generators.

    With `model_dir`, the model that will be trained, FSDP on several nodes shards it within each node where that fits
    (`shard_within_nodes`). On a GPU attention does not go through cuDNN, which makes a plan for each shape; nearly
    every pair has its own.
    """
    if "LOCAL_RANK" in os.environ:
        die_with_parent()  # the launcher
    if model_dir and os.environ.get("ACCELERATE_USE_FSDP") == "true" and (memory := gpu_memory()):
        settings["parallelism_config"] = shard_within_nodes(model_dir, memory)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **settings)
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = sharded_precision()
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not accelerator.is_main_process:
        log.setLevel("WARNING")
    # accelerate names each file of a resume point.
    for name, level in (("accelerate", "WARNING"), ("accelerate.utils.other", "ERROR")):
        logging.getLogger(name).setLevel(level)
    set_seed(seed)
    return accelerator


def sharded_precision():
    """The MixedPrecisionPolicy of FSDP 2: parameters are computed with in bfloat16, gradients reduced in float32.

    accelerate's own policy also rounds gradients and outputs to bfloat16, which costs a log-probability two nats. Here
    outputs stay as they are: `TokenLogps` returns float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def load_model(directory: str, from_config: bool = False, gradient_checkpointing: bool = False) -> nn.Module:
    """A causal language model with float32 weights; bfloat16 ones would not move at learning rates like 5e-7.

    Raises StageError when weights are missing, damaged or of other shapes than config.json says. With `from_config`
    the weights are random ones instead.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the single files; stages show their own
    if not from_config:
        check_weights(directory)
    if os.environ.get("RANK", "0") == "0":
        log.info("loading %s", directory)
    try:
        if from_config:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            if loading["mismatched_keys"]:
                raise ValueError("its weights do not have the shapes of its config.json")
            if loading["missing_keys"]:  # they would be random
                raise ValueError(f"its files lack weights, first {min(loading['missing_keys'])}")
    except Exception as error:  # each file format and each model has its own kinds
        raise StageError(f"model {directory} does not load: {first_line(error)}") from None
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return install_head(model)


def vocabulary_size(directory: str) -> int:
    """Number of tokens of a model, from its configuration alone. Raises StageError where that cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory).get_text_config().vocab_size
    except Exception as error:  # each model has its own kinds
        raise StageError(f"model {directory} does not load: {first_line(error)}") from None


# ---------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def one_pass(model: nn.Module, accelerator: Accelerator, sharding: str, last: bool) -> Iterator[None]:
    """The forward and backward pass of one micro-batch. Gradients are reduced among the processes in the `last` one of
    an update; under FSDP 2 with `sharding` "full" in every one, because they need not exist as a whole then."""
    every = accelerator.is_fsdp2 and sharding == "full"
    if accelerator.is_fsdp2:
        model.set_reshard_after_backward(every or last)
    with contextlib.nullcontext() if every or last else accelerator.no_sync(model):
        yield


def copy_for_logps(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A whole copy of the model on each process, with the parameters as FSDP 2 has them in a forward pass: in bfloat16
    where that is the precision, while buffers, above all rotary frequencies, stay in float32. So its values are those
    of the sharded model bit for bit. The first process has read the weights; the others may not have."""
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy  # None in float32
    for tensor in [*model.parameters(), *model.buffers()]:
        dtype = policy.param_dtype if policy and isinstance(tensor, nn.Parameter) else tensor.dtype
        tensor.data = tensor.data.to(accelerator.device, dtype)
        torch.distributed.broadcast(tensor.data, src=0)
    return model


# ---------------------------------------------------------------------------------------------- dealing


def micro_batches(indices: Iterable[int], lengths: Sequence[int], tokens: int, processes: int = 1) -> list[list[int]]:
    """Examples in groups for one forward pass each, the costliest first.

    The rows of a group are padded to its longest, so a group consists of neighbours in length and costs its number of
    rows times its longest, in positions: as many as fit into `tokens`, but at least one row. For several processes
    there are equally many groups for each, unless there are too few examples, and the costliest one is as cheap as the
    number of groups allows.
    """
    order = sorted(indices, key=lambda index: -lengths[index])
    groups = neighbours(order, lengths, tokens)
    if processes == 1:
        return groups
    cost = lambda group: len(group) * lengths[group[0]]
    count = min(len(order), math.ceil(len(groups) / processes) * processes)
    few_enough = lambda limit: len(neighbours(order, lengths, limit)) <= count
    groups = neighbours(order, lengths, bisect_left(range(tokens), True, key=few_enough))
    while len(groups) < count:  # examples of the same length, which no limit divides so
        largest = max((group for group in groups if len(group) > 1), key=cost)
        groups.append(largest[len(largest) // 2 :])
        del largest[len(largest) // 2 :]
    return sorted(groups, key=cost, reverse=True)


def neighbours(order: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Examples, the longest first, in as few groups of neighbours as cost at most `limit` positions or have one row."""
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def local_batches(
    batches: list[list[int]], lengths: Sequence[int], accelerator: Accelerator
) -> list[tuple[list[int], bool]]:
    """Deal micro-batches to the processes, the same number to each: one after another to the process that has the
    fewest positions so far.

    Returns those of this process, [(list of indices, whether they count)]: a process with one too few repeats the last
    batch without counting it, because all processes must take part in every collective operation.
    """
    rounds = math.ceil(len(batches) / accelerator.num_processes)
    dealt: list[list[tuple[list[int], bool]]] = [[] for _ in range(accelerator.num_processes)]
    positions = [0] * accelerator.num_processes
    for batch in batches:
        fewest = min((p for p in range(len(dealt)) if len(dealt[p]) < rounds), key=lambda p: positions[p])
        dealt[fewest].append((batch, True))
        positions[fewest] += len(batch) * max(lengths[i] for i in batch)
    mine = dealt[accelerator.process_index]
    return mine + [(batch, False) for batch in batches[-1:]] * (rounds - len(mine))
