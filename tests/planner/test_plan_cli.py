"""`llmtrain plan` as a user types it, and what it costs to import."""

import subprocess
import sys

import forked
import pytest
import yaml

from llmtrain.files import plain
from llmtrain.planner.plan import read_plan
from llmtrain.planner.runs import differences


def plan_verb(*arguments, cwd):
    return forked.verb("plan", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    done = plan_verb("budget.gpu_hours=100", "cluster=h100_sxm_8x", "name=trial", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_prints_the_plan_and_where_it_lies(finished):
    _, text = finished
    assert "PLAN trial" in text
    assert "besiroglu2024 *" in text
    assert "written: plans/experiment/trial.yaml, plans/trial.plan.html, plans/trial.plan.json" in text
    assert "llmtrain train --config-dir plans +experiment=trial" in text


def test_it_leaves_only_its_three_files(finished):
    folder, _ = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"plans/experiment/trial.yaml", "plans/trial.plan.json", "plans/trial.plan.html"}


def test_experiment_and_plan_file_agree(finished):
    folder, _ = finished
    plan = read_plan(folder / "plans/trial.plan.json")
    text = (folder / "plans/experiment/trial.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    experiment = yaml.safe_load(text)
    assert experiment["run"] == {"name": "trial", "plan": "plans/trial.plan.json"}
    assert experiment["train"]["total_tokens"] == plan.choice.total_tokens
    assert experiment["train"]["global_batch_rows"] == plan.choice.global_batch_rows
    assert experiment["data"]["seq_len"] == plan.choice.seq_len
    assert experiment["optimizer"]["peak_lr"] == plan.choice.peak_lr
    assert experiment["model"] == plain(plan.choice.model), "all of it, or the default model shows through"


def test_train_takes_the_experiment_as_it_is(finished):
    folder, _ = finished
    command = [sys.executable, "-m", "llmtrain.cli.main", "train"]
    composed = subprocess.run(
        [*command, "--config-dir", "plans", "+experiment=trial", "--cfg", "job"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert composed.returncode == 0, composed.stderr
    plan = read_plan(folder / "plans/trial.plan.json")
    job = yaml.safe_load(composed.stdout)
    assert job["model"]["d_model"] == plan.choice.model.d_model
    assert job["train"]["micro_batch_rows"] == plan.choice.micro_batch_rows
    assert job["run"]["plan"] == "plans/trial.plan.json"
    assert job["parallel"]["world_size"] == plan.choice.layout.world_size
    assert job["parallel"]["zero_stage"] == plan.choice.layout.zero_stage
    assert differences(plan, job, world_size=None) == [], "as planned, in every setting"


def test_a_sweep_writes_each_plan_into_its_own_folder(tmp_path):
    done = plan_verb(
        "-m", "budget.flops=1e19,1e20", "cluster=a100_sxm_80gb_8x", "hydra.sweep.dir=swept", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    budgets = [read_plan(tmp_path / f"swept/{job}/planned.plan.json").budget_flops for job in (0, 1)]
    assert budgets == [pytest.approx(flops, rel=0.02) for flops in (1e19, 1e20)]  # whole steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cluster=h100_sxm_8x",), "error: nothing says how large the run is; give one of budget.flops"),
        (("budget.flop=1",), "error: unknown setting 'budget.flop'; did you mean 'budget.flops'?"),
        (
            ("budget.flops=1e18", "cluster=h100_sxm_8"),
            "unknown option of cluster 'h100_sxm_8'; did you mean 'h100_sxm_8x'?",
        ),
        (("budget.flops=1e18", "cluster=custom"), "error: cluster=custom without cluster.gpu needs cluster."),
        (("budget.flops=1e18", "name=a/b"), "error: name='a/b' must be a file name without spaces"),
        (("budget.tokens=7GB",), "error: budget.tokens=7GB: 'GB' belongs to a size in bytes"),
        (
            ("budget.usd=5k", "cluster=h100_sxm_8x"),
            "error: budget.usd=5k needs a price; give cluster.price_usd",
        ),
        (
            ("budget.flops=1e18", "plan.law=besirogl0"),
            "unknown law 'besirogl0'; did you mean 'besiroglu2024'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, arguments, message):
    done = plan_verb(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*")), "nothing is written"


def test_a_plan_for_another_program_has_no_experiment(tmp_path):
    done = plan_verb("budget.flops=1e20", "cluster=h100_sxm_8x", "plan.program=megatron", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no experiment was written: the plan is for megatron, which `llmtrain train` is not" in done.stdout
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"plans/planned.plan.json", "plans/planned.plan.html"}


def processor_s(statement):
    """Seconds of the processor that an import takes in a fresh process, the best of three."""
    program = f"import time; begin = time.process_time(); {statement}; print(time.process_time() - begin)"
    spent = [
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        )
        for _ in range(3)
    ]
    return min(spent)


def test_the_planner_imports_in_a_few_times_what_numpy_takes():
    # 0.08 s are numpy's on a quiet machine, and 0.2 s are promised; `llmtrain bench planner` has the seconds
    assert processor_s("import llmtrain.planner.report") < 4 * processor_s("import numpy")
