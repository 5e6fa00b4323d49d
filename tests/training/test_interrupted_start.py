"""Ctrl-C while a script still imports JAX."""

import os
import signal
import subprocess
import sys

import pytest
from processes import REPOSITORY, environment

# In the place of JAX: says that its import has begun, and goes on for longer than any test.
SLOW_IMPORT = "import time\nprint('importing', flush=True)\ntime.sleep(300)\n"


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_ctrl_c_while_jax_is_imported_ends_without_a_traceback(script, tmp_path):
    (tmp_path / "jax.py").write_text(SLOW_IMPORT)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    # A child inherits that a signal is ignored, as it is for what a shell script starts in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / script), "--help"],
            env=environment(1) | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
