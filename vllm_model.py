"""The vLLM engine, how records go through it, and the policy that samples responses.

`Sampler`, and the judges of judges/, are built inside worker processes (`workers.pool.map_files`), each of which owns
its GPUs. Imports that cost seconds (vLLM, the tokenizer) happen there, not in the stage that hands out the records.
"""

import gc
import itertools
import os
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from data_utils import check_architecture, check_weights, model_fingerprint, resolve_model, resolve_tokenizer
from utils import StageError, check_at_least, derive_seed, first_line
from workers.journal import Skipped
from workers.pool import PoolConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(kw_only=True)
class EngineConfig(PoolConfig):
    """How engines run.

    Args:
        dtype: auto (bfloat16 on GPU, float32 on CPU) or a name
        gpu_memory_utilization: share of GPU memory for weights and KV cache
    """

    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.gpu_memory_utilization <= 1:
            raise StageError(
                f"--gpu_memory_utilization should be greater than 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.dtype not in DTYPES:
            raise StageError(f"--dtype should be one of {', '.join(DTYPES)}, got {self.dtype}")

    def fingerprint(self) -> dict:
        """{setting: value} of all that results depend on, so without the machine's."""
        machine = {field.name for field in fields(PoolConfig)} | {"gpu_memory_utilization"}
        return {name: value for name, value in asdict(self).items() if name not in machine}


def usable_model(name: str) -> str:
    """The directory of a model, as `data_utils.resolve_model` finds it.

    Raises StageError unless its architecture is known and all of its weights are there.
    """
    directory = resolve_model(name)
    check_architecture(directory)
    check_weights(directory)
    return directory


@dataclass(kw_only=True)
class SamplerConfig(EngineConfig):
    """The policy that answers, and the engines' settings.

    Args:
        model: checkpoint directory or Hub id of the policy
        tokenizer: directory or Hub id; default: the model's
        max_prompt_tokens: longer prompts are skipped and listed
        max_new_tokens: responses end here at the latest
        seed: the same seed gives the same samples, whatever the number of workers
    """

    model: str
    tokenizer: str = ""
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 2048
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, max_prompt_tokens=self.max_prompt_tokens, max_new_tokens=self.max_new_tokens)

    # Resolved once, in the stage; the workers get the values with the rest.
    @cached_property
    def model_path(self) -> str:
        """The model's directory."""
        return usable_model(self.model)

    @cached_property
    def tokenizer_path(self) -> str:
        """The tokenizer's directory; empty for the model's."""
        return self.tokenizer and resolve_tokenizer(self.model_path, self.tokenizer)

    def fingerprint(self) -> dict:
        """{setting: value} of all that samples depend on; of the model the contents instead of its name."""
        return super().fingerprint() | {"model": model_fingerprint(self.model_path)}


def check_top_p(value: float) -> None:
    """Raise StageError for what is no nucleus mass."""
    if not 0 < value <= 1:
        raise StageError(f"--top_p should be greater than 0 and at most 1, got {value}")


class Engine:
    """One vLLM engine in this process.

    Args:
        model: the model's directory.
        tokenizer: the tokenizer's directory; empty for the model's.
        max_model_len: prompt and new tokens together, at most.
        config: EngineConfig. Its dtype `auto` is bfloat16 on GPU and float32 on CPU; vLLM's own `auto` would make
            float16 of a float32 checkpoint on some devices.
        rewards: the model is a sequence classifier; requests bring PoolingParams instead of SamplingParams.

    Raises StageError if the model has fewer than `max_model_len` positions, or vLLM does not know its architecture.
    """

    def __init__(
        self, model: str, tokenizer: str, max_model_len: int, config: EngineConfig, rewards: bool = False
    ) -> None:
        whole_config = load_config(model)
        model_config = whole_config.get_text_config()
        self.model, self.vocab_size, self.counter = model, model_config.vocab_size, itertools.count()
        positions = getattr(model_config, "max_position_embeddings", None)
        if positions and max_model_len > positions:
            raise StageError(
                f"{model} has {positions} positions, but prompt and new tokens may take {max_model_len}; "
                "lower --max_prompt_tokens (of a policy also --max_new_tokens)"
            )
        on_gpu = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if config.tensor_parallel_size == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in a quarter of the time
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, about each other
        from vllm import LLM

        gc.freeze()  # vLLM collects garbage five times while it starts: seconds, if it looks through its own modules
        try:
            self.llm = LLM(
                model=model,
                tokenizer=tokenizer or model,
                max_model_len=max_model_len,
                dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
                gpu_memory_utilization=config.gpu_memory_utilization,
                tensor_parallel_size=config.tensor_parallel_size,
                enforce_eager=not on_gpu,
                **({} if on_gpu else settings_for_cpu(model_config, max_model_len)),
                **({"runner": "pooling", "convert": "classify"} if rewards else {}),
                enable_prefix_caching=True,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,  # every request brings its own
            )
        except ValueError as error:
            if "odel architecture" not in str(error):  # memory that is not free yet, for instance
                raise
            found = ", ".join(whole_config.architectures or ["none"])
            raise StageError(f"vLLM does not know the architecture that {model}/config.json names: {found}") from None

    def enqueue(self, requests: list[tuple[list[int], Any]]) -> list[str]:
        """Add requests, (token ids, vLLM's parameters) each; returns their ids.

        Raises StageError for a token outside the vocabulary.
        """
        from vllm.sampling_params import RequestOutputKind

        largest = max((max(prompt) for prompt, _ in requests), default=0)
        if largest >= self.vocab_size:
            raise StageError(
                f"token {largest} of a prompt is outside the vocabulary of {self.model} ({self.vocab_size} "
                "tokens); name the tokenizer that it was trained with (--tokenizer, --judge_tokenizer)"
            )
        names = [str(next(self.counter)) for _ in requests]
        for name, (prompt, params) in zip(names, requests):
            params.output_kind = RequestOutputKind.FINAL_ONLY
            self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return names

    def step(self) -> list:
        """Decode one token of everything that runs; returns vLLM's outputs of the requests that are finished."""
        if not self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("vLLM has lost a request")
        return [output for output in self.llm.llm_engine.step() if output.finished]


def load_config(directory: str):
    """The transformers config of a model directory. Raises StageError for one that transformers cannot read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # each architecture checks its fields in its own way
        raise StageError(f"transformers cannot read {directory}/config.json: {first_line(error)}") from None


def settings_for_cpu(config, max_model_len: int) -> dict:
    """Settings of vLLM's engine on a CPU. A prompt is read in one piece: the backend for CPUs cannot rewind a seeded
    generator after part of one. Shared prefixes are found in whole blocks, of which vLLM's own choice is 128."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_model_len),
        "kv_cache_memory_bytes": cpu_kv_cache_bytes(config, max_model_len),
        "block_size": 32,
    }


def cpu_kv_cache_bytes(config, max_model_len: int) -> int:
    """Room for 128 sequences of full length, but no more than 1 GiB unless two of them need it: vLLM fills all of it
    with zeros at its start, which takes up to 3 s a GiB. VLLM_CPU_KVCACHE_SPACE (GiB) overrides it.

    Args:
        config: the text part of a transformers config.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sequence = max_model_len * config.num_hidden_layers * 2 * heads * head_dim * 4  # keys and values in float32
    return min(128 * sequence, max(2 * sequence, 2**30))


class EngineWork:
    """Records through one engine, as the work of a worker process (workers/worker.py).

    A task is (job number, record). Subclasses have an `engine` and two methods:
        requests(job, record)    the requests of a record, [(token ids, vLLM's parameters)], or why it is skipped, text
        read(record, outputs)    its result, from vLLM's outputs of its requests, in their order
    """

    engine: Engine

    def requests(self, job: int, record: dict) -> list[tuple] | str:
        raise NotImplementedError

    def read(self, record: dict, outputs: list) -> dict:
        raise NotImplementedError

    def __init__(self):
        self.begun = {}  # by key: (record, ids of its requests, {request id: output}), or a Skipped
        self.owners = {}  # by request id: key
        self.ready = []  # keys that wait for nothing

    def begin(self, key, task: tuple[int, dict]) -> None:
        job, record = task
        requests = self.requests(job, record)
        if isinstance(requests, str):
            self.begun[key] = Skipped(record["prompt_id"], requests)
        else:
            ids = self.engine.enqueue(requests)
            self.begun[key] = record, ids, {}
            self.owners |= dict.fromkeys(ids, key)
        if isinstance(requests, str) or not requests:
            self.ready.append(key)

    def step(self) -> list:
        if not self.ready:
            for output in self.engine.step():
                key = self.owners.pop(output.request_id, None)
                if key is None:  # of a record whose other requests could not be added
                    continue
                _, ids, outputs = self.begun[key]
                outputs[output.request_id] = output
                if len(outputs) == len(ids):
                    self.ready.append(key)
        ready, self.ready = self.ready, []
        return ready

    def result(self, key) -> dict | Skipped:
        begun = self.begun.pop(key)
        if isinstance(begun, Skipped):
            return begun
        record, ids, outputs = begun
        return self.read(record, [outputs[name] for name in ids])


class Sampler(EngineWork):
    """Samples responses: a task is (job number, prompt record), its result a samples record.

    The seed of sample k of a prompt depends on the run's seed, the prompt_id and k alone, so that neither the
    number of workers nor the chunking changes what is drawn (as far as the engine's arithmetic allows).

    Args:
        config: SamplerConfig
        num_samples, temperature, top_p: one value a job.
    """

    def __init__(self, config: SamplerConfig, num_samples: list[int], temperature: list[float], top_p: list[float]):
        from data_utils import end_token_id, load_tokenizer

        super().__init__()
        self.config, self.num_samples, self.temperature, self.top_p = config, num_samples, temperature, top_p
        self.tokenizer = load_tokenizer(config.model_path, config.tokenizer_path)
        self.end_ids = sorted({end_token_id(self.tokenizer), self.tokenizer.eos_token_id})
        length = config.max_prompt_tokens + config.max_new_tokens
        self.engine = Engine(config.model_path, config.tokenizer_path, length, config)

    def requests(self, job: int, record: dict) -> list[tuple] | str:
        from data_utils import encode_prompt

        ids = encode_prompt(self.tokenizer, record["prompt"])
        if len(ids) > self.config.max_prompt_tokens:
            return f"the prompt has {len(ids)} tokens, --max_prompt_tokens is {self.config.max_prompt_tokens}"
        return [(ids, self.params(job, record))]

    def read(self, record: dict, outputs: list) -> dict:
        (output,) = outputs
        completions = sorted(output.outputs, key=lambda completion: completion.index)
        return {
            "prompt_id": record["prompt_id"],
            "prompt": record["prompt"],
            "prompt_token_ids": list(output.prompt_token_ids),
            "samples": [self.sample(completion) for completion in completions],
        }

    def params(self, job, record):
        from vllm import SamplingParams

        return SamplingParams(
            n=self.num_samples[job],
            temperature=self.temperature[job],
            top_p=self.top_p[job],
            max_tokens=self.config.max_new_tokens,
            seed=derive_seed(self.config.seed, record["prompt_id"]),
            stop_token_ids=self.end_ids,
            detokenize=False,
        )

    def sample(self, completion):
        ids = list(completion.token_ids)
        content = ids[:-1] if completion.finish_reason == "stop" else ids
        return {
            "text": self.tokenizer.decode(content, skip_special_tokens=True),
            "token_ids": ids,
            "finish_reason": completion.finish_reason,
        }
