import subprocess
import sys

import pytest

from core.device import keep_freed_memory

# Page faults of 60 tensors of 40 MB, one after the other.
_SCRIPT = """
import resource
import torch
from core.device import keep_freed_memory
{call}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    torch.ones(10 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(call: str) -> int:
    command = [sys.executable, "-c", _SCRIPT.format(call=call)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_tensor_s_memory_is_used_again() -> None:
    if not keep_freed_memory():
        pytest.skip("the allocator is not glibc's, or its settings are the user's own")
    # Not none at all: a block that small ones have nibbled at is a little too small next time.
    assert _faults("assert keep_freed_memory()") < 0.7 * _faults("")
