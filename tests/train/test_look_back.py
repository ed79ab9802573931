"""What can be said of a step afterwards, by `data trace run=`, `replay` and `inspect ledger`. The run reads
two data folders, fills in the middle, and went on with another number of ranks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from data_folder import train_arguments

from llmtrain.cli import data_trace, inspect_ledger, replay
from llmtrain.data.config import DataConfig, HeldOutConfig, PackConfig, TokenizerConfig
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.pipeline import run as run_data
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.loader.ledger import LEDGER_NAME
from llmtrain.loader.skipped import PassedOver
from llmtrain.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Launcher

VOCAB_SIZE = 300
STEPS = 10
WORDS = re.findall(r"\S+", "a row of tokens is read once and never again [in red] unless data are read twice")


def make_data(folder: Path, name: str, tokenizer: Path | None) -> Path:
    random = np.random.default_rng(len(name))
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as handle:
        for number in range(50):
            text = " ".join([name, str(number), *random.choice(WORDS, int(random.integers(5, 60)))])
            handle.write(json.dumps({"text": text}) + "\n")
    out = folder / name
    run_data(
        DataConfig(
            corpus=CorpusConfig(name=name, format=Format.jsonl, paths=[str(folder / f"{name}.jsonl")]),
            held_out=HeldOutConfig(fraction=0.2),
            tokenizer=TokenizerConfig(
                vocab_size=VOCAB_SIZE, path=None if tokenizer is None else str(tokenizer), fim=True
            ),
            pack=PackConfig(seq_lens=[32]),
            engine=EngineConfig(kind=EngineKind.inline),
            out=str(out),
        ),
        quiet=True,
    )
    return out


@pytest.fixture(scope="module")
def run(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two ranks, then on to the tenth on one; a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("look_back")
    web = make_data(folder, "web", None)
    [model] = web.glob("tokenizer/*/tokenizer.model")
    books = make_data(folder, "books", model)
    for ranks, steps in ((2, 4), (1, STEPS)):
        arguments = train_arguments(
            web,
            folder / "run",
            "data.folder=null",
            f"+data.sources={{web: {{folder: {web}, weight: 3}}, books: {{folder: {books}, weight: 1}}}}",
            f"model.vocab_size={VOCAB_SIZE}",
            f"train.total_tokens={steps * 8 * 32}",
            "data.block_rows=8",
            "data.objective.kind=fim",
            "save.every_steps=1",
            "save.keep_last=99",
            "train.eval_every_steps=0",
            "schedule.warmup_tokens=0",
            "data.max_epochs=99",
            "run.intent=fresh_or_resume",
        )
        status, text = launcher.run(arguments, num_ranks=ranks)
        assert status == 0, text
    return folder / "run"


def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def texts(folder: Path) -> dict[str, list[str]]:
    return {
        name: [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("web", "books")
    }


# data trace


def test_a_step_leads_to_its_documents_and_their_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_trace.show(data_trace.TraceRoot(run=str(run), step=2, format=OutputFormat.json))
    rows = shown(capsys)
    assert [row["place"]["position"] for row in rows] == list(range(8, 16))
    assert [row["place"]["rank"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["place"]["micro_batch"] for row in rows] == [0, 0, 1, 1] * 2
    assert sorted(row["place"]["source"] for row in rows) == ["books"] * 2 + ["web"] * 6, "a block is a step"
    originals = texts(run.parent)
    for row in rows:
        assert sum(document["num_tokens"] for document in row["documents"]) <= 32
        for document in row["documents"]:
            assert document["source"] == row["place"]["source"]
            text = originals[document["source"]][document["record"] - 1]
            assert text.encode()[document["byte_start"] : document["byte_end"]].decode() == document["text"]


def test_a_rank_and_a_micro_batch_are_parts_of_the_step(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def positions(**part: int) -> list[int]:
        data_trace.show(data_trace.TraceRoot(run=str(run), step=4, format=OutputFormat.json, **part))
        return [row["place"]["position"] for row in shown(capsys)]

    assert positions(rank=1) == [28, 29, 30, 31]
    assert positions(rank=1, micro_batch=0) == [28, 29]
    assert positions(micro_batch=1) == [26, 27, 30, 31]


def test_a_step_is_shown_as_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_trace.show(data_trace.TraceRoot(run=str(run), step=7, micro_batch=3))
    text = capsys.readouterr().out
    assert "row 54 of the run: rank 0, micro batch 3; row" in text
    assert ".jsonl, record" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 3}, "step, rank, micro_batch, position, attempt belong to a run"),
        ({"run": "x"}, "step=None with run=x: steps of a run count from 1"),
        ({"run": "x", "step": 0}, "step=0 with run=x"),
        ({"run": "x", "step": 1, "row": 3}, "row: a place in the data, and run=x is a step of a run"),
        ({"row": 3}, "give folder=DATA_FOLDER"),
    ],
)
def test_a_trace_without_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_trace.TraceRoot(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 11}, "step 11 is not in the ledger; steps there: 1 to 10"),
        ({"step": 4, "rank": 2}, "rank=2: step 4 was done by ranks 0 to 1"),
        ({"step": 5, "rank": 1}, "rank=1: step 5 was done by ranks 0 to 0"),
        ({"step": 4, "micro_batch": 2}, "in step 4 each rank had micro batches 0 to 1"),
    ],
)
def test_what_the_run_did_not_do_is_told(run: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data_trace.show(data_trace.TraceRoot(run=str(run), **settings))


# replay


def recorded(run: Path) -> dict[int, float]:
    return {
        line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"
    }


@pytest.mark.parametrize("step", [2, 4, 5, 10])
def test_a_replay_finds_the_loss_that_the_run_recorded(run: Path, step: int) -> None:
    found = replay.replay(replay.ReplayRoot(run=str(run), step=step, device="cpu"))
    assert found.weights_step == step - 1
    assert found.recorded_loss == recorded(run)[step]
    assert found.loss == pytest.approx(found.recorded_loss, abs=1e-5)
    assert found.hash == found.ledger_hash
    assert len(found.rows) == 8


def test_documents_add_up_to_rows_and_rows_to_the_step(run: Path) -> None:
    found = replay.replay(replay.ReplayRoot(run=str(run), step=6, device="cpu"))
    for row in found.rows:
        assert sum(each.num_targets for each in row.documents) == row.num_targets
        total = sum((each.loss or 0.0) * each.num_targets for each in row.documents)
        assert total == pytest.approx(row.loss * row.num_targets)
    half = replay.replay(replay.ReplayRoot(run=str(run), step=4, rank=1, device="cpu"))
    whole = replay.replay(replay.ReplayRoot(run=str(run), step=4, device="cpu"))
    assert [row.place for row in half.rows] == [row.place for row in whole.rows[4:]]
    assert half.recorded_loss is None
    assert half.hash is None


def test_the_worst_document_comes_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay.show(replay.ReplayRoot(run=str(run), step=9, device="cpu", worst=3))
    text = capsys.readouterr().out
    found = replay.replay(replay.ReplayRoot(run=str(run), step=9, device="cpu"))
    losses = sorted((e.loss for row in found.rows for e in row.documents if e.loss is not None), reverse=True)
    assert [f"{loss:.4f}" in text for loss in losses[:3]] == [True] * 3
    assert f"and {len(losses) - 3} more with lower losses" in text
    assert "tokens: those that the run read" in text


def test_other_weights_are_said_to_be_other(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step in (6, 7):
        shutil.rmtree(copy / f"checkpoints/step-{step:08d}")
    found = replay.replay(replay.ReplayRoot(run=str(copy), step=8, device="cpu"))
    assert found.weights_step == 5
    assert "the weights are those of step 5, not of step 7" in caplog.text
    assert found.loss != pytest.approx(found.recorded_loss, abs=1e-5)
    assert replay.replay(replay.ReplayRoot(run=str(copy), step=1, device="cpu")).weights_step == 1
    assert "the weights are those of step 1, not of step 0, and have seen these rows" in caplog.text
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no finished checkpoint in .* checkpoint=FOLDER"):
        replay.replay(replay.ReplayRoot(run=str(copy), step=1, device="cpu"))


def rolled_back(run: Path, into: Path, *, first: int, last: int) -> Path:
    """A copy of the run's folder whose ledger says that it went back behind step 4 after step 6, and did
    steps 5 and 6 again without those rows."""
    shutil.copytree(run, into)
    path = into / LEDGER_NAME
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if line["kind"] == "attempt" or line["step"] <= 6]
    start = next(line for line in kept if line["kind"] == "attempt" and line["attempt"] == 2)
    kept.append(start | {"part": 1, "step": 4, "position": 32, "skipped": [[first, last]]})
    passed_over, position = PassedOver.of([(first, last)]), 32
    for step in (5, 6):
        spans = passed_over.spans(position, 8)
        position = spans[-1][1] + 1
        entry = {"attempt": 2, "part": 1, "step": step, "first": spans[0][0], "last": spans[-1][1]}
        kept.append({"kind": "step", "hash": "0" * 16, **entry})
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return into


def replayed(run: Path, **settings: Any) -> replay.Replayed:
    return replay.replay(replay.ReplayRoot(run=str(run), device="cpu", **settings))


def test_a_step_that_was_rolled_back_can_be_picked_by_a_row_or_an_attempt(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = rolled_back(run, tmp_path / "run", first=40, last=47)
    newest = replayed(other, step=6)
    assert [row.place.position for row in newest.rows] == list(range(48, 56))
    assert newest.recorded_loss is None, "no record says that a step 6 ended there"
    spiked = replayed(other, step=6, position=44)
    assert [row.place.position for row in spiked.rows] == list(range(40, 48))
    assert spiked.recorded_loss == recorded(run)[6]
    assert spiked.loss == pytest.approx(spiked.recorded_loss, abs=1e-5)
    assert spiked.hash == spiked.ledger_hash
    assert not caplog.records
    first = replayed(other, step=4, attempt=1)
    assert [row.place.position for row in first.rows] == list(range(24, 32))
    with pytest.raises(DataError, match="step 6, position 60 is not in the ledger"):
        replayed(other, step=6, position=60)


def test_rows_that_a_step_passed_over_are_not_replayed(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = rolled_back(run, tmp_path / "run", first=36, last=37)
    found = replayed(other, step=5)
    assert [row.place.position for row in found.rows] == [32, 33, 34, 35, 38, 39, 40, 41]
    assert [row.place.micro_batch for row in found.rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not caplog.records
    found = replayed(other, step=6)
    assert [row.place.position for row in found.rows] == list(range(42, 50))
    assert "the weights of step 5 have seen other rows than those of attempt 2 had" in caplog.text


def test_the_loss_of_a_step_without_a_record_is_its_events(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if (line["kind"], line["step"]) != ("step", 6)]
    spike = {"kind": "event", "what": "spike", "step": 6, "attempt": 2, "time": 0.0, "first": 40, "last": 47}
    spike |= {"quantity": "loss", "value": 7.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, spike]))
    assert replayed(copy, step=6).recorded_loss == 7.5
    diverged = {"kind": "event", "what": "diverged", "step": 6, "attempt": 2, "time": 0.0, "loss": 8.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, diverged]))
    assert replayed(copy, step=6).recorded_loss == 8.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replayed(copy, step=6).recorded_loss is None


# inspect ledger


def test_the_ledger_proves_the_chain_and_its_tokens_can_be_read_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_ledger.show(inspect_ledger.InspectLedgerConfig(run=str(run), recompute=True))
    text = capsys.readouterr().out
    assert "steps 1 to 10 took rows 0 to 79, each once" in text
    assert "10 steps were read again and compared" in text
    inspect_ledger.show(
        inspect_ledger.InspectLedgerConfig(run=str(run), recompute=True, last=3, format=OutputFormat.json)
    )
    told = shown(capsys)
    assert told["num_steps"] == 10
    assert told["num_rows"] == 80
    assert told["num_recomputed"] == 3
    assert [attempt["world_size"] for attempt in told["attempts"]] == [2, 1]


def changed(run: Path, into: Path, step: int, **fields: Any) -> Path:
    """A copy of the run's folder whose ledger says something else of a step; None takes the line out."""
    shutil.copytree(run, into, ignore=shutil.ignore_patterns("checkpoints"))
    lines = []
    for line in (into / LEDGER_NAME).read_text().splitlines():
        value = json.loads(line)
        if value["kind"] == "step" and value["step"] == step:
            if not fields:
                continue
            value |= fields
        lines.append(json.dumps(value) + "\n")
    (into / LEDGER_NAME).write_text("".join(lines))
    return into


@pytest.mark.parametrize(
    ("fields", "recompute", "message"),
    [
        ({"hash": "0" * 16}, True, "the ledger says 0000000000000000"),
        ({"first": 17}, False, "step 3 of attempt 1 took rows 17 to 23; next was step 3 with rows 16 to 23"),
        ({}, False, "step 4 of attempt 1 took rows 24 to 31; next was step 3 with rows 16 to 23"),
    ],
)
def test_a_ledger_that_does_not_fit_fails(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    recompute: bool,
    message: str,
) -> None:
    other = changed(run, tmp_path / "run", 3, **fields)
    with pytest.raises(SystemExit, match="1"):
        inspect_ledger.show(inspect_ledger.InspectLedgerConfig(run=str(other), recompute=recompute))
    assert message in capsys.readouterr().out


def test_a_replay_of_other_tokens_fails(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(run, tmp_path / "run", 3, hash="0" * 16)
    cfg = replay.ReplayRoot(
        run=str(other), step=3, device="cpu", checkpoint=str(run / "checkpoints/step-00000002")
    )
    with pytest.raises(SystemExit, match="1"):
        replay.show(cfg)
    assert "NOT those that the run read" in capsys.readouterr().out


def test_a_run_whose_data_changed_is_not_traced(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("weight: 3", "weight: 2"))
    with pytest.raises(DataError, match=r"the data is not what .* read last"):
        data_trace.show(data_trace.TraceRoot(run=str(copy), step=2))
    config.unlink()
    with pytest.raises(DataError, match="give the folder of a run"):
        data_trace.show(data_trace.TraceRoot(run=str(copy), step=2))
