"""A judge behind a server: answers as text, a real server, and one with moods.

python -m pytest tests/test_servers.py
"""

import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.judging import PlainJudge, samples, score
from helpers.loop import ROOT
from helpers.served import KEY
from helpers.training import words

from judges.base import JudgeConfig
from judges.server import ServerJudge, duration, parse_answer, read_answer
from records import Record, read
from utils import StageError
from workers.journal import Skipped
from workers.worker import run_here

pytestmark = pytest.mark.slow


LABELS = ["Output (a)", "Output (b)"]


# ---------------------------------------------------------------------------------------------- answers as text


@pytest.mark.parametrize(
    "tokens, expected",
    [
        # the position after "Output (" decides, whatever the tokens are
        (
            [
                ("Output", [("Output", -0.1)]),
                (" (", [(" (", 0)]),
                ("a", [("a", math.log(0.6)), ("b", math.log(0.2)), ("c", -3)]),
            ],
            (0.75, 0.8),
        ),
        ([("Output (b", [("Output (b", math.log(0.9)), ("Output (a)", math.log(0.1)), ("Out", -9)])], (0.1, 1.0)),
        # an answer with white space before it; a label that is not among the candidates
        ([("\n", [("\n", 0)]), ("Output (", [("Output (", 0)]), ("b)", [("b)", math.log(0.5))])], (0.0, 0.5)),
        (
            [("I", [("I", -0.1), ("Output", -5)]), (" think", [(" think", -0.1)])],
            None,
        ),  # left both labels before they part
        ([("Output", [("Output", 0)]), (" (", [(" (", 0)]), ("c", [("c", -0.1), ("b", math.log(0.01))])], (0.0, 0.01)),
        ([("Output", [("Output", 0)])], None),
        ([], None),
    ],
)
def test_read_answer_where_the_labels_part(tokens, expected):
    found = read_answer(tokens, LABELS)
    assert found == expected if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer, expected",
    [("Output (a)", (1, 1)), (" Output (b). Because", (0, 1)), ("Output", None), ("(a)", None), ("", None)],
)
def test_parse_answer(answer, expected):
    assert parse_answer(answer, LABELS) == expected


@pytest.mark.parametrize("text, seconds", [("6m0s", 360), ("1.5s", 1.5), ("20ms", 0.02), ("3", 3), ("1h2m", 3720)])
def test_duration(text, seconds):
    assert duration(text) == pytest.approx(seconds)


# ---------------------------------------------------------------------------------------------- a server


@pytest.mark.cpu_engine
def test_a_server_that_goes_and_comes_back(served, demo_models, jsonl, tmp_path):
    """To what asks it, a server that is killed and started again."""
    source, there, count = jsonl("samples.jsonl", *samples(20)), tmp_path / "there.jsonl", 20
    asking = subprocess.Popen(
        [sys.executable, "scoring.py", *words(input=source, output=there, api_concurrency=2, **served.flags)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OPENAI_API_KEY": KEY},
    )
    partial = tmp_path / "there.jsonl.partial"
    lines = lambda: len(partial.read_bytes().splitlines()) - 1 if partial.exists() else 0
    while asking.poll() is None and lines() < 4:
        time.sleep(0.02)
    served.gate.shut()
    time.sleep(1)  # what it had answered arrives
    kept = lines()
    time.sleep(2)
    assert asking.poll() is None and not there.exists() and lines() == kept
    served.gate.open()
    output = asking.communicate(timeout=240)[0]
    assert asking.returncode == 0 and 4 <= kept < count, (kept, output)
    found, plain = list(read(there, Record)), PlainJudge(demo_models / "judge")
    assert [one["prompt_id"] for one in found] == [str(i) for i in range(count)]
    for one in (found[0], found[-2], found[-1]):  # before and after, and one with two equal responses
        texts = list(dict.fromkeys(sample["text"] for sample in one["samples"]))
        verdicts = {pair: plain(one["prompt"], *pair) for pair in itertools.permutations(texts, 2)}
        for (i, first), (j, second) in itertools.permutations(enumerate(one["samples"]), 2):
            pair = first["text"], second["text"]
            here, there = (verdicts.get(order, (0.5,))[0] for order in (pair, pair[::-1]))
            assert one["win_probs"][i][j] == pytest.approx((here + 1 - there) / 2, abs=1e-4)
        masses = [mass for _, mass in verdicts.values()]
        assert one["label_mass"] == pytest.approx(sum(masses) / len(masses), abs=1e-4)
    requests = sum(one["usage"]["requests"] for one in found)
    assert requests == (count - 1) * 6 + 2 and f"{requests} requests" in output
    printed = [path.read_text(errors="ignore") for path in tmp_path.iterdir()] + [output]
    assert not any(KEY in text for text in printed)


def completion(text, **usage):
    """An answer of a server."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    found = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return found | ({"usage": usage} if usage else {})


class Handler(BaseHTTPRequestHandler):
    """A server with its moods: `moods` are (status, headers, body) of the next requests, then it answers."""

    moods, asked, at = [], [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.at.append(time.monotonic())
        status, headers, answer = self.moods.pop(0) if self.moods else (200, {}, None)
        answer = answer or completion("Output (a)", prompt_tokens=7, completion_tokens=3, total_tokens=10)
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    Handler.moods, Handler.asked, Handler.at = [], [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield ServerJudge(
        JudgeConfig(
            judge="m",
            judge_type="server",
            api_base=f"http://127.0.0.1:{server.server_port}/v1",
            gpus="none",
            template=str(ROOT / "prompts/offsetbias.txt"),
            api_concurrency=1,
            api_retries=1,
        )
    )
    server.shutdown()


def work(judge, *records):
    return run_here(judge, [(0, record) for record in records])


def error(message):
    return {"error": {"message": message, "type": "x", "code": None}}


def test_answers_without_log_probabilities(server):
    Handler.moods = [
        (400, {}, error("top_logprobs must be at most 5")),
        (400, {}, error("logprobs is not supported")),
        (400, {}, error("Unsupported value: 'temperature'")),
    ]
    (found,) = work(server, samples(2)[0])
    # it always prefers the first one, so both orders together say 1/2
    assert found["win_probs"][0][1] == 0.5 and found["order_gap"] == 1
    assert found["usage"] == {"requests": 6, "prompt_tokens": 42, "completion_tokens": 18}
    assert Handler.asked[1]["top_logprobs"] == 5 and "logprobs" not in Handler.asked[2]
    assert not {"temperature", "logprobs", "top_logprobs"} & set(Handler.asked[-1]) and len(Handler.asked) == 9


def test_it_waits_as_long_as_the_server_says(server):
    Handler.moods = [
        (429, {"retry-after": "1"}, error("slow down")),
        (200, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"}, None),
    ]
    work(server, samples(2)[1])  # two orders
    first, second = Handler.at[1] - Handler.at[0], Handler.at[2] - Handler.at[1]
    assert first >= 0.95 and second >= 0.95


@pytest.mark.parametrize(
    "status, message",
    [
        (401, "did not answer for m: .*Incorrect API key \\*\\*\\*"),
        (404, "did not answer"),
        (400, "refuses the request for m: .*Incorrect"),
        (500, "What is finished is kept"),
    ],
)
def test_a_server_that_refuses(server, status, message):
    Handler.moods = [(status, {"retry-after": "0"}, error("Incorrect API key secret"))] * 50
    with pytest.raises(StageError, match=message):
        work(server, samples(2)[0])


def test_a_record_that_is_too_long_or_not_answered_is_skipped(server):
    Handler.moods = [(400, {}, error("This model's maximum context length is 8 tokens"))]
    first, second = work(server, *samples(2))
    assert isinstance(first, Skipped) and "too long" in first.reason and "win_probs" in second
    Handler.moods = [(200, {}, completion("Both are nice"))]
    (first,) = work(server, samples(2)[1])
    assert "answered 'Both are nice', which is none of its labels" in first.reason
    server.config.on_error = "skip"  # a request that the server will never take
    Handler.moods = [(400, {}, error("content policy"))]
    (first,) = work(server, samples(2)[0])
    assert "refuses the request for m" in first.reason and first.usage["completion_tokens"] == 15


def test_a_server_that_never_answers_with_a_label_is_no_judge(server):
    Handler.moods = [(200, {}, completion("Both"))] * 100
    with pytest.raises(StageError, match="does not answer with one of the labels, but 'Both'"):
        work(server, *samples(9))
    assert len(Handler.asked) < 30


def test_no_server_is_a_plain_error(jsonl, tmp_path):
    source, output = jsonl("samples.jsonl", *samples(1)), tmp_path / "o.jsonl"
    flags = {"check": False, "judge": "m", "judge_type": "server"}
    printed = score(source, output, api_base="http://127.0.0.1:9/v1", api_retries=1, **flags)
    assert "http://127.0.0.1:9/v1 did not answer for m: Connection error" in printed and "Traceback" not in printed
    printed = score(source, output, environment={"OPENAI_API_KEY": ""}, **flags)
    assert "OPENAI_API_KEY is not set" in printed
