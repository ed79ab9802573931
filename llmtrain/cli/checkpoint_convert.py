"""`llmtrain checkpoint convert`: to and from checkpoints of PyTorch (DCP) and DeepSpeed (universal)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.checkpoint import tell
from llmtrain.cli.compose import run_verb
from llmtrain.convert.convert import STATE_NAME, Format, export, import_
from llmtrain.errors import ConfigError
from llmtrain.units import format_bytes


@dataclass(kw_only=True)
class ConvertConfig:
    path: str
    """What is converted: a run folder or one of its checkpoints; with `source_format`, a folder that another
    program has written."""
    out: str
    """A folder that is not there yet."""
    to: Format = Format.llmtrain
    """torch_dcp, deepspeed_universal."""
    source_format: Format = Format.llmtrain
    """Of `path`: torch_dcp, deepspeed_universal."""
    like: str | None = None
    """A run or checkpoint of ours of the same model, whose configuration the new one takes. Needed where
    `path` has no llmtrain_state.json; then only weights are taken."""
    prefix: str | None = None
    """Of torch_dcp: what stands before the name of a weight; null: `model.`, or nothing where no key begins
    so."""
    trust_pickle: bool = False
    """Whether files that hold more than numbers are read all the same. That may run code of their author."""
    num_files: int = 1
    """Of the new checkpoint of ours."""

    def __post_init__(self) -> None:
        if (self.to is Format.llmtrain) == (self.source_format is Format.llmtrain):
            raise ConfigError(
                f"source_format={self.source_format.name} to={self.to.name}: set to=torch_dcp or "
                "to=deepspeed_universal, or source_format to one of them; for llmtrain to llmtrain there is "
                "`llmtrain checkpoint reshard`"
            )
        for name, default in (("like", None), ("prefix", None), ("trust_pickle", False), ("num_files", 1)):
            if self.to is not Format.llmtrain and getattr(self, name) != default:
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect with to={self.to.name}; leave it out"
                )


def main() -> None:
    run_verb("checkpoint_convert", ConvertConfig, run)


def run(cfg: ConvertConfig) -> None:
    if cfg.to is not Format.llmtrain:
        made = export(place_of(cfg.path), _folder("out", cfg.out), to=cfg.to)
        print(
            f"{made.path}: step {made.step}, {made.num_tensors:,} tensors of {', '.join(made.kinds)}, "
            f"{format_bytes(made.num_bytes)}"
        )
        print(
            f"names and orientation are llmtrain's (wo and w_down: [in, out]); the state is in {STATE_NAME}"
        )
        return
    tell(
        import_(
            _folder("path", cfg.path),
            place_of(cfg.out),
            source_format=cfg.source_format,
            like=None if cfg.like is None else place_of(cfg.like),
            prefix=cfg.prefix,
            trust_pickle=cfg.trust_pickle,
            num_files=cfg.num_files,
        )
    )


def _folder(name: str, given: str) -> Path:
    place = place_of(given)
    if not isinstance(place, Path):
        raise ConfigError(
            f"{name}={given}: checkpoints of other programs are read and written in folders only"
        )
    return place
