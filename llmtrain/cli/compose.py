"""From the command line to dataclasses: the only place that touches Hydra and OmegaConf objects.

A verb's root dataclass is its schema. Hydra composes `conf/<verb>.yaml` against it, `OmegaConf.to_object`
turns the result into dataclasses at once, and everything below sees only those. A mistake of the user ends
in one line and exit status 2, not in a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
import omegaconf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtrain import files
from llmtrain.errors import EXIT_FAILED, ConfigError, LLMTrainError, unknown_name
from llmtrain.log import setup_logging

Root = TypeVar("Root")


def conf_folder() -> Path:
    """`conf/` inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_verb(name: str, schema: type[Root], function: Callable[[Root], None]) -> None:
    """Compose `conf/<name>.yaml` with the command line, check it against `schema`, call `function` with it.

    The schema goes into Hydra's ConfigStore as `<name>_schema`; the YAML names it first in its defaults list.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us: Hydra would print its own text, and exit 1

    @hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)
    def compose_and_run(composed: DictConfig) -> None:
        setup_logging()
        try:
            function(to_dataclass(composed, schema))
        except LLMTrainError as error:  # here, where Hydra has not added its own text yet
            fail(str(error))

    try:
        compose_and_run()
    except HydraException as error:
        fail(_explain_hydra(error))
    except OmegaConfBaseException as error:
        fail(_explain_omegaconf(error))
    except KeyboardInterrupt:
        sys.exit(130)


def to_dataclass(composed: DictConfig, schema: type[Root]) -> Root:
    """Turn a composed config into an instance of `schema`, naming every value that is still missing."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}; give it on the command line, as in {missing[0]}=VALUE"
        )
    _refuse_unknown(composed, prefix="")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema), f"composed a {type(config).__name__}, not a {schema.__name__}"
    return config


def _refuse_unknown(node: DictConfig, *, prefix: str) -> None:
    """Raise on a key that no dataclass has: `+group.key=value` gets past OmegaConf's own check."""
    owner = OmegaConf.get_type(node)
    known = {field.name for field in fields(owner)} if owner is not None and is_dataclass(owner) else None
    for key in map(str, node):
        if known is not None and key not in known:
            names = [f"{prefix}{name}" for name in known]
            raise ConfigError(unknown_name("setting", f"{prefix}{key}", names))
        inner = node._get_node(key)
        if isinstance(inner, DictConfig) and not inner._is_none():
            _refuse_unknown(inner, prefix=f"{prefix}{key}.")


def sweep_folder() -> Path | None:
    """The folder of this job of a `--multirun`, or None outside one."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir)
    return None


def given_settings() -> set[str]:
    """Dotted names of all that was given on the command line: of `schedule={kind: wsd}` schedule.kind too."""
    if not HydraConfig.initialized():
        return set()
    parser, found = OverridesParser.create(), set()
    for override in parser.parse_overrides(list(HydraConfig.get().overrides.task)):
        value = override.value()
        name = override.key_or_group
        found |= {name, *files.flatten(value, name)} if isinstance(value, dict) else {name}
    return found


def fail(message: str) -> None:
    """Print one line and end the process as a mistake of the user."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_FAILED)


def _explain_hydra(error: HydraException) -> str:
    """Hydra's message, with the nearest known key or option in front where there is one."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return unknown_name(f"option of {group}", option, error.options)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return _explain_omegaconf(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _explain_omegaconf(error: OmegaConfBaseException) -> str:
    unknown = isinstance(error, omegaconf.errors.ConfigAttributeError | omegaconf.errors.ConfigKeyError)
    owner: Any = error.object_type
    if unknown and error.key is not None and is_dataclass(owner):
        prefix = str(error.full_key or error.key).removesuffix(str(error.key))
        known = [f"{prefix}{field.name}" for field in fields(owner)]
        return unknown_name("setting", f"{prefix}{error.key}", known)
    if unknown and error.full_key and owner is dict:
        parent = str(error.full_key).rpartition(".")[0]
        return (
            f"{parent} has no {error.key}; add names to it with a plus, as in +{parent}={{{error.key}: ...}}"
        )
    first_line = str(error.msg or error).splitlines()[0] if str(error) else type(error).__name__
    where = f"{error.full_key}: " if error.full_key else ""
    if "Invalid value 'False'" in first_line and "off" in first_line:
        first_line += '; YAML reads off without quotes as false: write "off"'
    return f"{where}{first_line}"
