"""What a run of 42 iterations costs, on paper: tokens, FLOPs, bytes, hours and disk for three policies on 1, 8 and 64
GPUs.

    python benchmarks/cost.py > benchmarks/COST.md
    python benchmarks/cost.py --matrix_rate 400 --bandwidth 2.0        of another card

The work is counted; the time is a model. A stage of matrix products takes FLOPs / (matrix rate x the share of it that
is reached); decoding takes what is larger of that and of the bytes it reads over the memory's bandwidth; sharded
training what is larger of the products and of the parameters that each pass gathers from the other GPUs. Nothing of it
was measured on a
GPU: the shares for log-probabilities and training are those of RESULTS.md, of a CPU; all others are assumptions, listed
below the table. Replace them by your own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import run  # noqa: E402

ITERATIONS, PROMPTS, TEST, EVALUATED, K, EPOCHS, GLOBAL_BATCH = 42, 10_000, 2_000, 805, 5, 3, 32
PROMPT, RESPONSE, JUDGE_TEMPLATE = 190, 300, 270  # tokens, means; the evaluation compares with two baselines


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


POLICIES = [
    Model("1.5B", 1536, 28, 256, 151_936, 1.54e9),
    Model("8B", 4096, 32, 1024, 128_256, 8.03e9),
    Model("70B", 8192, 80, 1024, 128_256, 70.6e9),
]
JUDGE = POLICIES[1]


def work(policy):
    """Counts of an iteration."""
    prompts = PROMPTS + TEST
    pair = PROMPT + 2 * RESPONSE  # the prompt once
    judgements = prompts * K * (K - 1) + EVALUATED * 4
    return {
        "decoded": prompts * K * RESPONSE + EVALUATED * RESPONSE,
        "read": prompts * PROMPT + EVALUATED * PROMPT,
        "judgements": judgements,
        # A perfect prefix cache: template, prompt and first response once for the K - 1 judgements that share them.
        "judged": prompts * (JUDGE_TEMPLATE + PROMPT + K * RESPONSE + K * (K - 1) * RESPONSE)
        + EVALUATED * 4 * (JUDGE_TEMPLATE + PROMPT + 2 * RESPONSE),
        "logprob FLOPs": 2 * prompts * policy.forward(pair, 2 * RESPONSE),
        "training FLOPs": 3 * EPOCHS * PROMPTS * policy.forward(pair, 2 * RESPONSE)
        + EPOCHS * TEST * policy.forward(pair, 2 * RESPONSE),
        "training tokens": EPOCHS * PROMPTS * pair,
        "record bytes": prompts
        * (4 * K * RESPONSE * 11 + 3 * pair * 11),  # ids and text, in samples, scores, pairs, data
    }


def hours(policy, gpus, rates):
    """{stage: hours an iteration}, or None where the training's state does not fit."""
    rate, memory = rates["matrix_rate"] * 1e12, rates["memory"] * 1e9
    state = 16 * policy.parameters / gpus  # float32 weights, gradients, two moments
    layer = 2 * policy.parameters / policy.layers * 2  # two units gathered, bfloat16
    activations = 34 * 2 * policy.hidden * policy.layers * (PROMPT + 2 * RESPONSE)  # one pair, without checkpointing
    if state + layer + activations > 0.9 * memory:
        return None
    counts = work(policy)
    weights = 2 * policy.parameters
    shared = 1
    while weights / shared > 0.6 * memory:
        shared *= 2
    if gpus < shared:
        return None
    engines = gpus // shared
    batch = min(rates["sequences"], (0.9 * memory * shared - weights) / (policy.cache * (PROMPT + RESPONSE)))
    step = max(
        (weights + batch * policy.cache * (PROMPT + RESPONSE / 2))
        / shared
        / (rates["bandwidth"] * 1e12 * rates["decoding"]),
        policy.forward(batch, batch) / shared / (rate * rates["reading"]),
    )
    sampling = counts["decoded"] / batch * step / engines + policy.forward(counts["read"], 0) / (
        rate * rates["reading"] * gpus
    )
    judging = JUDGE.forward(counts["judged"], counts["judgements"]) / (rate * rates["reading"] * gpus)
    logprobs = counts["logprob FLOPs"] / (rate * rates["logprobs"] * gpus)
    busy = min(gpus, GLOBAL_BATCH)  # an update has no more pairs than that
    compute = counts["training FLOPs"] / (rate * rates["training"] * busy)
    passes = EPOCHS * PROMPTS / busy  # forward and backward of one pair on each
    link = (rates["link"] if gpus <= 8 else rates["network"]) * 1e9
    gathered = 0 if gpus == 1 else 3 * weights * passes / link  # gathered twice, gradients scattered once
    starts = 5 * (rates["start"] + weights / (rates["disk"] * 1e9))
    seconds = {
        "sampling": sampling,
        "judging": judging,
        "log-probabilities": logprobs,
        "training": max(compute, gathered),
        "starts": starts,
    }
    note = "parameters over the network" if gathered > compute else ""
    note += ("; " if note else "") + f"{busy} of {gpus} GPUs have a pair" if busy < gpus else ""
    return {name: value / 3600 for name, value in seconds.items()} | {"note": note}


def main(
    matrix_rate: float = 700.0,
    bandwidth: float = 4.8,
    memory: float = 141.0,
    link: float = 450.0,
    network: float = 50.0,
    disk: float = 2.0,
    start: float = 60.0,
    sequences: int = 256,
    decoding: float = 0.6,
    reading: float = 0.5,
    logprobs: float = 0.6,
    training: float = 0.49,
):
    """Print the tables.

    Args:
        matrix_rate: of large bfloat16 products, TFLOP/s
        bandwidth: of the GPU's memory, TB/s
        memory: of a GPU, GB
        link: between the GPUs of a node, GB/s
        network: between nodes, GB/s a GPU
        disk: GB/s when a model is loaded
        start: seconds of a stage's start without the weights
        sequences: that an engine decodes at once
        decoding: share of the bandwidth, or of the matrix rate, that decoding reaches
        reading: share of the matrix rate that an engine reaches on prompts
        logprobs: likewise of log-probabilities
        training: likewise of training
    """
    rates = dict(list(locals().items()))
    print(
        "# The cost of 42 iterations\n\nMade by `python benchmarks/cost.py`; its docstring has the model of time. "
        "**On paper: no figure here was measured on a GPU.**\n"
    )
    print(
        f"An iteration: {PROMPTS:,} train and {TEST:,} test prompts of {PROMPT} tokens, K = {K} responses of {RESPONSE}; "
        f"{work(JUDGE)['judgements']:,} judgements by an 8B judge with {work(JUDGE)['judged'] / 1e6:.0f} M uncached tokens; "
        f"{EPOCHS} epochs.\n"
    )
    print(
        "| policy | decoded tokens | trained tokens | FLOPs: sampling | judging | log-probabilities | training | checkpoints, all |"
        " last only | records |\n|" + "---|" * 10
    )
    for policy in POLICIES:
        own = work(policy)
        flops = [
            policy.forward(own["read"] + own["decoded"], own["decoded"]),
            JUDGE.forward(own["judged"], own["judgements"]),
            own["logprob FLOPs"],
            own["training FLOPs"],
        ]
        checkpoint = 4 * policy.parameters
        print(
            f"| {policy.name} | {ITERATIONS * own['decoded'] / 1e9:.2f} G | {ITERATIONS * own['training tokens'] / 1e9:.2f} G | "
            + " | ".join(f"{ITERATIONS * value:.1e}" for value in flops)
            + f" | {ITERATIONS * checkpoint / 1e12:.2f} TB | {8 * checkpoint / 1e12:.2f} TB | "
            f"{ITERATIONS * own['record bytes'] / 1e9:.0f} GB |"
        )
    print(
        "\nLast only (`KEEP_CKPTS=last`): policy, reference, and during training the best one and two resume points (weights "
        "and two moments each).\n"
    )
    print(
        "| policy | GPUs | hours | GPU hours | sampling | judging | log-probabilities | training | starts | the next bottleneck |\n|"
        + "---|" * 10
    )
    for policy in POLICIES:
        for gpus in (1, 8, 64):
            found = hours(policy, gpus, rates)
            if found is None:
                print(
                    f"| {policy.name} | {gpus} | does not fit | | | | | | | training's state, 16 bytes a parameter: "
                    f"{16 * policy.parameters / 1e9:,.0f} GB |"
                )
                continue
            note = found.pop("note")
            total = sum(found.values())
            largest = max(found, key=found.get)
            shares = " | ".join(f"{100 * value / total:.0f} %" for value in found.values())
            detail = f" ({note})" if largest == "training" and note else ""
            print(
                f"| {policy.name} | {gpus} | {ITERATIONS * total:,.1f} | {ITERATIONS * total * gpus:,.0f} | {shares} | "
                f"{largest}{detail} |"
            )
    print(
        "\nAssumed: "
        + ", ".join(f"{name} {value:g}" for name, value in rates.items())
        + " (`python benchmarks/cost.py --help`)."
    )


if __name__ == "__main__":
    run(main)
