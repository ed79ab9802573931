"""Every YAML of conf/ composes against its verb's schema, and Hydra's own switches work."""

import importlib
import shlex
import sys
from pathlib import Path

import forked
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from llmtrain.cli.main import NEED_A_PART, PARTS, VERBS

CONF = Path(__file__).parents[2] / "conf"
GROUP_OF_NO_DEFAULTS_LIST = {"experiment": "train"}
"""Groups that a user adds with a plus sign, and the verb that takes them."""

TYPED = {
    words.replace(" ", "_").replace("-", "_"): words for words in (*VERBS, *PARTS) if words not in NEED_A_PART
}
"""Root YAML to what a user types."""

NEEDED = {  # what a user must type anyway
    "data_train_quality": ["positives=[a.jsonl]", "negatives=[b.jsonl]", "out=model.bin"],
    "plan": ["budget.gpu_hours=1"],
    "train": ["run.name=x", "train.total_tokens=1", "train.global_batch_rows=1", "train.micro_batch_rows=1"],
}
NEEDED_BY_OPTION = {
    ("cluster", "custom"): ["cluster.gpu=h100_sxm", "cluster.gpus_per_node=8"],
    ("corpus", "jsonl"): ["corpus.paths=[texts/*.jsonl]"],
    ("corpus", "parquet"): ["corpus.paths=[texts/*.parquet]"],
    ("corpus", "text"): ["corpus.paths=[texts/*.txt]"],
    ("corpus", "warc"): ["corpus.paths=[crawl/*.warc.gz]"],
    ("corpus", "datasets"): ["corpus.dataset=some/set"],
    ("engine", "dask_address"): ["engine.dask.address=tcp://10.0.0.7:8786"],
}


def schema_of(verb):
    """The root dataclass that the verb's main() hands to run_verb."""
    module = importlib.import_module(f"llmtrain.cli.{verb}")
    caught = []
    original, module.run_verb = module.run_verb, lambda *arguments: caught.append(arguments)
    arguments, sys.argv = sys.argv, [f"llmtrain {verb}"]
    try:
        module.main()
    finally:
        module.run_verb, sys.argv = original, arguments
    ((name, schema, _),) = caught
    assert name == verb
    return schema


def composed(verb, overrides):
    ConfigStore.instance().store(name=f"{verb}_schema", node=schema_of(verb))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(config_name=verb, overrides=overrides)


def groups_of(verb):
    """Config groups in the verb's defaults list: `- cluster: this_machine` names cluster."""
    defaults = yaml.safe_load((CONF / f"{verb}.yaml").read_text())["defaults"]
    return {
        group
        for entry in defaults
        if isinstance(entry, dict)
        for group in entry
        if not group.startswith("override ")
    }


def verbs_taking(group):
    named = [verb for verb in VERBS if (CONF / f"{verb}.yaml").is_file() and group in groups_of(verb)]
    return named or [GROUP_OF_NO_DEFAULTS_LIST[group]]


def options():
    return [
        (path.relative_to(CONF).parent.as_posix(), path.stem)
        for path in sorted(CONF.rglob("*.yaml"))
        if path.parent != CONF
    ]


def hydra_verb(*arguments, cwd, server=forked.HYDRA):
    return forked.verb(*arguments, cwd=cwd, server=server)


def test_every_verb_has_a_root_yaml_and_every_root_yaml_a_verb():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(TYPED)


@pytest.mark.parametrize("verb", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_root_composes_without_a_key_that_its_schema_lacks(verb):
    config = composed(verb, [])
    assert OmegaConf.get_type(config) is schema_of(verb)


@pytest.mark.parametrize(("group", "option"), options())
def test_every_option_of_every_group_makes_a_valid_config(group, option):
    for verb in verbs_taking(group):
        sign = "" if group in groups_of(verb) else "+"
        needed = [] if group == "experiment" else NEEDED.get(verb, [])
        if verb == "train" and group != "experiment":
            needed = [*needed, "optimizer.peak_lr=1e-3"]
        config = composed(
            verb, [f"{sign}{group}={option}", *needed, *NEEDED_BY_OPTION.get((group, option), [])]
        )
        missing = OmegaConf.missing_keys(config)
        assert not missing, f"{group}={option} leaves {missing} open"
        assert isinstance(OmegaConf.to_object(config), schema_of(verb))


@pytest.mark.parametrize("verb", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_help_and_cfg_job_work_without_the_values_a_run_needs(verb, tmp_path):
    words = TYPED[verb]
    shown = hydra_verb(*words.split(), "--help", cwd=tmp_path, server=forked.TORCH)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"llmtrain {words} is powered by Hydra"), "set hydra.help.app_name"
    job = hydra_verb(*words.split(), "--cfg", "job", cwd=tmp_path, server=forked.TORCH)
    assert job.returncode == 0, job.stderr
    assert isinstance(yaml.safe_load(job.stdout), dict)
    assert not list(tmp_path.iterdir()), "Hydra wrote something of its own"


def test_a_users_own_folder_adds_options(tmp_path):
    (tmp_path / "mine/cluster").mkdir(parents=True)
    (tmp_path / "mine/cluster/ours.yaml").write_text("name: custom\ngpu: h100_sxm\ngpus_per_node: 4\n")
    done = hydra_verb(
        "plan", "--config-dir", "mine", "cluster=ours", "budget.flops=1e18", "--cfg", "job", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["cluster"]["gpus_per_node"] == 4


def test_a_key_that_a_users_file_spells_wrong_is_an_error(tmp_path):
    (tmp_path / "mine/cluster").mkdir(parents=True)
    (tmp_path / "mine/cluster/ours.yaml").write_text("name: custom\npeak_tflop: 42.0\n")
    done = hydra_verb("plan", "--config-dir", "mine", "cluster=ours", "budget.flops=1e18", cwd=tmp_path)
    assert done.returncode == 2
    assert "peak_tflop" in done.stderr
    assert "Traceback" not in done.stderr


def test_off_without_quotes_in_a_file_is_explained(tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/mine.yaml").write_text("# @package _global_\ntracking: {wandb: off}\n")
    done = hydra_verb("train", "--config-dir", "mine", "+experiment=mine", cwd=tmp_path)
    assert done.returncode == 2
    assert 'write "off"' in done.stderr


def test_a_new_name_of_a_dictionary_needs_a_plus_and_the_message_says_so(tmp_path):
    done = hydra_verb("train", "data.sources={web: {folder: x}}", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "data.sources has no web; add names to it with a plus, as in +data.sources={web: ...}" in done.stderr
    )


def documented_commands():
    """The commands of docs/configuration.md that need no folder of the reader's."""
    text = (CONF.parent / "docs/configuration.md").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("    llmtrain ")]
    return [line for line in lines if "--config-dir" not in line]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_overrides_compose(command):
    _, verb, *arguments = shlex.split(command)
    overrides = [argument for argument in arguments if "=" in argument]
    if "-m" in arguments:  # of a sweep's values, one will do
        overrides = [override.split(",")[0] for override in overrides]
    config = composed(verb, overrides)
    assert OmegaConf.get_type(config) is schema_of(verb)
    if "+experiment=demo" in overrides:
        assert isinstance(OmegaConf.to_object(config), schema_of(verb))
