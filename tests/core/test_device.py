import pytest
import torch

from core.device import amp_dtype, deterministic


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
