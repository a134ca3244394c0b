"""What goes through vLLM's engines, against the plain way with the same model, and how fine a judge's probabilities are.

    python benchmarks/engines.py sampling --prompts FILE [--count 64]
    python benchmarks/engines.py judging --prompts FILE [--count 16]
    python benchmarks/engines.py judging --prompts FILE --hidden 512        a larger judge with random weights: time only
    python benchmarks/engines.py rewards --prompts FILE [--count 32]
    python benchmarks/engines.py margins --prompts FILE [--count 15]

Each way has a process of its own. Models are the demo's, or random ones with its tokenizer; instructions and the
responses that are judged are texts of the file: what is measured is the work, not the model.

`sampling`: the plain way hands `LLM.generate` a batch of 16 prompts, waits until its longest response has ended, and
takes the next batch; log-probabilities of the tokens are stored, as many samplers do. Ours hands the engine all prompts,
as a worker does, and stores tokens alone. A random policy ends with a probability of about 1/300 a token, so that
lengths vary as they do in practice. Goal: the engine is full until the last chunk; the same samples.

`judging`: the plain way asks the judge as one would by hand: every ordered pair is a request of its own for up to 16
tokens, without a prefix cache; the label is looked for in the answer, and its probability read there. Goals: uncached
prompt tokens within 15 % of the floor (each distinct prefix once), one decoded token a judgement, twice the judgements
a second on a CPU and three times on a GPU, probabilities within 1e-3 where both read the same position.

`rewards`: the plain way is transformers with padded batches of 8 responses, in order. Goal: as fast; the same rewards.

`margins` judges in bfloat16, in bfloat16 with the output layer in float32, as the project does, and in float32, and
counts the different margins (log P(first label) - log P(second label), to 1e-4); then the same of random rewards.
"""

import math
import tempfile
import time
from dataclasses import replace

import torch
from common import batches, child_environment, in_its_own_process, random_model, read_prompt_texts, record, table

from judges import generative
from judges.base import JudgeConfig, orders, sigmoid
from judges.generative import GenerativeJudge
from judges.reward import RewardJudge
from utils import StageError, run
from vllm_model import Sampler, SamplerConfig
from workers.worker import run_here

K, LAYERS = 5, 8  # responses to a prompt; layers of random judges


def make_records(prompts, count):
    """Samples records of the file's first texts, with the texts after them as responses."""
    texts = [text[:600] for text in read_prompt_texts(prompts)][: count * (1 + K)]
    if len(texts) < count * (1 + K):
        raise StageError(f"{prompts} has {len(texts)} prompts; {count} with {K} responses each take {count * (1 + K)}")
    responses = batches([{"text": text, "token_ids": [0]} for text in texts[count:]], K)
    return [
        {"prompt_id": str(i), "prompt": text, "samples": samples}
        for i, (text, samples) in enumerate(zip(texts[:count], responses))
    ]


def make_reward_model(source, hidden, layers, folder):
    """A sequence classifier with one output in place of `random_model`'s language model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    random_model(source, hidden, layers, folder)
    config = AutoConfig.from_pretrained(folder, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def in_an_engine_process(way, config, *arguments):
    """What `way` puts into the queue, its first argument; its process has the first GPU, where there is one."""
    with child_environment(**config.environments()[0]):
        return in_its_own_process(way, config, *arguments)


def timed(work, records):
    """(seconds, results) of all records but the first one, which warms up."""
    warm_up, *records = records
    run_here(work, [(0, warm_up)])
    began = time.perf_counter()
    results = run_here(work, [(0, one) for one in records])
    return time.perf_counter() - began, results


def watch(engine):
    """A list that gets vLLM's outputs of each step from now on, a list for each."""
    steps, step = [], engine.llm.llm_engine.step

    def watched():
        steps.append(step())
        return steps[-1]

    engine.llm.llm_engine.step = watched
    return steps


# ---------------------------------------------------------------------------------------------- sampling


def sampled(queue, config, records, way):
    """(seconds, {(prompt_id, k): token ids}, engine steps)."""
    sampler = Sampler(config, [K], [1.0], [0.95])
    run_here(sampler, [(0, records[0])])  # warm up
    steps, began = watch(sampler.engine), time.perf_counter()
    found = way(sampler, records)
    queue.put((time.perf_counter() - began, found, len(steps)))


def with_a_barrier(sampler, records):
    found = {}
    for batch in batches(records, 16):
        requests = [request for one in batch for request in sampler.requests(0, one)]
        for _, own in requests:
            own.logprobs, own.detokenize = 1, True
        prompts, params = [{"prompt_token_ids": ids} for ids, _ in requests], [own for _, own in requests]
        outputs = sampler.engine.llm.generate(prompts, params, use_tqdm=False)
        for one, output in zip(batch, outputs):
            found |= {(one["prompt_id"], answer.index): list(answer.token_ids) for answer in output.outputs}
    return found


def all_at_once(sampler, records):
    results = run_here(sampler, [(0, one) for one in records])
    return {(one["prompt_id"], k): sample["token_ids"] for one in results for k, sample in enumerate(one["samples"])}


def sampling(prompts: str, policy: str = "exps/demo-models/policy", count: int = 64):
    """Sample responses with a random policy; append to RESULTS.md."""
    texts = [text for text in read_prompt_texts(prompts) if len(text) < 600][:count]
    records = [{"prompt_id": str(i), "prompt": text} for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        random_model(policy, 256, 4, folder)
        config = SamplerConfig(model=folder, max_prompt_tokens=1024, max_new_tokens=512)
        plain, ours = (in_an_engine_process(sampled, config, records, way) for way in (with_a_barrier, all_at_once))
    rows = []
    for name, (taken, samples, steps) in (("batches of 16 prompts", plain), ("ours", ours)):
        tokens = sum(map(len, samples.values()))
        rows.append(f"{name} | {taken:.1f} | {tokens / taken:,.0f} | {steps:,} | {tokens / steps:.0f}")
    same = sum(plain[1][key] == ids for key, ids in ours[1].items())
    lines = [
        *table("way | seconds | tokens/s | engine steps | tokens a step", *rows),
        "",
        f"x{plain[0] / ours[0]:.2f}; {same} of {len(ours[1])} samples are the same tokens; mean length "
        f"{tokens / len(ours[1]):.0f}.",
    ]
    record(f"Sampling {K} responses to {count} prompts, a random policy of 4 layers of 256", lines, ("torch", "vllm"))


# ---------------------------------------------------------------------------------------------- judging


def judged_by_hand(queue, config, records):
    """As `judged`. A pair whose two answers do not begin with a label has no probability."""
    from vllm import SamplingParams

    judge = GenerativeJudge(replace(config, engine_args='{"enable_prefix_caching": false}'))
    asked = [(one["prompt"], *texts) for one in records for texts in orders(one)]
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=20, detokenize=False)
    warm_up = len(orders(records[0]))
    ask(judge, asked[:warm_up], params)
    steps, began = watch(judge.engine), time.perf_counter()
    first = ask(judge, asked[warm_up:], params)
    taken = time.perf_counter() - began
    second = {(prompt, a, b): first[prompt, b, a] for prompt, a, b in first}
    found = {key: 0.5 + (p - second[key]) / 2 for key, p in first.items() if None not in (p, second[key])}
    queue.put((taken, found, *counts(steps)))


def ask(judge, asked, params):
    """{(prompt, first, second): P(first label)}, None where no label begins the answer."""
    found, outputs, before = {}, {}, len(judge.label_prefix)
    prompts = [judge.encode(*order)[: -before or None] for order in asked]
    names = judge.engine.enqueue([(prompt, params) for prompt in prompts])
    while len(outputs) < len(names):
        outputs |= {output.request_id: output for output in judge.engine.step()}
    for order, name in zip(asked, names):
        answer, found[order] = outputs[name].outputs[0], None
        if list(answer.token_ids[:before]) == judge.label_prefix and len(answer.token_ids) > before:
            logprobs = answer.logprobs[before]
            first, second = (logprobs[id].logprob if id in logprobs else -math.inf for id in judge.label_ids)
            if max(first, second) > -math.inf:
                found[order] = sigmoid(first - second)
    return found


def judged(queue, config, records):
    """(seconds, {(prompt, first, second): P(first)}, prompt tokens, uncached ones, decoded ones, the floor of uncached
    ones)."""
    generative.MIN_LABEL_MASS = 0  # of random weights
    judge = GenerativeJudge(config)
    run_here(judge, [(0, records[0])])  # warm up
    steps, began = watch(judge.engine), time.perf_counter()
    results = run_here(judge, [(0, one) for one in records[1:]])
    taken, found = time.perf_counter() - began, {}
    for one in results:
        texts = [sample["text"] for sample in one["samples"]]
        for first, row in zip(texts, one["win_probs"]):
            found |= {(one["prompt"], first, second): p for second, p in zip(texts, row) if p is not None}
    queue.put((taken, found, *counts(steps)))


def counts(steps):
    """Of finished requests: prompt tokens, uncached ones, decoded ones, and distinct prefixes."""
    outputs = [output for step in steps for output in step if output.finished]
    prompts = [output.prompt_token_ids for output in outputs]
    total, cached = sum(map(len, prompts)), sum(output.num_cached_tokens or 0 for output in outputs)
    decoded = sum(len(output.outputs[0].token_ids) for output in outputs)
    return total, total - cached, decoded, distinct_prefixes(prompts)


def distinct_prefixes(prompts):
    """Tokens that a perfect prefix cache would compute: the nodes of the prompts' trie."""
    total, last = 0, []
    for prompt in sorted(prompts):
        same = next((i for i, (a, b) in enumerate(zip(prompt, last)) if a != b), min(len(prompt), len(last)))
        total, last = total + len(prompt) - same, prompt
    return total


def judging(prompts: str, judge: str = "exps/demo-models/judge", hidden: int = 0, count: int = 16):
    """Judge all pairs in both orders; append to RESULTS.md."""
    with tempfile.TemporaryDirectory() as folder:
        config = JudgeConfig(judge=random_model(judge, hidden, LAYERS, folder) if hidden else judge)
        records = make_records(prompts, count + 1)
        plain, ours = (in_an_engine_process(way, config, records) for way in (judged_by_hand, judged))
    judgements = count * K * (K - 1)
    rows = [
        f"{name} | {judgements / taken:.1f} | {total:,} | {uncached:,} | {decoded / judgements:.1f}"
        for name, (taken, _, total, uncached, decoded, _) in (("plain", plain), ("ours", ours))
    ]
    _, read, _, uncached, _, floor = ours
    difference = max((abs(p - read[key]) for key, p in plain[1].items()), default=math.nan)
    which = f", a random judge of {LAYERS} layers of {hidden}" if hidden else ""
    lines = [
        *table("way | judgements/s | prompt tokens | uncached | decoded a judgement", *rows),
        "",
        f"x{plain[0] / ours[0]:.2f}; floor of uncached tokens (each distinct prefix once) {floor:,}: "
        f"{uncached / floor:.2f} times that; largest difference of a win probability {difference:.1e}, over "
        f"{len(plain[1])} pairs whose answer was a label.",
    ]
    title = f"Judging, {judgements} judgements of {K} responses to {count} prompts{which}"
    record(title, lines, packages=("torch", "vllm"))


# ---------------------------------------------------------------------------------------------- rewards


def with_vllm(queue, config, records):
    """(seconds, rewards)."""
    taken, results = timed(RewardJudge(config), records)
    queue.put((taken, [reward for one in results for reward in one["rewards"]]))


def with_transformers(queue, config, records):
    """(seconds, rewards, tokens)."""
    from transformers import AutoModelForSequenceClassification

    from data_utils import encode_chat, load_tokenizer

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(config.judge, dtype=dtype).to(device).eval()
    tokenizer = load_tokenizer(config.judge)

    def encode(prompt, response):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return encode_chat(tokenizer, chat, add_generation_prompt=False)

    def rewards(records):
        chats = [encode(one["prompt"], sample["text"]) for one in records for sample in one["samples"]]
        found = []
        for part in batches(chats, 8):
            length = max(map(len, part))
            ids = torch.tensor([row + [0] * (length - len(row)) for row in part], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in part], device=device)
            with torch.no_grad():
                hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
                ends = hidden[torch.arange(len(part)), mask.sum(1) - 1]
                found += model.score(ends)[:, 0].float().tolist()
        return found, sum(map(len, chats))

    warm_up, *records = records
    rewards([warm_up])
    began = time.perf_counter()
    found, tokens = rewards(records)
    queue.put((time.perf_counter() - began, found, tokens))


def rewards(prompts: str, source: str = "exps/demo-models/judge", hidden: int = 512, count: int = 32):
    """Score responses with a random reward model; append to RESULTS.md."""
    with tempfile.TemporaryDirectory() as folder:
        make_reward_model(source, hidden, LAYERS, folder)
        config, records = reward_config(folder), make_records(prompts, count + 1)
        *plain, tokens = in_an_engine_process(with_transformers, config, records)
        ours = in_an_engine_process(with_vllm, config, records)
    rows = [
        f"{name} | {taken:.2f} | {count * K / taken:.1f}"
        for name, (taken, _) in (("transformers, batches of 8", plain), ("ours, vLLM's pooling", ours))
    ]
    difference = max(abs(one - other) for one, other in zip(plain[1], ours[1]))
    record(
        f"Rewards of {count * K} responses, {tokens:,} tokens, a random model of {LAYERS} layers of {hidden}",
        [
            *table("way | seconds | responses/s", *rows),
            "",
            f"x{plain[0] / ours[0]:.2f}; largest difference of a reward {difference:.1e}.",
        ],
    )


def reward_config(folder, **more):
    return JudgeConfig(judge=folder, judge_type="reward", max_prompt_tokens=2048, **more)


# ---------------------------------------------------------------------------------------------- margins

ROUNDED = '{"hf_overrides": {"head_dtype": "model"}}'  # the output layer in the dtype of the model
WAYS = {
    "bfloat16": ("bfloat16", ROUNDED),
    "bfloat16, output layer float32": ("bfloat16", ""),
    "float32": ("float32", ""),
}


def judged_margins(queue, config, records):
    judge, found = GenerativeJudge(config), []
    steps = watch(judge.engine)
    run_here(judge, [(0, one) for one in records])
    for output in (output for step in steps for output in step if output.finished):
        first, second = (output.outputs[0].logprobs[0][label].logprob for label in judge.label_ids)
        found.append(first - second)
    queue.put(found)


def margins(prompts: str, judge: str = "exps/demo-models/judge", count: int = 15):
    """Count the different margins and rewards; append to RESULTS.md."""
    records, many = make_records(prompts, count), make_records(prompts, 4 * count)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        make_reward_model(judge, 256, 2, folder)
        for name, (dtype, engine_args) in WAYS.items():
            config = JudgeConfig(judge=judge, max_prompt_tokens=2048, dtype=dtype, engine_args=engine_args)
            margin = in_an_engine_process(judged_margins, config, records)
            config = reward_config(folder, dtype=dtype, engine_args=engine_args)
            _, reward = in_an_engine_process(with_vllm, config, [many[0], *many])
            columns = [f"{len(values)} | {len({round(value, 4) for value in values})}" for values in (margin, reward)]
            lines.append(f"{name} | {' | '.join(columns)}")
    lines = table(" | judgements | different margins | rewards | different rewards", *lines)
    record("Different margins and rewards by the dtype of the output layer", lines, packages=("torch", "vllm"))


if __name__ == "__main__":
    run(sampling, judging, rewards, margins)
