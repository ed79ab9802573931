"""What `llmtrain verify` is for: a fault in our own code makes the certificate fail, by the name of the right
check; without it the same layout passes.

One start of four ranks runs every case: DeepSpeed's import is most of the time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import planted_worker
import pytest

from llmtrain.loader.config import LoaderConfig
from llmtrain.model.config import Family, ModelConfig
from llmtrain.parallel.config import ContextKind, EngineKind, ParallelConfig
from llmtrain.train.config import OptimizerConfig, RunConfig, TrainConfig, TrainRoot, VerifyConfig
from llmtrain.train.shrink import shrink
from llmtrain.train.verify import Check, compare, ranks_at_work, reference
from llmtrain.train.verify_rank import Case, read_told

RANKS = 4
MODELS = {
    "llama": ModelConfig(
        vocab_size=512, num_layers=5, d_model=256, num_heads=8, num_kv_heads=4, ffn_width=700
    ),
    "gpt2": ModelConfig(
        family=Family.gpt2,
        vocab_size=512,
        max_positions=1024,
        num_layers=5,
        d_model=256,
        num_heads=8,
        num_kv_heads=8,
        ffn_width=700,
        tie_embeddings=True,
    ),
}
LAYOUTS = {  # pipelines last: ZeRO-3 numbers modules over the whole process
    "tensor": ("llama", ParallelConfig(tp_size=2, sequence_parallel=True, zero_stage=2)),
    "context": ("llama", ParallelConfig(cp_size=2, context=ContextKind.sequence, zero_stage=1)),
    "dropout": ("gpt2", ParallelConfig(tp_size=2, zero_stage=1)),
    "zero3": ("gpt2", ParallelConfig(zero_stage=3)),
    "fsdp": ("llama", ParallelConfig(zero_stage=3, engine=EngineKind.accelerate)),
    "pipeline": ("gpt2", ParallelConfig(pp_size=2, zero_stage=1)),
}
PLANTED = {  # case -> the check that has to see it, and where
    "tensor:micro_batch_mean": ("gradient", ""),
    "tensor:dropped_micro_batch": ("gradient", ""),
    "tensor:norm_not_summed": ("gradient", "norm.weight"),
    "tensor:wrong_kv_head": ("loss", ""),
    "tensor:weight_not_reloaded": ("reload: state", planted_worker.FORGOTTEN),
    "tensor:steps_not_reloaded": ("reload: next step", "after it"),
    "context:gradient_times_cp": ("gradient norm", ""),
    "dropout:dropout_by_rank": ("copies agree", ""),
    "pipeline:clipped_by_stage": ("gradient", ""),
    "pipeline:tied_not_summed": ("gradient", "embedding.weight"),
}


def case_of(name: str) -> Case:
    layout = name.partition(":")[0]
    family, parallel = LAYOUTS[layout]
    cfg = TrainRoot(
        run=RunConfig(name="planted", folder="nowhere"),
        data=LoaderConfig(folder="nowhere", seq_len=1024),
        model=MODELS[family],
        train=TrainConfig(
            total_tokens=10**6,
            global_batch_rows=64,
            micro_batch_rows=4,
            dropout=0.2 if layout == "dropout" else 0.0,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        parallel=parallel,
        verify=VerifyConfig(num_steps=2),
    )
    small = shrink(cfg, num_ranks=RANKS)
    assert small.num_ranks == RANKS
    return Case(small.cfg, num_steps=2)


Checks = dict[str, dict[str, Check]]


@pytest.fixture(scope="module")
def checks() -> Checks:
    """By case and name."""
    names = [name for layout in LAYOUTS for name in (layout, *PLANTED) if name.partition(":")[0] == layout]
    cases = {name: case_of(name) for name in dict.fromkeys(names)}
    command = (sys.executable, planted_worker.__file__)
    found = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ranks_at_work(folder, cases, num_ranks=RANKS, command=command) as wait:
            expected = {layout: reference(case_of(layout), num_ranks=RANKS) for layout in LAYOUTS}
            wait()
        for name, case in cases.items():
            told = [read_told(folder / name, rank) for rank in range(RANKS)]
            compared = compare(case, told, expected[name.partition(":")[0]])
            found[name] = {check.name: check for check in compared}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_without_a_fault_passes(layout: str, checks: Checks) -> None:
    failed = [check.sentence() for check in checks[layout].values() if not check.passed]
    assert not failed


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails_the_check_that_is_for_it(name: str, checks: Checks) -> None:
    check, where = PLANTED[name]
    failed = {each.name: each.sentence() for each in checks[name].values() if not each.passed}
    assert check in failed, f"not seen by {check}, but by {failed}"
    assert where in failed[check]


def test_every_planted_fault_has_a_case() -> None:
    assert {name.partition(":")[2] for name in PLANTED} == planted_worker.FAULTS.keys()
