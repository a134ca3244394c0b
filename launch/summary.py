"""What an iteration came to, in three lines at most: time, what is left, win rates, lengths, KL.

    python3 launch/summary.py iteration | evaluation        with comal.sh's state in the environment
    python3 launch/summary.py duration SECONDS

The figures are those of the report (analysis/report.py), exps/NAME/report/summary.json; what is not known is left out.
Like settings.py it needs nothing but Python 3.9.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from experiment import experiment, loop_seconds, measured_seconds, state


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def rows() -> dict[int, dict]:
    """{iteration: its figures} of the report."""
    try:
        report = json.loads((experiment() / "report/summary.json").read_text(encoding="utf-8"))
        return {row["iteration"]: row for row in report["experiments"][0]["iterations"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def times(number: int) -> str:
    """How long this iteration took, and when the last one will be done."""
    left = int(state("ITERATIONS")) - number - 1
    text = f"iteration {number} took {duration(loop_seconds(Path(state('iter'))) or 0)}"
    seconds = measured_seconds()
    if left and seconds:
        rest = left * sum(seconds) / len(seconds)
        until = time.strftime("%a %H:%M", time.localtime(time.time() + rest))
        text += f"; {left} left, about {duration(rest)}, until {until}"
    return text


def win_rates(row: dict) -> str:
    """Of one policy, against the initial one and the one before it."""
    number = row["iteration"]
    at_start = number == int(state("FIRST_ITERATION") or 0)
    before = "the initial policy" if at_start else f"that of iteration {number - 1}"
    found = {"the initial policy": row.get("win_rate_start"), before: row.get("win_rate_previous")}
    known = [f"{100 * rate:.1f} % against {other}" for other, rate in found.items() if rate is not None]
    return f"the policy of iteration {number} wins {', '.join(known)}" if known else ""


def samples(row: dict) -> str:
    """Of the responses that the policy, before it was trained, has sampled in this iteration."""
    texts = {"sample_tokens": "{:.1f} tokens on average", "kl_reference": "KL from the reference {:.3f} nats"}
    found = [text.format(row[name]) for name, text in texts.items() if row.get(name) is not None]
    return f"its samples: {', '.join(found)}" if found else ""


def main() -> None:
    if sys.argv[1] == "duration":
        print(duration(int(sys.argv[2])))
        return
    number, every = int(state("i")), int(state("EVAL_EVERY"))
    figures = rows()
    if sys.argv[1] == "evaluation":
        lines = [win_rates(figures.get(number, {"iteration": number}))]
    else:
        compared = figures.get(number - 1, {}) if number % every == 0 else {}  # in this iteration's scoring
        lines = [times(number), win_rates(compared) if compared else "", samples(figures.get(number, {}))]
    print("\n".join(f"    {line}" for line in lines if line))


if __name__ == "__main__":
    main()
