"""Build preference pairs from scores, prepare prompt sets and SFT data, and import preference data.

    python data_processing.py make_pairs --input train.scores.jsonl --output train.pairs.jsonl
    python data_processing.py make_prompts --output_dir data/prompts
    python data_processing.py make_sft --output data/sft.jsonl --validation_output data/sft_test.jsonl
    python data_processing.py import_pairs --output pairs.jsonl --dataset trl-lib/ultrafeedback_binarized

`make_pairs` writes at most one pair a prompt, in TRL's conversational preference format with what training needs beside
it; `make_prompts` writes `train_0.jsonl` ... `train_5.jsonl`, `train.jsonl` (all of them) and `test.jsonl`; `make_sft`
writes chats for mle.py; `import_pairs` writes pairs of text alone, for get_logprobs.py. records.py has all fields.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
from tqdm import tqdm

from data_utils import as_pair, first_exchange, load_rows
from records import Chat, Message, Pair, Prompt, Scores, read, writer
from utils import (
    StageError,
    check_at_least,
    check_input,
    check_output,
    derive_seed,
    file_lists,
    fingerprint,
    log,
    run,
    split_list,
)

# ---------------------------------------------------------------------------------------------- pairs


def mean_win_probs(win_probs):
    """Each sample's mean win probability against the others: the row means without the diagonal. K x K -> K."""
    return [sum(p for j, p in enumerate(row) if j != i) / (len(row) - 1) for i, row in enumerate(win_probs)]


def by_score(record, usable):
    """The samples that a ranking rule may take, best first: of each different text the first one, with the mean of all
    verdicts on that text, where it is usable. Texts that are not usable count in the scores of the others."""
    texts = [sample["text"] for sample in record["samples"]]
    verdicts = defaultdict(list)
    for text, score in zip(texts, mean_win_probs(record["win_probs"])):
        verdicts[text].append(score)
    candidates = [i for i in map(texts.index, verdicts) if usable[i]]
    return sorted(candidates, key=lambda i: -sum(verdicts[texts[i]]) / len(verdicts[texts[i]]))  # ties: as sampled


def top_two(record, usable, rng):
    """The released recipe: the best text against the second best."""
    order = by_score(record, usable)
    return (order[0], order[1]) if len(order) > 1 else None


def best_worst(record, usable, rng):
    """INPO's paper: the best text against the worst."""
    order = by_score(record, usable)
    return (order[0], order[-1]) if len(order) > 1 else None


def random_pair(record, usable, rng):
    """The theory's rule: two samples drawn without looking at texts or scores; the judge says which one is chosen.

    With soft labels (or a label drawn with the win probability) this is the only unbiased rule of the three. To leave
    out a pair of equal texts is harmless, but no pair may be drawn instead of it. A tie is kept: to leave it out would
    change the weight of the regularisation.
    """
    first, second = rng.sample(range(len(usable)), 2)
    if record["samples"][first]["text"] == record["samples"][second]["text"] or not usable[first] or not usable[second]:
        return None
    win_probs = record["win_probs"]
    return (first, second) if win_probs[first][second] >= win_probs[second][first] else (second, first)


# A rule takes a scores record, for each sample whether training can take it (it has tokens and fits --max_length), and
# a generator of random numbers of this prompt. It returns the indices (chosen, rejected), or None.
PairRule = Callable[[dict, list[bool], random.Random], tuple[int, int] | None]
PAIR_RULES: dict[str, PairRule] = {"top_two": top_two, "best_worst": best_worst, "random": random_pair}


def make_pair(record: dict, rule: str, max_length: int, seed: int) -> dict | None:
    """The pair that a rule takes from a scores record, or None."""
    samples, room = record["samples"], max_length - len(record["prompt_token_ids"])
    usable = [0 < len(sample["token_ids"]) <= room for sample in samples]
    found = PAIR_RULES[rule](record, usable, random.Random(derive_seed(seed, record["prompt_id"], rule)))
    if found is None:
        return None
    chosen, rejected = found
    scores = mean_win_probs(record["win_probs"])
    return {
        "prompt_id": record["prompt_id"],
        "prompt": [{"role": "user", "content": record["prompt"]}],
        "chosen": [{"role": "assistant", "content": samples[chosen]["text"]}],
        "rejected": [{"role": "assistant", "content": samples[rejected]["text"]}],
        "prompt_token_ids": record["prompt_token_ids"],
        "chosen_token_ids": samples[chosen]["token_ids"],
        "rejected_token_ids": samples[rejected]["token_ids"],
        "win_prob": record["win_probs"][chosen][rejected],
        "score_chosen": scores[chosen],
        "score_rejected": scores[rejected],
    }


def make_pairs(input: str, output: str, pair_rule: str = "top_two", max_length: int = 2048, seed: int = 0):
    """Turn scores into preference pairs, at most one a prompt.

    Prompts without two different responses that training can take (under `random`: where the two that were drawn are
    not such) give no pair, and are counted.

    Args:
        input: scores file(s), comma-separated
        output: pairs file(s), as many
        pair_rule: top_two (the released recipe), best_worst (INPO's paper) or random (unbiased, the theory)
        max_length: prompt and response tokens together, at most
        seed: for the random rule
    """
    check_at_least(1, max_length=max_length)
    inputs, outputs = file_lists(input=input, output=output)
    if pair_rule not in PAIR_RULES:
        raise StageError(f"--pair_rule should be one of {', '.join(PAIR_RULES)}, got {pair_rule}")
    for path, target in zip(inputs, outputs):
        counts: Counter[str] = Counter()
        with writer(target, Pair) as write:
            for record in tqdm(read(path, Scores), desc="pairs", unit="record"):
                pair = make_pair(record, pair_rule, max_length, seed)
                counts["records"] += 1
                counts["pairs" if pair else "without a pair"] += 1
                if pair:
                    write(pair)
            if not counts["pairs"]:
                raise StageError(f"{path}: no usable pair in {counts['records']} records ({dict(counts)})")
        log.info("%s: %s", target, ", ".join(f"{count} {what}" for what, count in counts.items()))


# ---------------------------------------------------------------------------------------------- prompts and SFT data


def shuffle_key(seed, text):
    """Sorting by this is a shuffle that does not depend on the order or the presence of other texts."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()


def make_prompts(
    output_dir: str,
    local_file: str = "",
    dataset: str = "openbmb/UltraFeedback",
    field: str = "instruction",
    num_splits: int = 6,
    num_test: int = 1957,
    exclude: str = "",
    seed: int = 0,
):
    """Split UltraFeedback's instructions into train splits and a test set, deduplicated and shuffled.

    Args:
        output_dir: where train_<i>.jsonl, train.jsonl and test.jsonl go
        local_file: .jsonl, .json or .parquet file of the same format, instead of the Hub
        dataset: Hub data set
        field: its column with the prompt text
        num_splits: train splits; one round is one pass over all of them
        num_test: prompts of the test set
        exclude: prompt file(s), comma-separated, whose prompts must not occur
        seed: the same seed gives the same splits
    """
    check_at_least(1, num_splits=num_splits)
    check_at_least(0, num_test=num_test)
    if not output_dir:
        raise StageError("--output_dir should name a directory")
    names = [f"train_{i}" for i in range(num_splits)]
    stale = [path for path in Path(output_dir).glob("train_*.jsonl") if path.stem not in names]
    if stale:
        raise StageError(f"{output_dir} holds {stale[0].name} of another number of splits; remove its files first")
    excluded = set()
    for path in split_list(exclude):
        check_input(path)
        excluded |= {record["prompt"].strip() for record in read(path, Prompt)}
    rows = load_rows(dataset, "train", local_file)
    if field not in rows.column_names:
        raise StageError(f"{local_file or dataset} has no column {field!r}; it has {', '.join(rows.column_names)}")
    wrong = next((value for value in rows[field] if not isinstance(value, (str, type(None)))), None)
    if wrong is not None:
        raise StageError(f"{local_file or dataset}: column {field!r} should be text, found {type(wrong).__name__}")
    texts = [text.strip() for text in rows[field] if text]
    unique = sorted({text for text in texts if text} - excluded, key=lambda text: (shuffle_key(seed, text), text))
    if len(unique) < num_test + num_splits:
        raise StageError(
            f"{len(unique)} different prompts are too few for {num_test} test prompts (--num_test) and "
            f"{num_splits} train splits"
        )
    test, train = unique[:num_test], unique[num_test:]
    files = {name: train[i::num_splits] for i, name in enumerate(names)} | {"train": train, "test": test}
    for name, prompts in files.items():
        if prompts:
            with writer(Path(output_dir) / f"{name}.jsonl", Prompt) as write:
                for prompt in prompts:
                    write({"prompt_id": fingerprint(prompt), "prompt": prompt})
    log.info(
        "%s: %d rows, %d different prompts; %s",
        output_dir,
        len(texts),
        len(unique),
        ", ".join(f"{name} {len(prompts)}" for name, prompts in files.items()),
    )


def make_sft(
    output: str,
    validation_output: str,
    local_file: str = "",
    dataset: str = "HuggingFaceH4/ultrachat_200k",
    split: str = "train_sft",
    tokenizer: str = "",
    max_length: int = 2048,
    num_validation: int = 1000,
    limit: int = 0,
    seed: int = 0,
):
    """Turn chats (UltraChat's format, a `messages` column) into SFT examples for mle.py: the first exchange of each.

    Args:
        output: train file
        validation_output: validation file
        local_file: .jsonl, .json or .parquet file of the same format, instead of the Hub
        dataset: Hub data set
        split: its split
        tokenizer: directory or Hub id; when given, examples longer than --max_length are dropped and counted
        max_length: tokens of prompt and answer together
        num_validation: examples of the validation file
        limit: at most so many examples, 0 for all
        seed: the same seed gives the same split
    """
    check_at_least(1, num_validation=num_validation)
    check_at_least(0, limit=limit)
    check_output("output", output)
    check_output("validation_output", validation_output)
    paths = [Path(path).resolve() for path in (output, validation_output, local_file) if path]
    if len(set(paths)) < len(paths):
        raise StageError("--output, --validation_output and --local_file should be different files")
    rows = load_rows(dataset, split, local_file)
    if "messages" not in rows.column_names:
        raise StageError(f"{local_file or dataset} has no column 'messages'; it has {', '.join(rows.column_names)}")
    fits = length_filter(tokenizer, max_length)
    counts: Counter[str] = Counter()
    order = []  # (shuffle key, row number): the rows themselves stay on disk
    for number, row in enumerate(tqdm(rows, desc="chats", unit="chat")):
        try:
            msgspec.convert(row["messages"], list[Message])
        except msgspec.ValidationError as error:
            raise StageError(
                f"{local_file or dataset}, row {number + 1}: messages should be messages of "
                f"{{role, content}} ({error}), got {repr(row['messages'])[:200]}"
            ) from None
        messages = first_exchange(row["messages"])
        what = "without an answer"
        if messages:
            what = "examples" if fits(messages) else f"longer than {max_length} tokens"
        counts[what] += 1
        if messages and what == "examples":
            order.append((shuffle_key(seed, f"{messages[-2]['content']}\0{number}"), number))
    kept = [number for _, number in sorted(order)][: limit or None]
    if len(kept) <= num_validation:
        raise StageError(
            f"{len(kept)} usable examples are too few for {num_validation} of validation (--num_validation)"
        )
    with ExitStack() as stack:
        write_validation = stack.enter_context(writer(validation_output, Chat))
        write_train = stack.enter_context(writer(output, Chat))
        for position, number in enumerate(kept):
            write = write_validation if position < num_validation else write_train
            write({"prompt_id": str(number), "messages": first_exchange(rows[number]["messages"])})
    found = ", ".join(f"{count} {what}" for what, count in counts.items())
    log.info("%s: %s; %d train, %d validation", output, found, len(kept) - num_validation, num_validation)


def length_filter(tokenizer, max_length):
    """messages -> whether they fit; everything fits without a tokenizer."""
    if not tokenizer:
        return lambda messages: True
    from data_utils import encode_chat, encode_text, load_tokenizer, resolve_tokenizer

    loaded = load_tokenizer(resolve_tokenizer("", tokenizer))
    return lambda messages: (
        len(encode_chat(loaded, messages[:-1])) + len(encode_text(loaded, messages[-1]["content"])) + 1 <= max_length
    )


# ---------------------------------------------------------------------------------------------- pairs from elsewhere


def import_pairs(
    output: str, local_file: str = "", dataset: str = "trl-lib/ultrafeedback_binarized", split: str = "train"
):
    """Turn a preference data set in one of TRL's formats into pairs that get_logprobs.py takes.

    `chosen` and `rejected` are answers, as text or messages, beside a `prompt`, or whole conversations that differ in
    their last message. Other rows, and pairs of the same answer, are left out and counted. Only the text is taken:
    files that this project wrote go to get_logprobs.py as they are, with their token ids and win probabilities.

    Args:
        output: pairs file
        local_file: .jsonl, .json or .parquet file of the same format, instead of the Hub
        dataset: Hub data set
        split: its split
    """
    rows = load_rows(dataset, split, local_file)
    counts: Counter[str] = Counter()
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if missing:
        raise StageError(
            f"{local_file or dataset} has no column {' nor '.join(sorted(missing))}; "
            f"it has {', '.join(rows.column_names)}"
        )
    with writer(output, Pair) as write:
        for number, row in enumerate(tqdm(rows, desc="pairs", unit="pair")):
            pair, left_out = as_pair(row)
            counts[left_out or "pairs"] += 1
            if pair:
                write({"prompt_id": str(number)} | pair)
        if not counts["pairs"]:
            raise StageError(f"{local_file or dataset}: no usable pair in {len(rows)} rows ({dict(counts)})")
    log.info("%s: %s", output, ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    run(make_pairs, make_prompts, make_sft, import_pairs)
