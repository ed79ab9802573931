"""The keys of DeepSpeed 0.19.8's configuration, and which of them a user may add. stdlib only.

DeepSpeed itself takes unknown keys in silence, at the top level and in several sections: a misspelt
zero_optimization is a run at stage 0. A test compares these tables with what DeepSpeed reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmtrain.errors import unknown_name

Section = dict[str, "Section | None"]
"""Key -> its own keys; None where a value of any kind follows."""


def _keys(names: str) -> Section:
    return dict.fromkeys(names.split())


SCHEMA: Section = {
    **_keys(
        "communication_data_type dataloader_drop_last disable_allgather disable_python_gc dump_state "
        "gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor "
        "log_level managed_gradient_accumulation memory_breakdown prescale_gradients "
        "seq_parallel_communication_data_type steps_per_print train_batch_size "
        "train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size "
        "wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        # sections that are refused as a whole
        "activation_checkpointing autotuning bfloat16 checkpoint comet csv_monitor data_efficiency "
        "data_parallel_size datastates_ckpt expert_parallel hybrid_engine optimizer scheduler "
        "sequence_parallel_size tensor_parallel tensorboard torch_autocast wandb"
    ),
    "aio": _keys("block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds"),
    "bf16": _keys(
        "bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled "
        "immediate_grad_update"
    ),
    "comms_logger": _keys("debug enabled prof_all prof_ops verbose"),
    "compile": _keys(
        "autoep_non_moe debug_log deepcompile double_buffer free_activation free_activation_threshold "
        "keep_all_input_tensors keep_int_input_tensors offload_activation offload_activation_pin_memory "
        "offload_opt_states offload_parameters passes symmetric_memory sync_after_allgather "
        "sync_after_reduce sync_before_allgather sync_before_reduce"
    ),
    "data_types": _keys("buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype"),
    "flops_profiler": _keys(
        "detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules"
    ),
    "fp16": _keys(
        "auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis "
        "initial_scale_power loss_scale loss_scale_window min_loss_scale"
    ),
    "pipeline": _keys(
        "activation_checkpoint_interval grad_partitioned partition pipe_partitioned seed_layers stages "
        "use_reentrant"
    ),
    "timers": {"throughput": _keys("enabled synchronized")},
    "weight_quantization": _keys("enabled num_bits post_init_quant q_groups q_type quantized_initialization"),
    "zero_optimization": {
        **_keys(
            "allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload "
            "cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks "
            "ignore_unused_parameters legacy_stage1 load_from_fp32_weights log_trace_cache_warnings "
            "memory_efficient_linear overlap_comm override_module_apply parameter_alignment "
            "pipeline_loading_checkpoint reduce_bucket_size reduce_scatter round_robin_gradients "
            "save_muon_momentum_buffer_in_memory stage stage3_gather_fp16_weights_on_model_save "
            "sub_group_size use_multi_rank_bucket_allreduce zero_hpz_partition_size "
            "zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights "
            # each under its name and its alias
            "allgather_sequential stage3_allgather_sequential "
            "gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save "
            "max_live_parameters stage3_max_live_parameters "
            "max_reuse_distance stage3_max_reuse_distance "
            "model_persistence_threshold stage3_model_persistence_threshold "
            "module_granularity_threshold stage3_module_granularity_threshold "
            "param_persistence_threshold stage3_param_persistence_threshold "
            "prefetch_bucket_size stage3_prefetch_bucket_size "
            "use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params"
        ),
        "leaf_module": _keys("classes name_suffixes names"),
        "offload_optimizer": _keys(
            "buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read "
            "pipeline_write ratio super_offload"
        ),
        "offload_param": _keys("buffer_count buffer_size device max_in_cpu nvme_path pin_memory"),
        "zenflow": _keys(
            "auto_ratio full_warm_up_rounds offload overlap_step pt_reserved_cores_perc select_interval "
            "select_strategy steps_per_epoch topk_ratio update_interval"
        ),
    },
}
"""Every key that DeepSpeed reads, where it is a section with the section's keys."""

REMOVED: dict[str, str] = {
    "amp": "set train.precision=bf16",
    "compression_training": "",
    "curriculum_learning": "a growing batch is train.batch_ramp",
    "eigenvalue": "",
    "elasticity": "llmtrain resumes on any number of ranks without it",
    "graph_harvesting": "",
    "nebula": "llmtrain writes its own checkpoints, every save.every_steps",
    "progressive_layer_drop": "",
    "quantize_training": "",
    "sparse_attention": "",
    "sparse_gradients": "",
    "zero_optimization.mics_hierarchical_params_gather": "",
    "zero_optimization.mics_shard_size": "",
    "zero_optimization.zeropp_loco_param": "",
}
"""Keys of earlier versions, which 0.19.8 refuses with an exception -> what to do instead, if anything."""

_CHECKPOINTS = "llmtrain writes its own checkpoints; set save.every_steps and save.keep_last"
_LOOP = "llmtrain's loop records a run itself; set tracking.*"
_PRECISION = "set train.precision"

REFUSED: dict[str, str] = {
    "activation_checkpointing": "set train.recompute_every",
    "autotuning": "it is for DeepSpeed's launcher; `llmtrain plan` chooses sizes",
    "bf16.enabled": _PRECISION,
    "bfloat16": "set train.precision, and the rest of the section under its newer name, bf16",
    "checkpoint": _CHECKPOINTS,
    "comet": _LOOP,
    "csv_monitor": _LOOP,
    "data_efficiency": "llmtrain's loader chooses the rows; a growing batch is train.batch_ramp",
    "data_parallel_size": "it is the ranks that parallel.pp_size, cp_size and tp_size leave",
    "dataloader_drop_last": "llmtrain's loader chooses the rows, and every batch is full",
    "datastates_ckpt": _CHECKPOINTS,
    "expert_parallel": "llmtrain's models have no experts",
    "fp16.enabled": _PRECISION,
    "gradient_accumulation_steps": "it follows from train.global_batch_rows and train.micro_batch_rows",
    "gradient_allreduce_op": "llmtrain scales losses for a mean over ranks",
    "gradient_clipping": "set train.grad_clip",
    "hybrid_engine": "it generates text between training steps, and llmtrain does not",
    "managed_gradient_accumulation": "llmtrain says itself which micro batch is a step's last",
    "optimizer": "set optimizer.*",
    "pipeline.activation_checkpoint_interval": "set train.recompute_every",
    "pipeline.partition": "llmtrain cuts pipeline stages by the cost of blocks",
    "pipeline.seed_layers": "llmtrain makes every initial weight from run.seed and its name",
    "pipeline.stages": "set parallel.pp_size",
    "scheduler": "set schedule.*",
    "sequence_parallel_size": "set parallel.cp_size",
    "tensor_parallel": "set parallel.tp_size",
    "tensorboard": _LOOP,
    "torch_autocast": _PRECISION,
    "train_batch_size": "set train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_rows",
    "wandb": _LOOP,
    "zero_optimization.cpu_offload": "DeepSpeed has renamed it; set zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "DeepSpeed has renamed it; set zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed has renamed it; set pin_memory in "
    "zero_optimization.offload_param or offload_optimizer",
    "zero_optimization.stage": "set parallel.zero_stage",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
}
"""Keys that would contradict llmtrain, or do nothing under it -> what to do instead."""

_NAME = "parallel.deepspeed"


def check_extra(extra: Mapping[str, Any], ours: Collection[str]) -> list[str]:
    """A sentence for every key of `extra` that cannot be handed to DeepSpeed. Values are not looked at.

    Args:
        extra: parallel.deepspeed, nested as DeepSpeed's own configuration.
        ours: Keys that llmtrain writes itself, with dots: zero_optimization.stage.
    """
    return _check(extra, SCHEMA, "", frozenset(ours))


def _check(given: Mapping[str, Any], known: Section, prefix: str, ours: frozenset[str]) -> list[str]:
    found = []
    for key, value in given.items():
        path = f"{prefix}{key}"
        if path in REMOVED:
            instead = f"; {REMOVED[path]}" if REMOVED[path] else ""
            found.append(f"{_NAME}.{path} is of an earlier DeepSpeed: 0.19.8 refuses it; remove it{instead}")
        elif path in REFUSED:
            found.append(f"{_NAME}.{path} is not taken: {REFUSED[path]}")
        elif key not in known:
            where = f"{_NAME}.{prefix}".rstrip(".")
            found.append(unknown_name(f"key of {where}", str(key), known))
        elif path in ours:
            found.append(f"{_NAME}.{path} is not taken: llmtrain sets it; remove it")
        elif (section := known[key]) is not None:
            if isinstance(value, Mapping):
                found += _check(value, section, f"{path}.", ours)
            else:
                found.append(
                    f"{_NAME}.{path}={value} is not a section; it holds any of {', '.join(sorted(section))}"
                )
    return found
