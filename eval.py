"""Evaluate policies: responses to an evaluation set, and win rates between two or more sets of responses.

    python eval.py generate --model CKPT --output eval/responses.jsonl [--input prompts.jsonl]
    python eval.py compare --judge JUDGE --responses eval/responses.jsonl --baseline start/responses.jsonl \\
        --output eval/vs_start.jsonl
    python eval.py matrix --judge JUDGE --models MODEL,MODEL,MODEL --output matrix.json

`generate` writes a samples file (see sampling.py) with one response to each prompt; without --input the prompts are
AlpacaEval's 805 instructions, which `alpaca_eval` writes as a prompt file.
`compare` writes a comparison file and its summary: see analysis/comparisons.py. Responses may come from other systems;
they need no token ids.
`matrix` compares all with all, several checkpoints or systems, and writes the game between them: see
`analysis.matrix.play`. It takes models, whose responses it generates, and files of responses.
"""

import json
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

from analysis.comparisons import comparison_jobs, holds_outputs, judged_before, write_summaries
from analysis.length_control import read_difficulty
from analysis.matrix import (
    MEASURES,
    cell_paths,
    draw_matrix,
    play,
    print_best,
    print_matrix,
    short_names,
    win_probs_by_prompt,
)
from data_utils import has_tokenizer
from judges.base import JudgeConfig
from judges.panel import judge_files
from records import Prompt, Responses, read, writer
from utils import (
    StageError,
    check_at_least,
    check_input,
    check_output,
    file_lists,
    fingerprint,
    first_line,
    log,
    run,
    split_list,
    write_text,
)
from vllm_model import Sampler, SamplerConfig, check_top_p
from workers.engine_settings import EngineConfig
from workers.pool import map_files

# Baselines that are fetched by name: files of the Hub's data set tatsu-lab/alpaca_eval.
BASELINES = {"alpaca_eval_gpt4": "alpaca_eval_gpt4_baseline.json"}


def alpaca_eval_file(name: str, instead: str) -> str:
    """The path of a file of the Hub's data set tatsu-lab/alpaca_eval. Raises StageError, which says what to give
    `instead`, where the Hub does not provide it."""
    from huggingface_hub import hf_hub_download

    try:  # the Hub's plain JSON, no data set script
        return hf_hub_download("tatsu-lab/alpaca_eval", name, repo_type="dataset")
    except Exception as error:  # the Hub's client raises many kinds of errors; all mean that there is no file
        raise StageError(
            f"AlpacaEval's {name} could not be fetched from the Hub ({first_line(error)}); {instead}"
        ) from None


def alpaca_eval(output: str):
    """Write AlpacaEval's 805 instructions as a prompt file.

    Args:
        output: prompt file
    """
    with open(alpaca_eval_file("alpaca_eval.json", "give a prompt file with --input"), encoding="utf-8") as file:
        rows = json.load(file)
    with writer(output, Prompt) as write:
        for number, row in enumerate(rows):
            write({"prompt_id": f"alpaca_eval-{number}", "prompt": row["instruction"], "dataset": row["dataset"]})


def prompts_beside(output: str, input: str) -> str:
    """The prompt file: `input`, or else AlpacaEval's instructions, which are kept beside the output."""
    if not input:
        input = str(Path(output).with_name("alpaca_eval.jsonl"))
        if not Path(input).exists():
            alpaca_eval(input)
    return input


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
    (source,), (target,) = file_lists(input=prompts_beside(output, input), output=output)
    write_responses(source, target, SamplerConfig(**sampler), temperature, top_p)


def responses_settings(config: SamplerConfig, temperature: float, top_p: float) -> dict:
    """{setting: value} of all that responses depend on, besides the prompts."""
    return config.fingerprint() | {"num_samples": 1, "temperature": temperature, "top_p": top_p}


def write_responses(source: Path, target: Path, config: SamplerConfig, temperature: float, top_p: float):
    """Write one response to each prompt of the file `source`."""
    make_work = partial(Sampler, config, num_samples=[1], temperature=[temperature], top_p=[top_p])
    job = partial(read, source, Prompt), target, responses_settings(config, temperature, top_p)
    map_files([job], make_work, config, "responses")


def compare(
    responses: str,
    baseline: str,
    output: str,
    length_controlled: bool = False,
    difficulty: str = "",
    seed: int = 0,
    **judge: JudgeConfig,
):
    """Win rates of responses over baselines, judged in both orders, several comparisons with one start of the judge.

    An output that exists already, of the same responses by the same judge, is not judged again; its summary is written
    anew.

    Args:
        responses: responses file(s), comma-separated
        baseline: responses file(s) to beat, as many; also model outputs in AlpacaEval's format, a JSON list of
            {instruction, output}; alpaca_eval_gpt4: its reference outputs, fetched from the Hub
        output: comparison file(s), as many; the summary goes beside each, ending in .json
        length_controlled: add the length-controlled win rate to the summary; against model outputs, and with
            --difficulty, it is always there
        difficulty: AlpacaEval's instruction_difficulty.csv or df_gamed.csv, for the length-controlled win rate; without
            it the instructions count as equally difficult
        seed: of the bootstrap
    """
    baselines = [
        alpaca_eval_file(BASELINES[name], "give its path with --baseline") if name in BASELINES else name
        for name in split_list(baseline)
    ]
    files = list(zip(*file_lists(responses=responses, baseline=",".join(baselines), output=output)))
    names = list(zip(split_list(responses), split_list(baseline)))
    if difficulty:  # checked before anything is judged
        for ours, _, _ in files:
            read_difficulty(difficulty, [record["prompt_id"] for record in read(ours, Responses)])
    config = JudgeConfig(**judge)
    judged_by = config.judged_by()
    missing = [paths for paths in files if not judged_before(*paths, judged_by)]
    judge_missing(missing, len(files), config)
    write_summaries(files, judged_by, seed, names, length_controlled, difficulty)


def judge_missing(missing: list, total: int, judge: JudgeConfig):
    """Judge those (responses, baseline, output) files of `total` that were not judged before."""
    log.info("comparisons: %d, judged before: %d", total, total - len(missing))
    if missing:
        judge_files(comparison_jobs(missing), judge, "comparing")


def matrix(
    output: str,
    responses: str = "",
    models: str = "",
    names: str = "",
    input: str = "",
    tokenizer: str = "",
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_input_tokens: int = 2048,
    max_new_tokens: int = 2048,
    measure: str = "mean_win_prob",
    seed: int = 0,
    **judge: JudgeConfig,
):
    """All against all: every two sets of responses judged in both orders, and the game between them.

    It answers which checkpoint has the best worst case, and whether the last one wins at least half against every
    other. What has been judged before, between the same responses by the same judge, is not judged again, and no
    model's responses are generated twice. What is said about engines holds for the judge and for --models.

    Args:
        output: result, ending in .json; the heat map goes beside it (.svg), the judgements to cells/, the responses of
            models to responses/
        responses: responses files to the same prompts, comma-separated, the last checkpoint last
        models: checkpoint directories or Hub ids, comma-separated, which come after the files of --responses; their
            responses are generated, one model after the other
        names: one for each file and model, comma-separated; default: from the paths
        input: prompt file for --models; default: AlpacaEval's instructions, kept beside the output
        tokenizer: directory or Hub id, for those of --models that have none
        temperature: of --models
        top_p: nucleus mass, of --models
        max_input_tokens: longer prompts are skipped and listed, for --models
        max_new_tokens: responses of --models end here at the latest
        measure: mean_win_prob, the game's payoff, or win_rate, the share of prompts with a probability above 1/2, ties
            half
        seed: of the responses of --models and of the bootstrap
    """
    given, target = file_lists(responses=responses)[0] if split_list(responses) else [], Path(output)
    labels = check_matrix([*given, *split_list(models)], names, measure, target)
    config, paths = JudgeConfig(**judge), given
    if models:
        engine = {field.name: judge[field.name] for field in fields(EngineConfig) if field.name in judge}
        length = {"max_prompt_tokens": max_input_tokens, "max_new_tokens": max_new_tokens}
        sampler = engine | length | {"tokenizer": tokenizer, "seed": seed}
        source = prompts_beside(output, input)
        paths = given + model_responses(split_list(models), source, target, temperature, top_p, sampler)
    cells = judged_cells(paths, labels, config, target.parent / "cells", seed)
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
    print_best(result)


def judged_cells(paths: list, labels: list, judge: JudgeConfig, folder: Path, seed: int) -> dict:
    """The `analysis.matrix.cell_paths` of responses files; those that were not judged before are. The log calls the
    files by their labels."""
    judged_by = judge.judged_by()
    cells = cell_paths(paths, judged_by, folder)
    missing = {pair: path for pair, path in cells.items() if not path.with_suffix(".json").exists()}
    files = [(paths[i], paths[j], path) for (i, j), path in missing.items()]
    judge_missing(files, len(cells), judge)
    write_summaries(files, judged_by, seed, [(labels[i], labels[j]) for i, j in missing])
    return cells


def check_matrix(players: list, names: str, measure: str, target: Path) -> list:
    """The names of the players, which are response files (Path) and models (text). Raises StageError for flags that
    do not go together."""
    labels = split_list(names) or short_names(players)
    twice = [str(player) for player, count in Counter(map(str, players)).items() if count > 1]
    if len(players) < 2 or twice:
        raise StageError(
            "--responses and --models should together name two or more different files and models, got "
            + (f"{twice[0]} twice" if twice else str(len(players)))
        )
    if len(labels) != len(players) or len(set(labels)) < len(labels):
        raise StageError(
            f"--names should be {len(players)} different names, one a file or model, got {', '.join(labels)}"
        )
    for path in players:
        if isinstance(path, Path) and holds_outputs(path):
            raise StageError(f"--responses {path} is a list of model outputs, which only compare takes, as --baseline")
    if measure not in MEASURES:
        raise StageError(f"--measure should be one of {', '.join(MEASURES)}, got {measure}")
    if target.suffix != ".json":
        raise StageError(f"--output should end in .json, got {target}")
    return labels


def model_responses(models: list, source: str, output: Path, temperature: float, top_p: float, sampler: dict) -> list:
    """The responses files of models, in responses/ beside `output`; those that do not exist yet are generated.

    A file is named by the prompts in it and by all that the responses depend on, the contents of the model among it. So
    a model has one file, whether it comes from the Hub or from a folder.

    Args:
        models: checkpoint directories or Hub ids
        source: prompt file
        temperature, top_p: of sampling
        sampler: the other fields of SamplerConfig; its tokenizer is for models that have none

    Raises StageError, before anything is generated, for a model that is not there or has no tokenizer, and
    for two that are the same.
    """
    check_at_least(0, temperature=temperature)
    check_top_p(top_p)
    check_input(source)
    prompts = fingerprint(Path(source))
    found = {}
    for model in models:
        config = SamplerConfig(model=model, **sampler)
        if has_tokenizer(config.model_path):
            config.tokenizer = ""
        elif not config.tokenizer:
            raise StageError(f"there is no tokenizer beside {model}; name the one it was trained with (--tokenizer)")
        key = fingerprint([prompts, responses_settings(config, temperature, top_p)])
        path = output.parent / "responses" / f"{key}.jsonl"
        if path in found:
            raise StageError(f"--models {found[path].model} and {model} are the same model; name one of them")
        found[path] = config
    missing = {path: config for path, config in found.items() if not path.exists()}
    log.info("models: %d, with responses from before: %d", len(found), len(found) - len(missing))
    for path, config in missing.items():
        log.info("responses of %s", config.model)
        write_responses(Path(source), path, config, temperature, top_p)
    return list(found)


if __name__ == "__main__":
    run(alpaca_eval, generate, compare, matrix)
