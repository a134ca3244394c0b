"""What vLLM's engine is started with: the settings of the project, those of --engine_args, and the process around it.

Importing this does not import vLLM. What is for GPUs was read in the sources of vLLM 0.32; as far as a machine without
one can build it, tests/test_engine_settings.py does.
"""

import ast
import contextlib
import difflib
import functools
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

from data_utils import weight_files
from utils import StageError
from workers.pool import PoolConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
# Arguments of the engine that have a flag of their own.
FLAGS = {
    "model": "--model (of a judge --judge)",
    "tokenizer": "--tokenizer (of a judge --judge_tokenizer)",
    "max_model_len": "--max_prompt_tokens (of a policy also --max_new_tokens)",
    "dtype": "--dtype",
    "seed": "--seed",
    "gpu_memory_utilization": "--gpu_memory_utilization",
    "tensor_parallel_size": "--tensor_parallel_size",
    "runner": "--judge_type",
    "convert": "--judge_type",
}


@dataclass(kw_only=True)
class EngineConfig(PoolConfig):
    """How engines run.

    Args:
        dtype: auto (bfloat16 on GPU, float32 on CPU) or a name
        gpu_memory_utilization: share of GPU memory for weights and KV cache
        engine_args: further arguments of vLLM's engine, a JSON object: '{"max_num_seqs": 512}'
    """

    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    engine_args: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.gpu_memory_utilization <= 1:
            raise StageError(
                f"--gpu_memory_utilization should be greater than 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.dtype not in DTYPES:
            raise StageError(f"--dtype should be one of {', '.join(DTYPES)}, got {self.dtype}")
        read_engine_args(self.engine_args)

    def fingerprint(self) -> dict:
        """{setting: value} of all that results depend on, so without the machine's."""
        machine = {field.name for field in fields(PoolConfig)} | {"gpu_memory_utilization", "engine_args"}
        found = {name: value for name, value in asdict(self).items() if name not in machine}
        given = read_engine_args(self.engine_args)
        return found | ({"engine_args": given} if given else {})

    def dtype_on(self, on_gpu: bool) -> str:
        """The dtype of the engine's weights; vLLM's own `auto` would make float16 of float32 on some devices."""
        return ("bfloat16" if on_gpu else "float32") if self.dtype == "auto" else self.dtype

    def finds_gpus(self) -> bool:
        """Whether the workers have GPUs; of a Ray cluster, which is not asked here, whether they may have some."""
        if self.engine == "ray":
            return self.gpus != "none"
        return any(environment["CUDA_VISIBLE_DEVICES"] for environment in self.environments())


# ---------------------------------------------------------------------------------------------- --engine_args


def read_engine_args(text: str, flag: str = "--engine_args") -> dict:
    """The arguments of vLLM's engine in a text, the value of a flag: a JSON object, or empty.

    Raises StageError for another text, a name that the installed vLLM does not have, and one that is set by a flag.
    """
    wanted = f"""{flag} should be a JSON object such as '{{"max_num_seqs": 512}}'"""
    try:
        found = json.loads(text or "{}", parse_constant=_refuse_constant)
    except ValueError as error:
        raise StageError(f"{wanted}; it is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise StageError(f"{wanted}, got {text}")
    for name in found:
        if name in FLAGS:
            raise StageError(f"{flag}: {name} is set by {FLAGS[name]}")
        if (known := engine_arguments()) and name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            raise StageError(
                f"{flag}: vLLM's engine has no argument {name}" + (f"; did you mean {near[0]}?" if near else "")
            )
    return found


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


@functools.cache
def engine_arguments() -> tuple[str, ...]:
    """The names of the engine's arguments, the fields of vLLM's EngineArgs; none where these are not found. They are
    read in its source: importing it takes ten seconds."""
    vllm = find_spec("vllm")
    if vllm is None or not vllm.origin:
        return ()
    source = (Path(vllm.origin).parent / "engine/arg_utils.py").read_text(encoding="utf-8")
    classes = {part.name: part.body for part in ast.parse(source).body if isinstance(part, ast.ClassDef)}
    names = [line.target for line in classes.get("EngineArgs", []) if isinstance(line, ast.AnnAssign)]
    return tuple(name.id for name in names if isinstance(name, ast.Name))


# ---------------------------------------------------------------------------------------------- the arguments


def engine_settings(config: EngineConfig, directory: str, model, max_model_len: int, role: str, on_gpu: bool) -> dict:
    """The arguments of vLLM's engine besides the model and its tokenizer.

    Args:
        config: what --engine_args gives comes last; of an argument that is a dictionary, key by key
        directory: of the model
        model: the text part of its transformers config
        max_model_len: prompt and new tokens together, at most
        role: policy, judge, or reward (a sequence classifier)
        on_gpu: whether this process has one
    """
    settings = {
        "max_model_len": max_model_len,
        "dtype": config.dtype_on(on_gpu),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": not on_gpu,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,  # every request brings its own
    }
    if role != "policy":
        # bfloat16 logits from 16 to 32 are multiples of 1/8, and so would be the difference of the two labels'.
        settings["hf_overrides"] = {"head_dtype": "float32"}
    if role == "reward":
        settings |= {"runner": "pooling", "convert": "classify"}
    if not on_gpu:
        settings |= settings_for_cpu(model, max_model_len)
    elif role == "policy":
        settings |= settings_for_sampling(config, directory, model, max_model_len)
    else:
        # A judge reads prompts and decodes one token: graphs of decoding would be captured for nothing.
        settings["compilation_config"] = {"cudagraph_mode": "NONE"}
    for name, value in read_engine_args(config.engine_args).items():
        ours = settings.get(name)
        settings[name] = ours | value if isinstance(ours, dict) and isinstance(value, dict) else value
    return settings


def settings_for_cpu(model, max_model_len: int) -> dict:
    """Settings of vLLM's engine on a CPU. A prompt is read in one piece: the backend for CPUs cannot rewind a seeded
    generator after part of one. Shared prefixes are found in whole blocks, of which vLLM's own choice is 128.

    The cache has room for 128 sequences of full length, but no more than 1 GiB unless two of them need it: vLLM fills
    all of it with zeros at its start, which takes up to 3 s a GiB. VLLM_CPU_KVCACHE_SPACE (GiB) overrides it.
    """
    sequence = max_model_len * kv_bytes_a_token(model, 4)
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_model_len),
        "kv_cache_memory_bytes": min(128 * sequence, max(2 * sequence, 2**30)),
        "block_size": 32,
    }


def kv_bytes_a_token(model, size: int) -> int:
    """Bytes of a token's keys and values in all layers, `size` bytes a number.

    Args:
        model: the text part of a transformers config
    """
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return model.num_hidden_layers * 2 * heads * head_dim * size


def settings_for_sampling(config: EngineConfig, directory: str, model, max_model_len: int) -> dict:
    """`max_num_seqs` of the policy on a GPU, where vLLM's own is 1,024 on cards of 70 GiB and more (but not on an A100)
    and 256 on others."""
    from vllm.platforms import current_platform

    try:
        card = current_platform.get_device_total_memory()
    except Exception:  # as of some MIG instances; vLLM meets the same, and takes 256
        return {}
    memory = int(card * config.gpu_memory_utilization * config.tensor_parallel_size)
    weights = sum(path.stat().st_size for path in weight_files(directory))
    size = 4 if config.dtype_on(True) == "float32" else 2
    # A quarter of the longest: prompts and responses are mostly much shorter than what they may take.
    count = sequences_at_once(memory, weights, kv_bytes_a_token(model, size), max_model_len // 4)
    return {"max_num_seqs": count}


def sequences_at_once(memory: int, weights: int, kv_bytes: int, length: int) -> int:
    """How many sequences to decode together: as many as find room for their keys and values, from 256 to 1,024.

    Fewer would leave a card idle that is waiting for its memory; with too many the last ones are computed twice.

    Args:
        memory: bytes for weights, keys and values
        weights: bytes
        kv_bytes: of the keys and values of a token
        length: of a sequence, in tokens, as expected
    """
    return min(1024, max(256, (memory - weights) // (kv_bytes * max(1, length))))


# ---------------------------------------------------------------------------------------------- the process


def prepare_process(config: EngineConfig, on_gpu: bool) -> None:
    """Set the environment variables that vLLM reads when it is imported; most of them only where the user has not."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in a quarter of the time
    if on_gpu:
        # FlashInfer's sampler takes no requests with seeds of their own, but would be compiled and warmed up.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ["VLLM_CACHE_ROOT"] = cache_folder()


def cache_folder() -> str:
    """The folder of vLLM's cache for this process's GPUs, below VLLM_CACHE_ROOT, or else vLLM's own place.

    The engines of several GPUs, and of nodes that share a home, would otherwise write the same files at the same time,
    which vLLM does not do atomically.
    """
    root = os.environ.get("VLLM_CACHE_ROOT")
    root = root or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vllm")
    own = re.sub(r"[^\w.-]", "-", f"{platform.node()}-gpu-{os.environ['CUDA_VISIBLE_DEVICES']}")
    path = Path(os.path.abspath(os.path.expanduser(root)))
    return str(path if path.name == own else path / own)  # a second engine of the process finds it set


@contextlib.contextmanager
def constant_path(directory: str) -> Iterator[str]:
    """A path of a model's directory that is the same for every model: `model`, relative to the working directory, which
    is changed for as long as the block lasts.

    vLLM finds compiled code by the model's path, among others, and the policy of each iteration lies in another folder.
    The path is a link in a folder of this process's own, so no other process can make it lead to other weights. The
    processes that the block starts have the same working directory.
    """
    target = os.path.abspath(directory)
    with tempfile.TemporaryDirectory(prefix="comal-engine-") as folder, contextlib.chdir(folder):
        os.symlink(target, "model")
        yield "model"
