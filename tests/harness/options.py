"""The suite's options.

pyproject.toml names this module as a plugin: pytest then knows the options before it looks for
conftests, and does not take an option's value for a path to search. Nothing heavy is imported.
"""

import argparse

import pytest

from tests.harness.ledger import LEDGER


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention conformance")
    group.addoption(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME",
        help="backend under test: xfv1, or package.module:Class, any V1 AttentionBackend",
    )
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="run just this case, whatever its tier (may be given again)",
    )
    group.addoption(
        "--hf-config",
        action="append",
        default=[],
        metavar="PATH",
        help="add the cases of a model's Hugging Face config.json (may be given again)",
    )
    group.addoption(
        "--tensor-parallel-size",
        default="1",
        metavar="N",
        help="the models of --hf-config are shared by so many ranks; the cases are one rank's",
    )
    group.addoption(
        "--report", default="report", metavar="DIR", help="folder of results.json and junit.xml"
    )
    # For the suite's own tests: there is one ledger, and one limit.
    group.addoption("--ledger", default=str(LEDGER), help=argparse.SUPPRESS)
    group.addoption("--loading-limit", default=600.0, type=float, help=argparse.SUPPRESS)
