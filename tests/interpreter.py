"""Checks of Triton kernels without a GPU: in Triton's interpreter, which is chosen when a process starts."""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
BROKEN = "Triton's interpreter does not work here: that of Triton 3.6 needs a NumPy before 2.4"


def check_in_the_interpreter(path):
    """Runs the file as a program that ends with `run_checks`; skips the test where that says why it cannot."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    if BROKEN in done.stdout:
        pytest.skip(BROKEN)


def run_checks(*checks):
    """Calls each with the device, or prints why not."""
    try:
        for check in checks:
            check("cpu")
    except Exception as error:
        if "only 0-dimensional arrays can be converted" not in str(error):
            raise
        print(BROKEN)
