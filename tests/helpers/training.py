"""What the tests of training share: tiny models, pairs for them, and the slow but plain computation to compare with."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOGP_FIELDS = ("last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
FLOAT32 = 5e-6  # relative, of losses and gradient norms of computations that differ in batching, padding and summation
# The margin's target is 25 nats, which the few small steps of a test do not reach: near it the loss would be a small
# difference of large numbers.
ETA, R, BETA = 0.02, 0.25, 0.1
INPO = dict(eta=ETA, tau_eta_ratio=R, global_batch_size=11, micro_batch_tokens=200, num_epochs=4, learning_rate=3e-5)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def column(output, name):
    """One figure of metrics.jsonl at every step; `validation_loss` and the like at every validation."""
    return [record[name] for record in read(Path(output) / "metrics.jsonl") if name in record]


def relative_difference(first, second):
    """The largest |a - b| / |b| of two lists of numbers."""
    assert len(first) == len(second) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(first, second))


# ---------------------------------------------------------------------------------------------- models and pairs


def save_model(directory, config_dir, seed, **settings):
    """Random weights, five times the usual scale: log-probabilities are far from uniform, so that an error of position
    or of precision shows."""
    import torch

    from data_utils import import_transformers

    import_transformers()  # in half the time
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(config_dir, initializer_range=0.1, **settings)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(config_dir).save_pretrained(directory)
    return str(directory)


def load(path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make_pairs(tokenizer, count):
    """`count` pairs of several lengths, as data_processing.py writes them, and soft labels."""
    from game import ANSWERS, phrasings

    from data_utils import encode_prompt, encode_text, end_token_id

    records = []
    for n, prompt in enumerate(phrasings()[0][:count]):
        texts = {"chosen": ANSWERS[n % 3] + f" {n}" * (n % 4), "rejected": ANSWERS[(n + 1) % 3][: 20 + 3 * n]}
        ids = {
            f"{side}_token_ids": encode_text(tokenizer, text) + [end_token_id(tokenizer)]
            for side, text in texts.items()
        }
        records.append(
            {"prompt_id": f"p{n}", "prompt": [{"role": "user", "content": prompt}]}
            | {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
            | {"win_prob": 0.5 + n / 40, "prompt_token_ids": encode_prompt(tokenizer, prompt)}
            | ids
        )
    return records


def plain_logp(model, prompt_ids, response_ids):
    """log pi(response | prompt), a tensor: one sequence, every position through the head, the full log-softmax."""
    import torch

    logps = model(torch.tensor([prompt_ids + response_ids])).logits[0].double().log_softmax(dim=-1)  # (T, V)
    return sum(logps[len(prompt_ids) + i - 1, token] for i, token in enumerate(response_ids))  # row t predicts t + 1


def plain_logps(model, record):
    """(chosen, rejected) of one pair."""
    return [
        plain_logp(model, record["prompt_token_ids"], record[f"{side}_token_ids"]) for side in ("chosen", "rejected")
    ]


def pair_losses(model, records, eta=ETA, r=R):
    """The INPO loss of each pair from its definition."""
    import torch

    def one(record):
        chosen, rejected = plain_logps(model, record)
        margin = (
            chosen
            - r * record["ref_chosen_logp"]
            - (1 - r) * record["last_chosen_logp"]
            - rejected
            + r * record["ref_rejected_logp"]
            + (1 - r) * record["last_rejected_logp"]
        )
        return (margin - 1 / (2 * eta)) ** 2

    return torch.stack([one(record) for record in records])


def swap(record):
    """The pair with the label the other way round: training on one makes the other worse."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {
        name.replace(side, other[side]) if (side := next((s for s in other if s in name), None)) else name: value
        for name, value in record.items()
    }


def broken_model(setting, directory):
    """The policy with a weight that is not a number."""
    import torch

    model = load(setting.policy)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    model.save_pretrained(directory)
    setting.tokenizer.save_pretrained(directory)
    return str(directory)


def saved_tensors(directory):
    from safetensors.torch import load_file

    return load_file(Path(directory) / "model.safetensors")


@pytest.fixture(scope="session", name="setting")
def setting_fixture(tmp_path_factory, model_dirs):
    """`policy` and `reference` (Qwen2 models), `pairs` (a file of 11) and `data` (with the log-probabilities of
    both)."""
    import torch

    from data_utils import load_tokenizer

    directory = tmp_path_factory.mktemp("training")
    policy, reference = (
        save_model(directory / name, model_dirs["policy"], seed) for seed, name in enumerate(("policy", "reference"))
    )
    tokenizer = load_tokenizer(policy)
    records = make_pairs(tokenizer, 11)
    pairs = write(directory / "pairs.jsonl", records)
    models = load(policy), load(reference)
    with torch.no_grad():
        for record in records:
            record.update(zip(LOGP_FIELDS, (value.item() for model in models for value in plain_logps(model, record))))
    return SimpleNamespace(
        dir=directory,
        policy=policy,
        reference=reference,
        config=model_dirs["policy"],
        tokenizer=tokenizer,
        records=records,
        pairs=pairs,
        data=write(directory / "data.jsonl", records),
    )


# ---------------------------------------------------------------------------------------------- running stages


def environment(**changes):
    """That of a process on one thread of the CPU, whatever launched this one."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    # Where GPUs are seen, FSDP 2 builds its mesh of them, whatever accelerate uses.
    return clean | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | changes


def run_here(main, mixed_precision="no", **flags):
    """Run a stage's `main` in this process: on the CPU, with an Accelerator of its own, and on one thread (two threads
    on busy cores wait for each other: 30 times slower)."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
                patch.delenv(name)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("ACCELERATE_MIXED_PRECISION", mixed_precision)
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            main(**flags)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(threads)


@pytest.fixture(name="train")
def train_fixture(setting, tmp_path):
    """A function that trains in this process, by default INPO on `setting`, and returns the output directory."""
    import inpo

    def run(main=inpo.main, output="ckpt", **flags):
        defaults = dict(model=setting.policy, input=setting.data) | (INPO if main is inpo.main else {})
        run_here(main, **(defaults | dict(output=str(tmp_path / output)) | flags))
        return tmp_path / output

    return run


def words(**flags):
    """{"eta": 0.1} as ["--eta", "0.1"]."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def run_process(command):
    """A process of its own, finished; `stdout` has its errors, too."""
    output = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.run(command, cwd=ROOT, env=environment(), timeout=240, **output)


def launch_several(number, *command):
    """`accelerate launch` with fsdp_config.yaml in float32, one thread a process, on a port that the system chooses: on
    the CPU that means DDP over gloo. (`--cpu --num_processes 2` would start a single process.) Returns the finished
    process."""
    flags = ["--config_file", "fsdp_config.yaml", "--mixed_precision", "no", "--num_processes", str(number)]
    done = run_process([sys.executable, "-m", "accelerate.commands.launch", *flags, *map(str, command)])
    assert done.returncode == 0, done.stdout
    return done
