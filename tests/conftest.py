"""For all tests: the modules of the repository's root importable from anywhere, a few polite threads, no downloads.

The environment is set before the first import of torch, and processes that tests start inherit it.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # idle threads sleep: spinning ones slow the other ranks down
os.environ.setdefault("OMP_NUM_THREADS", "2")           # tests are small: more threads cost more than they bring
os.environ.setdefault("HF_HUB_OFFLINE", "1")            # a model that is not cached is an error at once, not minutes of retries


@pytest.fixture(scope="session")
def recordings() -> Path:
    """A folder of real LJSpeech clips beside the repository, in the published layout (metadata.csv, wavs/)."""
    folder = ROOT.parent / "shared" / "data" / "LJSpeech-64"
    if not folder.exists():
        pytest.skip("no recordings beside the repository")
    return folder
