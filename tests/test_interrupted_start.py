"""Ctrl-C while train.py still imports JAX."""

import signal
import subprocess
import sys
import time

import pytest
from processes import REPOSITORY, environment


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_ctrl_c_while_jax_is_imported_ends_without_a_traceback(seconds):
    # A child inherits that a signal is ignored, as it is for what a shell script starts in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "train.py"), "--help"],
            env=environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "")
