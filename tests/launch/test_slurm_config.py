"""What a job's settings refuse, and with which words."""

import pytest

from llmtrain.errors import ConfigError
from llmtrain.launch.config import After, ContainerConfig, ContainerKind, SlurmConfig, seconds_of
from llmtrain.launch.environment import looks_secret, outside_a_job, refuse_secrets


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("12:00:00", 43200), ("00:01:30", 90), ("2-00:00:00", 172800), ("1-6", 108000), ("1-06:30", 109800)],
)
def test_time_limits_are_read_as_slurm_reads_them(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["90", "43200", "12:00", "a day", "", "1:2:3:4", "12:00:00\n"])
def test_a_time_that_people_and_slurm_could_read_differently_is_refused(time):
    with pytest.raises(ConfigError, match=r"slurm\.time=.* must look like 12:00:00 or 2-00:00:00"):
        SlurmConfig(time=time)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0}, "slurm.nodes=0 must be at least 1"),
        ({"cpu_ranks_per_node": 0}, "slurm.cpu_ranks_per_node=0 must be at least 1"),
        ({"cpus_per_rank": 0}, "slurm.cpus_per_rank=0 must be at least 1"),
        ({"max_array_tasks": 0}, "slurm.max_array_tasks=0 must be at least 1"),
        ({"gpus_per_node": -1}, "slurm.gpus_per_node=-1 must be at least 0"),
        ({"max_restarts": -1}, "slurm.max_restarts=-1 must be at least 0"),
        ({"max_failures": -1}, "slurm.max_failures=-1 must be at least 0"),
        ({"after": [0]}, "slurm.after=[0] must be ids of jobs"),
        ({"cpus_per_rank": None}, "slurm.cpus_per_rank=null with slurm.exclusive=false: a job that asks for"),
        ({"signal_lead_s": 5}, "slurm.signal_lead_s=5 must be at least 30 and less than slurm.time"),
        (
            {"time": "00:05:00"},
            "slurm.signal_lead_s=300 must be at least 30 and less than slurm.time=00:05:00",
        ),
        ({"directives": ["-p x"]}, "slurm.directives: '-p x' must be a long option of sbatch"),
        ({"environment": {"a b": "x"}}, "slurm.environment: 'a b' is no name of a variable"),
        ({"pass_environment": ["A=1"]}, "slurm.pass_environment: 'A=1' is no name of a variable"),
        ({"environment": {"MY_TOKEN": "x"}}, "slurm.environment.MY_TOKEN sounds like a secret"),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        SlurmConfig(**settings)
    assert message in str(caught.value)


HOSTILE = [
    "a b",
    'a"b',
    "a'b",
    "a$(id)",
    "a`id`",
    "a;b",
    "a\nb",
    "a\\b",
    "a#b",
    "",
    "a>b",
    "a\x00b",
    "${HOME}",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "name",
    [
        *("partition", "account", "qos", "reservation", "gpu_type", "memory"),
        *("job_name", "log_folder", "constraint", "exclude"),
    ],
)
def test_what_a_line_of_sbatch_cannot_hold_is_refused(name, value):
    with pytest.raises(ConfigError) as caught:
        SlurmConfig(**{name: value})
    assert str(caught.value).startswith(f"slurm.{name}={value!r} holds ")
    assert "#SBATCH has no safe way to write that" in str(caught.value)


@pytest.mark.parametrize("value", [f"--comment={value}" for value in HOSTILE if value])
def test_a_directive_is_one_plain_option(value):
    with pytest.raises(ConfigError, match=r"slurm\.directives=.* holds "):
        SlurmConfig(directives=[value])


def test_what_sites_really_use_is_let_through():
    cfg = SlurmConfig(
        partition="gpu-a100,gpu_h100",
        account="proj:123",
        qos="high.prio",
        constraint="(a100|h100)&nvlink*2",
        exclude="gpu[003,017-019]",
        log_folder="/scratch/müller/logs",
        directives=["--mail-type=END", "--licenses=fs:2"],
        memory="0",
    )
    assert cfg.num_ranks == 8


def test_ranks_are_gpus_or_without_gpus_what_is_asked_for():
    assert SlurmConfig(nodes=3, gpus_per_node=4).num_ranks == 12
    assert SlurmConfig(nodes=3, gpus_per_node=0, cpu_ranks_per_node=2).num_ranks == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": ContainerKind.pyxis}, "slurm.container.kind=pyxis with slurm.container.image=None"),
        ({"image": "x.sif"}, "slurm.container.kind=none with slurm.container.image=x.sif"),
        ({"mounts": ["data:/data"]}, "slurm.container.mounts: 'data:/data' must be one absolute path"),
        ({"mounts": ["/a,/b"]}, "slurm.container.mounts: '/a,/b' must be one absolute path"),
    ],
)
def test_a_container_without_sense_is_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        ContainerConfig(**settings)
    assert message in str(caught.value)


def test_every_end_of_a_job_has_slurms_word():
    assert {after.name: after.word for after in After} == {
        "ok": "afterok",
        "not_ok": "afternotok",
        "any": "afterany",
    }


def test_names_of_secrets_are_known_and_others_are_not():
    assert looks_secret("WANDB_API_KEY")
    assert looks_secret("hf_token")
    assert looks_secret("AWS_SECRET_ACCESS_KEY")
    assert not looks_secret("TOKENIZERS_PARALLELISM")
    assert not looks_secret("NCCL_SOCKET_IFNAME")
    assert not looks_secret("MONKEY")


def test_the_value_of_a_secret_is_found_in_a_text():
    environ = {
        "WANDB_API_KEY": "0123456789",
        "MINE": "0a1b2c3d4e",
        "SHORT_KEY": "abc",
        "LANG": "C.UTF-8-long",
    }
    refuse_secrets("abc C.UTF-8-long 0a1b2c3d4e", environ, [])
    with pytest.raises(ConfigError, match="would hold the value of WANDB_API_KEY; take it out"):
        refuse_secrets("x=0123456789", environ, [])
    with pytest.raises(ConfigError, match="would hold the value of MINE"):
        refuse_secrets("x=0a1b2c3d4e", environ, ["MINE"])


def test_a_job_does_not_learn_of_the_job_that_it_was_submitted_from():
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_PARTITION": "gpu",
        "HOME": "/root",
    }
    assert outside_a_job(environ).keys() == {"SLURM_CONF", "SBATCH_PARTITION", "HOME"}
