"""A generative judge behind a server with OpenAI's chat completions (vLLM's own, or a hosted one)."""

import math
import os
import re
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from judges.base import Judge, JudgeConfig, check_labels, fill_template, orders, read_template, win_matrix
from records import Record, read
from utils import StageError, log, split_list
from workers.journal import Skipped, listing_of


class ServerJudge(Judge):
    """A generative judge behind a server; threads ask it, `--api_concurrency` at once.

    It answers freely; P is read where the two labels part (`read_answer`), from the log-probabilities where the
    server gives them, else from the answer alone, as 0 or 1. `usage` counts requests and tokens. The special tokens'
    spellings inside a response are the server's affair.
    """

    needs_engine = False
    settings = ("template", "labels")  # the model is known by its name, wherever its server is
    asked = {"temperature": 0, "max_completion_tokens": 16, "logprobs": True, "top_logprobs": 20}

    @staticmethod
    def check(config: JudgeConfig) -> None:
        check_labels(config)
        if min(config.api_concurrency, config.api_retries + 1) < 1:
            raise StageError("--api_concurrency should be at least 1 and --api_retries at least 0")
        config.api_base = config.api_base or os.environ.get("OPENAI_BASE_URL", "")
        if not config.api_base and not os.environ.get("OPENAI_API_KEY"):
            raise StageError("OPENAI_API_KEY is not set; OpenAI wants one. For another server give --api_base")
        # One process; small chunks, as finished ones are kept and the others paid for again.
        config.engine, config.gpus, config.tensor_parallel_size, config.cpu_workers = "local", "none", 1, 1
        config.chunk_size = min(config.chunk_size, 8)

    @staticmethod
    def report(paths: list[Path]) -> None:
        """Log the tokens that a server has counted for these outputs, earlier runs included."""
        files = [file for path in paths for file in (path, listing_of(path)) if Path(file).exists()]
        usage = [record["usage"] for file in files for record in read(file, Record) if "usage" in record]
        log.info(
            "%(requests)d requests, %(prompt_tokens)d prompt tokens, %(completion_tokens)d completion tokens",
            {name: sum(one[name] for one in usage) for name in ("requests", "prompt_tokens", "completion_tokens")},
        )

    def __init__(self, config: JudgeConfig):
        import openai

        key, base = os.environ.get("OPENAI_API_KEY"), config.api_base or None
        self.errors, self.config, self.labels = openai, config, split_list(config.labels)
        self.template, self.address = read_template(config.template), base or "OpenAI"
        self.client = openai.OpenAI(base_url=base, api_key=key or "none", max_retries=config.api_retries, timeout=300)
        self.quiet_until, self.lock = 0.0, threading.Lock()
        self.answers = {True: 0, False: 0}  # with one of the labels, with something else
        self.threads = ThreadPoolExecutor(config.api_concurrency)
        self.begun = {}  # by key: (record, futures of its answers)

    def begin(self, key, task: tuple[int, dict]) -> None:
        _, record = task
        texts = [fill_template(self.template, record["prompt"], *order) for order in orders(record)]
        self.begun[key] = record, [self.threads.submit(self.ask, text) for text in texts]

    def step(self) -> list:
        asked = [future for _, futures in self.begun.values() for future in futures if not future.done()]
        wait(asked, timeout=1, return_when=FIRST_COMPLETED)
        return [key for key, (_, futures) in self.begun.items() if self._is_ready(futures)]

    @staticmethod
    def _is_ready(futures):
        """Whether all is answered, or an exception has come: that is told at once."""
        done = [future for future in futures if future.done()]
        return len(done) == len(futures) or any(future.exception() for future in done)

    def result(self, key) -> dict | Skipped:
        record, futures = self.begun.pop(key)
        failed = next((future for future in futures if future.done() and future.exception()), None)
        outputs = [future.result() for future in ([failed] if failed else futures)]
        counts = [sum(usage[n] for _, usage in outputs) for n in range(2)]
        usage = {"requests": len(outputs), "prompt_tokens": counts[0], "completion_tokens": counts[1]}
        answers = [answer for answer, _ in outputs]
        refused = next((answer for answer in answers if isinstance(answer, str)), None)
        if refused:
            return Skipped(record["prompt_id"], refused, usage)
        texts = [sample["text"] for sample in record["samples"]]
        return record | win_matrix(texts, dict(zip(orders(record), answers))) | {"usage": usage}

    def ask(self, prompt):
        """((P(first label), mass of both) or why the record is skipped, (prompt tokens, completion tokens))."""
        while True:
            time.sleep(max(0.0, self.quiet_until - time.monotonic()))
            asked = dict(self.asked)
            try:
                response = self.client.chat.completions.with_raw_response.create(
                    model=self.config.judge, messages=[{"role": "user", "content": prompt}], **asked
                )
                break
            except self.errors.BadRequestError as error:
                if "context length" in str(error) or "context_length" in str(error):
                    return f"the judging prompt is too long for {self.config.judge}", (0, 0)
                if not self.ask_for_less(asked, str(error)):
                    reason = f"{self.address} refuses the request for {self.config.judge}: {self.without_key(error)}"
                    if self.config.on_error == "skip":
                        return reason, (0, 0)
                    raise StageError(f"{reason}\n--on_error skip leaves such records out") from None
            except self.errors.APIError as error:
                raise StageError(
                    f"{self.address} did not answer for {self.config.judge}: {self.without_key(error)}. What is "
                    "finished is kept; once the cause is mended, the same command goes on"
                ) from None
        self.obey(response.headers)
        completion = response.parse()
        usage = (completion.usage.prompt_tokens, completion.usage.completion_tokens) if completion.usage else (0, 0)
        choice = completion.choices[0]
        if choice.logprobs and choice.logprobs.content:
            tokens = [
                (one.token, [(top.token, top.logprob) for top in one.top_logprobs]) for one in choice.logprobs.content
            ]
            judgement = read_answer(tokens, self.labels)
        else:
            judgement = parse_answer(choice.message.content or "", self.labels)
        with self.lock:
            self.answers[judgement is not None] += 1
            if self.answers[False] >= 20 and not self.answers[True]:
                raise StageError(
                    f"{self.config.judge} does not answer with one of the labels, but {choice.message.content!r}; "
                    "are --template and --labels its own?"
                )
        if judgement is None:
            return f"{self.config.judge} answered {choice.message.content!r}, which is none of its labels", usage
        return judgement, usage

    def ask_for_less(self, asked, message):
        """Some servers refuse what others want to be told: leave out the parameter that the message names, if it
        does."""
        with self.lock:
            if self.asked != asked:  # another thread has
                return True
            if "top_logprobs" in message and self.asked.get("top_logprobs", 0) > 5:
                self.asked = self.asked | {"top_logprobs": 5}
                return True
            named = [name for name in self.asked if name in message]
            if not named:
                return False
            dropped = {"logprobs", "top_logprobs"} if "logprobs" in named[0] else {named[0]}
            self.asked = {name: value for name, value in self.asked.items() if name not in dropped}
            return True

    def obey(self, headers):
        """Pause all requests where the server says that none is left for now; the client obeys `retry-after` itself."""
        for kind in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
                pause = duration(headers.get(f"x-ratelimit-reset-{kind}", "1s"))
                self.quiet_until = max(self.quiet_until, time.monotonic() + pause)

    @staticmethod
    def without_key(error):
        key = os.environ.get("OPENAI_API_KEY")
        return str(error).replace(key, "***") if key else str(error)


def duration(text):
    """Seconds of `6m0s`, `1.5s`, `20ms`, `3`."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|h|m|s|)", text))


def read_answer(tokens, labels):
    """(P(first label), probability of both labels together) where the answer's labels part.

    Args:
        tokens: [(token that was answered, [(candidate, log-probability), ...])] as text, the most probable candidates.
        labels: the two answers.

    Returns:
        None when the answer leaves both labels before they part.
    """

    def sides(text):
        text = text.lstrip()
        return [bool(text) and (label.startswith(text) or text.startswith(label)) for label in labels]

    said = ""
    for token, candidates in tokens:
        found = [(sides(said + candidate), math.exp(logprob)) for candidate, logprob in candidates]
        if not (said + token).strip() or all(sides(said + token)):
            said += token
            continue
        first, second = (sum(p for on, p in found if on[side] and not on[1 - side]) for side in range(2))
        return (first / (first + second), first + second) if first + second > 0 else None
    return None


def parse_answer(answer, labels):
    """(1 or 0, 1) for an answer that begins with the first or the second label, else None."""
    begins = [answer.strip().startswith(label) for label in labels]
    return (float(begins[0]), 1.0) if sum(begins) == 1 else None
