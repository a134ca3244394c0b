"""The records of an output that are finished while it is not complete yet, and the list of those that were skipped."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from records import SkippedPrompt, writer
from utils import StageError, dump_json, log

FORMAT = 1  # of the lines of a `.partial` file; a program that writes other lines has another number


class Skipped(NamedTuple):
    """The verdict that a record is left out of the output; as JSON the list of its fields.

    Args:
        prompt_id: the record.
        reason: why, for people.
        usage: the tokens that a server has counted for it all the same.
    """

    prompt_id: str
    reason: str
    usage: dict | None = None


class Journal:
    """The finished records of an output that is not complete yet: `<output>.partial`.

    The first line is `{"format": 1, "fingerprint": {setting: value}}`, what the records depend on. Each further line is
    a record, an object, or a verdict, the list `[prompt_id, reason, usage]` of a `Skipped`, in the order in which they
    were finished. A line that a kill or a loss of power has torn, and everything after it, is dropped.

    Args:
        path: the output's path.
        fingerprint: {setting: value}, all that the records depend on.

    Raises StageError when the file holds records that were made with other settings, or lines of another format.
    """

    def __init__(self, path: str | Path, fingerprint: dict):
        self.output = Path(path)
        self.path = self.output.with_name(self.output.name + ".partial")
        self.offsets = {}  # of the line of each prompt_id, records and verdicts
        self.skipped = {}  # the verdicts among them, by prompt_id
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            header, size = self._read(file)
            if header is not None:
                found = f"{len(self.offsets)} finished records made"
                check_fingerprint(self.path, found, header.get("fingerprint", {}), fingerprint)
            file.truncate(size)
        if header is None:
            self._write([{"format": FORMAT, "fingerprint": fingerprint}])

    def _read(self, file):
        """(the header, the length of what is whole, in bytes); (None, 0) where no record is."""
        file.seek(0)
        header, size = None, 0
        for line in file:
            value = _whole(line)
            if value is None:
                break
            if header is None:
                header = value
            elif not (isinstance(header, dict) and header.get("format") == FORMAT):
                raise StageError(
                    f"{self.path} holds finished records in the format of another version of this program; "
                    "finish it with that version, or remove it"
                )
            else:
                self._note(Skipped(*value) if isinstance(value, list) else value, size)
            size += len(line)
        return (header, size) if self.offsets else (None, 0)  # without records the settings do not matter

    def append(self, results: list[dict | Skipped]) -> None:
        """Keep finished records and verdicts; they survive a kill from here on.

        Raises StageError when the disk is full.
        """
        for result, offset in zip(results, self._write(results)):
            self._note(result, offset)

    def _note(self, result, offset):
        """Note where the line of a record or of a verdict begins."""
        if isinstance(result, Skipped):
            self.skipped[result.prompt_id] = result
        self.offsets[result.prompt_id if isinstance(result, Skipped) else result.get("prompt_id")] = offset

    def _write(self, values):
        """Append values as lines; returns where each one begins."""
        lines = [dump_json(value).encode() + b"\n" for value in values]
        data = b"".join(lines)
        try:
            with open(self.path, "ab", buffering=0) as file:
                places = itertools.accumulate(map(len, lines[:-1]), initial=file.tell())
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise StageError(
                f"{self.path}: {error.strerror}; what was finished before is kept there. Make room and start again"
            ) from None
        return places

    def lines(self, ids: Iterable[str]) -> Iterator[bytes]:
        """The records of these prompt_ids as lines of bytes, in this order."""
        with open(self.path, "rb") as file:
            for prompt_id in ids:
                file.seek(self.offsets[prompt_id])
                yield file.readline()

    def remove(self) -> None:
        """Remove the file: its output is complete."""
        self.path.unlink(missing_ok=True)


def _whole(line):
    """The object or the list of a line of JSON; None for a torn line."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict | list) else None


def check_fingerprint(path: str | Path, what: str, then: dict, now: dict) -> None:
    """Raise StageError unless the settings that something was begun with are those to go on with.

    Args:
        path: where it is.
        what: what it holds, for the message.
        then, now: {setting: value}
    """
    changed = [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise StageError(
            f"{path} holds {what} with other settings ({'; '.join(changed)}); use those again, or remove it"
        )


# ---------------------------------------------------------------------------------------------- skipped records


def listing_of(path: str | Path) -> Path:
    """Where the skipped records of an output are listed."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".jsonl") + ".skipped.jsonl")


def list_skipped(path: str | Path, skipped: list[Skipped], total: int) -> None:
    """Write the list of an output's skipped records, if there are any, and log it.

    Args:
        path: the output.
        skipped: the verdicts.
        total: the number of its records, the skipped ones included.

    Raises StageError when all of them were skipped.
    """
    listing = listing_of(path)
    listing.unlink(missing_ok=True)
    if skipped:
        with writer(listing, SkippedPrompt) as write:
            for verdict in skipped:
                usage = {"usage": verdict.usage} if verdict.usage else {}
                write({"prompt_id": verdict.prompt_id, "skipped": verdict.reason} | usage)
        first = "; ".join(f"{verdict.prompt_id}: {verdict.reason}" for verdict in skipped[:3])
        log.warning("skipped records are listed in %s (%s%s)", listing, first, " ..." * (len(skipped) > 3))
    if len(skipped) == total:
        raise StageError(f"every record of {path} was skipped; see {listing}")
