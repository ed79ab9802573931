"""Which weight is updated how: AdamW with weight decay on matrices only, or Muon beside it."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from llmtrain.train.config import OptimizerConfig, OptimizerKind
from llmtrain.train.muon import Muon


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> AdamW | Muon:
    """Two parameter groups. The loop sets the rate at every step."""
    # ndim would be 1 for every weight under ZeRO-3, whose partitions are flat; a norm is known by its name.
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    vectors = {name: parameter for name, parameter in named.items() if is_vector(name)}
    if cfg.kind is OptimizerKind.muon:
        matrices = {name: parameter for name, parameter in named.items() if is_block_matrix(name)}
        decayed = {name: named[name] for name in named if name not in matrices and name not in vectors}
        return Muon(matrices=matrices, decayed=decayed, vectors=vectors, cfg=cfg)
    return AdamW(
        [
            {
                "params": [named[name] for name in named if name not in vectors],
                "weight_decay": cfg.weight_decay,
            },
            {"params": list(vectors.values()), "weight_decay": 0.0},
        ],
        lr=cfg.peak_lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,  # one kernel over the flat partition, on CPU as on CUDA
    )


def is_vector(name: str) -> bool:
    """Whether a canonical parameter name is a norm's scale, or a bias."""
    return name.endswith(("norm.weight", ".bias"))


def is_block_matrix(name: str) -> bool:
    """Whether a canonical parameter name is a matrix that maps activations to activations: Muon's."""
    return name.startswith("blocks.") and not is_vector(name)


def all_state_kinds(kind: OptimizerKind) -> tuple[str, ...]:
    """What the optimizer keeps beside the weights: kinds of pieces in a checkpoint."""
    return ("exp_avg", "exp_avg_sq") if kind is OptimizerKind.adamw else ("momentum", "exp_avg", "exp_avg_sq")


def state_kinds(name: str, kind: OptimizerKind) -> tuple[str, ...]:
    """Those that it keeps of the weight with this canonical name."""
    is_muons = kind is OptimizerKind.muon and is_block_matrix(name)
    return ("momentum",) if is_muons else ("exp_avg", "exp_avg_sq")
