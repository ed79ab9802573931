"""Every mistake that can be found before ranks start: on a login node, in seconds, without torch.

Each check adds a message; none stops the others, so that one look tells all.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from llmtrain import files
from llmtrain.checkpoint.find import list_checkpoints
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place
from llmtrain.data.manifest import read_manifest
from llmtrain.data.manifest import verify as verify_files
from llmtrain.errors import ConfigError, DataError, LLMTrainError
from llmtrain.loader.config import ObjectiveKind
from llmtrain.loader.open import OpenData, open_data
from llmtrain.model.size import num_params
from llmtrain.parallel.compatibility import Layout, describe, explain, warnings
from llmtrain.parallel.deepspeed_keys import check_extra
from llmtrain.tracking.against_plan import against_plan
from llmtrain.train.certificate import certificate_path, missing
from llmtrain.train.changes import DATA_HASH, FORBIDDEN, KEEPS_SHAPE, Change, Changed, compare, sentences
from llmtrain.train.config import Determinism, Intent, TrainRoot
from llmtrain.train.deepspeed_config import our_keys
from llmtrain.train.run_folder import checkpoint_to_start_from, run_folder
from llmtrain.train.unread import unread
from llmtrain.units import format_bytes, format_count

CHECKPOINT_BYTES_PER_PARAM = 12
"""fp32 weight and AdamW's two moments."""

VERIFY_CONTENT_BELOW_BYTES = 2 << 30
"""A check on a login node hashes shards up to this sum, about two seconds' worth; above it compares sizes
only."""


@dataclass
class Findings:
    problems: list[str] = field(default_factory=list)
    """Each one stops the run."""
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    """What the run will be, with the sums behind it."""
    data_hash: str = ""
    """OpenData.hash; empty when the data could not be opened."""
    checkpoint: Place | None = None
    """Where the run would start from; None for fresh weights."""
    changed: list[Changed] = field(default_factory=list)
    """What a resume would change against its checkpoint."""

    @property
    def accepted_change(self) -> bool:
        """Whether a resume would go on with other data, as the user asked."""
        return any(each.name == DATA_HASH and each.change is Change.trajectory for each in self.changed)

    def raise_if_any(self) -> None:
        if self.problems:
            raise ConfigError("\n       ".join(self.problems))


def check_train(
    cfg: TrainRoot, *, world_size: int | None, device: str | None = None, given: Collection[str] = ()
) -> Findings:
    """Check `cfg` against itself, the data folder, the run folder and the disk.

    Args:
        world_size: ranks that are there; None on a login node, where parallel.world_size speaks for them.
        device: "cpu" or "cuda"; None on a login node.
        given: names of the settings on the command line, for those that nothing reads.
    """
    found = Findings()
    found.problems += unread(cfg, given)
    _check_layout(cfg, world_size, device, found)
    _check_positions(cfg, found)
    if cfg.train.compile_blocks and cfg.train.determinism is Determinism.bitwise:
        found.problems.append(
            "train.compile_blocks=true with train.determinism=bitwise: the compiler may choose other kernels "
            "at the next start; set one of them back"
        )
    _check_schedule(cfg, found)
    data = _check_data(cfg, found)
    _check_start(cfg, data, world_size, found)
    _check_disk(cfg, found)
    _check_host_memory(cfg, world_size, found)
    _check_certificate(cfg, world_size or cfg.parallel.world_size, found)
    return found


def layout_of(cfg: TrainRoot, *, device: str | None) -> Layout:
    """What the rules of parallel/compatibility.py look at. Its dp_size stands for any."""
    parallel, train, model = cfg.parallel, cfg.train, cfg.model
    return Layout(
        engine=parallel.engine,
        pp_size=parallel.pp_size,
        pp_schedule=parallel.pp_schedule,
        dp_size=1,
        cp_size=parallel.cp_size,
        tp_size=parallel.tp_size,
        zero_stage=parallel.zero_stage,
        sequence_parallel=parallel.sequence_parallel,
        context=parallel.context,
        precision=train.precision.name,
        optimizer=cfg.optimizer.kind.name,
        device=device,
        micro_batch_rows=train.micro_batch_rows,
        rows_per_step=(*(stage.rows for stage in train.batch_ramp), train.global_batch_rows),
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        ffn_width=model.ffn_width,
        vocab_size=model.vocab_size,
        seq_len=cfg.data.seq_len,
        tie_embeddings=model.tie_embeddings,
        recompute=train.recompute.name if train.recompute_every else "none",
    )


def _check_layout(cfg: TrainRoot, world_size: int | None, device: str | None, found: Findings) -> None:
    parallel, expected = cfg.parallel, cfg.parallel.world_size
    if world_size is not None and expected is not None and world_size != expected:
        found.problems.append(
            f"parallel.world_size={expected}, but {world_size} ranks were launched; launch {expected}, "
            f"or set parallel.world_size=null to take what comes"
        )
    ranks = world_size or expected
    layout = layout_of(cfg, device=device)
    broken = explain(layout, ranks)
    found.problems += broken
    found.problems += check_extra(parallel.deepspeed, our_keys(cfg.train, parallel))
    if ranks is None:
        found.facts.append("ranks: not known here; give parallel.world_size to check the batch against them")
    if ranks is None or broken:
        return
    layout = replace(layout, dp_size=ranks // (layout.pp_size * layout.cp_size * layout.tp_size))
    found.warnings += warnings(layout)
    found.facts.append(f"layout: {describe(layout)}")
    rows, micro, dp = cfg.train.global_batch_rows, cfg.train.micro_batch_rows, layout.dp_size
    found.facts.append(
        f"global batch {rows * cfg.data.seq_len:,} tokens = {micro} rows x {cfg.data.seq_len} x "
        f"{rows // (micro * dp)} accumulation x {dp} dp; {cfg.total_steps:,} steps = "
        f"{cfg.total_rows * cfg.data.seq_len:,} tokens"
    )
    for start, size in zip(cfg.batch_sizes.starts, cfg.batch_sizes.sizes, strict=True):
        if cfg.train.batch_ramp:
            found.facts.append(f"batch ramp: {size:,} rows a step from row {start:,} on")


def _check_positions(cfg: TrainRoot, found: Findings) -> None:
    most = cfg.model.max_positions
    if most is not None and cfg.data.seq_len > most:
        found.problems.append(
            f"data.seq_len={cfg.data.seq_len} is more than model.max_positions={most}: a document that "
            "fills a row would have tokens without a position; raise model.max_positions"
        )


def _check_schedule(cfg: TrainRoot, found: Findings) -> None:
    planned = cfg.schedule.warmup_tokens + (cfg.schedule.decay_tokens or 0)
    if planned > cfg.train.total_tokens:
        found.problems.append(
            f"schedule.warmup_tokens + schedule.decay_tokens = {planned:,} is more than "
            f"train.total_tokens={cfg.train.total_tokens:,}; shorten them"
        )
    if cfg.save.every_steps > cfg.total_steps:
        found.warnings.append(
            f"save.every_steps={cfg.save.every_steps} is more than the run's "
            f"{cfg.total_steps} steps: the only checkpoint is the last one"
        )
    if cfg.train.eval_every_steps > cfg.total_steps:
        found.warnings.append(
            f"train.eval_every_steps={cfg.train.eval_every_steps} is more than the run's "
            f"{cfg.total_steps} steps: the only evaluation is after the last one"
        )


def _check_data(cfg: TrainRoot, found: Findings) -> OpenData | None:
    kind = cfg.data.objective.kind
    if kind not in (ObjectiveKind.causal, ObjectiveKind.fim):
        found.problems.append(
            f"data.objective.kind={kind.name} is for models that see both sides of a token, and `llmtrain "
            "train` trains causal ones; set causal or fim"
        )
        return None
    try:
        for folder in [cfg.data.folder] if cfg.data.folder else [s.folder for s in cfg.data.sources.values()]:
            _check_folder(cfg, Path(str(folder)), found)
        data = open_data(cfg.data, seed=cfg.run.seed)
    except LLMTrainError as error:
        found.problems.append(str(error))
        return None
    found.data_hash = data.hash
    where = ", ".join(map(str, data.folders.values()))
    vocab_size = data.manifest.tokenizer.vocab_size
    if cfg.model.vocab_size < vocab_size:
        found.problems.append(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the vocabulary of the tokenizer in "
            f"{where}, {vocab_size}; set model.vocab_size to that or more"
        )
    elif cfg.model.vocab_size > vocab_size:
        found.warnings.append(
            f"model.vocab_size={cfg.model.vocab_size} is more than the tokenizer's "
            f"{vocab_size}: the rows of the embedding above it are padding"
        )
    num_rows, needed = data.train.num_rows, cfg.total_rows
    epochs = needed / num_rows
    if cfg.data.sources:
        found.problems += data.order.check(needed)
        for name, rows in data.order.rows_by_source(needed).items():
            own = data.train.parts[name].num_rows
            found.facts.append(
                f"source {name}: {rows:,} of {needed:,} rows ({rows / needed:.1%}), {rows / own:.2f} epochs "
                f"of its {own:,}"
            )
    elif epochs > cfg.data.max_epochs:
        most = "of up to" if cfg.train.batch_ramp else "x"
        found.problems.append(
            f"too little data: {cfg.total_steps:,} steps {most} {cfg.train.global_batch_rows} rows need "
            f"{needed:,} rows, {epochs:.1f} epochs of the {num_rows:,} in {where}, and data.max_epochs="
            f"{cfg.data.max_epochs:g}; add text, lower train.total_tokens, or raise data.max_epochs"
        )
    else:
        found.facts.append(f"data: {num_rows:,} rows of {cfg.data.seq_len} tokens, {epochs:.2f} epochs")
    if (cfg.train.eval_rows or 0) > data.held_out.num_rows:
        found.warnings.append(
            f"train.eval_rows={cfg.train.eval_rows} is more than the held-out split's "
            f"{data.held_out.num_rows}: an evaluation reads all of them"
        )
    return data


def _check_folder(cfg: TrainRoot, folder: Path, found: Findings) -> None:
    """The files of one data folder."""
    manifest = read_manifest(folder)
    shard_bytes = int(manifest.table.records["num_bytes"].sum())
    verify_files(folder, manifest, content=cfg.check_only and shard_bytes <= VERIFY_CONTENT_BELOW_BYTES)
    if cfg.check_only and shard_bytes > VERIFY_CONTENT_BELOW_BYTES:
        found.facts.append(
            f"shards: {format_bytes(shard_bytes)}, sizes compared, contents not (too large for this check)"
        )
    manifest.pack("train", cfg.data.seq_len, cfg.data.packing.name)
    if manifest.pack("held_out", cfg.data.seq_len, cfg.data.packing.name).num_rows == 0:
        raise DataError(f"the held-out split in {folder} has no rows; raise its share in `llmtrain data`")


def _check_start(cfg: TrainRoot, data: OpenData | None, num_ranks: int | None, found: Findings) -> None:
    if cfg.run.plan is not None:
        try:
            plan = against_plan(Path(cfg.run.plan), files.plain(cfg))
            found.facts += plan.facts
            found.warnings += [f"not as planned: {each}" for each in plan.differences]
        except DataError as error:
            found.problems.append(f"run.plan={cfg.run.plan}: {error}; or set it to null")
    try:
        path = found.checkpoint = checkpoint_to_start_from(cfg.run, run_folder(cfg))
        if path is None:
            found.facts.append("start: fresh weights, step 0")
            return
        reader = CheckpointReader(path)
    except LLMTrainError as error:
        found.problems.append(str(error))
        return
    if cfg.run.intent is Intent.warm_start:
        found.facts.append(f"start: step 0 with the weights of {path}")
        _check_warm_start(cfg, data, reader, found)
        return
    found.facts.append(f"start: step {reader.step} from {path}")
    found.changed = compare(
        cfg,
        step=reader.step,
        state=reader.state,
        data_hash=None if data is None else data.hash,
        num_ranks=num_ranks or cfg.parallel.world_size,
    )
    found.problems += sentences(found.changed, Change.forbidden)
    found.warnings += sentences(found.changed, Change.trajectory)
    found.facts += sentences(found.changed, Change.layout)
    if safe := [each for each in found.changed if each.change is Change.safe and each.name != "check_only"]:
        told = ", ".join(f"{each.name} {each.old} -> {each.new}" for each in safe)
        found.facts.append(f"changed, and no number of the training with it: {told}")


def _check_warm_start(
    cfg: TrainRoot, data: OpenData | None, reader: CheckpointReader, found: Findings
) -> None:
    changed = compare(cfg, step=reader.step, state=reader.state, data_hash=None)
    for each in (each for each in changed if each.name.startswith("model.")):
        if FORBIDDEN[each.name] is KEEPS_SHAPE:
            found.problems.append(
                f"{each.name}={each.new}, but the checkpoint of run.init_from has {each.old}; a warm start "
                "keeps the model's shape"
            )
        elif each.name != "model.init_std":  # it was read long ago
            found.warnings.append(f"warm start with {each.name}={each.new}, trained with {each.old}")
    then = reader.state["tokenizer_fingerprint"]
    if data is not None and (now := data.manifest.tokenizer.fingerprint) != then:
        where = ", ".join(map(str, data.folders.values()))
        found.problems.append(
            f"the tokenizer of {where} ({now[:12]}) is not the one that "
            f"run.init_from was trained with ({then[:12]}): its weights would read other words; make the "
            f"data with tokenizer.path set to the old one"
        )


def _check_disk(cfg: TrainRoot, found: Findings) -> None:
    saved = run_folder(cfg).checkpoints
    for name, folder in (("run.folder", Path(cfg.run.folder)), ("save.folder", saved)):
        if not isinstance(folder, Path):
            continue
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            found.problems.append(
                f"{name}={folder} cannot be written: {existing} is not a folder that you may write to"
            )
            return
    one = num_params(cfg.model) * CHECKPOINT_BYTES_PER_PARAM
    what = f"model: {format_count(num_params(cfg.model))} parameters, checkpoints of {format_bytes(one)}"
    if not isinstance(saved, Path):
        found.facts.append(f"{what} in {saved}")
        return
    there = list_checkpoints(saved)
    more = max(1, _num_kept(cfg) + 1 - len(there))  # a new one is whole before the oldest goes
    free = files.free_bytes(saved)
    if free < one * more:
        found.problems.append(
            f"not enough disk space for {saved}: {more} more checkpoints of {format_bytes(one)} need "
            f"{format_bytes(one * more)}, {format_bytes(free)} are free; make room, or lower "
            f"save.keep_last, keep_best, or raise keep_every_tokens"
        )
    else:
        found.facts.append(f"{what}, {format_bytes(free)} free")


def _check_host_memory(cfg: TrainRoot, num_ranks: int | None, found: Findings) -> None:
    """Copies of the state, on this host, which stands for the others."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cfg.save.in_background or num_ranks is None:
        return
    need = num_params(cfg.model) * CHECKPOINT_BYTES_PER_PARAM * here // num_ranks
    there = psutil.virtual_memory().available
    if need > there:
        found.problems.append(
            f"save.in_background=true copies the state of this host's {here} of {num_ranks} ranks, "
            f"{format_bytes(need)}, and {format_bytes(there)} of memory are free: false needs none"
        )


def _num_kept(cfg: TrainRoot) -> int:
    """The most checkpoints that stay."""
    save = cfg.save
    by_tokens = cfg.train.total_tokens // save.keep_every_tokens if save.keep_every_tokens else 0
    return save.keep_last + save.keep_best + by_tokens


def _check_certificate(cfg: TrainRoot, num_ranks: int | None, found: Findings) -> None:
    """Whether `llmtrain verify` has passed for this config. One process has no layout to verify."""
    if num_ranks is None:
        found.facts.append("certificate: not looked for, as the number of ranks is not known here")
        return
    if num_ranks == 1 and not cfg.verify.required:
        return
    try:
        why = missing(cfg, num_ranks)
    except DataError as error:
        why = str(error)
    if why is None:
        found.facts.append(f"certificate: {certificate_path(cfg)} says that this layout computes right")
        return
    told = (
        f"this layout is not verified: {why}; run `llmtrain verify` with the same overrides and "
        f"verify.ranks={num_ranks}"
    )
    if cfg.verify.required:
        found.problems.append(f"{told}, or set verify.required=false")
    else:
        found.warnings.append(told)
