"""workers/journal.py: finished records and verdicts, what is dropped, kept and refused.

python -m pytest tests/test_journal.py
"""

import json

import pytest

from utils import StageError
from workers.journal import Journal, Skipped, check_fingerprint, list_skipped

A, B = {"prompt_id": "a", "text": "\u2028"}, {"prompt_id": "b", "skipped": "a user's field"}


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_journal_keeps_records_and_verdicts(tmp_path):
    journal = Journal(tmp_path / "out.jsonl", {"seed": 1})
    verdicts = [Skipped("c", "too long"), Skipped("d", "refused", {"requests": 2})]
    journal.append([A, verdicts[0]])
    journal.append([B, verdicts[1]])
    header, *rest = lines(tmp_path / "out.jsonl.partial")
    assert header == {"format": 1, "fingerprint": {"seed": 1}}
    assert rest == [A, ["c", "too long", None], B, ["d", "refused", {"requests": 2}]]
    for found in (journal, Journal(tmp_path / "out.jsonl", {"seed": 1})):
        assert found.skipped == {verdict.prompt_id: verdict for verdict in verdicts}
        assert list(map(json.loads, found.lines("ba"))) == [B, A]
        assert sorted(found.offsets) == ["a", "b", "c", "d"]
    journal.remove()
    assert not list(tmp_path.iterdir())


def test_journal_drops_a_torn_line_and_goes_on(tmp_path):
    Journal(tmp_path / "out", {}).append([A, Skipped("c", "x"), B])
    path = tmp_path / "out.partial"
    path.write_bytes(path.read_bytes()[:-3])
    journal = Journal(tmp_path / "out", {})
    assert list(journal.offsets) == ["a", "c"]
    journal.append([B])
    assert lines(path)[1:] == [A, ["c", "x", None], B]


@pytest.mark.parametrize("header", [{"made_with": {}}, {"format": 2, "fingerprint": {}}, ["a", "b", None]])
def test_journal_refuses_records_of_another_format(tmp_path, header):
    path = tmp_path / "out.partial"
    path.write_text(json.dumps(header) + "\n" + json.dumps(A) + "\n")
    before = path.read_bytes()
    with pytest.raises(StageError, match="out.partial holds .* another version of this program; .* remove it"):
        Journal(tmp_path / "out", {})
    assert path.read_bytes() == before


@pytest.mark.parametrize("held", ['{"made_with": {}}\n', '{"format": 1, "fingerprint": {"seed": 2}}\n', "", "nonsense"])
def test_what_holds_no_record_is_overwritten(tmp_path, held):
    (tmp_path / "out.partial").write_text(held)
    Journal(tmp_path / "out", {"seed": 1})
    assert lines(tmp_path / "out.partial") == [{"format": 1, "fingerprint": {"seed": 1}}]


def test_journal_refuses_other_settings(tmp_path):
    Journal(tmp_path / "out", {"seed": 1}).append([A])
    with pytest.raises(StageError, match=r"out.partial holds 1 finished records .*\(seed: 1 then, 2 now\)"):
        Journal(tmp_path / "out", {"seed": 2})


def test_journal_says_when_the_disk_is_full(tmp_path):
    journal = Journal(tmp_path / "out.jsonl", {})
    journal.path.unlink()
    journal.path.symlink_to("/dev/full")
    with pytest.raises(
        StageError, match="out.jsonl.partial: No space left on device; what was finished before is kept"
    ):
        journal.append([{"prompt_id": "a"}])


def test_check_fingerprint_names_what_differs():
    check_fingerprint("out", "records", {"a": 1}, {"a": 1})
    with pytest.raises(StageError, match=r"out holds records with other settings \(a: 1 then, 2 now; b: None then, 3"):
        check_fingerprint("out", "records", {"a": 1}, {"a": 2, "b": 3})


def test_list_skipped_lists_the_last_verdicts_alone(tmp_path):
    path, listing = tmp_path / "out.jsonl", tmp_path / "out.skipped.jsonl"
    list_skipped(path, [Skipped("a", "x"), Skipped("b", "y", {"requests": 1})], 3)
    assert lines(listing) == [
        {"prompt_id": "a", "skipped": "x"},
        {"prompt_id": "b", "skipped": "y", "usage": {"requests": 1}},
    ]
    list_skipped(path, [], 3)
    assert not listing.exists()
    with pytest.raises(StageError, match="every record of .*out.jsonl was skipped; see .*out.skipped.jsonl"):
        list_skipped(path, [Skipped("a", "x")], 1)
    assert listing.exists()
