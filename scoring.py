"""Score responses against each other with a judge: samples -> scores.

    python scoring.py --judge JUDGE --input train.samples.jsonl --output train.scores.jsonl

Input: the samples file of sampling.py, K samples a prompt.
Output, in input order: the input's fields and
    win_probs   K x K lists, [i][j] = P(sample i beats sample j), mean of both presentation orders, null where i = j
    order_gap   mean absolute disagreement of the two orders, null when all K responses are identical
    label_mass  mean probability that the judge puts on its two labels; far below 1, it is answering something else

With --responses it also compares policies, exactly as eval.py compare does. This is here because it takes minutes to
start a large judge: comal.sh lets the comparisons of an iteration wait until the judge is started anyway, to score the
samples of the next one, so that every iteration starts the judge once and not twice.

All ordered pairs of different responses are judged, each once. A record whose judging prompt is too long for the
judge is never cut: it is left out, counted, and listed in `<output>.skipped.jsonl`.
Exit code 0 means that every other record is in the output.
"""

from functools import partial

from analysis.comparisons import comparison_jobs, judge_figures, write_summaries
from judges.base import JudgeConfig
from judges.panel import judge_files
from records import Samples, Scores, read
from utils import file_lists, log, run


def main(input: str, output: str, responses: str = "", baseline: str = "", compared: str = "", **judge: JudgeConfig):
    """Compare all responses to a prompt with each other, in both orders, with one start of the judge.

    Args:
        input: samples file(s), comma-separated
        output: scores file(s), as many
        responses: responses file(s) to compare with baselines, as by eval.py compare
        baseline: as many
        compared: comparison file(s), as many
    """
    inputs, outputs = file_lists(input=input, output=output)
    comparisons = list(zip(*file_lists(responses=responses, baseline=baseline, compared=compared))) if responses else []
    config = JudgeConfig(**judge)
    jobs = [(partial(read, path, Samples), target) for path, target in zip(inputs, outputs)]
    judge_files(jobs + comparison_jobs(comparisons), config, "scoring")
    write_summaries(comparisons, config.judged_by())
    figures = judge_figures(record for path in outputs for record in read(path, Scores))
    if figures["label_mass"] is not None and all(member.kind.has_labels for member in config.members()):
        log.info(
            "the judge's position bias is %(order_gap).3f (the mean difference between its two orders); it puts "
            "%(label_mass).3f of its probability on its labels",
            figures,
        )
        if figures["label_mass"] < 0.5:
            log.warning("the judge mostly answers something else than its labels: are --template and --labels its own?")


if __name__ == "__main__":
    run(main)
