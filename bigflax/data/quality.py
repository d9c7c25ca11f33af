"""What happens to a record that is not as it should be: one policy, in one place.

A bad record (a source's fault: truncated, unreadable; or text that is not UTF-8, empty, or has an over-long line) is skipped and
counted, or stops the run. Skipped ones are named once each in a quarantine file, one JSON object a line: {"name", "reason"}. More than
`max_bad` of them stop the run in any case. Left out on purpose: judging content (language, duplicates, profanity): that is a data set's
own work, done once, before training.
"""

import dataclasses
import difflib
import json
import os
import threading
from typing import Any

from etils import epath

from bigflax.data.files import is_local

_lock = threading.Lock()  # of the module: a lock in the object could not be pickled into worker processes


class BadRecord(ValueError):
    """A record that the policy does not let pass; its one sentence names the record."""


@dataclasses.dataclass
class Quality:
    """`quality(record, name)` returns the record, its text field decoded to str, or None for a bad one (counted in `bad`: name -> reason).

    max_bad: more bad records than this raise BadRecord, `None` lets any number pass; max_line: characters allowed between two line breaks.
    """

    bad_records: str = "skip"
    max_bad: int | None = 1000
    quarantine: str | os.PathLike | None = None
    max_line: int = 1_000_000
    field: str | None = "text"
    bad: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.bad_records not in ("skip", "stop"):
            raise ValueError(f"bad_records={self.bad_records!r} is neither 'skip' nor 'stop'")

    def __call__(self, record: dict[str, Any], name: str) -> dict[str, Any] | None:
        if "fault" in record:
            return self.reject(name, record["fault"])
        if self.field is None:
            return record
        text, reason = self._text(record, self.field)
        return {**record, self.field: text} if reason is None else self.reject(name, reason)

    def _text(self, record, field: str) -> tuple[str, str | None]:
        if field not in record:
            close = difflib.get_close_matches(field, record, 1, cutoff=0.0)
            return "", f"no field {field!r}" + (f", nearest is {close[0]!r}" if close else "")
        text = record[field]
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                return "", f"not UTF-8 (byte {error.start})"
        if not isinstance(text, str):
            return "", f"field {field!r} is {type(text).__name__}, not text"
        if not text.strip():
            return "", "empty"
        longest = max(map(len, text.split("\n"))) if len(text) > self.max_line else 0
        return text, f"a line of {longest} characters (max_line is {self.max_line})" if longest > self.max_line else None

    def reject(self, name: str, reason: str) -> None:
        """Counts, quarantines or raises, by the policy."""
        if self.bad_records == "stop":
            raise BadRecord(f"bad record {name}: {reason}; mend it, or let bad_records='skip' pass over it")
        with _lock:
            if name not in self.bad:
                self.bad[name] = reason
                self._write(name, reason)
        self.check_limit()

    def check_limit(self) -> None:
        if self.max_bad is not None and len(self.bad) > self.max_bad:
            name, reason = next(iter(self.bad.items()))
            where = f"; all are named in {os.fspath(self.quarantine)}" if self.quarantine else ""
            raise BadRecord(f"{len(self.bad)} bad records, more than max_bad={self.max_bad} allows; the first is {name}: {reason}{where}")

    def _write(self, name: str, reason: str) -> None:
        if self.quarantine is None:
            return
        path, line = epath.Path(self.quarantine), json.dumps({"name": name, "reason": reason}) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if path.exists() else ""
        if any(json.loads(old)["name"] == name for old in before.splitlines()):
            return  # a resumed run, another epoch or another worker met it before
        if is_local(path):
            with open(path, "a") as file:  # one write of one line: workers and hosts append beside each other
                file.write(line)
        else:
            path.write_text(before + line)  # object stores cannot append
