"""What training programs keep in memory, as data of `memory()`, each with its source.

`slack` and `spread` are fitted to the rows of memory_rows.py, and a test fits them again. What is known of a
run beyond its layout (an unfused attention, dropout, a fused loss) is an argument of the program's function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner.cost.memory import GIB, NONE, MemoryProgram, split_from

CONTEXT_BYTES = 1.5 * GIB
"""CUDA's context with its kernels, 1,573 MiB on an A100 (bigscience-workshop/bigscience@9e64ede, chronicles
of BLOOM). NCCL's buffers, 0.3 to 1 GiB, are taken to lie within what is left: assumed, not measured."""

MEGATRON = MemoryProgram(
    source="NVIDIA/Megatron-LM@00611e6, with TransformerEngine 2.11",
    zero_stages=(0, 1),
    weights=split_from(3, 2),
    gradients=split_from(2, 4),
    masters=split_from(1, 4),
    moments=split_from(1, 8),
    keeps_sent_output=True,
    expert_load=1.4,
    logit_loss=6,
    logit_backward=6,
    head_gradient=2,
    kept_weight_gradients=2,
    workspace_bytes=0.09 * GIB,
    expert_workspace_bytes=4 * 32 * 2.0**20,
    slack=0.054,
    context_bytes=CONTEXT_BYTES,
    spread=(0.959, 1.023),
)
"""Bytes a weight: 6 + 12 / dp under the distributed optimizer (ZeRO 1), 18 without.

The loss: 16-bit logits, and fp32 ones that become probabilities and gradients in place
(core/tensor_parallel/cross_entropy.py): 6 bytes a logit. Of the golden runs, those with full recomputation
give 6.1. `expert_load` is fitted to the golden runs with experts, which drop no token and barely train;
TransformerEngine runs experts' products in 4 streams of 32 MiB of workspace each (Hopper and later). Empty
gradients of weights are its get_dummy_wgrad."""


def megatron(
    *,
    is_fused_attention: bool = True,
    has_dropout: bool = False,
    has_query_norm: bool = False,
    is_fused_loss: bool = False,
    accumulates_in_products: bool = True,
    caps_experts: bool = False,
) -> MemoryProgram:
    """Megatron-LM with what a run's arguments change.

    Args:
        is_fused_loss: TransformerEngine's cross entropy, which leaves the gradient in the 16-bit logits.
            (Megatron's own "native" one takes 14 bytes a logit in the golden runs, more than the unfused.)
        accumulates_in_products: products add to the fp32 gradients (--gradient-accumulation-fusion).
        caps_experts: each gets as many tokens, the rest are dropped (--moe-expert-capacity-factor 1).
    """
    return replace(
        MEGATRON,
        is_fused_attention=is_fused_attention,
        hidden_dropout=has_dropout,
        attention_dropout=has_dropout,
        keeps_raw_queries=has_query_norm,
        logit_loss=2 if is_fused_loss else MEGATRON.logit_loss,
        logit_backward=2 if is_fused_loss else MEGATRON.logit_backward,
        kept_weight_gradients=MEGATRON.kept_weight_gradients if accumulates_in_products else 0,
        expert_load=1 if caps_experts else MEGATRON.expert_load,
    )


LLMTRAIN_CHUNK_BYTES = {"cpu": 8.0 * 2**20, "cuda": 2.0**30}
"""fp32 logits at once: model/size.py LOGITS_BYTES, held equal by a test."""
DEEPSPEED_BUCKET = 500_000_000
"""Elements: zero_optimization.reduce_bucket_size of DeepSpeed 0.19.8."""
DEEPSPEED_LIVE = 1e9
"""Weights: stage3_max_live_parameters and stage3_max_reuse_distance of DeepSpeed 0.19.8."""
RESIDENT_BYTES = 630 * 2**20
"""Of a process on a CPU beside its tensors: libraries (torch, DeepSpeed, hydra, pyarrow) hold 430 MiB once
imported, the rest is heap that glibc keeps. Measured: 619 +- 30 MiB over 12 runs of torch 2.13."""
RESIDENT_SPREAD = (0.93, 1.12)
"""Of those runs. Most are missed with full recomputation and at ZeRO 3, 12% too low: small pieces that were
given back stay in the heap."""
LLMTRAIN_CPU_SPREAD = (0.99, 1.01)
"""Of live tensors: 51 ranks gave 1.0005 to 1.0050."""


def llmtrain(
    *,
    precision: str = "bf16",
    device: str = "cuda",
    is_resident: bool = False,
    bucket_elements: int = DEEPSPEED_BUCKET,
    live_weights: float = DEEPSPEED_LIVE,
) -> MemoryProgram:
    """This package under DeepSpeed 0.19.8: model/size.py's tables, and beyond them what live tensors of two
    ranks on a CPU showed (tables/cost/memory_llmtrain.csv).

    | | fp32 | bf16 |
    |---|---|---|
    | weights | 4, at ZeRO 3 shared | 2, at ZeRO 3 shared |
    | fp32 masters | 4 shared, from ZeRO 1 on | the same |
    | gradients | 4; from ZeRO 2 on 4 shared | 2 and 4; from ZeRO 2 on 4 shared |

    Context parallelism is by heads; the ring takes 2% less. On CUDA the slack is Megatron's, and the spread
    is assumed, not measured.

    Args:
        is_resident: on a CPU, all that a process holds, as metrics.jsonl has it; else its tensors alone.

    Raises:
        ConfigError: The precision or the device is not known.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(unknown_name("precision", precision, ("fp32", "bf16")))
    if device not in LLMTRAIN_CHUNK_BYTES:
        raise ConfigError(unknown_name("device", device, LLMTRAIN_CHUNK_BYTES))
    is_wide, is_cuda = precision == "fp32", device == "cuda"
    element = 4.0 if is_wide else 2.0
    bucket = element * bucket_elements
    gradients = element if is_wide else element + 4
    masters = split_from(1, 4)
    return MemoryProgram(
        source="llmtrain/model/size.py",
        element_bytes=element,
        weights=split_from(3, element),
        gradients=((gradients, 0), (gradients, 0), (0, 4), (0, 4)),
        masters=((0, 0), *masters[1:]) if is_wide else masters,
        moments=split_from(1, 8),
        gated_kept=4,
        norm_statistics=(4, 8 if is_cuda else 2 * element),
        keeps_gathered=True,
        keeps_sent_output=True,
        repeats_keys=True,
        mask_bytes=element,
        keeps_rotations=True,
        selective_keeps=frozenset({"queries", "keys", "values", "out", "project", "gate", "up", "down"}),
        logit_loss=8 if is_wide else element + 8,
        logit_backward=0,
        logit_loss_shared=4 if is_wide else element + 4,
        loss_chunk_bytes=LLMTRAIN_CHUNK_BYTES[device],
        head_gradient=0 if is_wide else element + 4,
        gathered_weights=live_weights,
        pipe_buffers=(0, 3, 6),
        keeps_outputs=True,
        bucket=(0, bucket if is_wide else 0, 0, bucket),
        filling_bucket=(0, 0, bucket, 0),
        reduction=((4, 0), (0, 0), (0, 0), (0, 0)) if is_wide else ((6, 0), (6, 0), (0, 0), (0, 0)),
        update=((0, 0), (0, 4), (0, 0), (0, 0)) if is_wide else NONE,
        slack=MEGATRON.slack if is_cuda else 0,
        context_bytes=CONTEXT_BYTES if is_cuda else RESIDENT_BYTES if is_resident else 0,
        counts_written_pages=is_resident,
        spread=(0.97, 1.06) if is_cuda else RESIDENT_SPREAD if is_resident else LLMTRAIN_CPU_SPREAD,
    )


TORCHTITAN = MemoryProgram(
    source="pytorch/torchtitan@b5bcd76, its FSDP2",
    zero_stages=(2, 3),
    weights=split_from(3, 4),
    gradients=split_from(2, 4),
    masters=NONE,
    moments=split_from(0, 8),
    frees_gradients=True,
    gated_kept=4,
    keeps_gathered=True,
    selective_keeps=frozenset({"queries", "values", "out", "gate", "down"}),
    logit_loss=10,
    logit_backward=14,
    gathered_blocks=2,
    reduced_block=6,
    workspace_bytes=0.09 * GIB,
    slack=0.10,
    context_bytes=CONTEXT_BYTES,
    spread=(0.98, 1.045),
)
"""Weights, gradients and moments in fp32, shared; products in 16 bits. Of a block's seven products every
other one is kept ("selective op"). The loss in eager fp32: log-probabilities (4 bytes), two gradients of them
(4 + 4), the 16-bit logits or their gradient (2). Whole are a block's weights and, ahead of time, the next
one's; a block's gradients are there in 16 bits and, for the reduce-scatter, in fp32."""

LLM_FOUNDRY = replace(
    TORCHTITAN,
    source="mosaicml/llm-foundry@8c8dd48, torch's FSDP1 FULL_SHARD, amp_bf16",
    zero_stages=(3,),
    logit_loss=2,
    logit_backward=4,
    slack=MEGATRON.slack,
)
"""As torchtitan in what is shared and gathered, but for flash-attn's fused cross entropy: 16-bit logits and
their gradient. No peak is published; its 108 benchmark runs, which ran, are all said to fit. Slack and spread
are those of Megatron and torchtitan: assumed, not measured."""

MEMORY_PROGRAMS: Mapping[str, MemoryProgram] = {
    "megatron": MEGATRON,
    "megatron_fused_loss": megatron(is_fused_loss=True),
    "torchtitan": TORCHTITAN,
    "llm_foundry": LLM_FOUNDRY,
    "llmtrain": llmtrain(),
    "llmtrain_fp32": llmtrain(precision="fp32"),
    "llmtrain_cpu": llmtrain(device="cpu"),
    "llmtrain_cpu_fp32": llmtrain(precision="fp32", device="cpu"),
}


def find_memory_program(name: str) -> MemoryProgram:
    """By name; ConfigError with the known ones for another."""
    if name not in MEMORY_PROGRAMS:
        raise ConfigError(unknown_name("memory program", name, MEMORY_PROGRAMS))
    return MEMORY_PROGRAMS[name]
