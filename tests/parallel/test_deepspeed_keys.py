"""The tables of DeepSpeed's keys against what DeepSpeed reads, and what a user is told about each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from llmtrain.parallel.deepspeed_keys import REFUSED, REMOVED, SCHEMA, Section, check_extra

READERS = """
import inspect, json
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.runtime import config
from deepspeed.runtime.pipe import engine as pipe_engine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
from deepspeed.runtime.zero import offload_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
import deepspeed


class Spy(dict):
    "Writes down every key that is asked for."

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self

    def __copy__(self):
        other = Spy(self)
        other.asked = self.asked
        return other


def fields(model):
    return sorted({name for key, field in model.model_fields.items() for name in (key, field.alias) if name})


sections = {"aio", "data_types", "flops_profiler"}
spy = Spy(train_batch_size=1, **{name: Spy() for name in sections}, timers=Spy(throughput={}))
config.DeepSpeedConfig(spy)
source = inspect.getsource(deepspeed)  # keys that are read before the class: config["..."] and config.get
before = {key for key in ("sequence_parallel_size", "data_parallel_size") if f'"{key}" in config' in source}
pipeline = set(config.get_pipeline_config({}))
if "_config.pipeline.get('use_reentrant')" in inspect.getsource(pipe_engine):
    pipeline.add("use_reentrant")
told = {
    "": spy.asked | before,
    **{name: spy[name].asked for name in sections},
    "timers": spy["timers"].asked,
    "timers.throughput": fields(DeepSpeedThroughputTimerConfig),
    "pipeline": pipeline,
    "bf16": fields(DeepSpeedBF16Config),
    "fp16": fields(DeepSpeedFP16Config),
    "comms_logger": fields(CommsLoggerConfig),
    "compile": fields(CompileConfig),
    "weight_quantization": fields(WeightQuantConfig),
    "zero_optimization": fields(DeepSpeedZeroConfig),
    "zero_optimization.leaf_module": fields(DeepSpeedZeroLeafModuleConfig),
    "zero_optimization.offload_optimizer": fields(offload_config.DeepSpeedZeroOffloadOptimizerConfig),
    "zero_optimization.offload_param": fields(offload_config.DeepSpeedZeroOffloadParamConfig),
    "zero_optimization.zenflow": fields(ZenFlowConfig),
    "removed": sorted(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    + [f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS],
}
print(json.dumps({name: sorted(keys) for name, keys in told.items()}))
"""


@cache
def read_by_deepspeed() -> dict[str, list[str]]:
    """In a process of its own: DeepSpeed's import warns."""
    done = subprocess.run(
        [sys.executable, "-c", READERS],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return told


def sections(schema: Section, prefix: str = "") -> dict[str, set[str]]:
    """Every section under its dotted name, with the keys in it."""
    found = {prefix.rstrip("."): set(schema)}
    for key, inner in schema.items():
        if inner is not None:
            found |= sections(inner, f"{prefix}{key}.")
    return found


OURS = ("zero_optimization.stage", "zero_optimization.overlap_comm", "steps_per_print", "gradient_clipping")


def test_the_schema_is_what_deepspeed_reads() -> None:
    theirs = read_by_deepspeed()
    removed_at_top = {key for key in REMOVED if "." not in key}
    mine = sections(SCHEMA)
    assert mine[""] | removed_at_top == set(theirs[""])
    assert not mine[""] & removed_at_top
    assert {name: keys for name, keys in mine.items() if name} == {
        name: set(keys) for name, keys in theirs.items() if name not in ("", "removed")
    }


def test_the_keys_of_earlier_versions_are_those_that_deepspeed_refuses() -> None:
    assert sorted(REMOVED) == sorted(read_by_deepspeed()["removed"])


def test_what_is_refused_is_a_key_of_the_schema() -> None:
    known = {f"{name}.{key}".lstrip(".") for name, keys in sections(SCHEMA).items() for key in keys}
    assert REFUSED.keys() <= known


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"communication_data_type": "fp32", "dump_state": True},
        {"zero_optimization": {"reduce_bucket_size": 5e7, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage3_max_live_parameters": 1e8, "max_live_parameters": 1e8}},
        {"bf16": {"check_grad_overflow": False}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"timers": {"throughput": {"enabled": False}}, "pipeline": {"pipe_partitioned": False}},
    ],
)
def test_other_keys_of_deepspeed_pass(extra: dict[str, Any]) -> None:
    assert check_extra(extra, OURS) == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"train_batch_size": 8},
            "parallel.deepspeed.train_batch_size is not taken: set train.global_batch_rows",
        ),
        (
            {"gradient_clipping": 1.0},
            "parallel.deepspeed.gradient_clipping is not taken: set train.grad_clip",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            "parallel.deepspeed.zero_optimization.stage is not taken: set parallel.zero_stage",
        ),
        ({"optimizer": {"type": "Adam"}}, "parallel.deepspeed.optimizer is not taken: set optimizer.*"),
        ({"bf16": {"enabled": True}}, "parallel.deepspeed.bf16.enabled is not taken: set train.precision"),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "parallel.deepspeed.zero_optimization.cpu_offload is not taken: DeepSpeed has renamed it; "
            "set zero_optimization.offload_optimizer",
        ),
        (
            {"steps_per_print": 10},
            "parallel.deepspeed.steps_per_print is not taken: llmtrain sets it; remove it",
        ),
        (
            {"zero_optimization": {"overlap_comm": True}},
            "parallel.deepspeed.zero_optimization.overlap_comm is not taken: llmtrain sets it; remove it",
        ),
        (
            {"elasticity": {}},
            "parallel.deepspeed.elasticity is of an earlier DeepSpeed: 0.19.8 refuses it; remove it; "
            "llmtrain resumes on any number of ranks without it",
        ),
        (
            {"sparse_attention": {}},
            "parallel.deepspeed.sparse_attention is of an earlier DeepSpeed: 0.19.8 refuses it; remove it",
        ),
        (
            {"zero_optimization": {"mics_shard_size": 2}},
            "parallel.deepspeed.zero_optimization.mics_shard_size is of an earlier DeepSpeed: 0.19.8 "
            "refuses it; remove it",
        ),
        (
            {"zero_optimization": True},
            "parallel.deepspeed.zero_optimization=True is not a section; it holds any of "
            "allgather_bucket_size,",
        ),
        (
            {"aio": None},
            "parallel.deepspeed.aio=None is not a section; it holds any of block_size, "
            "intra_op_parallelism, overlap_events, queue_depth, single_submit, use_gds",
        ),
        (
            {"zero_optimisation": {"stage": 2}},
            "unknown key of parallel.deepspeed 'zero_optimisation'; did you mean 'zero_optimization'? "
            "Known: activation_checkpointing,",
        ),
        (
            {"gradient_cliping": 1.0},
            "unknown key of parallel.deepspeed 'gradient_cliping'; did you mean 'gradient_clipping'?",
        ),
        (
            {"pipeline": {"pipe_partition": False}},
            "unknown key of parallel.deepspeed.pipeline 'pipe_partition'; did you mean 'pipe_partitioned'?",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "unknown key of parallel.deepspeed.zero_optimization.offload_param 'devise'; did you mean "
            "'device'?",
        ),
    ],
)
def test_a_key_that_cannot_be_set_says_what_to_do(extra: dict[str, Any], message: str) -> None:
    found = check_extra(extra, OURS)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_every_wrong_key_is_told() -> None:
    extra = {"amp": {}, "fp16": {"enabled": True, "loss_scail": 1}, "zero_optimization": {"stage": 1}}
    assert [message.split(": ")[0].split(" '")[0] for message in check_extra(extra, OURS)] == [
        "parallel.deepspeed.amp is of an earlier DeepSpeed",
        "parallel.deepspeed.fp16.enabled is not taken",
        "unknown key of parallel.deepspeed.fp16",
        "parallel.deepspeed.zero_optimization.stage is not taken",
    ]
