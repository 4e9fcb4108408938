"""The learner's step as a GPU would meet it, where there is none: every tensor on it, and nobody waiting for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.utils.backend_registration", reason="needs torch")
SCRIPT = Path(__file__).with_name("fakegpu.py")


@pytest.mark.slow
def test_a_step_has_every_tensor_on_its_device_and_never_waits_for_it():
    """In a process of its own: the device is made of patches."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "losses" in done.stdout
