"""What the tests of training share: tiny models, pairs for them, and the slow but plain computation to compare with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOGP_FIELDS = ("last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")


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


@pytest.fixture(name="single_process")
def single_process_fixture(monkeypatch):
    """A function that runs a stage's `main` in this process: on the CPU, with an Accelerator of its own, and on one
    thread (two threads on busy cores wait for each other: 30 times slower)."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(main, **flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            main(**flags)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    yield run
    torch.set_num_threads(threads)


def words(**flags):
    """{"eta": 0.1} as ["--eta", "0.1"]."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def launch(launcher_flags, *command, **environment):
    """`accelerate launch` on the CPU, one thread a process; returns the finished process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher_flags, *map(str, command)],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        text=True,
        timeout=240,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done


def launch_two(*command):
    """Two processes with fsdp_config.yaml in float32, on a port that the system chooses: on the CPU that means DDP over
    gloo. (`accelerate launch --cpu --num_processes 2` would start a single process.)"""
    return launch(
        ["--config_file", "fsdp_config.yaml", "--mixed_precision", "no", "--num_processes", "2"],
        *command,
        ACCELERATE_USE_CPU="true",
    )
