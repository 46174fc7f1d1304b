"""Memory: a conversion holds a few tensors at a time, however many layers there are."""

from __future__ import annotations

import sys

import pytest
from command import COMMAND
from tiny_models import Spec, write_tiny

N_EMBD, N_FF = 512, 1024
LARGEST_TENSOR_BYTES = 4 * N_EMBD * N_FF
LIMIT_BYTES = 3 * LARGEST_TENSOR_BYTES + 600_000_000
ALLOWED_GROWTH_BYTES = 8_000_000  # of 113 MB of float32 that 12 layers more hold


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory from the page cache")
def test_conversion_does_not_grow_with_layers(tmp_path):
    """Read, score, measure, plan, write: one file of 4 layers, one of 16."""
    from memory_probe import run_probed  # resource exists on Unix only

    peaks = {}
    for n_layers in (4, 16):
        spec = Spec("LlamaForCausalLM", n_layers=n_layers, n_embd=N_EMBD, n_ff=N_FF, n_heads=8, dtype="BF16")
        folder, target = write_tiny(tmp_path / f"{n_layers}", spec), tmp_path / f"{n_layers}.gguf"
        arguments = ("--target-bpw", "3.5", "--rounding", "rtn", "--no-verify", "--threads", "2", "-o", target)
        probed = run_probed([COMMAND, "convert", folder, *arguments], LIMIT_BYTES)
        assert probed.returncode == 0, probed.stderr
        assert target.stat().st_size > n_layers * 500_000
        assert probed.n_samples > 100
        peaks[n_layers] = probed.peak_bytes
    assert peaks[16] < LIMIT_BYTES
    assert peaks[16] - peaks[4] < ALLOWED_GROWTH_BYTES, peaks
