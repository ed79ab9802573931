"""`llmtrain plan ladder`: what it writes, and that `train` takes it; wrong input."""

import json
import subprocess
import sys

import pytest
import yaml

from llmtrain.cli.plan_ladder import PlanLadderConfig, resolve_devices, run
from llmtrain.errors import ConfigError
from llmtrain.planner.cost.cluster import ClusterConfig

CLUSTER = ClusterConfig(name="h100_sxm_8x", nodes=2)


def test_it_writes_an_experiment_a_run_with_the_sweep_and_its_cost(tmp_path, capsys):
    run(PlanLadderConfig(cluster=CLUSTER, budget="1e20", target="7B/300B", out=str(tmp_path)))
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert len(found["runs"]) == 16
    assert found["devices"]["num_devices"] == 16
    for row in found["runs"]:
        experiment = yaml.safe_load((tmp_path / "experiment" / f"{row['name']}.yaml").read_text())
        assert experiment["train"]["total_tokens"] == row["num_tokens"]
        assert row["name"] in (tmp_path / "ladder.sh").read_text()
        assert row["name"] in text
    assert f"all 16 runs: {found['flops']:.3g} FLOPs, {found['device_hours']['mid']:.3g} device-hours" in text
    assert "for 7B/300B, " in text
    assert "where the law has 2.13" in text


def test_a_cluster_is_a_pool_of_devices_in_bf16_and_this_machine_is_in_fp32():
    devices = resolve_devices(PlanLadderConfig(cluster=CLUSTER))
    assert (devices.num_devices, devices.precision) == (16, "bf16")
    assert devices.peak_flops == pytest.approx(989.5e12, rel=1e-3)
    here = resolve_devices(PlanLadderConfig(cluster=ClusterConfig(name="this_machine", peak_tflops=0.1)))
    assert (here.num_devices, here.precision, here.peak_flops) == (1, "fp32", 1e11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name='a/b' must be a file name"),
        ({"sizes": []}, "sizes and tokens_per_param must not be empty"),
        ({"tokens_per_param": [20.0, -1.0]}, "must be numbers above 0"),
        ({"tokens_per_param": [20.0, 20.0]}, "names a number twice"),
        ({"utilization": [0.5, 0.4, 0.6]}, "must be three rising parts of the peak"),
        ({"precision": "int8"}, "unknown precision 'int8'; known: bf16, fp32"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        PlanLadderConfig(cluster=CLUSTER, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ["7GB"]}, "sizes=7GB: 'GB' belongs to a size in bytes"),
        ({"budget": "-1"}, "budget=-1 must be a number of FLOPs above 0"),
        ({"target": "7B"}, "target=7B must be PARAMS/TOKENS"),
        ({"tokens_per_param": [20.0]}, "is no ladder: 4 runs, and a fit of 5 coefficients needs at least 7"),
    ],
)
def test_what_is_no_ladder_is_refused_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        run(PlanLadderConfig(cluster=CLUSTER, out=str(tmp_path), **changes))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_verb_ends_a_mistake_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", "plan", "ladder", "sizs=[1M]"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown setting 'sizs'; did you mean 'sizes'?")
    assert done.stderr.count("\n") == 1
