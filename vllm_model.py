"""The vLLM engine, how records go through it, and the policy that samples responses.

`Sampler`, and the judges of judges/, are built inside worker processes (`workers.pool.map_files`), each of which owns
its GPUs. Imports that cost seconds (vLLM, the tokenizer) happen there, not in the stage that hands out the records.
"""

import gc
import itertools
import os
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_utils import (
    check_architecture,
    check_weights,
    encode_prompt,
    end_token_id,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
    resolve_tokenizer,
)
from utils import StageError, check_at_least, derive_seed, first_line
from workers.engine_settings import EngineConfig, constant_path, engine_settings, prepare_process
from workers.journal import Skipped
from workers.pool import no_cpu_engine


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

    # Found once, in the stage, by `fingerprint`; the workers get the values with the rest.
    @cached_property
    def model_path(self) -> str:
        """The model's directory."""
        return usable_model(self.model)

    @cached_property
    def tokenizer_path(self) -> str:
        """The tokenizer's directory; empty for the model's."""
        return resolve_tokenizer(self.tokenizer)

    def fingerprint(self) -> dict:
        """{setting: value} of all that samples depend on; of the model the contents instead of its name."""
        directory, _ = self.model_path, self.tokenizer_path  # asked for here so that the workers get both
        return super().fingerprint() | {"model": model_fingerprint(directory)}


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
        config: EngineConfig.
        role: what it is for: policy, judge, or reward. A reward model is a sequence classifier; its requests bring
            PoolingParams instead of SamplingParams.

    Raises StageError if the model has fewer than `max_model_len` positions, vLLM does not know its architecture or
    refuses a setting, or the engine should run on a CPU and cannot.
    """

    def __init__(
        self, model: str, tokenizer: str, max_model_len: int, config: EngineConfig, role: str = "policy"
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
        if not on_gpu and (reason := no_cpu_engine()):
            raise StageError(reason)
        prepare_process(config, on_gpu)
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, about each other
        from vllm import LLM

        settings = engine_settings(config, model, model_config, max_model_len, role, on_gpu)
        tokenizer = tokenizer and os.path.abspath(tokenizer)
        gc.freeze()  # vLLM collects garbage five times while it starts: seconds, if it looks through its own modules
        try:
            with constant_path(model) as path:
                self.llm = LLM(model=path, tokenizer=tokenizer or path, **settings)
        except ValueError as error:
            if "odel architecture" in str(error):
                found = ", ".join(whole_config.architectures or ["none"])
                reason = f"vLLM does not know the architecture that {model}/config.json names: {found}"
            elif "unquantized lm_head" in str(error):
                reason = (
                    f"the output layer of {model} is quantised, so it cannot compute in float32; with --engine_args "
                    """'{"hf_overrides": {"head_dtype": "model"}}' it computes as it is"""
                )
            elif type(error).__name__ == "ValidationError":  # pydantic's
                reason = f"vLLM refuses its settings for {model}, --engine_args among them: {error}"
            else:  # memory that is not free yet, for instance
                raise
            raise StageError(reason) from None

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


class EngineWork:
    """Records through one engine, as the work of a worker process (workers/worker.py).

    A task is (job number, record). Subclasses have an `engine` and two methods:
        requests(job, record)    the requests of a record, [(token ids, vLLM's parameters)], or why it is skipped, text
        read(record, outputs)    its result, from vLLM's outputs of its requests, in their order

    `requests` runs in a thread of its own, with a GPU while the engine steps. Records that were begun together reach
    the engine together, and all in their order. When they do depends on the thread, and with that a result's last
    digits. On a CPU the thread would take the engine's time, so the step waits for it.
    """

    engine: Engine

    def requests(self, job: int, record: dict) -> list[tuple] | str:
        raise NotImplementedError

    def read(self, record: dict, outputs: list) -> dict:
        raise NotImplementedError

    def __init__(self):
        self.encoder = ThreadPoolExecutor(1, "encoder")
        self.beside = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))  # whether it works while the engine steps
        self.new = []  # (key, record, future of its requests) begun since the last step
        self.encoding = deque()  # lists of these, begun together, first come first
        # By key: (record, ids of its requests, {request id: output}), a Skipped, or the exception that it has caused.
        self.begun = {}
        self.owners = {}  # by request id: key
        self.ready = []  # keys that wait for nothing

    def begin(self, key, task: tuple[int, dict]) -> None:
        job, record = task
        self.new.append((key, record, self.encoder.submit(self.requests, job, record)))

    def step(self) -> list:
        if self.new:
            self.encoding.append(self.new)
            self.new = []
        while self.encoding:
            _, _, last = self.encoding[0][-1]
            if self.beside and not last.done() and (self.owners or self.ready):
                break  # there is something else to do
            for encoded in self.encoding.popleft():
                self._hand_on(*encoded)
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
        if isinstance(begun, Exception):
            raise begun
        if isinstance(begun, Skipped):
            return begun
        record, ids, outputs = begun
        return self.read(record, [outputs[name] for name in ids])

    def _hand_on(self, key, record, future):
        """Add the requests of a record to the engine."""
        ids = []
        try:
            requests = future.result()
            if isinstance(requests, list):
                ids = self.engine.enqueue(requests)
                self.begun[key] = record, ids, {}
            else:
                self.begun[key] = Skipped(record["prompt_id"], requests)
        except Exception as error:
            self.begun[key] = error
        self.owners |= dict.fromkeys(ids, key)
        if not ids:
            self.ready.append(key)


class Sampler(EngineWork):
    """Samples responses: a task is (job number, prompt record), its result a samples record.

    The seed of sample k of a prompt depends on the run's seed, the prompt_id and k alone, so that neither the
    number of workers nor the chunking changes what is drawn (as far as the engine's arithmetic allows).

    Args:
        config: SamplerConfig
        num_samples, temperature, top_p: one value a job.
    """

    def __init__(self, config: SamplerConfig, num_samples: list[int], temperature: list[float], top_p: list[float]):
        super().__init__()
        self.config, self.num_samples, self.temperature, self.top_p = config, num_samples, temperature, top_p
        self.tokenizer = load_tokenizer(config.model_path, config.tokenizer_path)
        self.tokenizing = threading.Lock()  # the tokenizer refuses to be used by two threads at once
        self.end_ids = sorted({end_token_id(self.tokenizer), self.tokenizer.eos_token_id})
        length = config.max_prompt_tokens + config.max_new_tokens
        self.engine = Engine(config.model_path, config.tokenizer_path, length, config)

    def requests(self, job: int, record: dict) -> list[tuple] | str:
        from vllm import SamplingParams

        with self.tokenizing:
            ids = encode_prompt(self.tokenizer, record["prompt"])
        if len(ids) > self.config.max_prompt_tokens:
            return f"the prompt has {len(ids)} tokens, --max_prompt_tokens is {self.config.max_prompt_tokens}"
        params = SamplingParams(
            n=self.num_samples[job],
            temperature=self.temperature[job],
            top_p=self.top_p[job],
            max_tokens=self.config.max_new_tokens,
            seed=derive_seed(self.config.seed, record["prompt_id"]),
            stop_token_ids=self.end_ids,
            detokenize=False,
        )
        return [(ids, params)]

    def read(self, record: dict, outputs: list) -> dict:
        (output,) = outputs
        completions = sorted(output.outputs, key=lambda completion: completion.index)
        return {
            "prompt_id": record["prompt_id"],
            "prompt": record["prompt"],
            "prompt_token_ids": list(output.prompt_token_ids),
            "samples": [self.sample(completion) for completion in completions],
        }

    def sample(self, completion):
        ids = list(completion.token_ids)
        content = ids[:-1] if completion.finish_reason == "stop" else ids
        with self.tokenizing:
            text = self.tokenizer.decode(content, skip_special_tokens=True)
        return {"text": text, "token_ids": ids, "finish_reason": completion.finish_reason}
