"""What a policy takes of a GPU's memory, by plain formulas, and what `auto` chooses from them.

A policy of N parameters, E of them in a table of vocabulary V x hidden size h, is trained by P processes. Bytes of one
process, in bfloat16 with weights in float32:

    training    16 N / P         weights, gradients and Adam's two moments, in float32, each process its share
                8 E              the output layer's weights (2), and its gradient as it is made (2) and added up (4)
                8 x 1,024 V      a block of the output layer: 1,024 positions x vocabulary
                12 N / P + 6 N   instead of the first, where parameters stay gathered: they (2) and their gradients (4)
      position  16 h + 10 a + 8 f    in each layer, with attention a = heads x head size, and MLP f: what the gradient
                                 needs. Each of two norms keeps its input in float32, that divided, and its output
                                 (8 h); attention its queries, keys and values, repeated for all heads, and its output
                                 twice (10 a); the MLP gate, up, an activation and a product (8 f). With gradient
                                 checkpointing 2 h in each layer, and all of that in one
    log-        2 N              a whole copy; where it is sharded instead, 4 N / P and 4 E
    probabilities   6 x 1,024 V  a block of the output layer
      position  16 h + 10 a + 8 f    in one layer

`benchmarks/memory.py` finds the peaks of training by simulation, and tests/test_memory.py compares. CUDA, NCCL and what
the allocator leaves unused take the share of the card that is not USED.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import ParallelismConfig
from torch import nn

from training.logps import ResponseHead
from utils import StageError, log

TRAINING_BYTES = 16  # a parameter: weight, gradient and Adam's two moments in float32
USED = 0.85  # share of a card's memory that the formulas may fill
ENOUGH, MOST = 4096, 16_384  # positions of a forward pass: they keep a GPU busy; more of them gain nothing
SHARDINGS = "optimizer", "full"  # the faster one first
GIB, MIB = 2**30, 2**20


class Needs(NamedTuple):
    """Bytes of one process: `fixed`, and for each `position` of a forward pass."""

    fixed: float
    position: float

    def positions(self, card: int) -> int:
        """How many fit into a card of so many bytes; negative where not even `fixed` does."""
        return int((card * USED - self.fixed) // self.position)


def check_choices(micro_batch_tokens: int | str, sharding: str) -> None:
    """Raise StageError unless the two flags are `auto` or a value that exists."""
    tokens = str(micro_batch_tokens)
    if tokens != "auto" and not tokens.isdecimal():
        raise StageError(f"--micro_batch_tokens should be auto or a whole number, at least 0, got {tokens}")
    if sharding not in ("auto", *SHARDINGS):
        raise StageError(f"--sharding should be auto, {' or '.join(SHARDINGS)}, got {sharding}")


def needs(model: nn.Module, processes: int, whole: bool, training: bool = True, width: int = 2) -> Needs:
    """The formulas above.

    Args:
        model: of models.load_model, not yet prepared by accelerate.
        processes: that share its parameters.
        whole: parameters stay gathered; for log-probabilities, each process has a copy of the model.
        training: or log-probabilities alone.
        width: bytes of a number in the products.
    """
    config = model.config.get_text_config()
    hidden, heads, vocabulary = config.hidden_size, config.num_attention_heads, config.vocab_size
    attention = heads * (getattr(config, "head_dim", None) or hidden // heads)
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    count, table = sum(parameter.numel() for parameter in model.parameters()), vocabulary * hidden
    layer = position = 16 * hidden + 10 * attention + 8 * intermediate
    if training:
        state = 12 * count / processes + 6 * count if whole else 16 * count / processes
        fixed = state + 8 * table + 8 * 1024 * vocabulary
        position = config.num_hidden_layers * layer
        if getattr(model, "is_gradient_checkpointing", False):
            position = config.num_hidden_layers * 2 * hidden + layer
    else:
        fixed = (width * count if whole else 4 * count / processes + 4 * table) + 6 * 1024 * vocabulary
    if not isinstance(getattr(model, "lm_head", None), ResponseHead):
        # Each response has a row of its own, and all of its logits in bfloat16 and float32, and their gradients.
        position = 2 * (position + 12 * vocabulary)
    return Needs(fixed, position * width / 2)


def choose(
    needed: Mapping[str, Needs], card: int | None, tokens: int | str, sharding: str, longest: int
) -> tuple[int, str]:
    """(positions of a forward pass, sharding): as given, or where that is `auto`, as it fits into the card.

    Args:
        needed: {sharding: Needs}
        card: bytes of a GPU; None on a CPU, where `auto` is one example a pass and full sharding.
        tokens, sharding: the two flags.
        longest: positions of the longest example, which goes alone where it has to.
    """
    if card is None:
        return (0 if tokens == "auto" else int(tokens)), ("full" if sharding == "auto" else sharding)
    if sharding == "auto":
        least = max(longest, ENOUGH if tokens == "auto" else int(tokens))
        sharding = next((name for name in SHARDINGS if needed[name].positions(card) >= least), "full")
    if tokens == "auto":
        tokens = max(0, min(MOST, needed[sharding].positions(card) // 256 * 256))
    return int(tokens), sharding


def plan(
    model: nn.Module, accelerator: Accelerator, tokens: int | str, sharding: str, longest: int, training: bool = True
) -> tuple[int, str]:
    """`choose` for a model, not yet prepared, on the GPUs of this run. The log says what was chosen, and from what."""
    sharded, card = accelerator.is_fsdp2, card_bytes(accelerator)
    processes = accelerator.num_processes if sharded else 1
    if sharded and accelerator.parallelism_config and accelerator.parallelism_config.dp_shard_enabled:
        processes = accelerator.parallelism_config.dp_shard_size  # others hold replicas of the shards
    width = 2 if accelerator.mixed_precision in ("bf16", "fp16") else 4
    # Without FSDP each process trains all parameters; log-probabilities are computed from float32 weights.
    whole = {name: name == "optimizer" if sharded else training for name in SHARDINGS}
    needed = {name: needs(model, processes, whole[name], training, width) for name in SHARDINGS}
    chosen, sharding_chosen = choose(needed, card, tokens, sharding, longest)
    if card is not None:
        need = needed[sharding_chosen]
        log.info(
            "micro_batch_tokens %s, sharding %s: a GPU of %.1f GiB, of which %d %% may be used; it needs %.1f GiB and "
            "%.3f MiB a position, the longest example has %d",
            f"{chosen}{' (auto)' * (tokens == 'auto')}",
            f"{sharding_chosen}{' (auto)' * (sharding == 'auto')}" if sharded else "none",
            card / GIB,
            100 * USED,
            need.fixed / GIB,
            need.position / MIB,
            longest,
        )
        if need.positions(card) < longest:
            log.warning(
                "WARNING: the longest example needs some %.1f GiB; if memory runs out, take more GPUs%s",
                (need.fixed + longest * need.position) / GIB,
                " or --gradient_checkpointing" * (training and not model.is_gradient_checkpointing),
            )
    return chosen, sharding_chosen


def card_bytes(accelerator: Accelerator) -> int | None:
    """Memory of the smallest GPU of all processes; None on a CPU."""
    if accelerator.device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory
    return int(accelerator.gather(torch.tensor([memory], device=accelerator.device)).min())


# ---------------------------------------------------------------------------------------------- several nodes


def gpu_memory() -> int:
    """Bytes of this process's GPU, or 0 where there is none: accelerate then uses no FSDP."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.cuda.get_device_properties(local).total_memory if torch.cuda.is_available() else 0


def shard_within_nodes(model_dir: str, memory: int) -> ParallelismConfig | None:
    """How FSDP divides a model between the processes of several nodes: each node holds all of it, sharded between its
    GPUs, which gather parameters from each other alone; between the nodes only gradients are reduced.

    None, so sharding between all of them, on one node, with one GPU a node, and where the node's share of weights,
    gradients and optimiser would take more than half of a GPU's `memory` in bytes.
    """
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = processes // here
    if nodes == 1 or here == 1:
        return None
    share = TRAINING_BYTES * count_parameters(model_dir) / here
    fits = share <= memory / 2
    if os.environ.get("RANK") == "0":
        log.info(
            "%s: weights, gradients and optimiser take %.1f GiB a GPU when each node has all of them, which is %s than "
            "half of its memory",
            f"sharded within each of {nodes} nodes, replicated between them" if fits else f"sharded over {nodes} nodes",
            share / GIB,
            "less" if fits else "more",
        )
    return ParallelismConfig(dp_replicate_size=nodes, dp_shard_size=here) if fits else None


def count_parameters(directory: str) -> int:
    """Number of parameters of a model, from its configuration alone; tied ones count once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return sum(parameter.numel() for parameter in model.parameters())
