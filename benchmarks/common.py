"""What the benchmarks share: prompts with real lengths, models of a given shape, peak memory, the results file."""

import ctypes
import json
import multiprocessing
import os
import platform
import shlex
import sys
import threading
import time
from datetime import date
from pathlib import Path
from queue import Empty

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")

# Shapes of Qwen2 with its vocabulary of 151,936: hidden, intermediate, layers, heads, key-value heads.
SHAPES = {"44M": (256, 1024, 4, 4, 2), "120M": (512, 2048, 10, 8, 2), "1.5B": (1536, 8960, 28, 12, 2)}


def make_model(shape, seed=0):
    """A Qwen2 of this shape with random float32 weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, intermediate, layers, heads, key_value_heads = SHAPES[shape]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            tie_word_embeddings=True,
            max_position_embeddings=32_768,
        ),
        dtype=torch.float32,
    )


def random_model(source, hidden, layers, folder):
    """The model `source` in this size with random weights, and its tokenizer, written to `folder`, which is
    returned."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from data_utils import resolve_model

    source = resolve_model(source)
    config = AutoConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, 3 * hidden, layers
    config.num_attention_heads = config.num_key_value_heads = hidden // 64
    config.head_dim = 64
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def in_its_own_process(function, *arguments):
    """What the function puts into a queue, its first argument; a dead process ends this one too."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(queue, *arguments))
    process.start()
    while True:
        try:
            found = queue.get(timeout=1)
            break
        except Empty:
            if process.exitcode is not None:
                sys.exit(f"{function.__name__}{arguments} ended with exit code {process.exitcode}")
    process.join()
    return found


def read_prompt_texts(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def make_pairs(prompts, count, seed=0, longest=1024, sequence=0):
    """[(prompt ids, chosen ids, rejected ids)] of random tokens. Prompts take a token for four characters and 20 for
    the chat template; responses are log-normal around 256 tokens (standard deviation 0.6 of the logarithm), at most
    `longest`. With `sequence` both sequences of a pair, prompt and response, have just that many tokens."""
    generator = np.random.default_rng(seed)
    texts = read_prompt_texts(prompts)
    chosen = generator.choice(len(texts), count, replace=False)
    ids = lambda length: generator.integers(0, 151_000, length).tolist()  # noqa: E731
    lengths = np.minimum(np.exp(generator.normal(np.log(256), 0.6, (count, 2))).astype(int) + 1, longest)
    pairs = []
    for i, (first, second) in zip(chosen, lengths):
        prompt = ids(20 + min(len(texts[i]) // 4, longest))
        if sequence:
            first = second = sequence - len(prompt)
        pairs.append((prompt, ids(first), ids(second)))
    return pairs


class PeakMemory:
    """Peak of the memory in use during a block above what was in use before, in MiB: `with PeakMemory() as peak: ...;
    peak.mib`.

    On a GPU it is the allocator's; on a CPU the process's resident memory, looked at every 2 ms."""

    def __init__(self, device):
        self.device = torch.device(device)

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts as free
            self.before = self.peak = resident_bytes()
            self.running = True
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.002)

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
        else:
            self.running = False
            self.thread.join()
            self.mib = (max(self.peak, resident_bytes()) - self.before) / 2**20


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds(function, device):
    """Time of one call; a GPU's work included."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product, the best of five: the rate that floors are computed with."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds(lambda: left @ right, device) for _ in range(5))


def forward_flops(model, tokens, response_tokens):
    """Of the matrix products of one forward pass, attention left out: 2 a weight and token, the output layer on
    `response_tokens` alone."""
    config = model.config
    head = config.hidden_size * config.vocab_size
    weights = sum(parameter.numel() for parameter in model.parameters()) - head
    return 2 * (weights * tokens + head * response_tokens)


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def record(title, lines, packages=("torch", "transformers")):
    """Print the lines and append them to RESULTS.md with date, machine, versions and command."""
    from importlib.metadata import distributions

    installed = {found.metadata["Name"].removesuffix("-cpu"): found.version for found in distributions()}
    command = "python " + shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    versions = ", ".join(f"{name} {installed[name]}" for name in packages)
    text = f"\n## {title}\n\n{date.today()}, {machine()}; {versions}\n\n    {command}\n\n" + "\n".join(lines) + "\n"
    print(text)
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(text)
