"""`llmtrain submit`: whose words are whose, what is refused before Slurm hears of it, what Slurm is given."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_folder import train_arguments, write_data_folder
from hydra import initialize_config_dir

from llmtrain.cli import submit as cli
from llmtrain.cli.compose import conf_folder
from llmtrain.cli.submit import SubmitRoot, Words, split
from llmtrain.errors import ConfigError, LaunchError
from llmtrain.launch import submit as slurm
from llmtrain.launch.config import ContainerConfig, ContainerKind, SlurmConfig
from llmtrain.launch.sbatch import Job

COMMAND = [sys.executable, "-c", "from llmtrain.cli.submit import main; main()"]
SBATCH = """#!{python}
import json, os, sys
with open({record!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
print(os.environ.get("ANSWER", "77"))
print("would start now", file=sys.stderr)
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An sbatch that tells how it was called, alone on PATH; calls() lists (arguments, environment)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    record = tmp_path / "record.jsonl"
    (tools / "sbatch").write_text(SBATCH.format(python=sys.executable, record=str(record)))
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))

    def calls():
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    return calls


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own as the current one, with Hydra ready to compose."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        yield folder


@pytest.fixture
def asked(monkeypatch):
    """What the verbs are asked, with a yes for an answer."""
    questions = []
    monkeypatch.setattr(
        cli, "_ask_the_verb", lambda words, **environment: questions.append((words, environment))
    )
    return questions


def run(*arguments, **settings):
    """`llmtrain submit ARGUMENTS` with `settings` of slurm."""
    words, own = split(arguments)
    assert own == []
    cli.run(SubmitRoot(slurm=SlurmConfig(**settings)), words=words)


DEMO = ("train", "+experiment=demo")


def test_words_that_begin_with_slurm_are_of_the_job_and_others_of_the_verb():
    words, own = split(
        ["train", "+experiment=x", "slurm=aws_p5", "slurm.nodes=2", "+slurm.environment.A=1", "~slurm.after",
         "engine.slurm.cores=2", "slurmish=1", "run.name=slurm.nodes=3", "--dry-run", "--config-dir", "mine",
         "slurm.job_name=a\nb"]
    )  # fmt: skip
    assert words == Words(
        "train",
        ["+experiment=x", "engine.slurm.cores=2", "slurmish=1", "run.name=slurm.nodes=3"],
        ["--config-dir", "mine"],
        is_sweep=False,
    )
    assert own == [
        "--config-dir", "mine", "slurm=aws_p5", "slurm.nodes=2", "+slurm.environment.A=1", "~slurm.after",
        "slurm.dry_run=true", "slurm.job_name=a\nb",
    ]  # fmt: skip


def test_flags_are_known_in_both_their_forms():
    words, own = split(["train", "-m", "--config-dir=mine", "--cfg", "job", "x=1,2"])
    assert words == Words("train", ["x=1,2"], ["--config-dir=mine"], is_sweep=True)
    assert own == ["--cfg", "job", "--config-dir=mine"]
    assert split(["--help"]) == (Words(None, [], [], is_sweep=False), ["--help"])
    assert split(["train", "x=1", "--multirun"])[0].is_sweep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tran",), "unknown verb to submit 'tran'; did you mean 'train'?"),
        ((), "`llmtrain submit` needs a verb first, one of train, data, evaluate; as in `llmtrain submit"),
        ((*DEMO, "--wait"), "`llmtrain submit` takes no --wait; it knows --dry-run, -m and --config-dir DIR"),
        (
            (*DEMO, "cluster=p5_48xlarge"),
            "cluster=p5_48xlarge: cluster is of `llmtrain plan`; a site of Slurm is",
        ),
        (("train", "run.name=x"), "no value for optimizer.peak_lr, "),
        (("data", "-m", "x=1,2"), "-m sweeps over runs of `train`, and data is one; submit each by itself"),
        ((*DEMO, "-m", "run.intent=fresh,resume"), "a sweep over run.intent: its jobs could not start again"),
        ((*DEMO, "run.name=a b"), "slurm.log_folder='"),
    ],
)
def test_what_cannot_be_submitted_is_refused(here, asked, sbatch, arguments, message):
    with pytest.raises(ConfigError) as caught:
        run(*arguments)
    assert str(caught.value).startswith(message)
    assert sbatch() == []
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("wanted", "settings", "message"),
    [
        (
            16,
            {},
            "parallel.world_size=16, but slurm.nodes * slurm.gpus_per_node = 1 * 8 = 8; set slurm.nodes=2, "
            "or plan for what there is",
        ),
        (12, {"nodes": 2}, "slurm.nodes * slurm.gpus_per_node = 2 * 8 = 16; change slurm.gpus_per_node, or"),
        (
            4,
            {"gpus_per_node": 0, "cpu_ranks_per_node": 2},
            "slurm.cpu_ranks_per_node = 1 * 2 = 2; set slurm.nodes=2",
        ),
    ],
)
def test_a_plan_for_another_number_of_ranks_is_refused(here, asked, sbatch, wanted, settings, message):
    with pytest.raises(ConfigError) as caught:
        run(*DEMO, f"parallel.world_size={wanted}", **settings)
    assert message in str(caught.value)
    assert asked == []
    assert sbatch() == []


def test_a_plan_for_this_number_of_ranks_is_taken_and_checked_for_it(here, asked, sbatch):
    run(*DEMO, "parallel.world_size=16", nodes=2)
    assert asked == [
        (["train", "+experiment=demo", "parallel.world_size=16", "check_only=true"], {"WORLD_SIZE": "16"})
    ]
    assert len(sbatch()) == 2


def test_other_verbs_have_one_process(here, asked, sbatch):
    with pytest.raises(ConfigError, match=r"slurm\.nodes=2, and `llmtrain data` is one process; set slurm"):
        run("data", "corpus=python_docs", nodes=2)


def test_slurm_is_first_asked_and_then_given_the_same_file(here, asked, sbatch, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/own.conf")
    run(*DEMO, nodes=2, partition="gpu")
    (first, second) = sbatch()
    script = here / "runs/demo/slurm/train.sbatch"
    assert first[0] == ["--test-only", str(script)]
    assert second[0] == ["--parsable", str(script)]
    assert "SLURM_JOB_ID" not in second[1]
    assert second[1]["SLURM_CONF"] == "/etc/own.conf"
    text = script.read_text()
    assert "#SBATCH --job-name=demo\n" in text
    assert f"#SBATCH --output={here}/runs/demo/slurm/%j.out\n" in text
    said = capsys.readouterr().out
    for line in (
        f"script    {script}",
        "slurm     would start now",
        "job       77",
        f"logs      {here}/runs/demo/slurm/77.out",
        f"follow    tail -F {here}/runs/demo/slurm/77.out {here}/runs/demo/slurm/77.0.out",
        "queue     squeue --jobs=77",
        "requeue   scancel --batch --signal=USR1 77",
        "cancel    scancel 77",
        "after it  llmtrain submit evaluate ... slurm.after=[77]",
    ):
        assert line in said


def test_a_dry_run_prints_the_script_and_leaves_nothing(here, asked, sbatch, capsys):
    run(*DEMO, dry_run=True)
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n# Written by `llmtrain submit train`")
    assert sbatch() == []
    assert not list(here.iterdir())


def test_a_sweep_is_one_array_with_a_checked_folder_for_each_run(here, asked, sbatch, capsys):
    run(
        *DEMO,
        "-m",
        "optimizer.peak_lr=1e-3,2e-3",
        "run.folder='runs/it\\'s'",
        max_array_tasks=1,
        log_folder="logs",
    )
    folders = [word for words, _ in asked for word in words if word.startswith("run.folder='runs/it\\'s/")]
    assert folders == ["run.folder='runs/it\\'s/0'", "run.folder='runs/it\\'s/1'"]
    text = (here / "logs/train.sbatch").read_text()
    assert "#SBATCH --array=0-1%1" in text
    assert "optimizer.peak_lr=0.001" in text
    assert "optimizer.peak_lr=0.002" in text
    assert "job       77, 2 runs" in capsys.readouterr().out


def test_a_job_that_waits_for_others_is_checked_when_it_starts(here, asked, sbatch, capsys):
    run(*DEMO, after=[5, 6])
    assert asked == []
    assert "only the config: the rest when the job starts" in capsys.readouterr().err
    assert "#SBATCH --dependency=afterok:5:6\n" in (here / "runs/demo/slurm/train.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["run.intent=fresh"], "again=(run.intent=fresh_or_resume) "),
        (["run.intent=resume"], "again=() "),
        (["run.intent=fresh_or_resume"], "again=() "),
        (["run.intent=warm_start", "run.init_from=x"], "again=(run.intent=resume run.init_from=null) "),
    ],
)
def test_a_later_start_goes_on_and_never_begins_anew_in_silence(here, asked, sbatch, words, again):
    run(*DEMO, *words)
    assert again in (here / "runs/demo/slurm/train.sbatch").read_text()


def test_the_interpreter_is_ours_or_the_venvs_or_the_containers(here, asked, capsys):
    container = ContainerConfig(kind=ContainerKind.apptainer, image="/x.sif")
    for settings, python in (
        ({}, sys.executable),
        ({"venv": "/opt/my env"}, "'/opt/my env/bin/python'"),
        ({"container": container}, "python3"),
        ({"container": container, "venv": "/opt/env"}, "/opt/env/bin/python"),
    ):
        run(*DEMO, dry_run=True, **settings)
        assert f"\npython={python}\n" in capsys.readouterr().out


def test_jobs_of_other_verbs_have_names_logs_and_words_of_their_own(here, asked, sbatch, capsys):
    run("evaluate", "checkpoint=runs/x")
    assert asked == [(["evaluate", "checkpoint=runs/x", "--cfg", "job"], {})]
    text = (here / "logs/slurm/evaluate.sbatch").read_text()
    assert "#SBATCH --job-name=evaluate\n" in text
    assert "#SBATCH --gres=gpu:1\n" in text
    assert "#SBATCH --cpus-per-task=8\n" in text
    assert "after it" not in capsys.readouterr().out
    run("data", "corpus=python_docs")
    assert "--gres" not in (here / "logs/slurm/data.sbatch").read_text()


def test_a_secret_in_an_override_is_refused_before_anything_is_written(here, asked, sbatch, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with pytest.raises(ConfigError, match="the job's script would hold the value of WANDB_API_KEY"):
        run(*DEMO, "run.name=x0123456789abcdef")
    assert not list(here.iterdir())
    run(*DEMO)
    files = [path for path in here.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert not [path for path in files if "0123456789abcdef" in path.read_text()]
    assert sbatch()[1][1]["WANDB_API_KEY"] == "0123456789abcdef", "the job has it by the environment"


# -- Slurm's own answers


def test_a_machine_without_sbatch_keeps_the_script(here, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"there is no sbatch on this machine; run .* or take .*train.sbatch there"
    ):
        run(*DEMO)
    assert (here / "runs/demo/slurm/train.sbatch").is_file()


def test_what_slurm_refuses_is_told_in_its_words(here, asked, sbatch, monkeypatch):
    monkeypatch.setenv("STATUS", "1")
    with pytest.raises(
        LaunchError, match=r"Slurm refuses the job: would start now; mend the setting of slurm\."
    ):
        run(*DEMO)
    assert len(sbatch()) == 1, "only the test"


def test_an_answer_that_names_no_job_is_an_error(here, asked, sbatch, monkeypatch):
    monkeypatch.setenv("ANSWER", "Submitted")
    with pytest.raises(LaunchError, match="answered 'Submitted', which names no job"):
        run(*DEMO)


def test_the_name_of_a_cluster_behind_the_id_is_left_out(sbatch, monkeypatch):
    monkeypatch.setenv("ANSWER", "123;west")
    assert slurm.submit(Path("x")) == 123


def test_a_controller_that_does_not_answer_is_named(sbatch, monkeypatch):
    def never(command, **_):
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", never)
    with pytest.raises(LaunchError, match="Slurm does not answer within 60 s; is its controller up"):
        slurm.check(Path("x"))


def test_an_array_is_followed_by_its_pattern():
    job = Job(
        verb="train", runs=[["x=1"], ["x=2"]], again=[], name="x", folder=Path("/f"),
        log_folder=Path("/f/a b"), python="python3",
    )  # fmt: skip
    assert "follow    tail -F '/f/a b'/77_*.out '/f/a b'/77_*.0.out" in slurm.advice(job, 77)


# -- the whole command


def submit(*words, cwd, **environment):
    return subprocess.run(
        [*COMMAND, *words],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_train_refuses_passes_through_and_nothing_is_submitted(data, tmp_path, sbatch):
    words = [*train_arguments(data, tmp_path / "run", "data.max_epochs=0.001"), "slurm=local"]
    done = submit(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: too little data" in done.stderr
    assert done.stderr.endswith("error: `llmtrain train` says no, so nothing was submitted\n")
    assert sbatch() == []
    assert not (tmp_path / "run").exists()


def test_what_train_takes_is_submitted(data, tmp_path, sbatch):
    done = submit(*train_arguments(data, tmp_path / "run"), "slurm=local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "check     nothing stands in the way of this run on 2 ranks\n" in done.stderr
    assert "job       77\n" in done.stdout
    assert [call[0][0] for call in sbatch()] == ["--test-only", "--parsable"]


def test_a_misspelt_setting_of_the_job_is_told_with_the_nearest(tmp_path):
    done = submit("train", "+experiment=demo", "slurm.node=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'slurm.nodes'?" in done.stderr


def test_a_folder_of_ones_own_brings_sites_and_experiments(data, tmp_path):
    for path, text in (
        ("mine/slurm/ours.yaml", 'nodes: 3\ngpus_per_node: 0\ncpus_per_rank: 1\ntime: "2:00:00"\n'),
        ("mine/experiment/wide.yaml", "# @package _global_\nrun: {name: wide}\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    words = train_arguments(data, tmp_path / "run")
    words = [word for word in words if not word.startswith(("run.name", "train.global", "train.micro"))]
    sizes = ["train.global_batch_rows=12", "train.micro_batch_rows=2"]
    done = submit(
        *words, *sizes, "+experiment=wide", "slurm=ours", "--config-dir", "mine", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --job-name=wide\n#SBATCH --nodes=3\n" in done.stdout
    assert "\n    --config-dir\n    mine\n" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_help_names_the_sites(tmp_path):
    done = submit("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "slurm: aws_p4, aws_p5, azure_nd, gcp_a3, generic, lambda, local" in done.stdout
