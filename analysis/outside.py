"""Others' outputs as responses: AlpacaEval's model outputs, a JSON list of {instruction, output, generator}.

So are AlpacaEval's reference outputs on the Hub (data set tatsu-lab/alpaca_eval: alpaca_eval.json,
alpaca_eval_gpt4_baseline.json) and the model_outputs.json of its leaderboard's models. They have no prompt_id and not
always the same order, so they are matched with our responses by the instruction's text.
"""

import codecs
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import msgspec

from utils import StageError, check_input, fingerprint


class Output(TypedDict):
    instruction: str
    output: str


def read_outputs(path: str | Path) -> list[dict]:
    """The outputs of a file as responses records, in its order: prompt_id (made from the text), prompt, samples.

    Raises StageError for a file that is missing or of another kind, and for an instruction that occurs twice.
    """
    check_input(path)
    try:
        outputs = msgspec.json.decode(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8), type=list[Output])
    except ValueError as error:
        raise StageError(f"{path}: should be a JSON list of {{instruction, output}} ({error})") from None
    if not outputs:
        raise StageError(f"{path}: no outputs")
    prompt, count = Counter(row["instruction"] for row in outputs).most_common(1)[0]
    if count > 1:
        raise StageError(f"{path}: an instruction occurs {count} times: {prompt[:100]!r}")
    return [
        {
            "prompt_id": fingerprint(row["instruction"]),
            "prompt": row["instruction"],
            "samples": [{"text": row["output"]}],
        }
        for row in outputs
    ]


def align(responses: Iterable[dict], outputs: Iterable[dict], source: str | Path = "the baseline") -> list[dict]:
    """The outputs to our prompts: records in our responses' order, with our prompt_id and prompt and their samples.

    An output belongs to a prompt when their texts are the same, or else when they are without the white space around
    them. Outputs to other prompts are left out.

    Raises StageError, which names `source`, for prompts without an output and for ones that several outputs fit.
    """
    exact, stripped = {}, {}
    for record in outputs:
        exact[record["prompt"]] = record
        stripped.setdefault(record["prompt"].strip(), []).append(record)
    aligned, missing, ambiguous = [], [], []
    for ours in responses:
        prompt = ours["prompt"]
        fitting = [exact[prompt]] if prompt in exact else stripped.get(prompt.strip(), [])
        if len(fitting) == 1:
            aligned.append({"prompt_id": ours["prompt_id"], "prompt": prompt, "samples": fitting[0]["samples"]})
        else:
            (ambiguous if fitting else missing).append(ours["prompt_id"])
    for ids, what in ((missing, "no output"), (ambiguous, "several outputs")):
        if ids:
            raise StageError(f"{source} has {what} to {len(ids)} of our prompts, first {', '.join(ids[:10])}")
    return aligned
