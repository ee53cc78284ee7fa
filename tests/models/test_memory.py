"""The C library's memory settings, seen from outside: page faults of a process of its own."""

import subprocess
import sys

import pytest

from dropserve.models.memory import keep_freed_memory

_FAULTS = """
import resource, sys, torch
from dropserve.models.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def work():
    for _ in range(3):
        held = [torch.zeros(2**18) for _ in range(32)]  # 1 MiB each, freed together

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    command = [sys.executable, "-c", _FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library has no mallopt")
def test_memory_that_is_kept_is_not_fetched_again():
    assert faults("keep") < faults("return") / 4
