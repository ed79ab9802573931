"""What of a block is computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Matrix products and attention: nearly all of a block's FLOPs. What lies between them is cheap to compute
and large to keep (Korthikanti et al. 2022, arXiv:2205.05198, section 5). Not bmm: context parallelism's ring
adds to its products in place."""


def selective() -> Any:
    """For `checkpoint(context_fn=...)`: keep the outputs of KEPT, compute the rest again."""

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    make: Any = create_selective_checkpoint_contexts
    return make(policy)
