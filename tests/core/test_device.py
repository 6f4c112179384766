import subprocess
import sys

import pytest
import torch

from core.device import amp_dtype, deterministic, keep_freed_memory

# Page faults of 60 tensors of 40 MB, one after the other, before and after the setting.
_SCRIPT = """
import resource
import torch
from core.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(60):
        torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory() and faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_tensor_s_memory_is_used_again() -> None:
    if not keep_freed_memory():
        pytest.skip("the allocator is not glibc's, or its settings are the user's own")
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, check=True)
    before, after = map(int, done.stdout.split())
    # Not none at all: a block that small ones have nibbled at is a little too small next time.
    assert after < 0.7 * before


def test_emulated_bf16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    # As an older GPU answers.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated)
    assert amp_dtype("auto", torch.device("cuda")) is torch.float16


def test_on_a_gpu_only_the_attention_of_fixed_order_is_left() -> None:
    def enabled() -> list[bool]:
        kinds = ("flash", "mem_efficient", "cudnn", "math")
        return [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds]

    before = enabled()
    with deterministic(torch.device("cuda")):
        assert enabled() == [False, False, False, True]
    assert enabled() == before
