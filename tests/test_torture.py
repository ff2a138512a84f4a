"""A few of each fate of tests/torture.py; minutes long: `./run.sh test -m slow tests/test_torture.py`."""

import subprocess
import sys

import pytest
import torture


@pytest.mark.slow
@pytest.mark.parametrize("name", torture.TRIALS)
def test_nothing_is_lost(name):
    done = subprocess.run([sys.executable, torture.__file__, "--kills=4", f"--only={name}"])
    assert done.returncode == 0
