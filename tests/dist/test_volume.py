"""Bytes handed to collectives in a step, counted on 2 and on 4 ranks: equal to the formulas', to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import REPOSITORY, run_ranks

WORKER = Path(REPOSITORY, "llmtrain", "bench", "_layout_rank.py")
GPT2 = {"family": "gpt2", "max_positions": 24}
ODD = {"d_model": 31, "head_width": 8, "ffn_width": 81, "vocab_size": 97}  # nothing divides by two
NOTHING_STAYS_WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SOME_STAY_WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}

TWO_RANKS = {
    "tp": {"tp_size": 2},
    "tp, bf16, every second block recomputed": {"tp_size": 2, "precision": "bf16", "recompute_every": 2},
    "tp, a shared key/value head": {"tp_size": 2, "model": {"num_kv_heads": 1}},
    "tp, gpt2": {"tp_size": 2, "model": GPT2},
    "sequence parallel": {"tp_size": 2, "sequence_parallel": True},
    "sequence parallel, recomputed": {"tp_size": 2, "sequence_parallel": True, "recompute_every": 1},
    "sequence parallel, gpt2, bf16, a shared key/value head": {
        "tp_size": 2,
        "sequence_parallel": True,
        "precision": "bf16",
        "model": {**GPT2, "num_kv_heads": 1, "tie_embeddings": True},
    },
    "cp by heads": {"cp_size": 2},
    "cp by heads, one key/value head, recomputed, bf16": {
        "cp_size": 2,
        "precision": "bf16",
        "recompute_every": 1,
        "model": {"num_kv_heads": 1},
    },
    "cp by sequence": {"cp_size": 2, "context": "sequence"},
    "cp by sequence, recomputed, bf16": {
        "cp_size": 2,
        "context": "sequence",
        "precision": "bf16",
        "recompute_every": 1,
    },
    "pp": {"pp_size": 2},
    "pp, bf16, tied": {"pp_size": 2, "precision": "bf16", "model": {"tie_embeddings": True}},
    "pp, dual, tied": {
        "pp_size": 2,
        "pp_schedule": "dual_pipe_v",
        "num_micro_batches": 4,
        "recompute_every": 2,
        "model": {"num_layers": 4, "tie_embeddings": True},
    },
    "ZeRO-0": {"zero_stage": 0, "model": ODD},
    "ZeRO-1": {"zero_stage": 1, "model": ODD},
    "ZeRO-1, bf16": {"zero_stage": 1, "precision": "bf16", "model": ODD},
    "ZeRO-2": {"zero_stage": 2, "model": ODD},
    "ZeRO-2, bf16": {"zero_stage": 2, "precision": "bf16", "model": ODD},
    "ZeRO-3, DeepSpeed's defaults": {"zero_stage": 3, "model": ODD},
    "ZeRO-3, small weights stay whole": {"zero_stage": 3, "model": ODD, "deepspeed": SOME_STAY_WHOLE},
    "ZeRO-3, nothing stays whole, recomputed, bf16": {
        "zero_stage": 3,
        "precision": "bf16",
        "recompute_every": 1,
        "model": ODD,
        "deepspeed": NOTHING_STAYS_WHOLE,
    },
}
FOUR_RANKS = {
    "pp and tp": {"pp_size": 2, "tp_size": 2, "sequence_parallel": True, "model": {"tie_embeddings": True}},
    "pp and cp": {"pp_size": 2, "cp_size": 2, "recompute_every": 2},
    "cp and tp": {"cp_size": 2, "tp_size": 2, "sequence_parallel": True, "context": "sequence"},
    "dp and tp, ZeRO-3": {"tp_size": 2, "zero_stage": 3, "deepspeed": NOTHING_STAYS_WHOLE},
    "ring of four": {"cp_size": 4, "context": "sequence"},
    "tp of four": {"tp_size": 4, "sequence_parallel": True},
}


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [(2, TWO_RANKS), pytest.param(4, FOUR_RANKS, marks=pytest.mark.slow)],
    ids=["two", "four"],
)
def test_counted_bytes_equal_the_formulas(num_ranks, cases):
    told = run_ranks(WORKER, json.dumps(cases), num_ranks=num_ranks, timeout_s=280)
    differing = {
        f"{name}, rank {rank}": result
        for rank, results in enumerate(told)
        for name, result in results.items()
        if result["counted"] != result["expected"]
    }
    assert not differing, json.dumps(differing, indent=1)
    # What the formulas leave out: single numbers, a handful a step.
    assert max(result["numbers"] for results in told for result in results.values()) <= 10
    assert all(result["counted"] for results in told for result in results.values()), "nothing was counted"
