"""Any layout, the same numbers: every legal layout of up to four ranks against plain PyTorch in one process.

`make test` runs a few in which every value of every setting occurs; `make test-all` runs all of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import engine_worker
import numpy as np
import pytest
from ranks import run_ranks

from llmtrain.errors import LLMTrainError
from llmtrain.parallel.compatibility import Layout, problems
from llmtrain.parallel.config import ContextKind, EngineKind, PipelineSchedule

WORKER = Path(engine_worker.__file__)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "family": ("llama", "gpt2"),
    "engine": ("deepspeed", "accelerate"),
    "pp_size": (1, 2, 4),
    "dp_size": (1, 2, 4),
    "cp_size": (1, 2),
    "tp_size": (1, 2, 4),
    "zero_stage": (0, 1, 2, 3),
    "context": ("heads", "sequence"),
    "sequence_parallel": (False, True),
    "pp_schedule": ("one_f_one_b", "dual_pipe_v"),
}
DROPOUT = {"llama": 0.0, "gpt2": 0.1}
Case = dict[str, Any]


def all_legal() -> list[Case]:
    found = []
    for values in itertools.product(*SETTINGS.values()):
        case = dict(zip(SETTINGS, values, strict=True))
        if num_ranks(case) > 4:
            continue
        has_no_effect = (
            (case["cp_size"] == 1 and case["context"] != "heads")
            or (case["tp_size"] == 1 and case["sequence_parallel"])
            or (case["pp_size"] == 1 and case["pp_schedule"] != "one_f_one_b")
        )
        if has_no_effect:
            continue
        if not problems(layout_of(case)):
            found.append(case)
    return found


def num_ranks(case: Case) -> int:
    return int(np.prod([case[f"{axis}_size"] for axis in ("pp", "dp", "cp", "tp")]))


def micro_rows(case: Case) -> int:
    """One micro batch a step, or as few as a schedule takes; and twice as many once the batch has doubled."""
    num_micro = 2 * case["pp_size"] if case["pp_schedule"] == "dual_pipe_v" else 1
    return int(engine_worker.ROWS // (case["dp_size"] * num_micro))


def layout_of(case: Case) -> Layout:
    model = engine_worker.MODELS[case["family"]]
    sizes = {key: value for key, value in case.items() if key in Layout.__dataclass_fields__}
    return Layout(
        **sizes
        | {
            "engine": EngineKind[case["engine"]],
            "context": ContextKind[case["context"]],
            "pp_schedule": PipelineSchedule[case["pp_schedule"]],
        },
        precision="fp32",
        optimizer="adamw",
        device="cpu",
        micro_batch_rows=micro_rows(case),
        rows_per_step=(engine_worker.ROWS, 2 * engine_worker.ROWS),
        seq_len=engine_worker.SEQ_LEN,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        ffn_width=model.ffn_width,
        vocab_size=model.vocab_size,
        tie_embeddings=model.tie_embeddings,
    )


def pairs(case: Case) -> set[tuple[str, Any, str, Any]]:
    return {(one, case[one], other, case[other]) for one, other in itertools.combinations(SETTINGS, 2)}


def covering(goals: Mapping[str, set[Any]]) -> list[str]:
    """Few layouts in which everything occurs that occurs in `goals`. Greedy, fewest ranks first among equals."""
    missing, chosen = set().union(*goals.values()), []
    while missing:
        best = max(goals, key=lambda name: (len(goals[name] & missing), -num_ranks(ALL[name])))
        missing -= goals[best]
        chosen.append(best)
    return chosen


def name_of(case: Case) -> str:
    axes = "-".join(
        f"{axis}{case[f'{axis}_size']}" for axis in ("pp", "dp", "cp", "tp") if case[f"{axis}_size"] > 1
    )
    extras = "-sp" * case["sequence_parallel"] + "-ring" * (case["context"] == "sequence")
    extras += "-dual" * (case["pp_schedule"] == "dual_pipe_v")
    return f"{case['family']}-{case['engine']}-{axes or 'one'}-zero{case['zero_stage']}{extras}"


ALL = {name_of(case): case for case in all_legal()}
SAMPLE = {name: ALL[name] for name in covering({name: pairs(case) for name, case in ALL.items()})}


def values(names: Iterable[str]) -> set[tuple[str, Any]]:
    """Every value of every setting that occurs in these layouts."""
    return {(setting, ALL[name][setting]) for name in names for setting in SETTINGS}


FEW = covering({name: values([name]) for name in SAMPLE})
REST = [name for name in ALL if name not in FEW]


def worker_case(case: Case) -> Case:
    """As engine_worker takes it; gpt2 drops activations, and computes every other block again."""
    told = {key: value for key, value in case.items() if key != "dp_size"} | {"micro": micro_rows(case)}
    if case["family"] == "gpt2":
        what = "selective" if case["zero_stage"] == 1 else "full"
        told |= {"recompute": 2, "recompute_what": what, "dropout": DROPOUT["gpt2"]}
    return told


@cache
def results(which: str, ranks: int) -> dict[str, Any] | str:
    """One start of the ranks runs every case of one size: DeepSpeed's import is most of the time. What went
    wrong, if it did: not to be tried again by every test."""
    names = {"few": FEW, "rest": REST}[which]
    # Pipelines last: ZeRO-3 counts the modules of a process, and stages build different numbers of them.
    ordered = sorted(names, key=lambda name: ALL[name]["pp_size"] > 1)
    mine = {name: worker_case(ALL[name]) for name in ordered if num_ranks(ALL[name]) == ranks}
    try:
        told: dict[str, Any] = run_ranks(WORKER, json.dumps(mine), num_ranks=ranks, timeout_s=3000)[0]
    except LLMTrainError as error:
        return str(error)
    return told


@cache
def reference(family: str) -> dict[str, Any]:
    return engine_worker.reference(family, dropout=DROPOUT[family])


def compare(which: str, name: str) -> None:
    case = ALL[name]
    found, expected = results(which, num_ranks(case)), reference(case["family"])
    assert not isinstance(found, str), found
    told = found[name]
    np.testing.assert_allclose(told["loss"], expected["loss"], rtol=2e-6)
    np.testing.assert_allclose(told["grad_norm"], expected["grad_norm"], rtol=1e-5)
    # 10 AdamW updates amplify the order of fp32 sums where a gradient is near zero
    np.testing.assert_allclose(told["checksum"], expected["checksum"], rtol=1e-4, atol=1e-3)
    held_out, num_targets = expected["held_out_by_rows"][case["dp_size"] * micro_rows(case)]
    assert told["held_out"][1] == num_targets
    np.testing.assert_allclose(told["held_out"][0], held_out, rtol=2e-6)


@pytest.mark.parametrize("name", FEW)
def test_a_layout_equals_plain_pytorch(name: str) -> None:
    compare("few", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_every_other_legal_layout_equals_plain_pytorch(name: str) -> None:
    compare("rest", name)


def test_the_sample_holds_every_legal_pair_of_settings() -> None:
    assert set().union(*map(pairs, ALL.values())) == set().union(*map(pairs, SAMPLE.values()))
    assert len(SAMPLE) < len(ALL) / 3
    assert values(FEW) == values(ALL)
    assert len(FEW) < len(SAMPLE) / 2


def test_clipping_is_at_work_in_the_reference() -> None:
    norms = reference("llama")["grad_norm"] + reference("gpt2")["grad_norm"]
    assert max(norms) > engine_worker.CLIP, "the parity cases would not see a wrong norm"
