"""Without a GPU: every system trains, is evaluated and samples on a device that does not take the host's
tensors, and no update waits for it.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import system

MIXED = (
    "a host tensor added",
    "a host tensor multiplied from the left",
    "a host tensor's index on the device",
)
WAITING = ("item", "bool", "cpu", "tolist", "nonzero", "mask", "copy to the host")
FREE = ("a host number added", "a sum", "copy to the device")
SCORE = {
    "tts": "eval/mcd",
    "spectrogram": "eval/lsd",
    "music": "val/flow_loss",  # captions of the computed recordings say nothing that could be judged
    "speech_align": "eval/recall_1",
    "speech_image": "eval/all_match",
}
each_system = pytest.mark.parametrize("name", [name for name in SCORE if name in system.SYSTEMS])


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What tests/fake_device.py saw, in a process of its own: torch keeps the device that it is told of."""
    path = tmp_path_factory.mktemp("fake") / "seen.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fake_device.py", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@each_system
def test_a_system_trains_is_evaluated_and_samples_on_a_device(name, seen):
    assert not seen[name]["error"]
    assert {"train/loss", SCORE[name]} <= seen[name]["metrics"].keys()


@each_system
def test_no_update_waits_for_the_device(name, seen):
    assert seen[name]["waits"] == []
    assert seen[name]["all_waits"] > 0  # a log line does


def test_the_device_refuses_the_host_s_tensors_and_counts_waits(seen):
    did = seen["operations"]
    assert all("same device" in did[name] for name in MIXED)
    assert "numpy" in did["numpy"]
    assert {did[name] for name in WAITING} == {"1 waits"}
    assert {did[name] for name in FREE} == {"0 waits"}
