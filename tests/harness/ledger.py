"""Known failures: data with a reason, strict both ways."""

import errno
import fnmatch
import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfv1.wording import did_you_mean, shown

LEDGER = Path(__file__).parents[2] / "fixtures" / "known_failures.toml"

REQUIRED = ("candidate", "test", "case", "reason", "link", "versions", "devices")
OPTIONAL = ("unless",)
LISTS = ("versions", "devices", "unless")


class LedgerError(ValueError):
    """The ledger is broken; the message names the entry and the field."""


@dataclass(frozen=True)
class Known:
    """candidate: as given to --candidate. Shell patterns: test, case, versions (of vLLM), devices
    ("cpu", or a GPU's name). unless: environment variables that void it where they are set."""

    candidate: str
    test: str
    case: str
    reason: str
    link: str
    versions: tuple[str, ...]
    devices: tuple[str, ...]
    unless: tuple[str, ...] = ()

    def applies(self, candidate: str, vllm_version: str, device: str) -> bool:
        """Whether the entry is about a run of this candidate, vLLM and device."""
        return (
            candidate == self.candidate
            and any(fnmatch.fnmatchcase(vllm_version, pattern) for pattern in self.versions)
            and any(fnmatch.fnmatchcase(device, pattern) for pattern in self.devices)
            and not any(os.environ.get(name) for name in self.unless)
        )

    def matches(self, test: str, case: str) -> bool:
        return fnmatch.fnmatchcase(test, self.test) and fnmatch.fnmatchcase(case, self.case)


def load_ledger(path: Path = LEDGER) -> list[Known]:
    """The entries of the ledger.

    Raises:
        LedgerError: naming the file, the entry, and the field that is missing, unknown or of a
            wrong type.
    """
    entries = _entries(path)
    return [
        _known(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, start=1)
    ]


def _entries(path: Path) -> list[Any]:
    """The entries that the file holds under `known`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}: expected a file") from error
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise LedgerError(f"{path}: {error}: expected TOML") from error
    for key in content:
        if key != "known":
            raise LedgerError(f"{path}: {key} is no key: expected [[known]]")
    entries = content.get("known", [])
    if not isinstance(entries, list):
        raise LedgerError(f"{path}: known={shown(entries)}: expected [[known]]")
    return entries


def _known(where: str, entry: Any) -> Known:
    """An entry, checked. where: the file and the entry's number, for complaints."""
    if not isinstance(entry, dict):
        raise LedgerError(f"{where}: {shown(entry)}: expected a table")
    for field in REQUIRED:
        if field not in entry:
            raise LedgerError(f"{where}: {field} is missing")
    for field, value in entry.items():
        if field not in REQUIRED + OPTIONAL:
            near = did_you_mean(field, REQUIRED + OPTIONAL)
            raise LedgerError(f"{where}: {field} is no field{near}")
        parts = value if field in LISTS and isinstance(value, list) else [value]
        listed = isinstance(value, list) == (field in LISTS)
        if not (listed and parts and all(isinstance(part, str) and part for part in parts)):
            kind = "a list of strings, none" if field in LISTS else "a string that is not"
            raise LedgerError(f"{where}: {field}={shown(value)}: expected {kind} empty")
    lists = {field: tuple(entry[field]) for field in LISTS if field in entry}
    return Known(**entry | lists)
