"""AdamW with weight decay on matrices only."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from llmtrain.train.config import OptimizerConfig


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> AdamW:
    """Two parameter groups: matrices (decayed) and vectors (not). The loop sets the rate at every step."""
    # ndim would be 1 for every weight under ZeRO-3, whose partitions are flat; a norm is known by its name.
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    vectors = [parameter for name, parameter in named if is_vector(name)]
    matrices = [parameter for name, parameter in named if not is_vector(name)]
    return AdamW(
        [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=cfg.peak_lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,  # one kernel over the flat partition, on CPU as on CUDA
    )


def is_vector(name: str) -> bool:
    """Whether a canonical parameter name is a norm's scale, or a bias."""
    return name.endswith(("norm.weight", ".bias"))
