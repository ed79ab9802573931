"""This machine's peak, measured."""

import pytest

from llmtrain.planner import hardware
from llmtrain.planner.hardware import measure_peak, num_threads


@pytest.fixture
def quick_measurement(monkeypatch):
    monkeypatch.setattr(hardware, "GEMM_SIZES", (64, 256))
    monkeypatch.setattr(hardware, "MEASURE_S", 0.01)


def test_measured_peak_says_how_it_was_measured(quick_measurement):
    flops, source = measure_peak()
    assert 1e8 < flops < 1e14
    assert source.startswith("measured here: best of ")
    assert "sgemm of 64, 256 square" in source
    assert f"{num_threads()} threads" in source


def test_threads_are_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert num_threads() == 3
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert num_threads() >= 1
