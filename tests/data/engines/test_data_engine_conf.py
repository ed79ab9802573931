"""The options of the group `engine` are its kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from llmtrain.cli.compose import conf_folder
from llmtrain.data.config import DataConfig
from llmtrain.data.engines.config import EngineKind


def test_every_kind_is_an_option_and_every_option_a_kind() -> None:
    assert {path.stem for path in Path(conf_folder(), "engine").glob("*.yaml")} == {
        kind.name for kind in EngineKind
    }


@pytest.mark.parametrize("kind", EngineKind)
def test_an_option_makes_the_engine_of_its_name(kind: EngineKind) -> None:
    ConfigStore.instance().store(name="data_schema", node=DataConfig)
    needed = ["engine.dask.address=tcp://10.0.0.7:8786"] if kind is EngineKind.dask_address else []
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        chosen = compose(config_name="data", overrides=[f"engine={kind.name}", *needed])
    config = OmegaConf.to_object(chosen)
    assert isinstance(config, DataConfig)
    assert config.engine.kind is kind
