"""What a resume may change, and settings that nothing reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
from data_folder import Finished, train_arguments
from omegaconf import OmegaConf

from llmtrain import files
from llmtrain.checkpoint.find import list_checkpoints
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.errors import EXIT_FAILED, ConfigError
from llmtrain.tracking.metrics import read_metrics
from llmtrain.tracking.run_events import told
from llmtrain.train.changes import CLASSES, DATA_HASH, NUM_RANKS, SAFE, Change, compare, sentences
from llmtrain.train.config import TrainRoot
from llmtrain.train.settings import by_name, defaults
from llmtrain.train.unread import ROWS, refuse_unread, unread, unread_names

if TYPE_CHECKING:
    from conftest import Launcher

TIMES = {"time", "tokens_per_s", "step_s", "data_wait_s", "mem_gib", "eval_s"}
"""Fields of metrics.jsonl that no two runs share."""


def configured(*overrides: str) -> TrainRoot:
    """A whole config, with some settings as they are typed."""
    arguments = train_arguments(Path("data"), Path("run"), *overrides)[1:]
    quoted = [each.removeprefix("+").replace("=off", "='off'") for each in arguments]  # Hydra knows, YAML not
    typed = OmegaConf.from_dotlist(quoted)
    root = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainRoot), typed))
    assert isinstance(root, TrainRoot)
    return root


def state_of(*overrides: str, **own: Any) -> dict[str, Any]:
    """What a checkpoint of such a run would store."""
    config = json.loads(json.dumps(files.plain(configured(*overrides))))
    return {"config": config, "data_hash": "a", "world_size": 1, "position": 64, **own}


def changes(state: dict[str, Any], *overrides: str, data_hash: str = "a") -> dict[str, Change]:
    found = compare(configured(*overrides), step=8, state=state, data_hash=data_hash, num_ranks=1)
    return {each.name: each.change for each in found}


# the comparison


def test_every_setting_has_a_class_and_every_class_a_setting() -> None:
    assert set(CLASSES) == set(defaults()), "give a new setting its class in llmtrain/train/changes.py"


def test_the_same_config_changes_nothing() -> None:
    assert changes(state_of()) == {}


@pytest.mark.parametrize(
    ("override", "name", "change"),
    [
        ("tracking.log_every_steps=3", "tracking.log_every_steps", Change.safe),
        ("data.prefetch_steps=0", "data.prefetch_steps", Change.safe),
        ("data.folder=elsewhere", "data.folder", Change.safe),
        ("train.micro_batch_rows=4", "train.micro_batch_rows", Change.layout),
        ("parallel.tp_size=2", "parallel.tp_size", Change.layout),
        ("optimizer.peak_lr=0.5", "optimizer.peak_lr", Change.trajectory),
        ("train.batch_ramp=[{until_tokens: 512, rows: 2}]", "train.batch_ramp", Change.trajectory),
        ("model.d_model=64", "model.d_model", Change.forbidden),
        ("run.seed=1", "run.seed", Change.forbidden),
        ("optimizer.kind=muon", "optimizer.kind", Change.forbidden),
    ],
)
def test_a_change_is_found_with_its_class(override: str, name: str, change: Change) -> None:
    assert changes(state_of(), override) == {name: change}
    assert changes(state_of(override)) == {name: change}, "and back"


def test_a_change_of_what_nothing_reads_changes_nothing() -> None:
    assert changes(state_of(), "optimizer.momentum=0.5") == {"optimizer.momentum": Change.safe}
    muon = "optimizer.kind=muon"
    assert changes(state_of(muon), muon, "optimizer.momentum=0.5") == {
        "optimizer.momentum": Change.trajectory
    }


def test_other_data_is_forbidden_until_it_is_accepted() -> None:
    assert changes(state_of(), data_hash="b") == {DATA_HASH: Change.forbidden}
    accepted = changes(state_of(), "data.accept_changed=true", data_hash="b")
    assert accepted == {"data.accept_changed": Change.safe, DATA_HASH: Change.trajectory}
    assert changes(state_of(), "data.seq_len=64", data_hash="b") == {"data.seq_len": Change.forbidden}


def test_other_ranks_are_a_layout() -> None:
    assert changes(state_of(world_size=4)) == {NUM_RANKS: Change.layout}


def test_a_setting_of_another_llmtrain_counts_as_its_default_or_is_told() -> None:
    older = state_of()
    del older["config"]["train"]["dropout"]
    assert changes(older) == {}
    assert changes(older, "train.dropout=0.1") == {"train.dropout": Change.trajectory}
    older["config"]["train"]["z_loss"] = 1e-4
    [gone] = compare(configured(), step=8, state=older, data_hash="a")
    assert (gone.name, gone.old, gone.new, gone.change) == ("train.z_loss", 1e-4, None, Change.trajectory)


def test_what_is_forbidden_is_told_with_both_values_and_what_to_do() -> None:
    found = compare(
        configured("model.d_model=64", "run.seed=1", "optimizer.kind=muon"),
        step=8,
        state=state_of(),
        data_hash="b",
    )
    told = sentences(found, Change.forbidden)
    assert len(told) == 4
    assert "run.seed=1, but step 8 was trained with 0; a resume cannot change it: set it back, or" in told[0]
    assert "model.d_model=64, but step 8 was trained with 32" in told[1]
    assert "the checkpoint has the state of the other optimizer" in told[2]
    assert "set data.accept_changed=true to go on with what is there now" in told[3]


def test_settings_by_name_keep_what_belongs_together() -> None:
    config = files.plain(configured("train.batch_ramp=[{until_tokens: 512, rows: 2}]"))
    named = by_name(config | {"old": {"part": {"x": 1}}})
    assert named["train.batch_ramp"] == [{"until_tokens": 512, "rows": 2}]
    assert named["parallel.deepspeed"] == {}
    assert named["old.part.x"] == 1
    assert set(named) == {*defaults(), "old.part.x"}


OTHER_PREFLIGHT = {
    "preflight.idle_nodes": "true",
    "preflight.max_clock_skew_s": "5",
    "preflight.max_lookup_s": "5",
    "preflight.min_free_gib": "0.01",
    "preflight.min_free_inodes": "9",
    "preflight.min_shared_memory_mib": "1",
    "preflight.max_gpu_celsius": "80",
    "preflight.max_gpu_used_gib": "5",
    "preflight.max_gpu_memory_errors": "1",
    "preflight.storage_mib": "1",
    "preflight.storage_s": "0.1",
    "preflight.min_storage_mb_per_s": "0.01",
    "preflight.all_reduce_mib": "1",
    "preflight.network_s": "1",
    "preflight.min_bus_gb_per_s": "0.000001",
    "preflight.slow_ratio": "9",
    "preflight.answer_s": "60",
}
OTHER_VALUES = {
    "run.name": "other",
    "run.fallback": "true",
    "run.time_limit_s": "3600",
    "run.leave_before_s": "1",
    "run.max_same_failures": "0",
    "data.verify": "touch",
    "data.prefetch_steps": "0",
    "data.accept_changed": "true",
    "train.eval_every_steps": "5",
    "train.eval_rows": "3",
    "train.process_group_timeout_s": "90",
    "train.start_up_silence_s": "3",
    "train.hang_timeout_s": "30",
    "train.straggler_slower_than": "0.5",
    "train.device_peak_tflops": "1",
    "train.device_peak_source": "guess",
    "tracking.log_every_steps": "3",
    "tracking.wandb": "offline",
    "tracking.wandb_project": "other",
    "tracking.wandb_entity": "other",
    "tracking.wandb_group": "other",
    "tracking.wandb_job_type": "other",
    "tracking.wandb_tags": "[other]",
    "tracking.wandb_node_metrics": "true",
    "tracking.wandb_init_timeout_s": "7",
    "tracking.wandb_finish_timeout_s": "7",
    "save.every_steps": "3",
    "save.in_background": "true",
    "save.memory_every_steps": "2",
    "save.exit_wait_s": "60",
    "save.check_loss": "false",
    "save.keep_last": "1",
    "save.keep_every_tokens": "512",
    "save.keep_best": "1",
    "verify.ranks": "1",
    "verify.max_ranks": "2",
    "verify.num_steps": "2",
    "verify.timeout_s": "5",
    "verify.folder": "nowhere",
    "verify.certificate": "nowhere",
    "preflight.enabled": "true",
    **OTHER_PREFLIGHT,
}
"""Settings that change no number, each with another value than the run `finished` had."""
ELSEWHERE = {
    "check_only": "starts nothing",
    "run.folder": "the test's own",
    "run.intent": "the test's own",
    "run.init_from": "for warm starts only",
    "run.plan": "tests/tracking/test_against_plan.py",
    "save.folder": "tests/train/test_resume.py",
    "save.memory_folder": "the test's own",
    "verify.required": "tests/train/test_verify.py",
}
"""Those that this test leaves out, and why."""


def test_all_safe_settings_at_once_change_no_loss(
    finished: Finished, launcher: Launcher, tmp_path: Path
) -> None:
    assert OTHER_VALUES.keys() | ELSEWHERE.keys() == set(SAFE.split())
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    for later in list_checkpoints(run / "checkpoints"):
        if later > 4:
            shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")
    memory = tmp_path / "memory"
    memory.mkdir()
    others = [f"{name}={value}" for name, value in OTHER_VALUES.items()]
    status, text = launcher.run(
        [
            *finished.arguments,
            *others,
            *(f"run.folder={run}", "run.intent=resume", f"save.memory_folder={memory}"),
        ]
    )
    assert status == 0, text
    assert losses(run) == losses(finished.folder)


def losses(run: Path) -> dict[int, float]:
    return {
        line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"
    }


# what nothing reads


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["schedule.decay_shape=sqrt"],
            "schedule.decay_shape=sqrt is read by nothing with schedule.kind=cosine; it counts with "
            "schedule.kind=wsd: set that, or leave schedule.decay_shape out",
        ),
        (["optimizer.momentum=0.9"], "it counts with optimizer.kind=muon"),
        (["save.memory_folder=/tmp"], "it counts with save.memory_every_steps=50"),
        (["data.block_rows=64"], "with 0 entries in data.sources; it counts with two or more data.sources"),
        (
            ["parallel.engine=accelerate", "parallel.deepspeed={steps_per_print: 5}"],
            "parallel.engine=deepspeed",
        ),
        (
            [
                "data.folder=null",
                "data.sources={a: {folder: a, weight: 2}}",
                "data.stages=[{from_tokens: 0, weights: {a: 1}}]",
            ],
            "data.sources.a.weight=2.0 is read by nothing with 1 entries in data.stages",
        ),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_unread(configured(*overrides))
    assert message in str(caught.value)


def test_a_default_counts_as_set_only_on_the_command_line() -> None:
    cfg = configured()
    assert unread(cfg) == []
    [told] = unread(cfg, given={"schedule.decay_shape", "schedule.floor_ratio"})
    assert "schedule.decay_shape=linear is read by nothing with schedule.kind=cosine" in told


def test_every_row_names_settings_and_a_way_out() -> None:
    for row in ROWS:
        assert {*row.names, *row.decided_by} <= defaults().keys()
        name, _, value = row.live.partition(" ")[0].rstrip(",").partition("=")
        if value:
            assert name == row.decided_by[0]
            others = [defaults()[each] for each in row.decided_by[1:]]
            assert row.is_read(yaml_value(value), *others), row


def yaml_value(text: str) -> Any:
    return OmegaConf.to_object(OmegaConf.from_dotlist([f"x={text}"]))["x"]  # type: ignore[index,call-overload]


UNREAD_HERE = {
    "schedule.decay_shape": "sqrt",
    "optimizer.momentum": "0.5",
    "train.recompute": "selective",
    "train.start_up_silence_s": "1",
    "tracking.wandb_project": "x",
    "tracking.wandb_entity": "y",
    "tracking.wandb_group": "z",
    "tracking.wandb_job_type": "z",
    "tracking.wandb_tags": "[z]",
    "tracking.wandb_node_metrics": "true",
    "tracking.wandb_init_timeout_s": "1",
    "tracking.wandb_finish_timeout_s": "1",
    "save.memory_folder": "/nowhere",
    "save.exit_wait_s": "1",
    "parallel.pp_schedule": "dual_pipe_v",
    "parallel.sequence_parallel": "true",
    "parallel.context": "sequence",
    "+parallel.deepspeed": "{prescale_gradients: true}",
    "data.on_exhausted": "redistribute",
    "data.block_rows": "7",
    "data.objective.fim_rate": "0.9",
    "data.objective.spm_rate": "0.9",
    "data.objective.mask_rate": "0.9",
    "data.objective.span_rate": "0.9",
    "data.objective.mean_span_tokens": "2",
    "spikes.loss_z": "1",
    "spikes.grad_norm_z": "1",
    "spikes.window_steps": "200",
    "spikes.warmup_steps": "20",
    "spikes.budget": "1",
    "spikes.budget_steps": "9",
    "spikes.cooldown_steps": "1",
    "spikes.rollback_checkpoints": "2",
    "spikes.rollback_steps_before": "3",
    **OTHER_PREFLIGHT,
}
UNREAD_THERE = {"schedule.floor_ratio": "0.5", "model.rope_theta": "500", "data.block_rows": "7"}
"""In the other pair of runs, of those that are not in UNREAD_HERE."""


def test_nothing_reads_what_is_refused(data: Path, tmp_path: Path) -> None:
    """Two runs without and two with other values of everything that is refused: what they write is the
    same."""
    here = ["parallel.engine=accelerate", "parallel.zero_stage=0", "save.in_background=false"]
    here += ["parallel.world_size=1", "spikes.on_spike=ignore", "preflight.enabled=false"]
    stages = "[{from_tokens: 0, weights: {a: 1}}]"
    there = [*here[:-2], "model.family=gpt2", "model.max_positions=32", "schedule.kind=constant"]
    there += ["data.folder=null", f"data.stages={stages}"]
    one, other = (f"+data.sources={{a: {{folder: {data}{more}}}}}" for more in ("", ", weight: 3"))
    cases = {
        "here": (here, []),
        "here-set": (here, [f"{name}={value}" for name, value in UNREAD_HERE.items()]),
        "there": ([*there, one], []),
        "there-set": ([*there, other], [f"{name}={value}" for name, value in UNREAD_THERE.items()]),
    }
    refused = {name for key in ("here-set", "there-set") for name in unread_names(configured(*cases[key][0]))}
    assert refused == {name for row in ROWS for name in row.names}, "set a new row's settings here as well"
    assert {name.removeprefix("+") for name in UNREAD_HERE} | UNREAD_THERE.keys() == refused
    for key in ("here-set", "there-set"):
        told = unread(configured(*cases[key][0], *cases[key][1]))
        num_set = len(UNREAD_HERE) if key == "here-set" else len(UNREAD_THERE) + 1  # a source's weight
        assert len(told) == num_set
    lists = [
        train_arguments(data, tmp_path / name, "train.total_tokens=1024", *fixed, *free)
        for name, (fixed, free) in cases.items()
    ]
    done = forked.script(Path(__file__).with_name("unread_worker.py"), json.dumps(lists))
    assert done.stdout.split() == ["0"] * 4, done.stderr
    for name in ("here", "there"):
        assert written(tmp_path / name) == written(tmp_path / f"{name}-set")


def written(run: Path) -> dict[str, Any]:
    """What a run left, without times and without its config."""
    lines = [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(run / "metrics.jsonl")
        if line["kind"] in ("step", "eval")
    ]
    tensors = {}
    for step in list_checkpoints(run / "checkpoints"):
        reader = CheckpointReader(run / "checkpoints" / f"step-{step:08d}")
        for kind in reader.kinds:
            for name in reader.shapes(kind):
                tensors[step, kind, name] = reader.read(kind, name).tobytes()
    names = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if ".tmp" not in path.name)
    return {"lines": lines, "tensors": tensors, "ledger": ledger(run), "files": names}


def ledger(run: Path) -> list[str]:
    return [line for line in (run / "ledger.jsonl").read_text().splitlines() if '"kind": "step"' in line]


# in a run


def test_a_check_shows_what_a_resume_changes(finished: Finished) -> None:
    status, text = check(
        finished,
        *("train.micro_batch_rows=4", "optimizer.peak_lr=0.5", "tracking.log_every_steps=5"),
    )
    assert status == 0, text
    assert (
        "warning  resuming with optimizer.peak_lr=0.5, which was 0.01: losses from here on may differ" in text
    )
    assert "ok       resuming with train.micro_batch_rows=4, which was 2: the same numbers" in text
    assert "run.intent fresh -> resume" in text
    assert "tracking.log_every_steps 10 -> 5" in text


def test_everything_forbidden_is_named_at_once(finished: Finished) -> None:
    status, text = check(finished, "model.d_model=64", "run.seed=3", "optimizer.kind=muon")
    assert status == EXIT_FAILED
    for name in ("model.d_model=64", "run.seed=3", "optimizer.kind=muon"):
        assert f"{name}, but step 12 was trained with" in text


@pytest.mark.parametrize("mode", ["check_only=true", "check_only=false"])
def test_a_default_on_the_command_line_that_nothing_reads_is_refused(finished: Finished, mode: str) -> None:
    given = ["schedule.decay_shape=linear", "optimizer={momentum: 0.95}"]
    done = forked.verb(*finished.arguments, "run.folder=nowhere", *given, mode)
    assert done.returncode == EXIT_FAILED
    assert "schedule.decay_shape=linear is read by nothing with schedule.kind=cosine" in done.stderr
    assert "optimizer.momentum=0.95 is read by nothing with optimizer.kind=adamw" in done.stderr
    assert not Path("nowhere").exists()


def test_a_resume_records_what_changed(finished: Finished, launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    arguments = [*finished.arguments, f"run.folder={run}", "run.intent=resume"]
    changed = ["optimizer.peak_lr=0.5", "train.micro_batch_rows=4", "tracking.log_every_steps=5"]
    status, text = launcher.run([*arguments, *changed])
    assert status == 0, text
    assert "WARNING resuming with optimizer.peak_lr=0.5, which was 0.01" in text
    events = [line for line in read_metrics(run / "metrics.jsonl") if line.get("what") == "config_changed"]
    assert [(event["step"], event["changes"]) for event in events] == [
        (
            8,
            [
                {"name": "train.micro_batch_rows", "old": 2, "new": 4, "change": "layout"},
                {"name": "optimizer.peak_lr", "old": 0.01, "new": 0.5, "change": "trajectory"},
            ],
        )
    ]
    assert told(events[0]).line == (
        "settings changed at the resume: train.micro_batch_rows 2 -> 4 (layout), "
        "optimizer.peak_lr 0.01 -> 0.5 (trajectory)"
    )
    parent = CheckpointReader(run / "checkpoints" / "step-00000012").state["parent"]
    assert parent["changed"]["optimizer.peak_lr"] == [0.01, 0.5]


def test_a_change_of_the_layout_is_refused_where_the_bits_are_promised() -> None:
    level, other = "train.determinism=bitwise", "train.micro_batch_rows=4"
    assert changes(state_of(level), level, other) == {"train.micro_batch_rows": Change.forbidden}
    assert changes(state_of(), level, other) == {
        "train.micro_batch_rows": Change.layout,
        "train.determinism": Change.layout,
    }
    assert changes(state_of(level), other)["train.micro_batch_rows"] is Change.layout
    [ranks] = compare(configured(level), step=8, state=state_of(level), data_hash="a", num_ranks=2)
    assert ranks.change is Change.forbidden
    assert "ranks=2, but step 8 was trained with 1, and train.determinism=bitwise promises" in ranks.text


def check(finished: Finished, *overrides: str) -> tuple[int, str]:
    done = forked.verb(*finished.arguments, "run.intent=resume", *overrides, "check_only=true")
    return done.returncode, done.stdout + done.stderr
