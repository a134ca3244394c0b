"""What the first figures of a run should be, and what to do where they are not.

Each function takes what was found (None: not known) and returns a Check: the name of the figure, the value and the
normal range in words, and, where something looks wrong, a sentence that says what to do. Its docstring says where the
range comes from. docs/recipes.md explains the figures themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

OTHER_LOGPS = (
    "training computes other log-probabilities than get_logprobs.py has stored. Both should run in the same precision "
    "and with the same version of the code."
)


@dataclass
class Check:
    name: str
    found: str
    normal: str
    wrong: str = ""


def number(value: float | None, form: str = ".4g") -> str:
    return "not known" if value is None else format(value, form)


def percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f} %"


# ---------------------------------------------------------------------------------------------- training


def first_loss(loss: float, trainer: str, eta: float, soft: bool, same: bool) -> Check:
    """The policy has not moved yet, so the margin h is 0 where the reference is the last policy (`same`): INPO and IPO,
    (h - target)^2, begin with the target's square, (1/(2 eta))^2 = 62,500 for eta 0.002; with soft labels p it is the
    mean of ((2p - 1)/(2 eta))^2, at most that. DPO begins with -log sigmoid(0) = log 2, also with soft labels
    (losses.py)."""
    name, found = "first loss", number(loss, ",.5g")
    if trainer not in ("inpo", "ipo", "dpo") or not same:
        why = "as the reference is another model" if not same else f"as {trainer}.py is a trainer of your own"
        return Check(name, found, f"not fixed, {why}")
    if trainer == "dpo":
        target, normal = math.log(2), "log 2 = 0.6931"
    else:
        target = (1 / (2 * eta)) ** 2
        normal = f"{'at most ' * soft}(1/(2 eta))^2 = {target:,.5g}"
    above, below = loss > target * (1 + tolerance(trainer, eta)), loss < target * (1 - tolerance(trainer, eta))
    wrong = above or (below and not (soft and trainer != "dpo"))
    sentence = (
        f"The first loss is {found} instead of {normal}: ETA, BETA or SOFT_LABELS are not what they should be, or the "
        "data were made with another policy or reference than MODEL and REFERENCE."
    )
    return Check(name, found, normal, sentence * wrong)


def tolerance(trainer: str, eta: float) -> float:
    """By how much a first loss may differ from what it should be, relatively. In bfloat16 the mean margin of a batch is
    off by a quarter of a nat or less, which changes (h - target)^2 by twice that over the target 1/(2 eta): by eta; and
    5 % at least."""
    return 0.05 if trainer == "dpo" else max(0.05, eta)


def normalised_loss(value: float, trainer: str, eta: float) -> Check:
    """The loss over that of the last policy on the same pairs, from their stored log-probabilities: 1 at the first
    update by construction, as the policy is still the last policy."""
    wrong = not abs(value - 1) <= tolerance(trainer, eta)
    sentence = f"The first normalised_loss is {value:.4g} instead of 1: {OTHER_LOGPS}"
    return Check("first normalised_loss", number(value), "1: the policy is still the last policy", sentence * wrong)


def margin(value: float | None) -> Check:
    """How far the pairs have moved apart since the last policy, 0 before the first update by construction. Half a nat
    is more than bfloat16 leaves in a batch's mean."""
    wrong = value is not None and not abs(value) <= 0.5
    sentence = f"The first margin is {number(value)} nats instead of 0: {OTHER_LOGPS}"
    return Check("first margin", f"{number(value)} nats", "0: the policy is still the last policy", sentence * wrong)


# ---------------------------------------------------------------------------------------------- judging


def label_mass(value: float | None) -> Check:
    """The probability that the judge gives to its two labels. A judge that has learnt to answer with them gives nearly
    all of it; scoring.py refuses below 0.05. Where a tenth is missing, P is read off a side of what it says."""
    wrong = value is not None and value < 0.9
    sentence = (
        f"The judge gives only {number(value, '.3f')} of its probability to its labels: give the TEMPLATE and the "
        "labels that it was trained with (docs/judges.md)."
    )
    return Check("label mass", number(value, ".3f"), "near 1: the judge answers with its labels", sentence * wrong)


def position_bias(value: float | None) -> Check:
    """Mean absolute difference of P between the two orders. 1/3 is what two numbers differ by that are drawn at random
    between 0 and 1: from there on P says as much about the order as about the responses. A judge that always prefers
    the first response has 1."""
    wrong = value is not None and value >= 1 / 3
    sentence = (
        f"The judge's two orders differ by {number(value, '.3f')} on average, no less than random verdicts would: "
        "check TEMPLATE and the order of its labels, or take a better judge."
    )
    return Check("position bias", number(value, ".3f"), "below 0.333, that of random verdicts", sentence * wrong)


def clearness(win_probs: list[float]) -> Check:
    """Mean of |2P - 1| over the pairs. The margin's target is that times 1/(2 eta) with soft labels; with hard labels a
    verdict near 1/2 is a coin's, and training learns noise."""
    value = sum(abs(2 * p - 1) for p in win_probs) / len(win_probs)
    wrong = value < 0.1
    sentence = (
        f"For most pairs P is near 1/2 (|2P - 1| is {value:.3f} on average), so there is little to learn: take a judge "
        "that tells responses apart, a smaller reward_temperature (JUDGE_FLAGS), or PAIR_RULE=best_worst."
    )
    return Check("clearness |2P - 1|", f"{value:.3f}", "above 0.1: the judge prefers one of the two", sentence * wrong)


# ---------------------------------------------------------------------------------------------- responses and pairs


def response_tokens(value: float | None, limit: int) -> Check:
    wrong = value is not None and value < 2
    sentence = "Most responses are empty: MODEL is no chat model, or its chat template or TOKENIZER is not its own."
    return Check("tokens of a response", number(value, ".1f"), f"at most MAX_NEW_TOKENS = {limit:,}", sentence * wrong)


def truncated(share: float | None, limit: int) -> Check:
    """Responses that ran into the length limit have no end token. A policy after SFT ends nearly always by itself.
    Where more than one in ten is cut off, the judge compares incomplete texts, and ending is not learnt."""
    wrong = share is not None and share > 0.1
    sentence = (
        f"{percent(share)} of the responses ran into MAX_NEW_TOKENS = {limit:,}: raise it, or, where the policy does "
        "not end by itself, check that its chat template and TOKENIZER have its end token."
    )
    return Check("responses cut off", percent(share), "below 10 %: a policy ends by itself", sentence * wrong)


def kept(share: float | None, rule: str) -> Check:
    """Share of the judged prompts that gave a pair. Of several responses two different ones are nearly always found; a
    random pair is dropped where its two texts are equal, with the demo's policy of three answers (0.8, 0.1, 0.1) two
    times in three."""
    least = 0.2 if rule == "random" else 0.9
    wrong = share is not None and share < least
    sentence = (
        f"Only {percent(share)} of the prompts gave a pair, as the responses are equal (then raise TEMPERATURE or "
        "NUM_SAMPLES) or too long for training (then raise MAX_LENGTH, or lower MAX_NEW_TOKENS)."
    )
    return Check(
        "prompts with a pair", percent(share), f"above {100 * least:.0f} % with PAIR_RULE={rule}", sentence * wrong
    )


def skipped(count: int | None, prompts: float) -> Check:
    """Records that a stage has left out, because they are too long; they are not learnt from."""
    share = None if count is None else count / prompts
    wrong = share is not None and share > 0.05
    sentence = (
        f"{percent(share)} of the prompts were left out: the reasons are in iter*/*.skipped.jsonl; raise "
        "MAX_PROMPT_TOKENS or MAX_JUDGE_TOKENS."
    )
    return Check("records left out", percent(share), "below 5 %", sentence * wrong)


# ---------------------------------------------------------------------------------------------- memory and disk


def training_memory(used: float | None, total: float | None) -> str:
    """What is wrong with the GPU's memory in training, in the same unit. A trial sees few of the long pairs, whose
    activations take more; engines fill a share of the GPU that is chosen beforehand, so for them it says nothing."""
    if used is None or not total or used <= 0.9 * total:
        return ""
    return (
        f"Training took {100 * used / total:.0f} % of a GPU's memory, and longer pairs than the trial's will take "
        "more: give GRADIENT_CHECKPOINTING=true, a smaller MICRO_BATCH_TOKENS, or more GPUs."
    )


def host_memory(used: float, total: float) -> str:
    """What is wrong with the host's memory, in the same unit: the kernel ends processes where there is none left."""
    if used <= 0.9 * total:
        return ""
    share = f"{100 * used / total:.0f} %"
    return f"The stages took {share} of the host's memory: use fewer GPUs at once, or a larger machine."


def disk(needed: float, free: float) -> str:
    """What is wrong with the room on the disk, in the same unit."""
    if needed <= free:
        return ""
    return (
        f"The run will write {needed / 2**30:,.0f} GiB, and {free / 2**30:,.0f} GiB are free: free some, give "
        "KEEP_CKPTS=rounds or KEEP_CKPTS=last, or make exps a link to a larger disk."
    )
