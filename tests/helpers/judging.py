"""What a generative judge should say, by a plain forward pass, and scoring.py as tests of judges start it."""

import os
import subprocess
import sys

from data_utils import encode_prompt, encode_text, load_tokenizer, resolve_model
from helpers.loop import ROOT
from helpers.training import words
from judges.base import fill_template, read_template
from judges.generative import split_labels
from training.models import load_model


class PlainJudge:
    """The judge of a folder with the template and the labels of OffsetBias."""

    def __init__(self, folder):
        directory = resolve_model(str(folder))
        self.tokenizer, self.model = load_tokenizer(directory), load_model(directory).eval()
        self.template = read_template(ROOT / "prompts/offsetbias.txt")
        labels = (encode_text(self.tokenizer, label) for label in ("Output (a)", "Output (b)"))
        self.prefix, self.labels = split_labels(*labels)

    def __call__(self, prompt, first, second):
        """(P(first beats second) in this order, probability of both labels together)."""
        import torch

        text = fill_template(self.template, prompt, first, second)
        with torch.no_grad():
            ids = torch.tensor([encode_prompt(self.tokenizer, text) + self.prefix])
            both = self.model(input_ids=ids).logits[0, -1].softmax(0)[list(self.labels)]
        return (both[0] / both.sum()).item(), both.sum().item()


def samples(count):
    """Records with three answers each, two of them the same in the last one."""
    from game import ANSWERS

    return [
        {
            "prompt_id": str(i),
            "prompt": f"Where to go on day {i}?",
            "prompt_token_ids": [1],
            "samples": [
                {"text": text, "token_ids": [3], "finish_reason": "stop"}
                for text in (ANSWERS if i < count - 1 else (ANSWERS[0], ANSWERS[1], ANSWERS[0]))
            ],
        }
        for i in range(count)
    ]


def score(source, output, check=True, environment=None, **flags):
    """What scoring.py prints; with `check` it has to succeed."""
    flags = {"input": source, "output": output, "gpus": "none", "max_prompt_tokens": 1000} | flags
    done = subprocess.run(
        [sys.executable, "scoring.py", *words(**flags)],
        cwd=ROOT,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | (environment or {}),
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout
