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
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from queue import Empty

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from utils import StageError  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")


def sizes(hidden, intermediate, layers, heads, key_value_heads, vocabulary, model_type="qwen2", tied=True):
    """A model's sizes, as transformers names them."""
    return dict(
        model_type=model_type,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
    )


# Of Qwen2-1.5B, Qwen2-7B and Llama-3-8B, and two small ones of Qwen2's kind; "tiny" is for trying a benchmark.
SHAPES = {
    "tiny": sizes(64, 128, 2, 2, 1, 1000),
    "44M": sizes(256, 1024, 4, 4, 2, 151_936),
    "1.5B": sizes(1536, 8960, 28, 12, 2, 151_936),
    "7B": sizes(3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "8B": sizes(4096, 14_336, 32, 32, 8, 128_256, "llama", tied=False),
}


def make_config(shape):
    """The configuration of a model of this shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=32_768)


def make_model(shape, device="cpu", dtype=torch.float32):
    """A model of this shape with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(make_config(shape), dtype=dtype)


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


def write_chat_tokenizer(folder, texts=()):
    """The demo's kind of tokenizer, 664 tokens of ChatML learnt from a few texts: for models made on the spot."""
    sys.path.append(str(ROOT / "data" / "demo"))
    from game import ANSWERS, CHATML, write_tokenizer

    write_tokenizer(folder, [*ANSWERS, *texts], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML)


# Of the variables that accelerate's launcher sets for its own processes, and that others should not see.
LAUNCHER = "RANK", "WORLD_SIZE", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_"


@contextmanager
def child_environment(**more):
    """The environment that processes get which are started in this block: without the launcher's variables, with
    these."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHER):
            del os.environ[name]
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_its_own_process(function, *arguments):
    """What the function puts into a queue, its first argument. Raises StageError where the process dies."""
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
                raise StageError(f"{function.__name__} ended with exit code {process.exitcode}, see above") from None
    process.join()
    return found


def read_prompt_texts(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def make_pairs(prompts, count, longest=1024, vocabulary=151_000):
    """[(prompt ids, chosen ids, rejected ids)] of random tokens.

    Prompts take a token for four characters of the file `prompts` and 20 for the chat template; without a file they are
    log-normal around 150 tokens (standard deviation 0.8 of the logarithm), as UltraFeedback's are. Responses are
    log-normal around 256 tokens (0.6). None is longer than `longest`."""
    generator = np.random.default_rng(0)
    if prompts:
        texts = read_prompt_texts(prompts)
        asked = [20 + len(texts[i]) // 4 for i in generator.choice(len(texts), count, replace=False)]
    else:
        asked = np.exp(generator.normal(np.log(150), 0.8, count)).astype(int) + 1
    lengths = np.minimum(np.exp(generator.normal(np.log(256), 0.6, (count, 2))).astype(int) + 1, longest)
    ids = lambda length: generator.integers(0, vocabulary, length).tolist()
    return [(ids(min(prompt, longest)), *map(ids, responses)) for prompt, responses in zip(asked, lengths)]


def batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def as_rows(pairs):
    """Pairs as training.logps.response_logps takes them."""
    return [(prompt, [chosen, rejected]) for prompt, chosen, rejected in pairs]


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


def matrix_rate(device, dtype, size=0):
    """FLOP/s of a large matrix product, the best of five: the rate that floors are computed with."""
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds(lambda: left @ right, device) for _ in range(5))


def forward_flops(config, rows):
    """FLOPs of the matrix products of one forward pass over rows [(prompt ids, [response ids, ...]), ...], each prompt
    computed once; a backward pass takes twice as many.

    A layer has the matrices q and o (hidden x heads * dimension), k and v (hidden x key-value heads * dimension) and
    three of hidden x intermediate; each takes 2 FLOPs a weight and token. So does the output layer (hidden x
    vocabulary), on the positions that predict a response token alone. Attention comes on top, see `attention_flops`.

    Args:
        config: of the model, as transformers has it
    """
    dimension = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * config.hidden_size * dimension * (config.num_attention_heads + config.num_key_value_heads)
    layer += 3 * config.hidden_size * config.intermediate_size
    predicted = sum(len(response) for _, responses in rows for response in responses)
    tokens = predicted + sum(len(prompt) for prompt, _ in rows)
    products = config.num_hidden_layers * layer * tokens + config.hidden_size * config.vocab_size * predicted
    return 2 * products + attention_flops(config, rows)


def attention_flops(config, rows):
    """FLOPs of attention in one forward pass: 4 x heads x dimension a layer, 2 for each of its two products, for each
    query and each key that it sees: P (P + 1) / 2 in a prompt of P tokens, R P + R (R + 1) / 2 in a response of R."""
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or 0) or config.hidden_size
    seen = 0
    for prompt, responses in rows:
        before = len(prompt)
        seen += before * (before + 1) // 2
        seen += sum(len(one) * before + len(one) * (len(one) + 1) // 2 for one in responses)
    return 4 * width * config.num_hidden_layers * seen


def machine():
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    cards = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return "; ".join([f"{name}, {torch.get_num_threads()} threads", *cards])


def versions(packages):
    """Of the packages that are installed, as text; vLLM's build for the CPU has a name of its own."""
    from importlib.metadata import distributions

    installed = {found.metadata["Name"].removesuffix("-cpu"): found.version for found in distributions()}
    return ", ".join(f"{name} {installed[name]}" for name in packages if name in installed)


def table(head, *rows):
    """Lines of Markdown from the text of each row, "cell | cell"."""
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {row} |" for row in rows)]


def record(title, lines, packages=("torch", "transformers", "vllm")):
    """Print the lines and append them to RESULTS.md with date, machine, versions and command."""
    command = "python " + shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    about = f"{date.today()}, {machine()}; {versions(packages)}"
    text = f"\n## {title}\n\n{about}\n\n    {command}\n\n" + "\n".join(lines) + "\n"
    print(text)
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(text)
