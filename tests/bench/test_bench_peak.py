"""The measured peak: plausible, and set beside numpy's on a CPU."""

import pytest
import torch

from llmtrain.bench import peak
from llmtrain.bench.table import BenchConfig
from llmtrain.errors import ConfigError
from llmtrain.planner import hardware


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(peak, "CPU_SIZES", (64, 128))
    monkeypatch.setattr(peak, "SECONDS_PER_SIZE", 0.01)
    monkeypatch.setattr(hardware, "GEMM_SIZES", (64, 128))
    monkeypatch.setattr(hardware, "MEASURE_S", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_there_is_a_row_a_format_and_numpy_is_the_rival_in_fp32():
    fp32, bf16 = peak.run(BenchConfig(topic="peak"))
    assert fp32.name.startswith("fp32 matrix product on CPU")
    assert bf16.name.startswith("bf16 matrix product on CPU")
    assert 1e-4 < fp32.value < 1e4
    assert fp32.unit == "TFLOP/s"
    assert fp32.rival is not None
    assert bf16.rival is None


def test_an_option_is_refused():
    with pytest.raises(ConfigError, match=r"topic peak takes no options, got options\.size"):
        peak.run(BenchConfig(topic="peak", options={"size": 1}))
