"""The demo's game: the cyclic preferences of the paper as a language task, small enough for two CPU cores.

    python data/demo/game.py write --output_dir exps/demo-models     # prompts, training texts, untrained models
    python data/demo/game.py table --experiment exps/demo            # the result, from a finished or running loop

Someone asks where to spend a holiday, in one of 160 phrasings, and there are three answers. The judge prefers the sea
to the mountains and the city to the sea with probability 0.9, and the mountains to the city with 0.8: a cycle, which no
reward explains. The Nash policy answers (mountains, sea, city) with probabilities (4, 3, 4)/11.

The judge is a tiny Llama that reads the full judging prompt and has learnt this table, the policy a tiny Qwen2 that
begins at (0.8, 0.1, 0.1). Both are fitted by mle.py from the files that `write` makes; build.sh does all of it.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from analysis.nash import duality_gap
from judges.base import fill_template, read_template
from records import Chat, Prompt, writer
from utils import log, run, write_text

NAMES = ("mountains", "sea", "city")
ANSWERS = (
    "Go to the mountains, walk from hut to hut and sleep well.",
    "Go to the sea, swim every morning and eat fish by the harbour.",
    "Go to the city, see the museums and stay up late.",
)
PREFERENCE = ((0.5, 0.1, 0.8), (0.9, 0.5, 0.1), (0.2, 0.9, 0.5))  # [i][j] = P(answer i beats answer j)
# Another judge, to set beside it: Bradley-Terry with scores 0, log 3 and log 9.
BRADLEY_TERRY = ((0.5, 1 / 4, 1 / 10), (3 / 4, 0.5, 1 / 4), (9 / 10, 3 / 4, 0.5))
START = (0.8, 0.1, 0.1)

OPENINGS = ("Hello!", "Good morning.", "A quick question:", "Please help me.", "Tell me,", "I wonder:", "So,")
OPENINGS += ("Honestly,", "We need advice.", "Dear assistant,")
QUESTIONS = (
    "where should we spend {}?",
    "what is the best place for {}?",
    "which trip would you choose for {}?",
    "where would you go for {}?",
)
OCCASIONS = ("the summer", "a long weekend", "our holiday", "the first week of May")
NUM_HELD_OUT = 32  # phrasings that neither model has seen in training


def phrasings():
    """(phrasings to learn from, held-out phrasings), in a fixed order that mixes their parts."""
    parts = itertools.product(OPENINGS, QUESTIONS, OCCASIONS)
    every = [f"{opening} {question.format(occasion)}" for opening, question, occasion in parts]
    mixed = [every[(i * 37) % len(every)] for i in range(len(every))]  # 37 and 160 have no common divisor
    return mixed[NUM_HELD_OUT:], mixed[:NUM_HELD_OUT]


# ---------------------------------------------------------------------------------------------- what build.sh needs

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def write_tokenizer(directory, texts, special_tokens, chat_template):
    """A byte-level BPE tokenizer of 664 tokens, learnt from the texts; the last special token ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=664, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, *others, end = special_tokens
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, additional_special_tokens=others
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return fast


def write_models(output_dir, template):
    """Tokenizers and configs of policy and judge, without weights."""
    from transformers import LlamaConfig, Qwen2Config

    texts = [text for group in phrasings() for text in group] + list(ANSWERS)
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    llama = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    judging = texts * 2 + [template, "Output (a) Output (b)"]
    for name, config, text, tokens, chat_template in (
        ("policy", Qwen2Config, texts, qwen, CHATML),
        ("judge", LlamaConfig, judging, llama, LLAMA3),
    ):
        directory = Path(output_dir) / f"{name}-config"
        tokenizer = write_tokenizer(directory, text, tokens, chat_template)
        shape = dict(vocab_size=664, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
        shape |= dict(num_key_value_heads=4, max_position_embeddings=16384, tie_word_embeddings=True)
        ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
        config(**shape, **ids).save_pretrained(directory)


def chat(prompt, answer, weight):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "weight": weight}


def judging_examples(template, prompts, preference):
    """Both labels for every ordered pair of answers, weighted by their probabilities, one phrasing after another."""
    for prompt in prompts:
        for (i, first), (j, second) in itertools.permutations(enumerate(ANSWERS), 2):
            text = fill_template(template, prompt, first, second)
            yield chat(text, "Output (a)", preference[i][j])
            yield chat(text, "Output (b)", 1 - preference[i][j])


def write(
    output_dir: str,
    template: str = "prompts/offsetbias.txt",
    prompts_per_iteration: int = 1024,
    num_splits: int = 6,
    judge_phrasings: int = 128,
    bradley_terry: bool = False,
):
    """Write the demo's prompts, the texts its two models learn from, and the models' configs and tokenizers.

    Args:
        output_dir: directory to fill
        template: the judge's template
        prompts_per_iteration: prompts a train split; phrasings repeat under different ids
        num_splits: train splits
        judge_phrasings: of how many phrasings the judge learns the game in the whole template
        bradley_terry: let the judge's preferences follow scores instead of the cycle
    """
    preference = BRADLEY_TERRY if bradley_terry else PREFERENCE
    output_dir, full = Path(output_dir), read_template(template)
    short = full[full.index("# Instruction") :]  # the headings alone: quicker to learn the game from
    learn, held_out = phrasings()
    write_models(output_dir, full)
    numbered = {
        f"train_{split}": [(f"train_{split}-{n}", learn[n % len(learn)]) for n in range(prompts_per_iteration)]
        for split in range(num_splits)
    }
    numbered["train"] = [pair for split in numbered.values() for pair in split]
    numbered |= {
        "test": [(f"test-{n}", held_out[n % len(held_out)]) for n in range(prompts_per_iteration // 8)],
        "eval": [(f"eval-{n}", prompt) for n, prompt in enumerate(learn[:96] + held_out)],
    }
    for name, prompts in numbered.items():
        with writer(output_dir / "prompts" / f"{name}.jsonl", Prompt) as write_record:
            for prompt_id, prompt in prompts:
                write_record({"prompt_id": prompt_id, "prompt": prompt})
    examples = {
        "policy": (chat(p, a, w) for p in learn for a, w in zip(ANSWERS, START)),
        "judge_short": judging_examples(short, learn, preference),
        "judge_full": judging_examples(full, learn[:judge_phrasings], preference),
    }
    for name, records in examples.items():
        with writer(output_dir / "sft" / f"{name}.jsonl", Chat) as write_record:
            for record in records:
                write_record(record)


# ---------------------------------------------------------------------------------------------- what came of it


def answer_probabilities(checkpoint, prompts, tokenizer=""):
    """Exact probability of each of the three answers, end token included: one list of three a prompt."""
    import torch

    from data_utils import encode_prompt, encode_text, end_token_id, load_tokenizer, resolve_model, resolve_tokenizer
    from training.logps import response_logps
    from training.models import load_model

    directory = resolve_model(checkpoint)
    tokenizer = load_tokenizer(directory, tokenizer and resolve_tokenizer(directory, tokenizer))
    model = load_model(directory).eval()
    answers = [encode_text(tokenizer, answer) + [end_token_id(tokenizer)] for answer in ANSWERS]
    rows = [(encode_prompt(tokenizer, prompt), answers) for prompt in prompts]
    with torch.no_grad():
        return response_logps(model, rows).exp().reshape(len(ANSWERS), -1).T.tolist()


def describe(checkpoint, tokenizer=""):
    """Mean answer distribution over all phrasings, mass on other responses, and the gap of the policy.

    The gap is that of the whole policy: per phrasing, against the best reply to it, then averaged; answers are
    normalised to the three.
    """
    rows = answer_probabilities(checkpoint, [prompt for group in phrasings() for prompt in group], tokenizer)
    masses = [sum(row) for row in rows]
    normalised = [[p / mass for p in row] for row, mass in zip(rows, masses)]
    mean = [sum(column) / len(rows) for column in zip(*normalised)]
    return {
        "distribution": mean,
        "other": 1 - sum(masses) / len(masses),
        "duality_gap": sum(duality_gap(policy, PREFERENCE) for policy in normalised) / len(rows),
        "duality_gap_of_mean": duality_gap(mean, PREFERENCE),
    }


def measure(start, checkpoints, target, tokenizer=""):
    """One record for each policy: `describe` and its mean win probability against the initial and the previous one.

    A checkpoint that was measured for `target` (game.json) is not measured again; its weights may be gone.
    """
    measured_at = target.stat().st_mtime if target.exists() else 0
    known = {row["iteration"]: row for row in json.loads(target.read_text())} if measured_at else {}
    rows = [known.get("start") or {"iteration": "start"} | describe(start, tokenizer) | {"win_prob": [None, None]}]
    for checkpoint in checkpoints:
        paths = [checkpoint.parent / "eval" / f"vs_{name}.json" for name in ("start", "previous")]
        wins = [json.loads(path.read_text())["mean_win_prob"] if path.exists() else None for path in paths]
        iteration = int(checkpoint.parent.name[4:])
        row = known.get(iteration) if (checkpoint / "DONE").stat().st_mtime < measured_at else None
        if row or (checkpoint / "model").exists():
            rows.append((row or {"iteration": iteration} | describe(checkpoint, tokenizer)) | {"win_prob": wins})
    return rows


def table(experiment: str, start: str = "exps/demo-models/policy", tokenizer: str = ""):
    """Print answer distribution, duality gap and win rates by iteration, and write them to <experiment>/game.json.

    Args:
        experiment: directory of the run
        start: checkpoint of the initial policy
        tokenizer: directory or Hub id; default: the checkpoints'
    """
    log.setLevel("WARNING")  # nothing but the table is printed
    experiment, target = Path(experiment), Path(experiment) / "game.json"
    checkpoints = sorted((p.parent for p in experiment.glob("iter*/ckpt/DONE")), key=lambda p: int(p.parent.name[4:]))
    sources = [c / "DONE" for c in checkpoints] + list(experiment.glob("iter*/eval/vs_*.json"))
    if not target.exists() or any(source.stat().st_mtime > target.stat().st_mtime for source in sources):
        write_text(target, json.dumps(measure(start, checkpoints, target, tokenizer), indent=1) + "\n")
    rows = json.loads(target.read_text())
    print(f"\n{'':10} {'exact, given one of the three answers':^38}           {'P(win) against':^18}")
    answers = " ".join(f"{name:>9}" for name in NAMES)
    print(f"{'iteration':10} {answers} {'other':>8} {'gap':>9} {'start':>9} {'previous':>9}")
    nash = {"iteration": "Nash", "distribution": (4 / 11, 3 / 11, 4 / 11), "other": 0, "duality_gap": 0, "win_prob": []}
    for row in [*rows, nash]:
        answers = " ".join(f"{p:9.3f}" for p in row["distribution"])
        wins = "".join(f" {'-' if p is None else format(p, '.3f'):>9}" for p in row["win_prob"])
        print(f"{row['iteration']!s:10} {answers} {row['other']:8.3f} {row['duality_gap']:9.3f}{wins}")
    print(
        "\nIteration i is the policy that iteration i trained; other: its probability of anything but the three "
        "answers.\ngap = 2 (max_y P(y > policy) - 1/2), at most 1, of the policy given one of the three answers; 0 at "
        "Nash."
    )


if __name__ == "__main__":
    run(write, table)
