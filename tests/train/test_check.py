"""`llmtrain train check_only=true`: every mistake has its own message, all are told at once, and it is
quick."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest
from data_folder import train_arguments, write_data_folder

from llmtrain.errors import EXIT_FAILED

if TYPE_CHECKING:
    from conftest import Finished


def check(*arguments: str, **environment: str) -> tuple[int, str]:
    done = forked.verb(*arguments, "check_only=true", **environment)
    return done.returncode, done.stdout + done.stderr


def test_a_good_run_is_checked_in_under_5_seconds_without_torch(data: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch'] = None  # importing it is an error\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = train_arguments(data, tmp_path / "run", "parallel.world_size=2", "check_only=true")
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor: what else the machine does is not the check's
    assert spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime < 5
    assert "global batch 256 tokens = 2 rows x 32 x 2 accumulation x 2 dp; 12 steps = 3,072 tokens" in text
    assert not (tmp_path / "run").exists(), "a check must leave nothing behind"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.total_tokenz=5", "did you mean 'train.total_tokens'?"),
        ("+optimizer.peek_lr=5", "did you mean 'optimizer.peak_lr'?"),
        ("model=demmo", "did you mean 'demo'?"),
        ("train.precision=fp8", "train.precision: Invalid value 'fp8', expected one of [fp32, bf16, fp16]"),
        (
            "train.total_tokens=many",
            "train.total_tokens: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("model.d_model=30", "model.d_model=30 is not a multiple of model.num_heads=4"),
        ("model.num_kv_heads=3", "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (
            "train.micro_batch_rows=3",
            "train.global_batch_rows=8 is not a multiple of train.micro_batch_rows=3",
        ),
        ("parallel.world_size=3", "not a multiple of train.micro_batch_rows * dp = 2 * 3 = 6"),
        ("parallel.zero_stage=4", "parallel.zero_stage=4 must be 0, 1, 2 or 3"),
        ("model.vocab_size=63", "model.vocab_size=63 is smaller than the vocabulary of the tokenizer"),
        ("data.seq_len=64", "no pack of split 'train' has seq_len=64; there are [32]"),
        (
            "data.objective.kind=masked_lm",
            "data.objective.kind=masked_lm is for models that see both sides of a token",
        ),
        ("data.objective.kind=fim", "needs the tokens fim_prefix, fim_middle, fim_suffix"),
        ("train.total_tokens=1000000", "too little data: 3,907 steps x 8 rows need 31,256 rows"),
        (
            "schedule.warmup_tokens=4000",
            "schedule.warmup_tokens + schedule.decay_tokens = 4,000 is more than",
        ),
        ("schedule.kind=wsd", "wsd needs decay_tokens"),
        ("run.intent=resume", "there is no finished checkpoint in"),
        ("run.intent=warm_start", "warm_start needs init_from"),
        ("run.plan=nowhere.json", "run.plan=nowhere.json: no plan at nowhere.json; `llmtrain plan` writes"),
        ("data.folder=nowhere", "data folder nowhere does not exist; run `llmtrain data` first"),
        ("run.folder=/dev/null/run", "run.folder=/dev/null/run cannot be written: /dev/null is not a folder"),
        ("save.keep_last=999999999", "not enough disk space for"),
        ("save.keep_best=999999999", "not enough disk space for"),
    ],
)
def test_a_mistake_is_named_and_ends_with_status_2(
    data: Path, tmp_path: Path, override: str, message: str
) -> None:
    status, text = check(*train_arguments(data, tmp_path / "run"), override)
    assert (status, message in text) == (EXIT_FAILED, True), text
    assert "Traceback" not in text


def test_rows_longer_than_a_models_positions_are_refused(data: Path, tmp_path: Path) -> None:
    status, text = check(
        *train_arguments(data, tmp_path / "run"), "model.family=gpt2", "model.max_positions=31"
    )
    assert status == EXIT_FAILED
    assert "data.seq_len=32 is more than model.max_positions=31" in text


def test_bf16_without_zero_is_refused(data: Path, tmp_path: Path) -> None:
    status, text = check(
        *train_arguments(data, tmp_path / "run"), "train.precision=bf16", "parallel.zero_stage=0"
    )
    assert status == EXIT_FAILED
    assert "train.precision=bf16 with parallel.zero_stage=0" in text


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    status, text = check("train", "run.name=test")
    assert status == EXIT_FAILED
    assert "no value for optimizer.peak_lr" in text


def test_all_mistakes_are_told_at_once(data: Path, tmp_path: Path) -> None:
    status, text = check(
        *train_arguments(data, tmp_path / "run"),
        "model.vocab_size=63",
        "run.plan=x.json",
        "parallel.world_size=3",
    )
    assert status == EXIT_FAILED
    assert all(part in text for part in ("model.vocab_size=63", "run.plan=x.json", "2 * 3 = 6"))


def test_a_flipped_byte_of_a_shard_is_found(tmp_path: Path) -> None:
    data = write_data_folder(tmp_path / "data")
    shard = data / "shards/test/train-00001.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    status, text = check(*train_arguments(data, tmp_path / "run"))
    assert status == EXIT_FAILED
    assert str(shard) in text


def test_a_truncated_shard_is_found(tmp_path: Path) -> None:
    data = write_data_folder(tmp_path / "data")
    shard = data / "shards/test/train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    status, text = check(*train_arguments(data, tmp_path / "run"))
    assert status == EXIT_FAILED
    assert str(shard) in text


def test_fresh_over_a_run_is_refused(finished: Finished) -> None:
    status, text = check(*finished.arguments)
    assert status == EXIT_FAILED
    assert f"run.intent=fresh, but {finished.folder} holds a run already" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_model=64", "model.d_model=64, but step 12 was trained with 32; a resume cannot change it"),
        ("run.seed=1", "run.seed=1, but step 12 was trained with 0; a resume cannot change it"),
    ],
)
def test_a_resume_cannot_change_what_the_weights_depend_on(
    finished: Finished, override: str, message: str
) -> None:
    status, text = check(*finished.arguments, "run.intent=resume", override)
    assert status == EXIT_FAILED
    assert message in text


def test_a_resume_with_another_rate_is_allowed_and_said(finished: Finished) -> None:
    status, text = check(*finished.arguments, "run.intent=resume", "optimizer.peak_lr=0.5")
    assert status == 0
    assert "warning  resuming with optimizer.peak_lr=0.5, which was 0.01" in text


def test_a_resume_on_other_data_is_refused(finished: Finished, tmp_path: Path) -> None:
    other = write_data_folder(tmp_path / "data", seed=1)
    status, text = check(*finished.arguments, "run.intent=resume", f"data.folder={other}")
    assert status == EXIT_FAILED
    assert "is not what step 12 was trained on" in text


def test_a_resume_with_another_row_length_is_refused_once(finished: Finished, tmp_path: Path) -> None:
    other = write_data_folder(tmp_path / "data", seq_len=64)
    status, text = check(*finished.arguments, "run.intent=resume", f"data.folder={other}", "data.seq_len=64")
    assert status == EXIT_FAILED
    assert "data.seq_len=64, but step 12 was trained with 32; a resume cannot change it" in text
    assert "is not what step 12 was trained on" not in text


def test_a_warm_start_keeps_the_shape(finished: Finished, tmp_path: Path) -> None:
    status, text = check(
        *finished.arguments,
        f"run.folder={tmp_path / 'run'}",
        "run.intent=warm_start",
        f"run.init_from={finished.folder}",
        "model.ffn_width=128",
    )
    assert status == EXIT_FAILED
    assert "model.ffn_width=128, but the checkpoint of run.init_from has 64" in text


def test_an_interrupted_run_without_a_checkpoint_starts_anew_only_when_told(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    arguments = train_arguments(data, tmp_path / "run")
    assert check(*arguments)[0] == EXIT_FAILED
    assert check(*arguments, "run.intent=resume")[0] == EXIT_FAILED
    status, text = check(*arguments, "run.intent=fresh_or_resume")
    assert status == 0
    assert "start: fresh weights, step 0" in text
    shutil.rmtree(tmp_path / "run")
