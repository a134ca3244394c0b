"""A generative judge: a model that answers with one of two labels."""

import math

from data_utils import encode_prompt, encode_text, load_tokenizer
from judges.base import (
    Judge,
    JudgeConfig,
    check_labels,
    fill_template,
    orders,
    read_template,
    sigmoid,
    too_long,
    win_matrix,
)
from utils import StageError, split_list
from vllm_model import Engine, EngineWork

MIN_LABEL_MASS = 0.05  # mean probability of both labels together; below it a model is no judge
ENOUGH = {"records": 8, "answers": 20}  # after so many it is looked at


class GenerativeJudge(EngineWork, Judge):
    """A model that answers with one of two labels.

    P(first beats second) is read at the one position where the two labels' token ids part: everything before it
    (the chat prompt and the labels' common beginning, `Output (`) is given, and the log-probabilities of exactly
    the two deciding tokens are asked for, so neither can fall out of a top-k list. Each ordered pair of *different*
    texts is judged once; identical texts get 1/2.

    Raises StageError for labels that no single position decides.
    """

    settings = ("dtype", "engine_args", "judge_tokenizer", "template", "labels", "max_prompt_tokens")
    check = staticmethod(check_labels)

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.template, self.max_prompt_tokens = read_template(config.template), config.max_prompt_tokens
        self.tokenizer = load_tokenizer(config.judge_path, config.tokenizer_path)
        labels = (encode_text(self.tokenizer, label) for label in split_list(config.labels))
        self.label_prefix, self.label_ids = split_labels(*labels)
        self.records, self.answers, self.mass = 0, 0, 0.0  # how many so far, and the sum of the label masses
        self.engine = Engine(config.judge_path, config.tokenizer_path, self.max_prompt_tokens + 1, config, "judge")

    def requests(self, job: int, record: dict) -> list[tuple] | str:
        from vllm import SamplingParams

        prompts = [self.encode(record["prompt"], first, second) for first, second in orders(record)]
        asked = dict(max_tokens=1, temperature=0, logprob_token_ids=list(self.label_ids), detokenize=False)
        return too_long(prompts, self.max_prompt_tokens) or [(prompt, SamplingParams(**asked)) for prompt in prompts]

    def encode(self, prompt: str, first: str, second: str) -> list[int]:
        """The token ids of a judging prompt, up to the position that decides."""
        return encode_prompt(self.tokenizer, fill_template(self.template, prompt, first, second)) + self.label_prefix

    def read(self, record: dict, outputs: list) -> dict:
        answers = [self.read_labels(output) for output in outputs]
        self.check_mass([mass for _, mass in answers])
        texts = [sample["text"] for sample in record["samples"]]
        return record | win_matrix(texts, dict(zip(orders(record), answers)))

    def check_mass(self, masses: list[float]) -> None:
        """Count the label masses of a record; raise StageError once the model turns out not to be a judge."""
        self.records, self.answers, self.mass = self.records + 1, self.answers + len(masses), self.mass + sum(masses)
        enough = self.records >= ENOUGH["records"] and self.answers >= ENOUGH["answers"]
        if enough and self.mass / self.answers < MIN_LABEL_MASS:
            raise StageError(
                f"{self.engine.model} puts {self.mass / self.answers:.2g} of its probability on the two labels, so it "
                "does not answer with one of them; is it a judge, and are --template and --labels its own?"
            )

    def read_labels(self, output) -> tuple[float, float]:
        """(P(first label), probability of both labels together)."""
        logprobs = output.outputs[0].logprobs[0]
        first, second = (logprobs[label].logprob for label in self.label_ids)
        return sigmoid(first - second), math.exp(first) + math.exp(second)


def split_labels(first_ids: list[int], second_ids: list[int]) -> tuple[list[int], tuple[int, int]]:
    """(common beginning, (deciding token of the first label, of the second)) of two labels' token ids.

    Raises StageError when one label is the beginning of the other: no single position decides then.
    """
    for position, pair in enumerate(zip(first_ids, second_ids)):
        if pair[0] != pair[1]:
            return first_ids[:position], pair
    raise StageError(f"the judge's labels {first_ids} and {second_ids} (token ids) do not differ at any position")
