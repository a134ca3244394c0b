"""Evaluate policies: responses to an evaluation set, and win rates between two sets of responses.

    python eval.py generate --model CKPT --output eval/responses.jsonl [--input prompts.jsonl]
    python eval.py compare --judge JUDGE --responses eval/responses.jsonl --baseline start/responses.jsonl \\
        --output eval/vs_start.jsonl

`generate` writes a samples file (see sampling.py) with one response a prompt; without --input the prompts are
AlpacaEval's 805 instructions.
`compare` writes one line a prompt,
    prompt_id, prompt
    samples        list of two {text, ...}: the response, the baseline's response
    win_probs      2 x 2 as in scoring.py; [0][1] = P(response beats baseline's)
    order_gap, label_mass
and beside it `<output>` with the ending .json, the summary: see `summarise`.
"""

import json
from functools import partial
from pathlib import Path

from utils import StageError, derive_seed, file_lists, jsonl_writer, log, read_jsonl, read_prompts, run, write_text
from vllm_model import Judge, JudgeConfig, Sampler, SamplerConfig
from workers import map_files

RESPONSE_FIELDS = {"prompt_id": str, "prompt": str, "samples": list}


# ---------------------------------------------------------------------------------------------- generate

def alpaca_eval(output: str):
    """Write AlpacaEval's 805 instructions as a prompt file.

    Args:
        output: prompt file
    """
    from huggingface_hub import hf_hub_download
    try:  # the Hub's plain JSON, no data set script
        source = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
    except Exception as error:  # the Hub client raises a dozen kinds; all mean that there is no file
        raise StageError(f"AlpacaEval's instructions could not be fetched from the Hub ({str(error).splitlines()[0]}); "
                         "give a prompt file with --input") from None
    with open(source, encoding="utf-8") as file:
        rows = json.load(file)
    with jsonl_writer(output) as write:
        for number, row in enumerate(rows):
            write({"prompt_id": f"alpaca_eval-{number}", "prompt": row["instruction"], "dataset": row["dataset"]})


def generate(output: str, input: str = "", temperature: float = 0.7, **sampler: SamplerConfig):
    """One response to every prompt of an evaluation set.

    Args:
        output: responses file
        input: prompt file; default: AlpacaEval's instructions, kept beside the output
        temperature: sampling temperature
    """
    if not input:
        input = str(Path(output).with_name("alpaca_eval.jsonl"))
        if not Path(input).exists():
            alpaca_eval(input)
    (source,), (target,) = file_lists(input=input, output=output)
    config = SamplerConfig(**sampler)
    make_work = partial(Sampler, config, num_samples=[1], temperature=[temperature])
    made_with = config.made_with() | {"num_samples": 1, "temperature": temperature}
    map_files([(partial(read_prompts, source), target, made_with)], make_work, config, "responses")


# ---------------------------------------------------------------------------------------------- compare

def read_responses(path):
    """Yield the records of a responses file, ours or another's; raises StageError for one without a response."""
    for record in read_jsonl(path, RESPONSE_FIELDS):
        sample = record["samples"][0] if record["samples"] else None
        if not (isinstance(sample, dict) and isinstance(sample.get("text"), str)):
            raise StageError(f"{path}: prompt_id {record['prompt_id']} has no response: samples[0] should be {{text, ...}}")
        yield record


def join_responses(responses_path, baseline_path):
    """Yield {prompt_id, prompt, samples: [response, baseline's]} for two files of responses to the same prompts.

    Raises StageError when one of them answers a prompt that the other does not.
    """
    baseline = {record["prompt_id"]: record for record in read_responses(baseline_path)}
    missing = []
    for record in read_responses(responses_path):
        other = baseline.pop(record["prompt_id"], None)
        if other is None:
            missing.append(record["prompt_id"])
        elif record["prompt"] != other["prompt"]:
            raise StageError(f"{responses_path} and {baseline_path} have different prompts under prompt_id "
                             f"{record['prompt_id']}")
        else:
            yield {"prompt_id": record["prompt_id"], "prompt": record["prompt"],
                   "samples": [record["samples"][0], other["samples"][0]]}
    for path, ids in ((baseline_path, missing), (responses_path, list(baseline))):
        if ids:
            raise StageError(f"{path} has no response to {len(ids)} prompts of the other file, first "
                             + ", ".join(ids[:10]))


def compare(responses: str, baseline: str, output: str, seed: int = 0, **judge: JudgeConfig):
    """Win rates of responses over baselines, judged in both orders, several comparisons with one start of the judge.

    Args:
        responses: responses file(s), comma-separated
        baseline: responses file(s) to beat, as many
        output: comparison file(s), as many; the summary goes beside each, ending in .json
        seed: of the bootstrap
    """
    ours, theirs, outputs = file_lists(responses=responses, baseline=baseline, output=output)
    for path in outputs:
        if path.suffix == ".json":
            raise StageError(f"--output {path}: the summary goes to a file of that name; end it in .jsonl")
    config = JudgeConfig(**judge)
    made_with = config.made_with()
    jobs = [(partial(join_responses, *paths), target, made_with) for *paths, target in zip(ours, theirs, outputs)]
    map_files(jobs, partial(Judge, config), config, "comparing")
    for response_path, baseline_path, path in zip(ours, theirs, outputs):
        names = {"responses": str(response_path), "baseline": str(baseline_path)}
        summary = names | summarise(list(read_jsonl(path)), seed)
        write_text(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
        low, high = summary["win_rate_interval"]
        log.info("%s against %s: win rate %.1f %% [%.1f, %.1f], mean probability %.3f, %d prompts, %d ties",
                 response_path, baseline_path, 100 * summary["win_rate"], 100 * low, 100 * high,
                 summary["mean_win_prob"], summary["num_prompts"], summary["num_ties"])


def summarise(comparisons, seed=0, num_bootstrap=10_000):
    """Figures of one comparison.

    A prompt is won when P(response beats baseline's), the mean of both orders, is above 1/2; a tie counts half.
    Intervals are 95 % percentile bootstrap intervals over prompts.

    Returns:
        num_prompts, num_ties, win_rate, win_rate_interval, mean_win_prob, mean_win_prob_interval, order_gap,
        mean_tokens and mean_characters ([response, baseline's]).
    """
    import numpy as np
    probs = np.array([record["win_probs"][0][1] for record in comparisons])  # (N,)
    wins = (probs > 0.5) + 0.5 * (probs == 0.5)
    generator = np.random.default_rng(derive_seed("bootstrap", seed))
    draws = (generator.integers(len(probs), size=len(probs)) for _ in range(num_bootstrap))
    means = np.array([(wins[draw].mean(), probs[draw].mean()) for draw in draws])  # (num_bootstrap, 2)
    win_interval, prob_interval = np.percentile(means, [2.5, 97.5], axis=0).T.tolist()
    gaps = [record["order_gap"] for record in comparisons if record["order_gap"] is not None]
    samples = list(zip(*(record["samples"] for record in comparisons)))
    return {
        "num_prompts": len(probs),
        "num_ties": int((probs == 0.5).sum()),
        "win_rate": float(wins.mean()),
        "win_rate_interval": win_interval,
        "mean_win_prob": float(probs.mean()),
        "mean_win_prob_interval": prob_interval,
        "order_gap": sum(gaps) / len(gaps) if gaps else None,
        "mean_tokens": [sum(len(s["token_ids"]) for s in side) / len(side) for side in samples],
        "mean_characters": [sum(len(s["text"]) for s in side) / len(side) for side in samples],
    }


if __name__ == "__main__":
    run(generate, compare, alpaca_eval)
