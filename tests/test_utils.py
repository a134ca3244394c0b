"""utils.py: the checked command line, files, seeds, and worker processes (real ones, started with spawn).

    python -m pytest tests/test_utils.py
"""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from utils import (MAX_ATTEMPTS, SEED_SPACING, StageError, derive_seed, dump_json, file_lists,
                   jsonl_writer, map_chunks, map_files, read_jsonl, read_prompts, split_list, text_id,
                   worker_environments, write_text)

ROOT = Path(__file__).resolve().parents[1]

# ---- run: a stage, and a server that gives every command line to a process of its own ----

STAGE = '''
import json, os, sys
from dataclasses import dataclass
sys.path.insert(0, sys.argv[1])
from utils import StageError, run

@dataclass(kw_only=True)
class Base:
    """Shared settings.

    Args:
        rate: learning rate
    """
    rate: float = 0.5

@dataclass(kw_only=True)
class Config(Base):
    """Settings.

    Args:
        size: a size without a default
        deep: deeper
    """
    size: int
    deep: bool = False

def main(text: str, count: int = 1, quick: bool = True, max_length: int = 8):
    """Print the flags.

    Args:
        text: any text
    """
    print("ran", json.dumps([text, count, quick, max_length]))
    return "what Fire must not print"

def configured(text: str = "", **config: Config):
    """Print the configuration."""
    print("ran", json.dumps([text, vars(Config(**config))]))

def fail(how: str):
    """End in one way or another."""
    if how == "stage":
        raise StageError("the input is too short; give a longer one")
    if how == "interrupt":
        raise KeyboardInterrupt
    open("no/such/file")

PROGRAMS = {"main": [main], "configured": [configured], "fail": [fail], "several": [main, fail]}
for line in sys.stdin:
    program, *argv = json.loads(line)
    child = os.fork()
    if child == 0:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["stage.py", *argv]
        run(*PROGRAMS[program])
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, open("out").read(), open("err").read()]), flush=True)
'''


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A function that runs one of the PROGRAMS above with these words and returns (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "stage.py").write_text(STAGE)
    with subprocess.Popen([sys.executable, "stage.py", str(ROOT)], cwd=folder, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        def run_stage(*words):
            server.stdin.write(json.dumps(words) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())
        yield run_stage
        server.stdin.close()


def assert_refused(result, *words):
    """Exit code 2, a message with these words and no traceback, and the function has not run."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def ran(result):
    """What the function printed, the only thing on stdout."""
    code, out, err = result
    assert code == 0, err
    assert out.startswith("ran ") and out.count("\n") == 1
    return json.loads(out[4:])


@pytest.mark.parametrize("words, message", [
    (["--text", "a", "--cuont", "3"], "unknown flag --cuont; did you mean --count?"),
    (["--cuont=3", "--text", "a"], "unknown flag --cuont"),
    (["--text", "a", "--zzz"], "see stage.py --help"),
    (["--text", "a", "--count", "three"], "--count takes int, got 'three'"),
    (["--text", "a", "--count", "1e3"], "--count takes int, got '1e3'"),
    (["--text", "a", "--count", "2.0"], "--count takes int, got '2.0'"),
    (["--text", "a", "--quick=maybe"], "--quick takes bool, got 'maybe'"),
    (["--text", "a", "--quick", "maybe"], "unexpected argument 'maybe'"),
    (["--count", "3"], "missing --text"),
    ([], "missing --text"),
    (["a"], "unexpected argument 'a'"),
    (["--text", "a", "b"], "unexpected argument 'b'"),
    (["-text", "a"], "unexpected argument '-text'"),
    (["--text", "a", "--", "--trace"], "unexpected argument '--'"),
    (["--text", "a", "--text", "b"], "--text is given twice"),
    (["--text", "a", "--max-length", "1", "--max_length", "2"], "--max_length is given twice"),
    (["--text", "--count", "3"], "--text needs a value"),
    (["--text", "a", "--count"], "--count needs a value"),
])
def test_run_refuses_before_the_function_runs(stage, words, message):
    assert_refused(stage("main", *words), message)


@pytest.mark.parametrize("text", ["0,1", "1e3", "007", "7", "None", "True", "[1]", "{a: 1}", "'quoted'", "a=b", "",
                                  "two words", "naïve\u2028", "-5", "#x"])
def test_run_keeps_text_as_text(stage, text):
    assert ran(stage("main", "--text", text))[0] == text
    assert ran(stage("main", f"--text={text}"))[0] == text


@pytest.mark.parametrize("text", ["-", "-dir", "-h"])
def test_run_takes_a_value_with_a_dash_as_text_or_refuses_it(stage, text):
    # Fire takes `-` for its separator and `-dir` for a flag.
    code, out, err = result = stage("main", "--text", text)
    if code == 0:
        assert ran(result)[0] == text
    else:
        assert_refused(result)


def test_run_reads_numbers_by_their_annotation(stage):
    assert ran(stage("main", "--text", "a", "--count", "-12", "--max-length=16")) == ["a", -12, True, 16]
    assert ran(stage("configured", "--size", "3", "--rate", "1e-3")) == ["", {"rate": 0.001, "size": 3, "deep": False}]


@pytest.mark.parametrize("words, value", [
    ([], True), (["--quick"], True), (["--quick", "false"], False), (["--quick=0"], False), (["--quick", "No"], False),
    (["--quick=True"], True), (["--quick", "--count", "2"], True)])
def test_run_reads_booleans(stage, words, value):
    assert ran(stage("main", "--text", "a", *words))[2] is value


def test_run_takes_the_fields_of_a_configuration_as_flags(stage):
    assert ran(stage("configured", "--deep", "--size=3", "--text", "7"))[1] == {"rate": 0.5, "size": 3, "deep": True}
    assert_refused(stage("configured", "--text", "7"), "missing --size")
    assert_refused(stage("configured", "--size", "3", "--depe"), "did you mean --deep?")
    assert_refused(stage("configured", "--size", "3", "--rate", "fast"), "--rate takes float, got 'fast'")


@pytest.mark.parametrize("program, words", [("main", ["--help"]), ("main", ["-h"]), ("main", ["--text", "a", "--help"]),
                                            ("several", ["main", "--text", "a", "--help"])])
def test_run_shows_help_and_does_not_run(stage, program, words):
    code, out, err = stage(program, *words)
    assert "ran" not in out
    assert code == 0
    assert "any text" in out + err and "--count" in out + err


def test_run_with_a_mistyped_flag_and_help_does_not_run(stage):
    assert "ran" not in stage("main", "--text", "a", "--zzz", "1", "--help")[1]


def test_run_help_documents_inherited_settings(stage):
    code, out, err = stage("configured", "--help")
    assert code == 0
    for words in ("--rate", "learning rate", "--size", "a size without a default", "--deep", "deeper"):
        assert words in out + err


def test_run_chooses_among_commands(stage):
    assert ran(stage("several", "main", "--text", "main"))[0] == "main"
    for words in ([], ["other"], ["--text", "a"]):
        assert_refused(stage("several", *words), "usage: stage.py COMMAND", "Print the flags.", "End in one way or")
    assert_refused(stage("several", "main", "--zzz", "1"), "stage.py main: error: unknown flag --zzz")


@pytest.mark.parametrize("how, code, message", [
    ("stage", 1, "stage.py: error: the input is too short; give a longer one"),
    ("missing file", 1, "stage.py: error: No such file or directory (no/such/file)"),
    ("interrupt", 130, "stage.py: interrupted"),
])
def test_run_ends_with_a_message_and_without_a_traceback(stage, how, code, message):
    found, out, err = stage("fail", "--how", how)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1] == message
    assert "Traceback" not in err


def test_run_exit_code_of_a_real_stage(tmp_path):
    flags = ["--input", "no-such-file", "--output", str(tmp_path / "a")]
    command = [sys.executable, "data_processing.py", "make_pairs", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "data_processing.py make_pairs: error: input file no-such-file does not exist"
    assert not list(tmp_path.iterdir())


# ---- Files ----


def test_split_list_drops_blanks():
    assert split_list(" a, b c ,,d,") == ["a", "b c", "d"]
    assert split_list("") == []


def test_file_lists_pairs_inputs_with_outputs(jsonl):
    a, b = jsonl("a", {}), jsonl("b", {})
    inputs, outputs = file_lists(input=f"{a},{b}", output="x,y")
    assert (inputs, outputs) == ([a, b], [Path("x"), Path("y")])


@pytest.mark.parametrize("input, output, message", [
    ("a,b", "x", "--input has 2, --output has 1"),
    ("", "", "--input has 0"),
    ("a,missing", "x,y", "missing does not exist"),
    ("empty", "x", "empty is empty"),
    ("folder", "x", "folder is not a file"),
    ("a,b", "x,./x", "written twice"),
    ("a", "./a", "is also an input"),
    ("a,b", "x,folder/../a", "is also an input"),
    ("a", "folder", "is a directory"),
])
def test_file_lists_refuses(jsonl, tmp_path, monkeypatch, input, output, message):
    jsonl("a", {}), jsonl("b", {}), jsonl("empty"), (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=message):
        file_lists(input=input, output=output)


FIELDS = {"prompt_id": str, "prompt": str, "score": (int, float)}
GOOD = '{"prompt_id": "a", "prompt": "x", "score": 1}\n'


@pytest.mark.parametrize("second, message", [
    ("not json\n", "line 2: not valid JSON"),
    ('{"prompt_id": "b", "prompt": "x", "sco', "line 2: not valid JSON"),  # the file was cut
    ("\n", "line 2: not valid JSON"),
    ('{"prompt_id": "b", "prompt": "x", "score": NaN}\n', "line 2: not valid JSON"),
    ('[1, 2]\n', "line 2: expected a JSON object, got list"),
    ('{"prompt_id": "b", "score": 2}\n', "line 2: field 'prompt' is missing; found prompt_id, score"),
    ('{"prompt_id": "b", "prompt": ["x"], "score": 2}\n', "line 2: field 'prompt' should be str, got list"),
    ('{"prompt_id": 7, "prompt": "x", "score": 2}\n', "line 2: field 'prompt_id' should be str, got int"),
    ('{"prompt_id": "b", "prompt": "x", "score": "2"}\n', "line 2: field 'score' should be int or float, got str"),
    (GOOD, "line 2: prompt_id 'a' occurs a second time"),
])
def test_read_jsonl_names_file_and_line(tmp_path, second, message):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + second)
    with pytest.raises(StageError, match=f"a.jsonl, {message}"):
        list(read_jsonl(path, FIELDS))


def test_read_jsonl_names_the_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt_id": "\xff"}\n')
    with pytest.raises(StageError, match="line 2: not valid JSON"):
        list(read_jsonl(path, FIELDS))


def test_read_jsonl_refuses_an_empty_file(jsonl):
    with pytest.raises(StageError, match="no records"):
        list(read_jsonl(jsonl("a.jsonl"), FIELDS))


def test_read_jsonl_splits_at_line_feeds_only(jsonl):
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\rb", "a\nb"]
    records = [{"prompt_id": str(i), "prompt": text} for i, text in enumerate(texts)]
    path = jsonl("a.jsonl", *records)
    assert path.read_bytes().count(b"\n") == 5  # only ASCII control characters are escaped in JSON
    assert list(read_jsonl(path, {"prompt_id": str})) == records
    assert sum(1 for _ in read_jsonl(path, {"prompt_id": str})) == 5


def test_read_prompts_makes_ids_from_the_text(jsonl):
    path = jsonl("a.jsonl", {"prompt": "x"}, {"prompt": "y", "prompt_id": "mine"}, {"prompt": "z", "prompt_id": 3})
    # The first 16 hex digits of sha256("x").
    assert [record["prompt_id"] for record in read_prompts(path)] == ["2d711642b726b044", "mine", "3"]


def test_read_prompts_keeps_numbered_ids(jsonl):
    path = jsonl("a.jsonl", *({"prompt": "x", "prompt_id": number} for number in range(3)))
    assert [record["prompt_id"] for record in read_prompts(path)] == ["0", "1", "2"]


@pytest.mark.parametrize("records, message", [
    ([{"prompt": "x"}, {"prompt": " \n"}], "line 2: the prompt is empty"),
    ([{"prompt": "x"}, {"prompt": "x"}], "line 2: prompt_id '2d711642b726b044' .* occurs a second time"),
    ([{"prompt": "x", "prompt_id": "3"}, {"prompt": "y", "prompt_id": 3}], "line 2: prompt_id '3' .* a second time"),
    ([{"prompt": "x", "prompt_id": ["3"]}], "line 1: .*prompt_id"),
    ([{"text": "x"}], "line 1: field 'prompt' is missing"),
    ([], "no records"),
])
def test_read_prompts_refuses(jsonl, records, message):
    with pytest.raises(StageError, match=message):
        list(read_prompts(jsonl("a.jsonl", *records)))


def test_read_prompts_names_the_line_of_half_a_character(tmp_path):
    # JSON can spell one half of a surrogate pair (an emoji that was cut); no tokenizer or UTF-8 file takes it.
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "\\ud83d"}\n')
    with pytest.raises(StageError, match="line 2"):
        list(read_prompts(path))


def test_text_id_differs_by_text_and_not_by_run():
    assert text_id("x") == "2d711642b726b044"
    assert len({text_id(text) for text in ("x", "x ", "X", "é", "e\u0301", "")}) == 6


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_dump_json_refuses_what_is_not_json(number):
    with pytest.raises(ValueError):
        dump_json({"score": number})


def test_jsonl_writer_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    records = [{"text": "naïve 東京\u2028\n", "p": 0.1}, {"text": "", "p": None}]
    with jsonl_writer(path) as write:
        for record in records:
            write(record)
        assert not path.exists()
    assert list(read_jsonl(path)) == records
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_jsonl_writer_leaves_nothing_after_an_exception(tmp_path, error):
    with pytest.raises(error), jsonl_writer(tmp_path / "a.jsonl") as write:
        write({"a": 1})
        raise error
    assert list(tmp_path.iterdir()) == []


def test_jsonl_writer_keeps_the_old_file_after_an_exception(tmp_path, jsonl):
    path = jsonl("a.jsonl", {"old": True})
    with pytest.raises(ValueError), jsonl_writer(path) as write:
        write({"score": float("nan")})
    assert list(read_jsonl(path)) == [{"old": True}]
    assert list(tmp_path.iterdir()) == [path]


def test_write_text_replaces_a_file(tmp_path):
    for text in ("a\n", "é\u2028\n"):
        write_text(tmp_path / "new" / "a.json", text)
        assert (tmp_path / "new" / "a.json").read_bytes() == text.encode()
    assert len(list((tmp_path / "new").iterdir())) == 1


# ---- Seeds ----


def test_derive_seed_is_the_same_everywhere():
    # blake2b of "0\0alpaca_eval-0", six bytes, big-endian, times 4096
    assert derive_seed(0, "alpaca_eval-0") == 120409874984366080
    assert derive_seed(1, "naïve") == 980777871091683328


def test_derive_seed_leaves_room_for_the_samples_of_a_prompt():
    seeds = [derive_seed(seed, prompt) for seed in range(3) for prompt in range(1000)]
    assert len(set(seeds)) == 3000
    assert all(seed % SEED_SPACING == 0 and 0 <= seed < 2 ** 60 for seed in seeds)


def test_derive_seed_tells_its_parts_apart():
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed(3, 12)}) == 4


# ---- Workers ----


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi with this shell body first on PATH; CUDA_VISIBLE_DEVICES is unset."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(body):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    install("printf '0\\n1\\n2\\n3\\n'")
    return install


def devices(*args, **settings):
    return [environment["CUDA_VISIBLE_DEVICES"] for environment in worker_environments(*args, **settings)]


def test_worker_environments_takes_the_gpus_that_nvidia_smi_lists(nvidia_smi):
    assert devices("auto") == ["0", "1", "2", "3"]
    assert devices("auto", gpus_per_worker=2) == ["0,1", "2,3"]
    assert devices("3, 1") == ["3", "1"]
    assert devices("none", cpu_workers=3) == ["", "", ""]


@pytest.mark.parametrize("visible, expected", [
    ("2,5", ["2", "5"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]), ("", [""]), ("-1", [""])])
def test_worker_environments_stays_within_cuda_visible_devices(nvidia_smi, monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)  # -1 is CUDA's own way to say: none
    assert devices("auto") == expected
    assert devices("none") == [""]
    with pytest.raises(StageError, match="--gpus names 0, but CUDA_VISIBLE_DEVICES allows"):
        devices("0")


@pytest.mark.parametrize("body", ["exit 9", "echo 'NVIDIA-SMI has failed'; exit 1", ":"])
def test_worker_environments_uses_the_cpu_where_there_is_no_gpu(nvidia_smi, body):
    nvidia_smi(body)
    assert devices("auto", cpu_workers=2) == ["", ""]
    with pytest.raises(StageError, match="--gpus names 0, but nvidia-smi lists none"):
        devices("0")


def test_worker_environments_refuses_an_unknown_gpu(nvidia_smi):
    with pytest.raises(StageError, match="--gpus names 4,x, but nvidia-smi lists 0,1,2,3"):
        devices("0,4,x")


def test_worker_environments_refuses_an_uneven_split(nvidia_smi):
    with pytest.raises(StageError, match="4 GPUs cannot be split into groups of 3"):
        devices("auto", gpus_per_worker=3)


@pytest.mark.parametrize("gpus, settings", [
    ("0,0", {}), ("auto", {"gpus_per_worker": 0}), ("none", {"cpu_workers": 0})])
def test_worker_environments_refuses_impossible_settings(nvidia_smi, gpus, settings):
    # A GPU given to two engines, groups of none, and no worker at all, for which map_chunks would wait for ever.
    with pytest.raises(StageError):
        worker_environments(gpus, **settings)


# The functions of the worker processes: `work(folder, chunk)`, where the folder takes notes of what happened.


def start(work, folder):
    (folder / f"pid-{os.getpid()}").touch()
    return partial(work, folder)


def doubled(folder, chunk):
    return 2 * chunk


def visible_devices(folder, chunk):
    return os.environ["CUDA_VISIBLE_DEVICES"]


def first_is_slow(folder, chunk):
    """Chunk 0 ends only after chunk 5 has ended, which so has to run elsewhere."""
    deadline = time.monotonic() + 60
    while chunk == 0 and not (folder / "done-5").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (folder / f"done-{chunk}").touch()
    return chunk, os.getpid()


def raises(error, folder, chunk):
    if chunk == 2:
        raise error("chunk two is bad")
    return chunk


def dies(times, folder, chunk):
    """Kills itself at chunk 2, so many times."""
    notes = folder / "deaths"
    deaths = notes.read_text() if notes.exists() else ""
    if chunk == 2 and len(deaths) < times:
        notes.write_text(deaths + "x")
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * chunk


def dies_at_start(folder):
    with open(folder / "deaths", "a") as notes:
        notes.write("x")
    os._exit(7)


def fails_at_start(folder):
    raise StageError("the model does not exist")


def unpicklable(folder, chunk):
    return lambda: chunk


@pytest.fixture(autouse=True)
def no_child_left(tmp_path):
    """After the test, every worker that it started has ended."""
    yield
    assert multiprocessing.active_children() == []
    for note in tmp_path.glob("pid-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.name.removeprefix("pid-")), 0)


def run_chunks(tmp_path, work, chunks, workers=1):
    return list(map_chunks(partial(start, work, tmp_path), chunks, [{}] * workers))


def test_map_chunks_keeps_the_order_of_uneven_work(tmp_path):
    found = run_chunks(tmp_path, first_is_slow, range(9), workers=2)
    assert [chunk for chunk, _ in found] == list(range(9))
    assert [result for _, (result, _) in found] == list(range(9))
    pids = [pid for _, (_, pid) in found]
    assert len(set(pids)) == 2
    assert len(set(pids[1:6])) == 1 and pids[0] != pids[1]


def test_map_chunks_sets_each_workers_environment(tmp_path):
    (found,) = map_chunks(partial(start, visible_devices, tmp_path), [0], [{"CUDA_VISIBLE_DEVICES": "3,5"}])
    assert found == (0, "3,5")


def test_map_chunks_takes_chunks_as_they_are_needed(tmp_path):
    results = map_chunks(partial(start, doubled, tmp_path), count(), [{}])  # chunks without end
    assert [next(results) for _ in range(3)] == [(0, 0), (1, 2), (2, 4)]
    results.close()


def test_map_chunks_without_chunks(tmp_path):
    assert run_chunks(tmp_path, doubled, []) == []


@pytest.mark.parametrize("error, shown", [
    (ValueError, "ValueError: chunk two is bad"), (StageError, "chunk two is bad")])
def test_map_chunks_passes_on_an_exception(tmp_path, error, shown):
    with pytest.raises(StageError, match=rf"worker 0 \(CPU, pid \d+\) failed:\n(.*\n)*{shown}$") as raised:
        run_chunks(tmp_path, partial(raises, error), range(4))
    assert ("Traceback" in str(raised.value)) == (error is ValueError)


def test_map_chunks_passes_on_a_result_that_cannot_be_sent(tmp_path):
    with pytest.raises(StageError, match="pickle"):
        run_chunks(tmp_path, unpicklable, [0])


def test_map_chunks_passes_on_a_failed_start(tmp_path):
    with pytest.raises(StageError, match="failed:\nthe model does not exist$"):
        list(map_chunks(partial(fails_at_start, tmp_path), [0], [{}]))


@pytest.mark.parametrize("workers", [1, 2])
def test_map_chunks_does_the_chunk_of_a_killed_worker_again(tmp_path, caplog, workers):
    assert run_chunks(tmp_path, partial(dies, MAX_ATTEMPTS - 1), range(6), workers) == [(n, 2 * n) for n in range(6)]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == MAX_ATTEMPTS - 1
    assert all("died with exit code -9" in warning for warning in warnings)


def test_map_chunks_gives_up_on_a_chunk_that_always_kills(tmp_path):
    with pytest.raises(StageError, match=f"died with exit code -9, as did {MAX_ATTEMPTS - 1} before it"):
        run_chunks(tmp_path, partial(dies, 10), range(6))
    assert (tmp_path / "deaths").read_text() == "x" * MAX_ATTEMPTS


def test_map_chunks_gives_up_on_a_worker_that_never_starts(tmp_path):
    with pytest.raises(StageError, match="died with exit code 7"):
        list(map_chunks(partial(dies_at_start, tmp_path), [0], [{}]))
    assert (tmp_path / "deaths").read_text() == "x" * MAX_ATTEMPTS


def test_map_chunks_passes_on_an_error_among_the_chunks(tmp_path):
    def chunks():
        yield 0
        raise StageError("line 2 is bad")
    with pytest.raises(StageError, match="line 2 is bad"):
        run_chunks(tmp_path, doubled, chunks())


def answered(folder, tasks):
    """One record a task: skipped where the prompt says so."""
    return [{"prompt_id": record["prompt_id"], "skipped": "too long"} if record["prompt"] == "skip" else
            record | {"job": job, "pid": os.getpid()} for job, record in tasks]


def fails_on_request(folder, tasks):
    assert all(record["prompt"] != "fail" for _, record in tasks), "asked to fail"
    return answered(folder, tasks)


def run_files(tmp_path, work, *inputs, chunk_size=2):
    """Paths of one output a list of prompts."""
    jobs = []
    for number, prompts in enumerate(inputs):
        records = [{"prompt_id": f"{number}-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
        jobs.append((partial(iter, records), tmp_path / "out" / f"{number}.jsonl"))
    map_files(jobs, partial(start, work, tmp_path), [{}], chunk_size, "working")
    return [path for _, path in jobs]


def ids(path):
    return [record["prompt_id"] for record in read_jsonl(path)]


def test_map_files_writes_each_job_in_order_with_one_start(tmp_path):
    first, second = run_files(tmp_path, answered, "abc", "defg")
    assert ids(first) == ["0-0", "0-1", "0-2"]
    assert ids(second) == ["1-0", "1-1", "1-2", "1-3"]
    results = [record for path in (first, second) for record in read_jsonl(path)]
    assert [record["job"] for record in results] == [0, 0, 0, 1, 1, 1, 1]
    assert len({record["pid"] for record in results}) == 1
    assert sorted(path.name for path in first.parent.iterdir()) == ["0.jsonl", "1.jsonl"]


def test_map_files_counts_and_lists_skipped_records(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = run_files(tmp_path, answered, ["a", "skip", "b"], ["c"])
    assert (ids(first), ids(second)) == (["0-0", "0-2"], ["1-0"])
    listing = first.with_name("0.skipped.jsonl")
    assert list(read_jsonl(listing)) == [{"prompt_id": "0-1", "skipped": "too long"}]
    assert not first.with_name("1.skipped.jsonl").exists()
    assert f"{first}: 2 records written, 1 skipped" in caplog.messages
    # A list of an earlier run does not outlive it.
    run_files(tmp_path, answered, ["a", "b"])
    assert not listing.exists()


def test_map_files_leaves_nothing_after_a_failure(tmp_path):
    with pytest.raises(StageError, match="asked to fail"):
        run_files(tmp_path, fails_on_request, ["a", "b", "c"], ["d", "e", "fail"])
    assert list((tmp_path / "out").iterdir()) == []


def test_map_files_fails_without_an_output_when_all_is_skipped(tmp_path):
    with pytest.raises(StageError, match="every record of .*0.jsonl was skipped; see .*0.skipped.jsonl"):
        run_files(tmp_path, answered, ["skip", "skip"])
    assert len(ids(tmp_path / "out" / "0.skipped.jsonl")) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.skipped.jsonl"]


def test_map_files_checks_every_record_before_it_starts(tmp_path, jsonl):
    good = jsonl("good.jsonl", {"prompt_id": "a", "prompt": "x"})
    bad = jsonl("bad.jsonl", {"prompt_id": "a", "prompt": "x"}, {"prompt_id": "b"})
    fields = {"prompt_id": str, "prompt": str}
    jobs = [(partial(read_jsonl, path, fields), tmp_path / "out" / path.name) for path in (good, bad)]
    with pytest.raises(StageError, match="bad.jsonl, line 2: field 'prompt' is missing"):
        map_files(jobs, partial(start, answered, tmp_path), [{}], 2, "working")
    assert not list(tmp_path.glob("pid-*")) and not (tmp_path / "out").exists()
