"""What a run of 42 iterations costs, on paper: tokens, FLOPs, bytes, hours and disk of three policies on several cards.

    python benchmarks/cost.py > benchmarks/COST.md
    python benchmarks/cost.py --matrix_rate 400 --bandwidth 2.0 --memory 80       another large card
    python benchmarks/cost.py --link 25                                           its GPUs talk over PCIe 4
    python benchmarks/cost.py --fp8 --cached false       the judge in fp8; engines find no compiled code

The work is counted; the time is a model, whose shares and seconds are assumptions, listed below the tables. gpu.sh
measures the most important of them on a card: replace them by your own. Stages:

- Products take FLOPs / (matrix rate x the share of it that is reached). A pass takes at least the time to launch its
  kernels: 122 a layer, forward and backward, a third of them forward alone (benchmarks/memory.py's model, counted).
- Decoding takes what is larger of that and of the bytes that it reads over the memory's bandwidth.
- Training is sharded (FSDP 2). A GPU holds 16 bytes a parameter over the number of shards: weights, gradients and two
  moments in float32. In each pass (SHARDING=full) it receives all parameters twice in bfloat16, forward and backward,
  and its gradients are reduced once in float32: 2 + 2 + 4 = 8 bytes a parameter, x (shards - 1) / shards. Where the
  memory allows whole parameters and gradients, 2 + 4 bytes more, they are gathered and reduced once an update instead
  (SHARDING=optimizer): 2 + 4 bytes. Shards are the GPUs of a node where that fits, and nodes then add up their
  gradients over the network once an update (2 x 4 bytes over the number of shards). Communication and products overlap:
  the larger counts.
- Activations take 83 bytes x hidden x layers a token (3.4 MiB of Qwen2-1.5B, simulated by memory.py).
- Starts: two engines and three models for PyTorch an iteration. An engine compiles its model unless its cache has it.
"""

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import run  # noqa: E402

ITERATIONS, PROMPTS, TEST, EVALUATED, K, EPOCHS, GLOBAL_BATCH = 42, 10_000, 2_000, 805, 5, 3, 32
PROMPT, RESPONSE, JUDGE_TEMPLATE = 190, 300, 270  # tokens, means; the evaluation compares with two baselines
PAIR = PROMPT + 2 * RESPONSE  # the prompt once
NODE = 8  # GPUs
KERNELS = 122  # of a layer, forward and backward
ACTIVATION = 83  # bytes x hidden x layers a token


@dataclass
class Model:
    name: str
    hidden: int
    layers: int
    key_values: int  # heads x dimension
    vocabulary: int
    parameters: float

    @property
    def head(self):
        return self.hidden * self.vocabulary

    def forward(self, tokens, predicted):
        """FLOPs of the matrix products: 2 a weight and token, the output layer where a token is predicted. Attention's
        own are left out: 4 x hidden x context a layer and token, under a tenth of them at these lengths."""
        return 2 * ((self.parameters - self.head) * tokens + self.head * predicted)

    @property
    def cache(self):
        """Bytes of keys and values a token, bfloat16."""
        return 2 * 2 * self.layers * self.key_values

    @property
    def checkpoint(self):
        """Bytes, float32."""
        return 4 * self.parameters


@dataclass
class Rates:
    """A card, and what the software makes of it.

    Args:
        matrix_rate: of large bfloat16 products on the large card, TFLOP/s
        bandwidth: of its memory, TB/s
        memory: its size, GB
        link: between the GPUs of a node, GB/s; 25: PCIe 4
        network: between nodes, GB/s a GPU
        disk: GB/s when a model is loaded
        start: seconds of an engine's start without weights and compilation; a stage of PyTorch's takes half of it
        compile: seconds that an engine takes to compile its model
        cached: engines find what an earlier iteration has compiled
        fp8: the judge's products are in fp8, twice as fast
        launch: microseconds to launch a kernel
        sequences: that an engine decodes at once
        decoding: share of the bandwidth, or of the matrix rate, that decoding reaches
        reading: share of the matrix rate that an engine reaches on prompts
        logprobs: likewise of log-probabilities; 0.6 is the goal of gpu.sh
        training: likewise of training; 0.45 is its goal
    """

    matrix_rate: float = 700.0
    bandwidth: float = 4.8
    memory: float = 141.0
    link: float = 450.0
    network: float = 50.0
    disk: float = 2.0
    start: float = 40.0
    compile: float = 50.0
    cached: bool = True
    fp8: bool = False
    launch: float = 5.0
    sequences: int = 256
    decoding: float = 0.6
    reading: float = 0.5
    logprobs: float = 0.6
    training: float = 0.45

    def products(self, flops, share):
        """Seconds."""
        return flops / (self.matrix_rate * 1e12 * share)

    @property
    def usable(self):
        """Bytes of the memory."""
        return 0.9 * self.memory * 1e9


POLICIES = [
    Model("1.5B", 1536, 28, 256, 151_936, 1.54e9),
    Model("8B", 4096, 32, 1024, 128_256, 8.03e9),
    Model("70B", 8192, 80, 1024, 128_256, 70.6e9),
]
JUDGE = POLICIES[1]
SMALL_CARD = dict(matrix_rate=110, bandwidth=0.77, memory=48, link=25)  # RTX A6000 over PCIe 4; it has no fp8


def work(policy):
    """Counts of an iteration."""
    prompts = PROMPTS + TEST
    pair_flops = policy.forward(PAIR, 2 * RESPONSE)
    return {
        "decoded": prompts * K * RESPONSE + EVALUATED * RESPONSE,
        "read": prompts * PROMPT + EVALUATED * PROMPT,
        "judgements": prompts * K * (K - 1) + EVALUATED * 4,
        # A perfect prefix cache: template, prompt and first response once for the K - 1 judgements that share them.
        "judged": prompts * (JUDGE_TEMPLATE + PROMPT + K * RESPONSE + K * (K - 1) * RESPONSE)
        + EVALUATED * 4 * (JUDGE_TEMPLATE + PROMPT + 2 * RESPONSE),
        "logprob FLOPs": 2 * prompts * pair_flops,
        "training FLOPs": EPOCHS * (3 * PROMPTS + TEST) * pair_flops,
        "training tokens": EPOCHS * PROMPTS * PAIR,
        # As comal.sh --plan counts: a token is 10 bytes as a number and as text; all responses stand in samples and
        # scores, two of each prompt's in pairs and data too.
        "record bytes": prompts * 10 * ((2 * K + 2 * 2) * RESPONSE + 4 * PROMPT),
    }


# ---------------------------------------------------------------------------------------------- hours


def training(policy, gpus, rates):
    """(seconds of an iteration's training, what holds it up), or None where it does not fit."""
    for shards in dict.fromkeys((min(gpus, NODE), gpus)):
        room = rates.usable - 16 * policy.parameters / shards - 4 * policy.parameters / policy.layers
        pair = ACTIVATION * policy.hidden * policy.layers * PAIR
        if room >= pair:
            break
    else:
        return None
    whole = room - 6 * policy.parameters >= pair
    busy, updates = min(gpus, GLOBAL_BATCH), EPOCHS * PROMPTS / GLOBAL_BATCH
    each = math.ceil(GLOBAL_BATCH / busy)  # pairs of an update on a GPU
    passes = math.ceil(each / max(1, (room - whole * 6 * policy.parameters) // pair))
    products = rates.products(work(policy)["training FLOPs"], rates.training) / busy
    launches = updates * passes * KERNELS * policy.layers * rates.launch * 1e-6
    received = (6 if whole else 8 * passes) * policy.parameters * (shards - 1) / shards
    link = rates.link if shards <= NODE else rates.network
    talk = updates * received / (link * 1e9)
    if gpus > shards:
        talk += updates * 8 * policy.parameters / shards / (rates.network * 1e9)
    note = ["parameters and gradients between GPUs"] * (talk > max(products, launches))
    note += [f"{busy} of {gpus} GPUs have a pair"] * (busy < gpus)
    return max(products, launches, talk), "; ".join(note)


def sampling(policy, gpus, rates):
    """Seconds, or None where the weights do not fit."""
    counts, weights, shared = work(policy), 2 * policy.parameters, 1
    while weights / shared > 0.6 * rates.memory * 1e9:
        shared *= 2
    if gpus < shared:
        return None
    batch = min(rates.sequences, (rates.usable * shared - weights) / (policy.cache * (PROMPT + RESPONSE)))
    read = (weights + batch * policy.cache * (PROMPT + RESPONSE / 2)) / shared
    step = max(
        read / (rates.bandwidth * 1e12 * rates.decoding),
        rates.products(policy.forward(batch, batch), rates.reading) / shared,
    )
    prompts = rates.products(policy.forward(counts["read"], 0), rates.reading) / gpus
    return counts["decoded"] / batch * step / (gpus // shared) + prompts


def logprobs(policy, gpus, rates):
    """Seconds: a copy a GPU, where it fits, talks to nobody; otherwise each pass receives all parameters once."""
    passes = 2 * (PROMPTS + TEST) / gpus / max(1, 8192 // PAIR)
    products = rates.products(work(policy)["logprob FLOPs"], rates.logprobs) / gpus
    launches = passes * KERNELS / 3 * policy.layers * rates.launch * 1e-6
    fits = 2 * policy.parameters < 0.8 * rates.memory * 1e9
    link = rates.link if gpus <= NODE else rates.network
    return max(products, launches, 0 if fits else passes * 2 * policy.parameters / (link * 1e9))


def hours(policy, gpus, rates):
    """({stage: hours an iteration}, what holds training up), or None where something does not fit."""
    trained, sampled = training(policy, gpus, rates), sampling(policy, gpus, rates)
    if trained is None or sampled is None:
        return None
    counts = work(policy)
    judged = JUDGE.forward(counts["judged"], counts["judgements"])
    compiling = 0 if rates.cached else rates.compile
    reading = sum(2 * one.parameters for one in (policy, JUDGE)) + 3 * policy.checkpoint
    seconds = {
        "sampling": sampled,
        "judging": rates.products(judged, rates.reading * (2 if rates.fp8 else 1)) / gpus,
        "log-probabilities": logprobs(policy, gpus, rates),
        "training": trained[0],
        "starts": 2 * (rates.start + compiling) + 3 * rates.start / 2 + reading / (rates.disk * 1e9),
    }
    return {name: value / 3600 for name, value in seconds.items()}, trained[1]


# ---------------------------------------------------------------------------------------------- tables


def counted():
    """Lines of the table of what is counted."""
    yield "| policy | decoded tokens | trained tokens | FLOPs: sampling | judging | log-probabilities | training |"
    yield "|" + "---|" * 7
    for policy in POLICIES:
        own = work(policy)
        flops = [
            policy.forward(own["read"] + own["decoded"], own["decoded"]),
            JUDGE.forward(own["judged"], own["judgements"]),
            own["logprob FLOPs"],
            own["training FLOPs"],
        ]
        yield (
            f"| {policy.name} | {ITERATIONS * own['decoded'] / 1e9:.2f} G | "
            f"{ITERATIONS * own['training tokens'] / 1e9:.2f} G | "
            + " | ".join(f"{ITERATIONS * value:.1e}" for value in flops)
            + " |"
        )


def disk():
    """Lines of the table of what is written. With KEEP_CKPTS=last as comal.sh --plan counts: two checkpoints, and seven
    times as much while the next one is trained (the best weights, two resume points of weights and two moments)."""
    yield "| policy | checkpoints, `KEEP_CKPTS=all` | `last`, while training | records | traffic of a training pass |"
    yield "|" + "---|" * 5
    for policy in POLICIES:
        yield (
            f"| {policy.name} | {ITERATIONS * policy.checkpoint / 1e12:.2f} TB | {9 * policy.checkpoint / 1e12:.2f} TB | "
            f"{ITERATIONS * work(policy)['record bytes'] / 1e9:.0f} GB | {8 * policy.parameters / 1e9:.0f} GB a GPU |"
        )


def timed(cards):
    """Lines of the table of hours; cards: [(name, GPUs, Rates)]."""
    yield (
        "| policy | cards | hours | GPU hours | sampling | judging | log-probabilities | training | starts | the next "
        "bottleneck |"
    )
    yield "|" + "---|" * 10
    for policy in POLICIES:
        for name, gpus, rates in cards:
            yield f"| {policy.name} | {gpus} x {name} | {timed_line(policy, gpus, rates)}"


def timed_line(policy, gpus, rates):
    found = hours(policy, gpus, rates)
    if found is None:
        state = 16 * policy.parameters / 1e9
        return f"does not fit | | | | | | | training's state, 16 bytes a parameter: {state:,.0f} GB |"
    by_stage, note = found
    total, largest = sum(by_stage.values()), max(by_stage, key=by_stage.get)
    shares = " | ".join(f"{100 * value / total:.0f} %" for value in by_stage.values())
    detail = f" ({note})" if largest == "training" and note else ""
    return f"{ITERATIONS * total:,.1f} | {ITERATIONS * total * gpus:,.0f} | {shares} | {largest}{detail} |"


def changed(rates):
    """Lines of the table of what single assumptions change, of 1.5B on 8 large cards."""
    yield "| 1.5B on 8 large cards | hours |"
    yield "|---|---|"
    for name, changes in (
        ("as above", {}),
        ("the judge in fp8", {"fp8": True}),
        ("no engine finds compiled code", {"cached": False}),
        ("PCIe 4 between the GPUs, 25 GB/s", {"link": 25}),
        ("kernels take twice as long to launch", {"launch": 2 * rates.launch}),
    ):
        yield f"| {name} | {ITERATIONS * sum(hours(POLICIES[0], 8, replace(rates, **changes))[0].values()):,.1f} |"


def main(**rates: Rates):
    """Print the tables."""
    rates = Rates(**rates)
    small = replace(rates, **SMALL_CARD, fp8=False)
    sizes = [(f"{rates.memory:g} GB", gpus, rates) for gpus in (1, 8, 64)] + [("48 GB", gpus, small) for gpus in (4, 8)]
    counts = work(JUDGE)
    print(
        "# The cost of 42 iterations\n\nMade by `python benchmarks/cost.py`; its docstring has the model of time. "
        "**On paper: no figure here was measured on a GPU.**\n\n"
        f"An iteration: {PROMPTS:,} train and {TEST:,} test prompts of {PROMPT} tokens, K = {K} responses of {RESPONSE}; "
        f"{counts['judgements']:,} judgements by an 8B judge with {counts['judged'] / 1e6:.0f} M uncached tokens; "
        f"{EPOCHS} epochs.\n"
    )
    for lines in (counted(), disk(), timed(sizes), changed(rates)):
        print(*lines, "", sep="\n")
    print(
        "`last`: policy and reference, and while training the best weights and two resume points (weights and two "
        "moments each).\n\nAssumed: "
        + ", ".join(f"{name} {value:g}" for name, value in asdict(rates).items())
        + " (`python "
        "benchmarks/cost.py --help`); of a card of 48 GB "
        + ", ".join(f"{name} {value:g}" for name, value in SMALL_CARD.items())
        + "."
    )


if __name__ == "__main__":
    run(main)
