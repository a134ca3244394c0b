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
    jsonl_writer,
    read_jsonl,
    read_prompts,
    read_scores,
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
    "words", [["a/b", "c", "--count", "2"], ["--names", "a/b,c", "--count=2"], ["a/b", "--count", "2", "c"]]
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
    ],
)
def test_run_refuses_before_the_function_runs(stage, words, message):
    assert_refused(stage("main", *words), message)


@pytest.mark.parametrize(
    "text",
    [
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
        "",
        "two words",
        "naïve\u2028",
        "-5",
        "#x",
    ],
)
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
    assert_refused(stage("configured", "--size", "3", "--rate", "fast"), "--rate takes float, got 'fast'")


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


@pytest.mark.parametrize(
    "input, output, message",
    [
        ("a,b", "x", "--input has 2, --output has 1"),
        ("", "", "--input has 0"),
        ("a,missing", "x,y", "missing does not exist"),
        ("empty", "x", "empty is empty"),
        ("folder", "x", "folder is not a file"),
        ("a,b", "x,./x", "written twice"),
        ("a", "./a", "is also an input"),
        ("a,b", "x,folder/../a", "is also an input"),
        ("a", "folder", "is a directory"),
    ],
)
def test_file_lists_refuses(jsonl, tmp_path, monkeypatch, input, output, message):
    jsonl("a", {}), jsonl("b", {}), jsonl("empty"), (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=message):
        file_lists(input=input, output=output)


FIELDS = {"prompt_id": str, "prompt": str, "score": (int, float)}
GOOD = '{"prompt_id": "a", "prompt": "x", "score": 1}\n'


@pytest.mark.parametrize(
    "second, message",
    [
        ("not json\n", "line 2: not valid JSON"),
        ('{"prompt_id": "b", "prompt": "x", "sco', "line 2: not valid JSON"),  # the file was cut
        ("{}\0\0\n", "line 2: not valid JSON"),
        ("[" * 100_000 + "\n", "line 2: not valid JSON"),
        (
            '{"prompt_id": "b", "prompt": "x", "score": true}\n',
            "line 2: field 'score' should be int or float, got bool",
        ),
        ('{"prompt_id": "b", "prompt": "x", "score": NaN}\n', "line 2: not valid JSON"),
        ("[1, 2]\n", "line 2: expected a JSON object, got list"),
        ('{"prompt_id": "b", "score": 2}\n', "line 2: field 'prompt' is missing; found prompt_id, score"),
        ('{"prompt_id": "b", "prompt": ["x"], "score": 2}\n', "line 2: field 'prompt' should be str, got list"),
        ('{"prompt_id": 7, "prompt": "x", "score": 2}\n', "line 2: field 'prompt_id' should be str, got int"),
        ('{"prompt_id": "b", "prompt": "x", "score": "2"}\n', "line 2: field 'score' should be int or float, got str"),
        (GOOD, "line 2: prompt_id 'a' occurs a second time"),
    ],
)
def test_read_jsonl_names_file_and_line(tmp_path, second, message):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + second)
    with pytest.raises(StageError, match=f"a.jsonl, {message}"):
        list(read_jsonl(path, FIELDS))


def test_read_jsonl_overlooks_what_editors_leave(tmp_path):
    """A byte order mark, carriage returns, blank lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n\n \n")
    assert [record["prompt_id"] for record in read_jsonl(path, FIELDS)] == ["a"]


@pytest.mark.parametrize(
    "content, kind",
    [
        (gzip.compress(b"{}\n", mtime=0), "compressed with gzip"),
        (b"PAR1....", "a Parquet file"),
        ("{}\n".encode("utf-16"), "UTF-16"),
        (b"PK\3\4....", "a zip archive"),
    ],
)
def test_check_input_names_what_is_not_text(tmp_path, content, kind):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(StageError, match=f"a.jsonl is {kind}"):
        check_input(tmp_path / "a.jsonl")


def scored(prompt_id="a", count=2, **changes):
    """A record of a scores file."""
    samples = [{"text": str(n), "token_ids": [n], "finish_reason": "stop"} for n in range(count)]
    return {
        "prompt_id": prompt_id,
        "prompt": "x",
        "prompt_token_ids": [1],
        "samples": samples,
        "win_probs": [[None if i == j else 0.5 for j in range(count)] for i in range(count)],
    } | changes


@pytest.mark.parametrize(
    "record, message",
    [
        (scored(count=1), "1 samples, needed: 2"),
        (scored(count=3), "3 samples, but the records before it have 2"),
        (scored(prompt_token_ids=["1"]), "prompt_token_ids should be a list of token ids"),
        (scored(prompt_token_ids=[True]), "prompt_token_ids should be a list of token ids"),
        (scored(samples=["a", "b"]), "each of samples should be {text, token_ids, finish_reason}"),
        (scored(samples=[{"text": "a"}] * 2), "token_ids of a sample should be a list of token ids, got None"),
        (scored(samples=[{"text": 1, "token_ids": []}] * 2), "each of samples should be"),
        (scored(win_probs=None), "is missing; is this a scores file"),
        (scored(win_probs=[[None, 0.5]]), "win_probs should be 2 x 2 numbers for 2 samples"),
        (scored(win_probs=[[None], [None]]), "win_probs should be 2 x 2 numbers"),
        (scored(win_probs=[[0.5, 0.5], [0.5, None]]), r"win_probs\[0\]\[0\] should be null, got 0.5"),
        (scored(win_probs=[[None, None], [None, None]]), r"win_probs\[1\]\[0\] should be a probability, got None"),
        (scored(win_probs=[[None, 1.2], [-0.2, None]]), r"win_probs\[1\]\[0\] should be a probability, got -0.2"),
        (scored(win_probs=[[None, 0.7], [0.5, None]]), "should add up to 1, got 0.5 and 0.7"),
    ],
)
def test_read_scores_refuses(jsonl, record, message):
    path = jsonl("scores.jsonl", *([scored("first")] if len(record["samples"]) == 3 else []), record)
    with pytest.raises(StageError, match=f"scores.jsonl, prompt_id a: .*{message}"):
        list(read_scores(path))


def test_read_jsonl_names_the_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt_id": "\xff"}\n')
    with pytest.raises(StageError, match="line 2: not UTF-8 text"):
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


@pytest.mark.parametrize(
    "records, message",
    [
        ([{"prompt": "x"}, {"prompt": " \n"}], "record 2: the prompt is empty"),
        ([{"prompt": "x"}, {"prompt": "x"}], "record 2: prompt_id '2d711642b726b044' .* occurs a second time"),
        (
            [{"prompt": "x", "prompt_id": "3"}, {"prompt": "y", "prompt_id": 3}],
            "record 2: prompt_id '3' .* a second time",
        ),
        ([{"prompt": "x", "prompt_id": ["3"]}], "record 1: prompt_id should be text"),
        ([{"text": "x"}], "line 1: field 'prompt' is missing"),
        ([], "no records"),
    ],
)
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
    assert fingerprint("x") == "2d711642b726b044"
    assert len({fingerprint(text) for text in ("x", "x ", "X", "é", "e\u0301", "")}) == 6


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
    assert all(seed % SEED_SPACING == 0 and 0 <= seed < 2**60 for seed in seeds)


def test_derive_seed_tells_its_parts_apart():
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed(3, 12)}) == 4
