"""Style and types: what `make lint` says, beside the other tests rather than before them."""

import subprocess
import sys

import pytest
import shared_runs


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_there_is_nothing_to_say(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=shared_runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
