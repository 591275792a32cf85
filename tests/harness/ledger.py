"""Known failures: data with a reason, strict both ways."""

import fnmatch
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

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
        """Whether the entry says anything of a run."""
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
        LedgerError: naming the entry and the field that is missing, unknown or of a wrong type.
    """
    try:
        entries = tomllib.loads(path.read_text()).get("known", [])
    except tomllib.TOMLDecodeError as error:
        raise LedgerError(f"{path.name}: {error}") from error
    known = []
    for number, entry in enumerate(entries, start=1):
        for field in REQUIRED:
            if field not in entry:
                raise LedgerError(f"{path.name}, entry {number}: {field} is missing")
        for field in entry:
            if field not in REQUIRED + OPTIONAL:
                raise LedgerError(f"{path.name}, entry {number}: {field} is no field")
            kind = list if field in LISTS else str
            if not isinstance(entry[field], kind) or not entry[field]:
                raise LedgerError(
                    f"{path.name}, entry {number}: {field}={entry[field]!r}:"
                    f" expected a {kind.__name__} that is not empty"
                )
        lists = {field: tuple(entry[field]) for field in LISTS if field in entry}
        known.append(Known(**entry | lists))
    return known
