"""utils.py: the checked command line, files and seeds.

python -m pytest tests/test_utils.py
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from utils import (
    SEED_SPACING,
    StageError,
    check_input,
    derive_seed,
    dump_json,
    file_lists,
    fingerprint,
    split_list,
    write_text,
)

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

def listed(names: list, count: int = 1):
    """Print names."""
    print("ran", json.dumps([names, count]))

PROGRAMS = {"main": [main], "configured": [configured], "fail": [fail], "several": [main, fail], "listed": [listed]}
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
    with subprocess.Popen(
        [sys.executable, "stage.py", str(ROOT)], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:

        def run_stage(*words):
            server.stdin.write(json.dumps(words) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield run_stage
        server.stdin.close()


@pytest.mark.parametrize(
    "words", [["a/b", "c", "--count", "2"], ["--count=2", "a/b", "c"], ["a/b", "--count", "2", "c"]]
)
def test_run_takes_words_without_a_flag_where_a_list_is_wanted(stage, words):
    assert ran(stage("listed", *words)) == [["a/b", "c"], 2]


def test_run_misses_a_list(stage):
    assert_refused(stage("listed"), "missing --names")


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


@pytest.mark.parametrize(
    "words, message",
    [
        (["--text", "a", "--cuont", "3"], "unknown argument --cuont; did you mean --count?"),
        (["--cuont=3", "--text", "a"], "unknown argument --cuont"),
        (["--text", "a", "--count", "1e3"], "--count: invalid int value: '1e3'"),
        (["--text", "a", "--quick=maybe"], "--quick: should be true or false, got 'maybe'"),
        ([], "missing --text"),
        (["a"], "unknown argument a"),
        (["-text", "a"], "unknown argument -text"),
        (["--text", "a", "--", "--trace"], "unknown argument --"),
        (["--text", "--count", "3"], "--text: expected one argument"),
    ],
)
def test_run_refuses_before_the_function_runs(stage, words, message):
    assert_refused(stage("main", *words), message)


TEXTS = [
    "0,1",
    "1e3",
    "007",
    "7",
    "None",
    "True",
    "[1]",
    "{a: 1}",
    "'quoted'",
    "a=b",
    "-5",
    "#x",
    "",
    "two words",
    "ï\u2028",
]


@pytest.mark.parametrize("text", TEXTS)
def test_run_keeps_text_as_text(stage, text):
    assert ran(stage("main", "--text", text))[0] == text
    assert ran(stage("main", f"--text={text}"))[0] == text


@pytest.mark.parametrize("text", ["-", "-dir", "-h"])
def test_run_takes_a_value_with_a_dash_as_text_or_refuses_it(stage, text):
    code, out, err = result = stage("main", "--text", text)
    if code == 0:
        assert ran(result)[0] == text
    else:
        assert_refused(result)


def test_run_reads_numbers_by_their_annotation(stage):
    assert ran(stage("main", "--text", "a", "--count", "-12", "--max-length=16")) == ["a", -12, True, 16]
    assert ran(stage("configured", "--size", "3", "--rate", "1e-3")) == ["", {"rate": 0.001, "size": 3, "deep": False}]


@pytest.mark.parametrize(
    "words, value",
    [
        ([], True),
        (["--quick"], True),
        (["--quick", "false"], False),
        (["--quick=0"], False),
        (["--quick", "No"], False),
        (["--quick=True"], True),
        (["--quick", "--count", "2"], True),
    ],
)
def test_run_reads_booleans(stage, words, value):
    assert ran(stage("main", "--text", "a", *words))[2] is value


def test_run_takes_the_fields_of_a_configuration_as_flags(stage):
    assert ran(stage("configured", "--deep", "--size=3", "--text", "7"))[1] == {"rate": 0.5, "size": 3, "deep": True}
    assert_refused(stage("configured", "--text", "7"), "missing --size")
    assert_refused(stage("configured", "--size", "3", "--depe"), "did you mean --deep?")
    assert_refused(
        stage("configured", "--size", "3", "--rate", "fast"), "--rate: should be a finite number, got 'fast'"
    )


@pytest.mark.parametrize(
    "program, words",
    [
        ("main", ["--help"]),
        ("main", ["-h"]),
        ("main", ["--text", "a", "--help"]),
        ("several", ["main", "--text", "a", "--help"]),
    ],
)
def test_run_shows_help_and_does_not_run(stage, program, words):
    code, out, err = stage(program, *words)
    assert code == 0 and "ran" not in out
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
    assert_refused(stage("several", "main", "--zzz", "1"), "stage.py main: error: unknown argument --zzz")


@pytest.mark.parametrize(
    "how, code, message",
    [
        ("stage", 1, "stage.py: error: the input is too short; give a longer one"),
        ("missing file", 1, "stage.py: error: No such file or directory (no/such/file)"),
        ("interrupt", 130, "stage.py: interrupted"),
    ],
)
def test_run_ends_with_a_message_and_without_a_traceback(stage, how, code, message):
    found, out, err = stage("fail", "--how", how)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1] == message and "Traceback" not in err


# ---- Files ----


def test_split_list_drops_blanks():
    assert split_list(" a, b c ,,d,") == ["a", "b c", "d"] and split_list("") == []


def test_file_lists_pairs_inputs_with_outputs(jsonl):
    a, b = jsonl("a", {}), jsonl("b", {})
    inputs, outputs = file_lists(input=f"{a},{b}", output="x,y")
    assert (inputs, outputs) == ([a, b], [Path("x"), Path("y")])


@pytest.mark.parametrize(
    "input, output, message",
    [
        ("", "", "--input has 0"),
        ("a,missing", "x,y", "missing does not exist"),
        ("a", "/dev/null", "is a device"),
        ("a,b", "x,./x", "written twice"),
        ("a,b", "x,folder/../a", "is also an input"),
    ],
)
def test_file_lists_refuses(jsonl, tmp_path, monkeypatch, input, output, message):
    jsonl("a", {}), jsonl("b", {}), (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=message):
        file_lists(input=input, output=output)


@pytest.mark.parametrize(
    "content, kind",
    [
        (gzip.compress(b"{}\n", mtime=0), "a gzip file"),
        (b"PAR1....", "a Parquet file"),
        ("{}\n".encode("utf-16"), "a UTF-16 file"),
        (b"PK\3\4....", "a zip file"),
    ],
)
def test_check_input_names_what_is_not_text(tmp_path, content, kind):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(StageError, match=f"a.jsonl is {kind}"):
        check_input(tmp_path / "a.jsonl")


def test_fingerprint_differs_by_text_and_not_by_run():
    assert fingerprint("x") == "2d711642b726b044"
    assert len({fingerprint(text) for text in ("x", "x ", "X", "é", "e\u0301", "")}) == 6


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_dump_json_refuses_what_is_not_json(number):
    with pytest.raises(ValueError):
        dump_json({"score": number})


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
    assert all(seed % SEED_SPACING == 0 and 0 <= seed < 2**60 for seed in seeds)


def test_derive_seed_tells_its_parts_apart():
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed(3, 12)}) == 4
