"""Models under accelerate: what a stored log-probability and a trained one have in common.

Both take the same way: `start_accelerator`, `load_model`, examples in `micro_batches` that `local_batches` deals to the
processes, and `training.logps.response_logps` on each of them. Models come as directories: a stage resolves the names
that it was given once, with `data_utils.resolve_model`.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn

from data_utils import check_weights
from training.logps import install_head
from utils import StageError, first_line, log
from workers.local import die_with_parent


def start_accelerator(seed: int, **settings) -> Accelerator:
    """The Accelerator of this process, as `accelerate launch` or its absence says; seeds all generators.

    On a GPU attention does not go through cuDNN, which makes a plan for each shape; nearly every pair has its own.
    """
    if "LOCAL_RANK" in os.environ:
        die_with_parent()  # the launcher
    accelerator = Accelerator(**settings)
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


def micro_batches(indices: Iterable[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Examples in groups for one forward pass each, the longest first, so that there is little padding and neighbours
    take the same time: as many as fit into `tokens` positions, padding included, but at least one."""
    groups = []
    for index in sorted(indices, key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def local_batches(batches: list[list[int]], accelerator: Accelerator) -> Iterator[tuple[list[int], bool]]:
    """Deal micro-batches to the processes, the same number to each.

    Yields (list of indices, whether they count): a process without one left repeats the first without counting
    it, because all processes must take part in every collective operation.
    """
    for i in range(0, len(batches), accelerator.num_processes):
        mine = i + accelerator.process_index
        yield (batches[mine], True) if mine < len(batches) else (batches[0], False)
