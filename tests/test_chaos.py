"""A run killed in any phase, at no planned moment, ends as if nothing had happened."""

import random
from pathlib import Path

import chaos
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("method", ["universally_slimmable", "msdnet"])
def test_killed_in_every_phase(method: str, tmp_path: Path) -> None:
    num_kills = len(chaos.phases_of(method))
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown if the test fails
    runs = chaos.break_method(method, num_kills, tmp_path, random.Random(seed))
    assert sum(run.kills.total() for run in runs) == num_kills
    assert all(run.identical for run in runs)
