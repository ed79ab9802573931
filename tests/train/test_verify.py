"""`llmtrain verify`: what is shrunk, what a certificate belongs to, what `train` makes of it, and ranks that
die."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_folder import train_arguments, wait_for

from llmtrain import files
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.cli import verify as cli
from llmtrain.errors import EXIT_FAILED, ConfigError, DataError, LaunchError, LLMTrainError
from llmtrain.loader.config import LoaderConfig
from llmtrain.model.config import Family, ModelConfig
from llmtrain.parallel.compatibility import problems
from llmtrain.parallel.config import ContextKind, ParallelConfig, PipelineSchedule
from llmtrain.parent import PARENT_VARIABLE
from llmtrain.train import verify
from llmtrain.train.certificate import belongs_to, certificate_path, missing, read_certificate
from llmtrain.train.check import check_train, layout_of
from llmtrain.train.config import (
    OptimizerConfig,
    Precision,
    RampConfig,
    RunConfig,
    TrainConfig,
    TrainRoot,
    VerifyConfig,
)
from llmtrain.train.shrink import reduced_sizes, shrink
from llmtrain.train.verify_rank import Case, random_batch

LLAMA_8B = ModelConfig(
    vocab_size=128256, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, ffn_width=14336
)
GPT2 = ModelConfig(
    family=Family.gpt2,
    max_positions=1024,
    vocab_size=50304,
    num_layers=13,
    d_model=768,
    num_heads=16,
    num_kv_heads=16,
    ffn_width=3072,
    tie_embeddings=True,
)


def root(folder: Path | str = "nowhere", **changes: Any) -> TrainRoot:
    parts: dict[str, Any] = {
        "run": RunConfig(name="test", folder=str(folder)),
        "data": LoaderConfig(folder="nowhere", seq_len=1024),
        "model": LLAMA_8B,
        "train": TrainConfig(total_tokens=10**9, global_batch_rows=512, micro_batch_rows=4),
        "optimizer": OptimizerConfig(peak_lr=1e-3),
    }
    return TrainRoot(**(parts | changes))


# -- shrinking


@pytest.mark.parametrize("model", [LLAMA_8B, replace(LLAMA_8B, num_kv_heads=1), replace(GPT2, num_heads=16)])
@pytest.mark.parametrize("context", list(ContextKind))
@pytest.mark.parametrize("pp_schedule", list(PipelineSchedule))
def test_every_legal_layout_shrinks_to_a_legal_one_of_few_ranks_with_its_relations(
    model: ModelConfig, context: ContextKind, pp_schedule: PipelineSchedule
) -> None:
    num_seen = 0
    for pp, dp, cp, tp in itertools.product((1, 2, 4), (1, 2, 8), (1, 2, 4), (1, 2, 4, 8, 16)):
        parallel = ParallelConfig(
            pp_size=pp,
            pp_schedule=pp_schedule,
            cp_size=cp,
            tp_size=tp,
            context=context,
            sequence_parallel=True,
        )
        cfg = root(model=model, parallel=parallel)
        if problems(replace(layout_of(cfg, device=None), dp_size=dp)):
            continue
        num_seen += 1
        small = shrink(cfg, num_ranks=pp * dp * cp * tp)  # asserts that it is legal
        assert small.num_ranks <= 8
        run, shape = small.cfg.parallel, small.cfg.model
        assert (shape.num_kv_heads < run.tp_size) == (model.num_kv_heads < tp) or run.tp_size == 1
        assert (shape.num_kv_heads < shape.num_heads) == (model.num_kv_heads < model.num_heads)
        assert shape.tie_embeddings == model.tie_embeddings
        assert shape.family == model.family
        if run.pp_size == pp:
            num_stages = pp * (pp_schedule.stages_per_rank if pp > 1 else 1)
            assert (shape.num_layers % num_stages == 0) == (model.num_layers % num_stages == 0)
        if pp * cp * tp * min(dp, 2) <= 8:
            assert (run.pp_size, run.cp_size, run.tp_size) == (pp, cp, tp)
            assert small.num_ranks // (pp * cp * tp) >= min(dp, 2)
        assert shape.num_heads * shape.width_per_head <= 512
    assert num_seen > 50


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 64, 1, 1), (1, 8, 1, 1)),
        ((2, 16, 1, 2), (2, 2, 1, 2)),
        ((1, 1, 1, 16), (1, 1, 1, 8)),
        ((1, 4, 1, 8), (1, 2, 1, 4)),
        ((4, 8, 1, 8), (2, 2, 1, 2)),
        ((2, 8, 2, 8), (2, 1, 2, 2)),
        ((3, 1, 1, 2), (3, 1, 1, 2)),
    ],
)
def test_axes_are_reduced_in_the_stated_order(given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    names = ("pp_size", "dp_size", "cp_size", "tp_size")
    assert reduced_sizes(dict(zip(names, given, strict=True)), most=8) == dict(
        zip(names, expected, strict=True)
    )


def test_what_was_reduced_is_named_as_not_covered() -> None:
    parallel = ParallelConfig(pp_size=2, cp_size=2, tp_size=8)
    train = TrainConfig(
        total_tokens=1, global_batch_rows=64, micro_batch_rows=4, precision=Precision.bf16, grad_clip=0
    )
    told = " | ".join(shrink(root(parallel=parallel, train=train), num_ranks=64).not_covered)
    for part in (
        "dp_size=2: no rank of the check shares work along this axis",
        "tp_size=8: the check has 2",
        "train.precision=bf16: the check is in fp32",
        "train.grad_clip=0",
        "kernels and collectives of GPUs",
    ):
        assert part in told


def test_accumulation_and_a_ramp_are_kept_in_kind() -> None:
    ramp = [RampConfig(until_tokens=10**6, rows=256)]
    cfg = root(
        train=TrainConfig(total_tokens=10**9, global_batch_rows=512, micro_batch_rows=4, batch_ramp=ramp)
    )
    small = shrink(cfg, num_ranks=4).cfg
    assert [rows // (small.train.micro_batch_rows * 4) for rows in small.batch_sizes.sizes] == [2, 3]
    dual = ParallelConfig(pp_size=2, pp_schedule=PipelineSchedule.dual_pipe_v)
    small = shrink(replace(cfg, parallel=dual), num_ranks=4).cfg
    assert [rows // (small.train.micro_batch_rows * 2) for rows in small.batch_sizes.sizes] == [4, 5]
    one = TrainConfig(total_tokens=10**9, global_batch_rows=16, micro_batch_rows=4)
    small = shrink(root(train=one), num_ranks=4).cfg
    assert small.train.global_batch_rows == 4 * small.train.micro_batch_rows


def test_rows_have_several_documents_and_uneven_numbers_of_targets() -> None:
    cfg = shrink(root(), num_ranks=1).cfg
    batch = random_batch(cfg, range(8))
    assert all(len(row.unique()) == 3 for row in batch.segments_BS)
    counts = (batch.targets_BS != -100).sum(1).tolist()
    assert min(counts) == 0
    assert len(set(counts)) > 3
    assert int(batch.positions_BS.max()) < cfg.data.seq_len


# -- certificates


def certify(cfg: TrainRoot, num_ranks: int, *, passed: bool = True) -> None:
    found = verify.Verified([verify.Check("loss", 0.0 if passed else float("nan"), 1e-6, "step 1")], 1.0)
    verify.write_certificate(certificate_path(cfg), cfg, num_ranks, shrink(cfg, num_ranks=num_ranks), found)


def test_a_certificate_belongs_to_layout_model_batch_and_versions_alone(tmp_path: Path) -> None:
    cfg = root(tmp_path)
    hashed = files.hash_json(belongs_to(cfg, 4))
    same = [
        replace(cfg, optimizer=replace(cfg.optimizer, peak_lr=0.5)),
        replace(cfg, run=replace(cfg.run, seed=7, name="other")),
        replace(cfg, train=replace(cfg.train, total_tokens=5), save=SaveConfig(every_steps=7)),
        replace(cfg, model=replace(cfg.model, init_std=0.5)),
        replace(cfg, parallel=replace(cfg.parallel, world_size=4)),
    ]
    other = [
        replace(cfg, optimizer=replace(cfg.optimizer, beta2=0.99)),
        replace(cfg, train=replace(cfg.train, micro_batch_rows=2)),
        replace(cfg, train=replace(cfg.train, precision=Precision.bf16)),
        replace(cfg, model=replace(cfg.model, num_layers=33)),
        replace(cfg, parallel=replace(cfg.parallel, zero_stage=3)),
        replace(cfg, data=replace(cfg.data, seq_len=2048)),
    ]
    assert all(files.hash_json(belongs_to(each, 4)) == hashed for each in same)
    assert all(files.hash_json(belongs_to(each, 4)) != hashed for each in other)
    assert files.hash_json(belongs_to(cfg, 8)) != hashed
    assert belongs_to(cfg, 4)["versions"].keys() >= {"python", "torch", "deepspeed", "llmtrain", "source"}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    cfg = root(tmp_path)
    assert missing(cfg, 4) == f"{tmp_path / 'certificate.json'} does not exist"
    certify(cfg, 4)
    assert missing(cfg, 4) is None
    elsewhere = replace(root(), verify=VerifyConfig(certificate=str(tmp_path / "certificate.json")))
    assert missing(elsewhere, 4) is None
    told = missing(replace(cfg, parallel=ParallelConfig(zero_stage=3)), 8)
    assert told is not None
    assert "ranks=8 (there 4), parallel.zero_stage=3 (there 1)" in told
    certify(cfg, 4, passed=False)
    assert missing(cfg, 4) == f"{tmp_path / 'certificate.json'} says that the check failed"
    assert read_certificate(tmp_path / "certificate.json")["checks"][0]["worst"] == "nan"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 0}', '{"format_version": 1}'])
def test_a_file_that_is_no_certificate_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "certificate.json").write_text(text)
    with pytest.raises(DataError, match=r"certificate.json .*run `llmtrain verify`"):
        missing(root(tmp_path), 4)


def test_train_warns_without_a_certificate_and_refuses_when_it_is_required(tmp_path: Path) -> None:
    cfg = root(tmp_path)
    required = replace(cfg, verify=VerifyConfig(required=True))

    def told(cfg: TrainRoot, ranks: int | None) -> tuple[str, str, str]:
        found = check_train(cfg, world_size=ranks)
        return "\n".join(found.problems), "\n".join(found.warnings), "\n".join(found.facts)

    wanted = "does not exist; run `llmtrain verify` with the same overrides and verify.ranks=4"
    problems, warnings, _ = told(cfg, 4)
    assert wanted in warnings
    assert "verified" not in problems
    problems, warnings, _ = told(required, 4)
    assert f"{wanted}, or set verify.required=false" in problems
    assert "verified" not in warnings
    assert "verified" not in "".join(told(cfg, 1))
    assert "this layout is not verified" in told(required, 1)[0]
    assert "certificate: not looked for" in told(cfg, None)[2]
    certify(cfg, 4)
    problems, warnings, facts = told(required, 4)
    assert "verified" not in problems + warnings
    assert f"certificate: {tmp_path / 'certificate.json'} says that this layout computes right" in facts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "verify.ranks=0 and verify.max_ranks=8 must be at least 1"),
        ({"max_ranks": 0}, "verify.max_ranks=0"),
        ({"timeout_s": 0.0}, "verify.timeout_s=0.0 above 0"),
        ({"num_steps": 1}, "verify.num_steps=1 must be at least 2"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VerifyConfig(**settings)


def test_verify_refuses_what_train_would_refuse() -> None:
    with pytest.raises(ConfigError, match=r"verify.ranks=2, but parallel.world_size=4"):
        cli.ranks_of(root(verify=VerifyConfig(ranks=2), parallel=ParallelConfig(world_size=4)))
    with pytest.raises(ConfigError, match=r"world_size=3 is not a multiple of"):
        cli.ranks_of(root(verify=VerifyConfig(ranks=3), parallel=ParallelConfig(tp_size=2)))
    with pytest.raises(ConfigError, match=r"verify.max_ranks=0 must be at least 1"):
        reduced_sizes({"pp_size": 1, "dp_size": 1, "cp_size": 1, "tp_size": 1}, most=0)


# -- comparing


@pytest.mark.parametrize("worst", [1e-3, float("nan"), float("inf")])
def test_a_failed_check_ends_in_a_sentence_and_in_a_certificate_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], worst: float
) -> None:
    checks = [
        verify.Check("loss", 1e-7, 2e-6, "step 1"),
        verify.Check("gradient", worst, 1e-5, "blocks.0.attention.wk.weight"),
        verify.Check("copies agree", 2.0, 0, "final_norm.weight on rank 3"),
    ]
    monkeypatch.setattr(verify, "verify", lambda small: verify.Verified(checks, 1.0))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cfg = root(tmp_path, verify=VerifyConfig(ranks=4))
    with pytest.raises(LLMTrainError) as failure:
        cli.run(cfg)
    assert f"gradient is off by {worst:.1e} at blocks.0.attention.wk.weight; allowed is 1e-05" in str(
        failure.value
    )
    assert "copies agree: 2 where 0 is allowed, at final_norm.weight on rank 3" in str(failure.value)
    assert "loss" not in str(failure.value)
    assert json.loads((tmp_path / "certificate.json").read_text())["passed"] is False
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "FAIL" in line] == ["gradient", "copies"]


# -- ranks


def start(tmp_path: Path, program: str, *, timeout_s: float = 60.0) -> None:
    """Two ranks that run `program`."""
    small = shrink(root(verify=VerifyConfig(timeout_s=timeout_s)), num_ranks=2)
    command = (sys.executable, "-c", program)
    with verify.ranks_at_work(tmp_path, {"run": Case(small.cfg, 2)}, num_ranks=2, command=command) as wait:
        wait()


def test_a_rank_whose_starter_is_gone_ends_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.train.verify_rank", str(tmp_path)],
        env=os.environ | {PARENT_VARIABLE: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the process that started this rank has ended" in done.stderr


IS_RANK_1 = "import os, sys, time; print('rank here', flush=True); is_1 = os.environ['RANK'] == '1'; "
NOTES_PID = "open(sys.argv[1] + '/pid-' + os.environ['RANK'], 'w').write(str(os.getpid())); "


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("sys.exit('the disk is gone')", r"rank 1 exited with 1; its last lines:\n(.*\n)?  the disk is gone"),
        ("os.kill(os.getpid(), 9)", r"rank 1 was killed by signal 9; its last lines:\n  rank here"),
    ],
)
def test_a_rank_that_dies_is_named_and_the_others_are_ended(tmp_path: Path, end: str, message: str) -> None:
    program = f"{IS_RANK_1}{NOTES_PID}\nif is_1: {end}\ntime.sleep(600)"
    begin = time.monotonic()
    with pytest.raises(LaunchError, match=message):
        start(tmp_path, program)
    assert time.monotonic() - begin < 30
    other = tmp_path / "pid-0"
    assert not other.exists() or not Path(f"/proc/{other.read_text()}").exists()


def test_ranks_that_are_late_are_named_and_ended(tmp_path: Path) -> None:
    program = f"{IS_RANK_1}{NOTES_PID}\nif not is_1: time.sleep(600)"
    with pytest.raises(LaunchError, match=r"ranks 0 are not done after verify.timeout_s=5 s"):
        start(tmp_path, program, timeout_s=5)
    assert not Path(f"/proc/{(tmp_path / 'pid-0').read_text()}").exists()


def test_ranks_end_with_whoever_started_them_also_at_ctrl_c(tmp_path: Path) -> None:
    small = shrink(root(), num_ranks=2)
    command = (sys.executable, "-c", f"{IS_RANK_1}{NOTES_PID}time.sleep(600)")
    pids = [tmp_path / "pid-0", tmp_path / "pid-1"]

    def interrupted() -> None:
        with verify.ranks_at_work(tmp_path, {"run": Case(small.cfg, 2)}, num_ranks=2, command=command):
            wait_for(lambda: all(pid.exists() and bool(pid.read_text()) for pid in pids))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(Path(f"/proc/{pid.read_text()}").exists() for pid in pids)


def llmtrain(*arguments: str) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_verified_config_is_one_that_train_takes(data: Path, tmp_path: Path) -> None:
    """DDP on two ranks, the quickest to start. `verify` needs no data."""
    settings = ("parallel.engine=accelerate", "parallel.zero_stage=0", "parallel.world_size=2")
    _, *arguments = train_arguments(data, tmp_path / "run", *settings)
    without_data = [argument for argument in arguments if not argument.startswith("data.folder")]
    required = [*arguments, "verify.required=true", "check_only=true"]
    status, text = llmtrain("train", *required)
    assert status == EXIT_FAILED
    assert "this layout is not verified" in text
    status, text = llmtrain("verify", *without_data, "data.folder=nowhere")
    assert status == 0, text
    assert "FAIL" not in text
    told = read_certificate(tmp_path / "run" / "certificate.json")
    assert told["passed"]
    assert told["shrunk"]["data.seq_len"] == {"from": 32, "to": 24}
    assert {check["name"] for check in told["checks"]} >= {"loss", "gradient", "reload: next step"}
    status, text = llmtrain("train", *required)
    assert status == 0, text
    assert "says that this layout computes right" in text
    status, text = llmtrain("train", *required, "optimizer.beta2=0.9")
    assert status == EXIT_FAILED
    assert "is of another config: optimizer.beta2=0.9 (there 0.95)" in text
