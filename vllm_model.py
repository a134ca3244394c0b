"""The vLLM engine, how chunks of records go through it, and the policy that samples responses.

`Sampler`, and the judges of judges/, are built inside worker processes (`workers.map_files`), each of which owns its
GPUs. Imports that cost seconds (vLLM, the tokenizer) happen there, not in the stage that hands out the records.
"""

import itertools
import os
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial

from data_utils import check_weights, model_fingerprint, resolve_model, resolve_tokenizer
from utils import StageError, check_at_least, derive_seed
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
        for name, value in asdict(self).items():
            if name in ("max_prompt_tokens", "max_new_tokens"):
                check_at_least(1, **{name: value})
            if name in ("top_p", "gpu_memory_utilization") and not 0 < value <= 1:
                raise StageError(f"--{name} should be greater than 0 and at most 1, got {value}")
        if self.dtype not in DTYPES:
            raise StageError(f"--dtype should be one of {', '.join(DTYPES)}, got {self.dtype}")

    def made_with(self):
        """{setting: value} of all that results depend on: not the machine's, and the files instead of their names."""
        machine = {field.name for field in fields(PoolConfig)} | {"gpu_memory_utilization"}
        settings = {name: value for name, value in asdict(self).items() if name not in machine}
        if "model" in settings:
            settings["model"] = whole_model_fingerprint(settings["model"])
        return settings


def whole_model_fingerprint(name):
    """`data_utils.model_fingerprint` of a directory or Hub id; raises StageError unless all of its weights are there."""
    directory = resolve_model(name)
    check_weights(directory)
    return model_fingerprint(directory)


@dataclass(kw_only=True)
class SamplerConfig(EngineConfig):
    """The policy that answers, and the engines' settings.

    Args:
        model: checkpoint directory or Hub id of the policy
        tokenizer: directory or Hub id; default: the model's
        top_p: nucleus mass
        max_prompt_tokens: longer prompts are skipped and listed
        max_new_tokens: responses end here at the latest
        seed: the same seed gives the same samples, whatever the number of workers
    """

    model: str
    tokenizer: str = ""
    top_p: float = 0.95
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 2048
    seed: int = 0


class Engine:
    """One vLLM engine in this process.

    Args:
        model: checkpoint directory or Hub id.
        tokenizer: directory or Hub id; empty for the model's.
        max_model_len: prompt and new tokens together, at most.
        config: EngineConfig. Its dtype `auto` is bfloat16 on GPU and float32 on CPU; vLLM's own `auto` would make
            float16 of a float32 checkpoint on some devices.

        rewards: the model is a sequence classifier; requests bring PoolingParams instead of SamplingParams.

    Raises StageError if the model has fewer than `max_model_len` positions.
    """

    def __init__(self, model, tokenizer, max_model_len, config, rewards=False):
        from transformers import AutoConfig

        directory = resolve_model(model)
        model_config = AutoConfig.from_pretrained(directory).get_text_config()
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
        if config.gpus_per_worker == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in a quarter of the time
        if not on_gpu:
            # A prompt is read in one piece: vLLM's CPU backend cannot rewind a seeded generator after part of one.
            for_cpu = {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, max_model_len),
                "kv_cache_memory_bytes": cpu_kv_cache_bytes(model_config, max_model_len),
                "block_size": 32,
            }  # shared prefixes are found in whole blocks; vLLM's own choice is 128
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, about each other
        from vllm import LLM

        self.llm = LLM(
            model=directory,
            tokenizer=resolve_tokenizer(model, tokenizer),
            max_model_len=max_model_len,
            dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.gpus_per_worker,
            enforce_eager=not on_gpu,
            **({} if on_gpu else for_cpu),
            **({"runner": "pooling", "convert": "classify"} if rewards else {}),
            enable_prefix_caching=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,  # every request brings its own
        )

    def enqueue(self, prompts, params):
        """Add requests for lists of token ids, with the parameters of each; returns their ids, str.

        Raises StageError for a token outside the vocabulary.
        """
        from vllm.sampling_params import RequestOutputKind

        if not prompts:
            return []
        largest = max(map(max, prompts))
        if largest >= self.vocab_size:
            raise StageError(
                f"token {largest} of a prompt is outside the vocabulary of {self.model} ({self.vocab_size} "
                "tokens); name the tokenizer that it was trained with (--tokenizer, --judge_tokenizer)"
            )
        names = [str(next(self.counter)) for _ in prompts]
        for name, ids, own in zip(names, prompts, params, strict=True):
            own.output_kind = RequestOutputKind.FINAL_ONLY
            self.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, own)
        return names

    def step(self):
        """Decode one token of everything that runs; returns vLLM's outputs of the requests that are finished."""
        if not self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("vLLM has lost a request")
        return [output for output in self.llm.llm_engine.step() if output.finished]


class EngineWork:
    """Chunks of tasks through one engine, which goes on with the next chunk while the last requests of one are
    finished: the work of a worker process (workers.map_chunks). Called with tasks, it returns their results.

    Subclasses have an `engine` and `requests(tasks)`, which returns the prompts as token ids, SamplingParams for each,
    and a function that turns their outputs, in order, into the results of all tasks.
    """

    def __init__(self):
        self.chunks = {}  # number: (request ids, function of their outputs)
        self.outputs = {}  # by request id

    def begin(self, number, tasks):
        prompts, params, results = self.requests(tasks)
        self.chunks[number] = self.engine.enqueue(prompts, params), results

    def step(self):
        finished = [number for number, (ids, _) in self.chunks.items() if all(i in self.outputs for i in ids)]
        if not finished:
            self.outputs |= {output.request_id: output for output in self.engine.step()}
            return []
        done = []
        for number in finished:
            ids, results = self.chunks.pop(number)
            done.append((number, results([self.outputs.pop(i) for i in ids])))
        return done

    def __call__(self, tasks):
        self.begin(None, tasks)
        while not (done := self.step()):
            pass
        return done[0][1]


def cpu_kv_cache_bytes(config, max_model_len):
    """Room for 128 sequences of full length, but no more than 1 GiB unless two of them need it: vLLM fills all of it
    with zeros at its start, which takes up to 3 s a GiB. VLLM_CPU_KVCACHE_SPACE (GiB) overrides it.

    Args:
        config: the text part of a transformers config.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sequence = max_model_len * config.num_hidden_layers * 2 * heads * head_dim * 4  # keys and values in float32
    return min(128 * sequence, max(2 * sequence, 2**30))


class Sampler(EngineWork):
    """Samples responses: a task is (job number, prompt record), its result a samples record.

    The seed of sample k of a prompt depends on the run's seed, the prompt_id and k alone, so that neither the
    number of workers nor the chunking changes what is drawn (as far as the engine's arithmetic allows).

    Args:
        config: SamplerConfig
        num_samples, temperature: one value a job.
    """

    def __init__(self, config, num_samples, temperature):
        from data_utils import end_token_id, load_tokenizer

        super().__init__()
        self.config, self.num_samples, self.temperature = config, num_samples, temperature
        self.tokenizer = load_tokenizer(config.model, config.tokenizer)
        self.end_ids = sorted({end_token_id(self.tokenizer), self.tokenizer.eos_token_id})
        self.engine = Engine(config.model, config.tokenizer, config.max_prompt_tokens + config.max_new_tokens, config)

    def requests(self, tasks):
        from data_utils import encode_prompt

        prompts = [encode_prompt(self.tokenizer, record["prompt"]) for _, record in tasks]
        fits = [len(ids) <= self.config.max_prompt_tokens for ids in prompts]
        return (
            [ids for ids, fit in zip(prompts, fits) if fit],
            [self.params(*task) for task, fit in zip(tasks, fits) if fit],
            partial(self.results, tasks, prompts, fits),
        )

    def results(self, tasks, prompts, fits, outputs):
        outputs, results = iter(outputs), []
        for (_, record), ids, fit in zip(tasks, prompts, fits):
            if fit:
                completions = sorted(next(outputs).outputs, key=lambda completion: completion.index)
                results.append(
                    {
                        "prompt_id": record["prompt_id"],
                        "prompt": record["prompt"],
                        "prompt_token_ids": ids,
                        "samples": [self.sample(completion) for completion in completions],
                    }
                )
            else:
                results.append(
                    {
                        "prompt_id": record["prompt_id"],
                        "skipped": f"the prompt has {len(ids)} tokens, "
                        f"--max_prompt_tokens is {self.config.max_prompt_tokens}",
                    }
                )
        return results

    def params(self, job, record):
        from vllm import SamplingParams

        return SamplingParams(
            n=self.num_samples[job],
            temperature=self.temperature[job],
            top_p=self.config.top_p,
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
