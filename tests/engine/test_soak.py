"""Does a soak of a few minutes give the reference's tokens, with all that it is to go through?"""

import time
from pathlib import Path

import pytest

from tests.engine.models import LLAMA, tiny
from tests.programs.soak import soak

pytestmark = pytest.mark.long

MINUTES = 3


def test_answers_outlast_preemption_and_eviction(tmp_path: Path) -> None:
    result = soak(tiny(LLAMA), 16, 32, time.time() + 60 * MINUTES, tmp_path)
    assert result["problems"] == []
