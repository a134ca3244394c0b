"""Judges: P(first response beats second), from a generative judge, reward models, a server, or a panel of them.

A judge is the work of a worker process (`workers.map_files`): a task is (job number, record with `prompt` and
`samples`), its result the record with
    win_probs   K x K, [i][j] = P(sample i beats sample j), null on the diagonal, 1/2 between identical texts
    order_gap   mean absolute disagreement of the two presentation orders; null when all K texts are identical; 0 where
                a judge sees no order
    label_mass  mean probability of the judge's two labels together, null likewise; 1 where it is not asked for labels
and what else it has to tell: `rewards`, `usage`, `panel`. `JUDGE_TYPES` names them; `judge_files` judges files.
"""

import math
import os
import re
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from utils import StageError, fingerprint, jsonl_writer, log, read_jsonl, split_list
from vllm_model import Engine, EngineConfig, EngineWork, whole_model_fingerprint
from workers.pool import digest_of, list_skipped, listing_of, map_files

MIN_LABEL_MASS = 0.05  # mean probability of both labels together; below it a model is no judge


@dataclass(kw_only=True)
class JudgeConfig(EngineConfig):
    """The judge that compares, and the engines' settings.

    Several judges, comma-separated, are a panel: P is the weighted mean of theirs. The flags that describe a judge take
    one value for all or as many as there are judges.

    Args:
        judge: checkpoint directory or Hub id of the judge; the model's name on a server; several: a panel
        judge_type: offsetbias-lm, a generative judge that answers with one of two labels; bt-mixture, reward models
            (sequence classifiers with one output); openai, a server with OpenAI's chat completions
        judge_weights: of the members of a panel; default: equal
        judge_tokenizer: directory or Hub id; default: the judge's
        template: file with {input}, {output_1}, {output_2}
        labels: the two answers, comma-separated; the first says that the first output is better; of several judges
            separated by semicolons
        reward_temperature: T of sigmoid((r1 - r2) / T)
        max_prompt_tokens: records with a longer judging prompt are skipped and listed
        api_base: the server's address, ending in /v1; default: OPENAI_BASE_URL, else OpenAI's. The key is
            OPENAI_API_KEY
        api_concurrency: requests at once
        api_retries: of a request that the server refuses for the moment, or that does not reach it, up to 8 s apart
        api_price: dollars a million prompt tokens and a million completion tokens, comma-separated, to tell the cost
    """

    judge: str
    judge_type: str = "offsetbias-lm"
    judge_weights: str = ""
    judge_tokenizer: str = ""
    template: str = "prompts/offsetbias.txt"
    labels: str = "Output (a),Output (b)"
    reward_temperature: str = "1"
    max_prompt_tokens: int = 8191
    api_base: str = ""
    api_concurrency: int = 32
    api_retries: int = 30
    api_price: str = ""

    def __post_init__(self):
        super().__post_init__()
        self.weights()
        self.prices()
        members = self.members()
        if len(members) > 1:  # each has checked itself
            return
        if self.judge_type not in JUDGE_TYPES:
            raise StageError(f"--judge_type should be one of {', '.join(JUDGE_TYPES)}, got {self.judge_type}")
        if self.judge_type == "bt-mixture":
            temperature(self)
        else:
            check_labels(self)
        if min(self.api_concurrency, self.api_retries + 1) < 1:
            raise StageError("--api_concurrency should be at least 1 and --api_retries at least 0")
        if self.judge_type == "openai":
            self.api_base = self.api_base or os.environ.get("OPENAI_BASE_URL", "")
            if not self.api_base and not os.environ.get("OPENAI_API_KEY"):
                raise StageError("OPENAI_API_KEY is not set; OpenAI wants one. For another server give --api_base")
            # One process; small chunks, as finished ones are kept and the others paid for again.
            self.engine, self.gpus, self.gpus_per_worker, self.cpu_workers = "local", "none", 1, 1
            self.chunk_size = min(self.chunk_size, 8)

    def members(self):
        """One JudgeConfig a judge, this one itself where there is just one."""
        judges = split_list(self.judge)
        if len(judges) < 2:
            return [self]
        found = [{"judge": judge, "judge_weights": ""} for judge in judges]
        for name in ("judge_type", "judge_tokenizer", "template", "reward_temperature", "labels"):
            value = getattr(self, name)
            values = value.split(";") if name == "labels" else split_list(value)
            if len(values) not in (0, 1, len(judges)):
                raise StageError(f"--{name} has {len(values)} values for {len(judges)} judges; give one, or one each")
            for number, member in enumerate(found):
                member[name] = values[number % len(values)] if values else ""
        return [replace(self, **member) for member in found]

    def weights(self):
        """A weight a judge, all together 1. Raises StageError for what are not weights."""
        judges, values = split_list(self.judge), split_list(self.judge_weights)
        try:
            weights = [float(value) for value in values] or [1.0] * max(1, len(judges))
        except ValueError:
            weights = []
        if len(weights) != max(1, len(judges)) or not all(0 < weight < math.inf for weight in weights):
            raise StageError(
                f"--judge_weights should be numbers greater than 0, as many as judges ({len(judges)}), "
                f"got {self.judge_weights}"
            )
        return [weight / sum(weights) for weight in weights]

    def prices(self):
        """Dollars a prompt token and a completion token, or None."""
        try:
            found = [float(value) / 1e6 for value in split_list(self.api_price)]
        except ValueError:
            found = [-1]
        if len(found) not in (0, 2) or any(price < 0 for price in found):
            raise StageError(
                f"--api_price should be two prices, dollars a million tokens: prompt,completion; got {self.api_price}"
            )
        return found or None

    def made_with(self):
        """{setting: value} of all that a judge's (not a panel's) results depend on."""
        settings, judge_type = super().made_with(), JUDGE_TYPES[self.judge_type]
        kept = {name: value for name, value in settings.items() if name in judge_type.settings}
        if "template" in kept:
            kept["template"] = fingerprint(read_template(self.template))
        local = judge_type is not ServerJudge
        return kept | {
            "judge_type": self.judge_type,
            "judge": whole_model_fingerprint(self.judge) if local else self.judge,
        }


def judge_files(jobs, config, description):
    """Judge files of records with `prompt` and `samples`; a panel's judges after each other, each with one start.

    Args:
        jobs: [(function that returns an iterator of records, output path)]
        config: JudgeConfig
        description: of the progress bar

    Raises StageError as `map_files` does.
    """
    members = config.members()
    if len(members) == 1:
        make_judge = partial(JUDGE_TYPES[config.judge_type], config)
        made_with = config.made_with()
        map_files([(*job, made_with) for job in jobs], make_judge, config, description)
        tell_usage([path for _, path in jobs], config)
        return
    digests = [digest_of(records()) for records, _ in jobs]
    made_with = [member.made_with() for member in members]
    parts = [
        [Path(f"{path}.{fingerprint([digest, own])}.partial") for own in made_with]
        for (_, path), digest in zip(jobs, digests)
    ]
    for number, member in enumerate(members):
        left = [(records, own[number]) for (records, _), own in zip(jobs, parts) if not own[number].exists()]
        if left:
            log.info("judge %d of %d: %s", number + 1, len(members), member.judge)
            judge_files(left, member, description)
    for (records, path), own in zip(jobs, parts):
        combine(records(), path, own, members, config.weights())
    for own in parts:  # only when all outputs are in place
        for part in own:
            part.unlink()
            listing_of(part).unlink(missing_ok=True)


def combine(records, path, parts, members, weights):
    """Write a panel's output from those of its members; a record that one of them skipped is skipped."""
    found, count = [read_jsonl(part) for part in parts], 0
    heads = [next(part, None) for part in found]
    reasons = [
        {record["prompt_id"]: record["skipped"] for record in read_jsonl(listing)} if listing.exists() else {}
        for listing in map(listing_of, parts)
    ]
    skipped = []
    with jsonl_writer(path) as write:
        for record in records:
            own = [head if head and head["prompt_id"] == record["prompt_id"] else None for head in heads]
            heads = [next(part, None) if judged else head for part, head, judged in zip(found, heads, own)]
            if all(own):
                write(record | panel(record, own, members, weights))
                count += 1
            else:
                member = own.index(None)
                reason = reasons[member].get(record["prompt_id"], "not judged")
                skipped.append({"prompt_id": record["prompt_id"], "skipped": f"{members[member].judge}: {reason}"})
    list_skipped(path, skipped)
    if not count:
        path.unlink()
        raise StageError(f"every record of {path} was skipped; see {listing_of(path)}")


def panel(record, judged, members, weights):
    """The fields of a panel: weighted means of its members' records `judged`, and `panel`, what each of them found."""
    mean = lambda values: (
        None if None in values else min(1.0, sum(weight * value for weight, value in zip(weights, values)))
    )
    count = len(record["samples"])
    return {
        "win_probs": [[mean([one["win_probs"][i][j] for one in judged]) for j in range(count)] for i in range(count)],
        "order_gap": mean([one["order_gap"] for one in judged]),
        "label_mass": mean([one["label_mass"] for one in judged]),
        "panel": [
            {"judge": member.judge, "weight": weight}
            | {name: value for name, value in one.items() if name not in record}
            for member, weight, one in zip(members, weights, judged)
        ],
    }


def tell_usage(paths, config):
    """Log the tokens, and with --api_price the cost, that a server has counted for these files, earlier runs
    included."""
    if config.judge_type != "openai":
        return
    files = [file for path in paths for file in (path, listing_of(path)) if Path(file).exists()]
    usage = [record["usage"] for file in files for record in read_jsonl(file) if "usage" in record]
    total = {name: sum(one[name] for one in usage) for name in ("requests", "prompt_tokens", "completion_tokens")}
    prices = config.prices()
    cost = (
        f": {prices[0] * total['prompt_tokens'] + prices[1] * total['completion_tokens']:.2f} dollars" if prices else ""
    )
    log.info(
        "%(requests)d requests, %(prompt_tokens)d prompt tokens, %(completion_tokens)d completion tokens%(cost)s",
        total | {"cost": cost},
    )


class GenerativeJudge(EngineWork):
    """A model that answers with one of two labels: a task is (job number, record with `prompt` and `samples`), its
    result the record with `win_probs`, `order_gap` and `label_mass`.

    P(first beats second) is read at the one position where the two labels' token ids part: everything before it
    (the chat prompt and the labels' common beginning, `Output (`) is given, and the log-probabilities of exactly
    the two deciding tokens are asked for, so neither can fall out of a top-k list. Each ordered pair of *different*
    texts is judged once; identical texts get 1/2.

    Args:
        config: JudgeConfig
    """

    settings = ("dtype", "judge_tokenizer", "template", "labels", "max_prompt_tokens")

    def __init__(self, config):
        from data_utils import encode_text, load_tokenizer

        super().__init__()
        self.template, self.max_prompt_tokens = read_template(config.template), config.max_prompt_tokens
        self.tokenizer = load_tokenizer(config.judge, config.judge_tokenizer)
        labels = (encode_text(self.tokenizer, label) for label in split_list(config.labels))
        self.label_prefix, self.label_ids = split_labels(*labels)
        self.engine = Engine(config.judge, config.judge_tokenizer, self.max_prompt_tokens + 1, config)

    def requests(self, tasks):
        from vllm import SamplingParams

        judgements, results = [], []  # token ids of every judgement of this chunk; per record, its comparisons
        for _, record in tasks:
            asked = orders(record)
            prompts = [self.encode(record["prompt"], first, second) for first, second in asked]
            longest = max(map(len, prompts), default=0)
            if longest > self.max_prompt_tokens:
                results.append(too_long(record, longest, self.max_prompt_tokens))
            else:
                results.append((record, asked, slice(len(judgements), len(judgements) + len(prompts))))
                judgements.extend(prompts)
        params = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(self.label_ids), detokenize=False)
        return judgements, [params] * len(judgements), partial(self.results, results)

    def results(self, results, outputs):
        answers = self.read_labels(outputs)
        return [result if isinstance(result, dict) else self.score(*result, answers) for result in results]

    def encode(self, prompt, first, second):
        from data_utils import encode_prompt

        return encode_prompt(self.tokenizer, fill_template(self.template, prompt, first, second)) + self.label_prefix

    def read_labels(self, outputs):
        """[(P(first label), probability of both labels together)]."""
        first_id, second_id = self.label_ids
        answers = []
        for output in outputs:
            logprobs = output.outputs[0].logprobs[0]
            first, second = logprobs[first_id].logprob, logprobs[second_id].logprob
            answers.append((sigmoid(first - second), math.exp(first) + math.exp(second)))
        mass = sum(mass for _, mass in answers) / max(1, len(answers))
        if len(answers) >= 20 and mass < MIN_LABEL_MASS:
            raise StageError(
                f"{self.engine.model} puts {mass:.2g} of its probability on the two labels, so it does not "
                "answer with one of them; is it a judge, and are --template and --labels its own?"
            )
        return answers

    @staticmethod
    def score(record, asked, where, answers):
        return record | win_matrix([sample["text"] for sample in record["samples"]], dict(zip(asked, answers[where])))


class RewardJudge(EngineWork):
    """A reward model, r(prompt, response): P(first beats second) = sigmoid((r(first) - r(second)) / T), Bradley-Terry.

    Each different response is scored once, through vLLM's pooling; `rewards` has the raw scores of the K responses.
    Several such judges are the mixture of the paper's second version: the mean of their probabilities, not of their
    scores.

    Args:
        config: JudgeConfig
    """

    settings = ("dtype", "judge_tokenizer", "reward_temperature", "max_prompt_tokens")

    def __init__(self, config):
        from transformers import AutoConfig

        from data_utils import load_tokenizer, resolve_model

        super().__init__()
        self.temperature, self.max_prompt_tokens = temperature(config), config.max_prompt_tokens
        model = AutoConfig.from_pretrained(resolve_model(config.judge))
        kind = (model.architectures or ["unknown"])[0]
        if ("SequenceClassification" not in kind and "Reward" not in kind) or model.num_labels != 1:
            raise StageError(
                f"{config.judge} is a {kind} with {model.num_labels} outputs; a reward model is a sequence "
                "classifier with one"
            )
        self.tokenizer = load_tokenizer(config.judge, config.judge_tokenizer)
        self.engine = Engine(config.judge, config.judge_tokenizer, self.max_prompt_tokens, config, rewards=True)

    def requests(self, tasks):
        from vllm import PoolingParams

        prompts, results = [], []  # token ids of every response of this chunk; per record, its different texts
        for _, record in tasks:
            texts = different_texts(record)
            own = [self.encode(record["prompt"], text) for text in texts]
            longest = max(map(len, own))
            if longest > self.max_prompt_tokens:
                results.append(too_long(record, longest, self.max_prompt_tokens))
            else:
                results.append((record, texts, slice(len(prompts), len(prompts) + len(own))))
                prompts.extend(own)
        params = [PoolingParams(task="classify", use_activation=False) for _ in prompts]
        return prompts, params, partial(self.results, results)

    def encode(self, prompt, response):
        from data_utils import encode_chat

        return encode_chat(
            self.tokenizer,
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
            add_generation_prompt=False,
        )

    def results(self, results, outputs):
        rewards = [output.outputs.data.item() for output in outputs]
        return [result if isinstance(result, dict) else self.score(*result, rewards) for result in results]

    def score(self, record, texts, where, rewards):
        by_text = dict(zip(texts, rewards[where]))
        if not all(map(math.isfinite, by_text.values())):
            raise StageError(
                f"{self.engine.model} gives no finite reward to the responses of prompt_id {record['prompt_id']}"
            )
        judgements = {
            (first, second): (sigmoid((by_text[first] - by_text[second]) / self.temperature), 1.0)
            for first, second in orders(record)
        }
        found = [sample["text"] for sample in record["samples"]]
        return record | win_matrix(found, judgements) | {"rewards": [by_text[text] for text in found]}


def temperature(config):
    try:
        value = float(config.reward_temperature)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise StageError(f"--reward_temperature should be a number greater than 0, got {config.reward_temperature}")
    return value


def sigmoid(x):
    return 1 / (1 + math.exp(min(-x, 700.0)))


def too_long(record, tokens, limit):
    return {"prompt_id": record["prompt_id"], "skipped": f"a judging prompt has {tokens} tokens, the limit is {limit}"}


class ServerJudge:
    """A generative judge behind a server with OpenAI's chat completions (vLLM's own, or a hosted one).

    The server answers freely; P is read where the two labels part (`read_answer`), from the log-probabilities where the
    server gives them, else from the answer alone, as 0 or 1. `usage` counts requests and tokens. The special tokens'
    spellings inside a response are the server's affair.

    Args:
        config: JudgeConfig
    """

    settings = ("template", "labels")  # the model is known by its name, wherever its server is
    asked = {"temperature": 0, "max_completion_tokens": 16, "logprobs": True, "top_logprobs": 20}

    def __init__(self, config):
        import openai

        key, base = os.environ.get("OPENAI_API_KEY"), config.api_base or None
        self.errors, self.config, self.labels = openai, config, split_list(config.labels)
        self.template, self.address = read_template(config.template), base or "OpenAI"
        self.client = openai.OpenAI(base_url=base, api_key=key or "none", max_retries=config.api_retries, timeout=300)
        self.pool_of_threads = ThreadPoolExecutor(config.api_concurrency)
        self.chunks = {}  # number: [(record, {order: future})]
        self.quiet_until, self.lock = 0.0, threading.Lock()
        self.answers = {True: 0, False: 0}  # with one of the labels, with something else

    def begin(self, number, tasks):
        def ask(record, first, second):
            return self.pool_of_threads.submit(self.ask, fill_template(self.template, record["prompt"], first, second))

        self.chunks[number] = [
            (record, {order: ask(record, *order) for order in orders(record)}) for _, record in tasks
        ]

    def step(self):
        running = [future for chunk in self.chunks.values() for _, asked in chunk for future in asked.values()]
        wait([future for future in running if not future.done()], timeout=1, return_when=FIRST_COMPLETED)
        for future in running:
            if future.done():
                future.result()  # an error ends the stage at once
        finished = [
            number
            for number, chunk in self.chunks.items()
            if all(future.done() for _, asked in chunk for future in asked.values())
        ]
        return [
            (
                number,
                [
                    self.result(record, {order: future.result() for order, future in asked.items()})
                    for record, asked in self.chunks.pop(number)
                ],
            )
            for number in finished
        ]

    def result(self, record, answers):
        counts = [sum(usage[n] for _, usage in answers.values()) for n in range(2)]
        usage = {"requests": len(answers), "prompt_tokens": counts[0], "completion_tokens": counts[1]}
        refused = next((answer for answer, _ in answers.values() if isinstance(answer, str)), None)
        if refused:
            return {"prompt_id": record["prompt_id"], "skipped": refused, "usage": usage}
        judgements = {order: judgement for order, (judgement, _) in answers.items()}
        return record | win_matrix([sample["text"] for sample in record["samples"]], judgements) | {"usage": usage}

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
        content = choice.logprobs.content if choice.logprobs else None
        judgement = (
            read_answer(
                [(token.token, [(top.token, top.logprob) for top in token.top_logprobs]) for token in content],
                self.labels,
            )
            if content
            else parse_answer(choice.message.content or "", self.labels)
        )
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


def different_texts(record):
    """Of a record's samples, each once, in their order."""
    return list(dict.fromkeys(sample["text"] for sample in record["samples"]))


def orders(record):
    """All ordered pairs of different texts."""
    texts = different_texts(record)
    return [(first, second) for first in texts for second in texts if first != second]


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


def win_matrix(texts, judgements):
    """Win probabilities of K responses from judgements in both orders.

    Args:
        texts: the K responses.
        judgements: {(first, second): (P(first is better), probability on both labels)} of every ordered pair of
            different texts.

    Returns:
        `win_probs`: K x K, `[i][j]` = P(i beats j) = mean over the two orders, None on the diagonal;
        `order_gap`: mean absolute disagreement of the two orders over pairs of different texts, None if there are none;
        `label_mass`: mean probability that the judge gives to its two labels together, None likewise.
    """

    def beats(first, second):
        if first == second:
            return 0.5
        return (judgements[first, second][0] + 1 - judgements[second, first][0]) / 2

    gaps = [abs(p - (1 - judgements[second, first][0])) for (first, second), (p, _) in judgements.items()]
    masses = [mass for _, mass in judgements.values()]
    return {
        "win_probs": [[None if i == j else beats(a, b) for j, b in enumerate(texts)] for i, a in enumerate(texts)],
        "order_gap": sum(gaps) / len(gaps) if gaps else None,
        "label_mass": sum(masses) / len(masses) if masses else None,
    }


def judge_figures(records):
    """Means of `order_gap` and `label_mass` over judged records, None where all their responses are identical."""
    judged = [(record["order_gap"], record["label_mass"]) for record in records if record["label_mass"] is not None]
    gap, mass = (sum(values) / len(values) for values in zip(*judged)) if judged else (None, None)
    return {"order_gap": gap, "label_mass": mass}


# Names of the three parts: ours, and those of published judge templates.
_PLACEHOLDERS = {"input": 0, "instruction": 0, "output_1": 1, "output_a": 1, "output_2": 2, "output_b": 2}


def read_template(path):
    """The text of a judge template. Raises StageError unless it names the instruction and both outputs once."""
    if not Path(path).is_file():
        raise StageError(f"judge template {path} {'is not a file' if Path(path).exists() else 'does not exist'}")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise StageError(f"judge template {path} is not UTF-8 text") from None
    found = [_PLACEHOLDERS[name] for name in re.findall(r"\{(\w+)\}", text) if name in _PLACEHOLDERS]
    if sorted(found) != [0, 1, 2]:
        raise StageError(f"judge template {path} should contain {{input}}, {{output_1}} and {{output_2}} once each")
    return text


def fill_template(template, prompt, first, second):
    """The template with its three parts filled in, in one pass: braces inside the parts stay what they are."""
    parts = (prompt, first, second)
    return re.sub(
        r"\{(\w+)\}", lambda match: parts[_PLACEHOLDERS[match[1]]] if match[1] in _PLACEHOLDERS else match[0], template
    )


def split_labels(first_ids, second_ids):
    """(common beginning, (deciding token of the first label, of the second)) of two labels' token ids.

    Raises StageError when one label is the beginning of the other: no single position decides then.
    """
    for position, pair in enumerate(zip(first_ids, second_ids)):
        if pair[0] != pair[1]:
            return first_ids[:position], pair
    raise StageError(f"the judge's labels {first_ids} and {second_ids} (token ids) do not differ at any position")


def check_labels(config):
    """Raise StageError unless the template is one and the labels are two different answers."""
    found = split_list(config.labels)
    if len(set(found)) != 2 or len(found) != 2:
        raise StageError(f"--labels should be two different answers, comma-separated, got {config.labels!r}")
    read_template(config.template)


JUDGE_TYPES = {"offsetbias-lm": GenerativeJudge, "bt-mixture": RewardJudge, "openai": ServerJudge}
