"""The vLLM engine and the two things it is used for: sampling responses and reading a judge's preferences.

`Sampler` and `Judge` are built inside worker processes (`workers.map_files`), each of which owns its GPUs. Imports that
cost seconds (vLLM, the tokenizer) happen there, not in the stage that hands out the records.
"""

import itertools
import math
import os
import re
import warnings
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from utils import (StageError, check_at_least, check_weights, derive_seed, model_fingerprint, resolve_model,
                   resolve_tokenizer, split_list, text_id)
from workers import PoolConfig

JUDGE_TYPES = ("offsetbias-lm",)
MIN_LABEL_MASS = 0.05  # mean probability of both labels together; below it a model is no judge
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
        for name in {"model", "judge"} & set(settings):
            directory = resolve_model(settings[name])
            check_weights(directory)
            settings[name] = model_fingerprint(directory)
        if "template" in settings:
            settings["template"] = text_id(read_template(settings["template"]))
        return settings


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


@dataclass(kw_only=True)
class JudgeConfig(EngineConfig):
    """The judge that compares, and the engines' settings.

    Args:
        judge: checkpoint directory or Hub id of the judge
        judge_type: offsetbias-lm, a generative judge that answers with one of two labels
        judge_tokenizer: directory or Hub id; default: the judge's
        template: file with {input}, {output_1}, {output_2}
        labels: the two answers, comma-separated; the first says that the first output is better
        max_prompt_tokens: records with a longer judging prompt are skipped and listed
    """

    judge: str
    judge_type: str = "offsetbias-lm"
    judge_tokenizer: str = ""
    template: str = "prompts/offsetbias.txt"
    labels: str = "Output (a),Output (b)"
    max_prompt_tokens: int = 8191

    def __post_init__(self):
        super().__post_init__()
        if self.judge_type not in JUDGE_TYPES:
            raise StageError(f"--judge_type should be one of {', '.join(JUDGE_TYPES)}, got {self.judge_type}")
        if len(set(split_list(self.labels))) != 2 or len(split_list(self.labels)) != 2:
            raise StageError(f"--labels should be two different answers, comma-separated, got {self.labels!r}")
        read_template(self.template)


class Engine:
    """One vLLM engine in this process.

    Args:
        model: checkpoint directory or Hub id.
        tokenizer: directory or Hub id; empty for the model's.
        max_model_len: prompt and new tokens together, at most.
        config: EngineConfig. Its dtype `auto` is bfloat16 on GPU and float32 on CPU; vLLM's own `auto` would make
            float16 of a float32 checkpoint on some devices.

    Raises StageError if the model has fewer than `max_model_len` positions.
    """

    def __init__(self, model, tokenizer, max_model_len, config):
        from transformers import AutoConfig
        directory = resolve_model(model)
        model_config = AutoConfig.from_pretrained(directory).get_text_config()
        self.model, self.vocab_size, self.counter = model, model_config.vocab_size, itertools.count()
        positions = getattr(model_config, "max_position_embeddings", None)
        if positions and max_model_len > positions:
            raise StageError(f"{model} has {positions} positions, but prompt and new tokens may take {max_model_len}; "
                             "lower --max_prompt_tokens (of a policy also --max_new_tokens)")
        on_gpu = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if config.gpus_per_worker == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in a quarter of the time
        if not on_gpu:
            # A prompt is read in one piece: vLLM's CPU backend cannot rewind a seeded generator after part of one.
            for_cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len),
                       "kv_cache_memory_bytes": cpu_kv_cache_bytes(model_config, max_model_len),
                       "block_size": 32}  # shared prefixes are found in whole blocks; vLLM's own choice is 128
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
            enable_prefix_caching=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,  # every request brings its own
        )

    def enqueue(self, prompts, params):
        """Add requests for lists of token ids, with a SamplingParams each; returns their ids, str.

        Raises StageError for a token outside the vocabulary.
        """
        from vllm.sampling_params import RequestOutputKind
        if not prompts:
            return []
        largest = max(map(max, prompts))
        if largest >= self.vocab_size:
            raise StageError(f"token {largest} of a prompt is outside the vocabulary of {self.model} ({self.vocab_size} "
                             "tokens); name the tokenizer that it was trained with (--tokenizer, --judge_tokenizer)")
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
    """Chunks of tasks through one engine, which goes on with the next chunk while the last requests of one are finished:
    the work of a worker process (workers.map_chunks). Called with tasks, it returns their results.

    Subclasses have an `engine` and `requests(tasks)`, which returns the prompts as token ids, SamplingParams for each, and a
    function that turns their outputs, in order, into the results of all tasks.
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
    """Room for 128 sequences of full length, but no more than 1 GiB unless two of them need it: vLLM fills all of it with
    zeros at its start, which takes up to 3 s a GiB. VLLM_CPU_KVCACHE_SPACE (GiB) overrides it.

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
        return ([ids for ids, fit in zip(prompts, fits) if fit],
                [self.params(*task) for task, fit in zip(tasks, fits) if fit],
                partial(self.results, tasks, prompts, fits))

    def results(self, tasks, prompts, fits, outputs):
        outputs, results = iter(outputs), []
        for (_, record), ids, fit in zip(tasks, prompts, fits):
            if fit:
                completions = sorted(next(outputs).outputs, key=lambda completion: completion.index)
                results.append({"prompt_id": record["prompt_id"], "prompt": record["prompt"], "prompt_token_ids": ids,
                                "samples": [self.sample(completion) for completion in completions]})
            else:
                results.append({"prompt_id": record["prompt_id"], "skipped":
                                f"the prompt has {len(ids)} tokens, --max_prompt_tokens is {self.config.max_prompt_tokens}"})
        return results

    def params(self, job, record):
        from vllm import SamplingParams
        return SamplingParams(n=self.num_samples[job], temperature=self.temperature[job],
                              top_p=self.config.top_p, max_tokens=self.config.max_new_tokens,
                              seed=derive_seed(self.config.seed, record["prompt_id"]),
                              stop_token_ids=self.end_ids, detokenize=False)

    def sample(self, completion):
        ids = list(completion.token_ids)
        content = ids[:-1] if completion.finish_reason == "stop" else ids
        return {"text": self.tokenizer.decode(content, skip_special_tokens=True), "token_ids": ids,
                "finish_reason": completion.finish_reason}


class Judge(EngineWork):
    """A generative judge that answers with one of two labels: a task is (job number, record with `prompt` and `samples`), its
    result the record with `win_probs`, `order_gap` and `label_mass`.

    P(first beats second) is read at the one position where the two labels' token ids part: everything before it
    (the chat prompt and the labels' common beginning, `Output (`) is given, and the log-probabilities of exactly
    the two deciding tokens are asked for, so neither can fall out of a top-k list. Each ordered pair of *different*
    texts is judged once; identical texts get 1/2.

    Args:
        config: JudgeConfig
    """

    def __init__(self, config):
        from data_utils import encode_text, load_tokenizer
        super().__init__()
        self.template, self.max_prompt_tokens = read_template(config.template), config.max_prompt_tokens
        self.tokenizer = load_tokenizer(config.judge, config.judge_tokenizer)
        labels = (encode_text(self.tokenizer, label) for label in split_list(config.labels))
        self.label_prefix, self.label_ids = split_labels(*labels)
        self.engine = Engine(config.judge, config.judge_tokenizer, self.max_prompt_tokens + 1, config)

    def requests(self, tasks):
        from vllm import SamplingParams
        judgements, results = [], []  # token ids of every judgement of this chunk; per record, its comparisons
        for _, record in tasks:
            texts = list(dict.fromkeys(sample["text"] for sample in record["samples"]))
            orders = [(first, second) for first in texts for second in texts if first != second]
            prompts = [self.encode(record["prompt"], first, second) for first, second in orders]
            longest = max(map(len, prompts), default=0)
            if longest > self.max_prompt_tokens:
                results.append({"prompt_id": record["prompt_id"], "skipped":
                                f"a judging prompt has {longest} tokens, the limit is {self.max_prompt_tokens}"})
            else:
                results.append((record, orders, slice(len(judgements), len(judgements) + len(prompts))))
                judgements.extend(prompts)
        params = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(self.label_ids), detokenize=False)
        return judgements, [params] * len(judgements), partial(self.results, results)

    def results(self, results, outputs):
        answers = self.read_labels(outputs)
        return [result if isinstance(result, dict) else self.score(*result, answers) for result in results]

    def encode(self, prompt, first, second):
        from data_utils import encode_prompt
        return encode_prompt(self.tokenizer, fill_template(self.template, prompt, first, second)) + self.label_prefix

    def read_labels(self, outputs):
        """[(P(first label), probability of both labels together)]."""
        first_id, second_id = self.label_ids
        answers = []
        for output in outputs:
            logprobs = output.outputs[0].logprobs[0]
            first, second = logprobs[first_id].logprob, logprobs[second_id].logprob
            answers.append((1 / (1 + math.exp(min(second - first, 700.0))), math.exp(first) + math.exp(second)))
        mass = sum(mass for _, mass in answers) / max(1, len(answers))
        if len(answers) >= 20 and mass < MIN_LABEL_MASS:
            raise StageError(f"{self.engine.model} puts {mass:.2g} of its probability on the two labels, so it does not "
                             "answer with one of them; is it a judge, and are --template and --labels its own?")
        return answers

    @staticmethod
    def score(record, orders, where, answers):
        return record | win_matrix([sample["text"] for sample in record["samples"]], dict(zip(orders, answers[where])))


def win_matrix(texts, judgements):
    """Win probabilities of K responses from judgements in both orders.

    Args:
        texts: the K responses.
        judgements: {(first, second): (P(first is better), probability on both labels)} of every ordered pair of
            different texts.

    Returns:
        `win_probs`: K x K, `[i][j]` = P(i beats j) = mean over the two orders, None on the diagonal;
        `order_gap`: mean absolute disagreement of the two orders over pairs of different texts, None if there are none;
        `label_mass`: mean probability that the judge gives to its two labels together, None likewise.
    """
    def beats(first, second):
        if first == second:
            return 0.5
        return (judgements[first, second][0] + 1 - judgements[second, first][0]) / 2

    gaps = [abs(p - (1 - judgements[second, first][0])) for (first, second), (p, _) in judgements.items()]
    masses = [mass for _, mass in judgements.values()]
    return {
        "win_probs": [[None if i == j else beats(a, b) for j, b in enumerate(texts)] for i, a in enumerate(texts)],
        "order_gap": sum(gaps) / len(gaps) if gaps else None,
        "label_mass": sum(masses) / len(masses) if masses else None,
    }


def judge_figures(records):
    """Means of `order_gap` and `label_mass` over judged records, None where all their responses are identical."""
    judged = [(record["order_gap"], record["label_mass"]) for record in records if record["label_mass"] is not None]
    gap, mass = (sum(values) / len(values) for values in zip(*judged)) if judged else (None, None)
    return {"order_gap": gap, "label_mass": mass}


# Names of the three parts: ours, and those of published judge templates.
_PLACEHOLDERS = {"input": 0, "instruction": 0, "output_1": 1, "output_a": 1, "output_2": 2, "output_b": 2}


def read_template(path):
    """The text of a judge template. Raises StageError unless it names the instruction and both outputs once."""
    if not Path(path).is_file():
        raise StageError(f"judge template {path} {'is not a file' if Path(path).exists() else 'does not exist'}")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise StageError(f"judge template {path} is not UTF-8 text") from None
    found = [_PLACEHOLDERS[name] for name in re.findall(r"\{(\w+)\}", text) if name in _PLACEHOLDERS]
    if sorted(found) != [0, 1, 2]:
        raise StageError(f"judge template {path} should contain {{input}}, {{output_1}} and {{output_2}} once each")
    return text


def fill_template(template, prompt, first, second):
    """The template with its three parts filled in, in one pass: braces inside the parts stay what they are."""
    parts = (prompt, first, second)
    return re.sub(r"\{(\w+)\}",
                  lambda match: parts[_PLACEHOLDERS[match[1]]] if match[1] in _PLACEHOLDERS else match[0], template)


def split_labels(first_ids, second_ids):
    """(common beginning, (deciding token of the first label, of the second)) of two labels' token ids.

    Raises StageError when one label is the beginning of the other: no single position decides then.
    """
    for position, pair in enumerate(zip(first_ids, second_ids)):
        if pair[0] != pair[1]:
            return first_ids[:position], pair
    raise StageError(f"the judge's labels {first_ids} and {second_ids} (token ids) do not differ at any position")
