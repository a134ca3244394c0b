"""Evaluate policies: responses to an evaluation set, and win rates between two or more sets of responses.

    python eval.py generate --model CKPT --output eval/responses.jsonl [--input prompts.jsonl]
    python eval.py compare --judge JUDGE --responses eval/responses.jsonl --baseline start/responses.jsonl \\
        --output eval/vs_start.jsonl
    python eval.py matrix --judge JUDGE --responses start.jsonl,a.jsonl,b.jsonl --output matrix.json

`generate` writes a samples file (see sampling.py) with one response to each prompt; without --input the prompts are
AlpacaEval's 805 instructions, which `alpaca_eval` writes as a prompt file.
`compare` writes a comparison file and its summary: see analysis/comparisons.py. Responses may come from other systems;
they need no token ids.
`matrix` compares all with all, several checkpoints or systems, and writes the game between them: see
`analysis.matrix.play`.
"""

import json
from functools import partial
from pathlib import Path

from analysis.comparisons import comparison_jobs, write_summaries
from analysis.matrix import MEASURES, cell_paths, draw_matrix, play, print_matrix, short_names, win_probs_by_prompt
from judges.base import JudgeConfig
from judges.panel import judge_files
from records import Prompt, read, writer
from utils import (
    StageError,
    check_at_least,
    check_output,
    file_lists,
    first_line,
    log,
    run,
    split_list,
    write_text,
)
from vllm_model import Sampler, SamplerConfig, check_top_p
from workers.pool import map_files


def alpaca_eval(output: str):
    """Write AlpacaEval's 805 instructions as a prompt file.

    Args:
        output: prompt file
    """
    from huggingface_hub import hf_hub_download

    try:  # the Hub's plain JSON, no data set script
        source = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
    except Exception as error:  # the Hub's client raises many kinds of errors; all mean that there is no file
        raise StageError(
            f"AlpacaEval's instructions could not be fetched from the Hub ({first_line(error)}); "
            "give a prompt file with --input"
        ) from None
    with open(source, encoding="utf-8") as file:
        rows = json.load(file)
    with writer(output, Prompt) as write:
        for number, row in enumerate(rows):
            write({"prompt_id": f"alpaca_eval-{number}", "prompt": row["instruction"], "dataset": row["dataset"]})


def generate(output: str, input: str = "", temperature: float = 0.7, top_p: float = 0.95, **sampler: SamplerConfig):
    """One response to every prompt of an evaluation set.

    Args:
        output: responses file
        input: prompt file; default: AlpacaEval's instructions, kept beside the output
        temperature: sampling temperature
        top_p: nucleus mass
    """
    check_at_least(0, temperature=temperature)
    check_top_p(top_p)
    check_output("output", output)
    if not input:
        input = str(Path(output).with_name("alpaca_eval.jsonl"))
        if not Path(input).exists():
            alpaca_eval(input)
    (source,), (target,) = file_lists(input=input, output=output)
    config = SamplerConfig(**sampler)
    make_work = partial(Sampler, config, num_samples=[1], temperature=[temperature], top_p=[top_p])
    fingerprint = config.fingerprint() | {"num_samples": 1, "temperature": temperature, "top_p": top_p}
    map_files([(partial(read, source, Prompt), target, fingerprint)], make_work, config, "responses")


def judge_responses(files: list, config: JudgeConfig, seed: int):
    """Judge (responses, baseline, output) files with one start of the judge; write the outputs and their summaries."""
    judge_files(comparison_jobs(files), config, "comparing")
    write_summaries(files, seed)


def compare(responses: str, baseline: str, output: str, seed: int = 0, **judge: JudgeConfig):
    """Win rates of responses over baselines, judged in both orders, several comparisons with one start of the judge.

    Args:
        responses: responses file(s), comma-separated
        baseline: responses file(s) to beat, as many
        output: comparison file(s), as many; the summary goes beside each, ending in .json
        seed: of the bootstrap
    """
    files = list(zip(*file_lists(responses=responses, baseline=baseline, output=output)))
    judge_responses(files, JudgeConfig(**judge), seed)


def matrix(
    responses: str, output: str, names: str = "", measure: str = "mean_win_prob", seed: int = 0, **judge: JudgeConfig
):
    """All against all: every two sets of responses judged in both orders, and the game between them.

    It answers whether the last one wins at least half against every other. What has been judged before, between the
    same responses by the same judge, is not judged again.

    Args:
        responses: responses files to the same prompts, comma-separated, the last checkpoint last
        output: result, ending in .json; the heat map goes beside it (.svg), the judgements to cells/
        names: one for each file, comma-separated; default: from the paths
        measure: mean_win_prob, the game's payoff, or win_rate, the share of prompts with a probability above 1/2, ties
            half
        seed: of the bootstrap
    """
    paths, target = file_lists(responses=responses)[0], Path(output)
    labels = split_list(names) or short_names(paths)
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise StageError(f"--responses should be two different files or more, comma-separated, got {responses}")
    if len(labels) != len(paths) or len(set(labels)) < len(labels):
        raise StageError(f"--names should be {len(paths)} different names, one a file, got {', '.join(labels)}")
    if measure not in MEASURES:
        raise StageError(f"--measure should be one of {', '.join(MEASURES)}, got {measure}")
    if target.suffix != ".json":
        raise StageError(f"--output should end in .json, got {output}")
    config = JudgeConfig(**judge)
    judged_by = [member.fingerprint() for member in config.members()] + config.weights()
    cells = cell_paths(paths, judged_by, target.parent / "cells")
    missing = {path: pair for pair, path in cells.items() if not path.with_suffix(".json").exists()}
    log.info("%d comparisons, %d of them judged before", len(cells), len(cells) - len(missing))
    if missing:
        judge_responses([(paths[i], paths[j], path) for path, (i, j) in missing.items()], config, seed)
    result = {
        "names": labels,
        "responses": list(map(str, paths)),
        "judge": config.judge,
        "measure": measure,
        **play(*win_probs_by_prompt(cells, len(paths)), measure, seed),
    }
    write_text(target.with_suffix(".svg"), draw_matrix(result, whole_file=True))
    write_text(target, json.dumps(result, indent=2) + "\n")
    print_matrix(result)


if __name__ == "__main__":
    run(alpaca_eval, generate, compare, matrix)
