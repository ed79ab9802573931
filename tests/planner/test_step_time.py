"""Parts of a step's seconds against sums by hand, limits and orders."""

import time
from dataclasses import fields, replace

import numpy as np
import pytest

from llmtrain.parallel import volume
from llmtrain.planner.cost import collectives, schedule
from llmtrain.planner.cost.candidates import FULL, NO_RECOMPUTE, SELECTIVE, candidates, num_params
from llmtrain.planner.cost.step_time import (
    OPTIMIZER_BYTES,
    Constants,
    Software,
    StepTime,
    rank_expert_params,
    rank_params,
    step_time,
)

H100 = {
    "peak_flops": 989.5e12,
    "mem_bytes_s": 3350e9,
    "num_multiprocessors": 132,
    "gpus_per_node": 8,
    "link_bytes_s": 450e9,
    "node_bytes_s": 400e9,
}
LLAMA_7B = {
    "num_layers": 32,
    "d_model": 4096,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_width": 128,
    "ffn_width": 11008,
    "is_gated": 1,
    "vocab_size": 32000,
}
IDEAL = Constants(
    gemm_efficiency=1.0,
    attention_efficiency=1.0,
    memory_efficiency=1e9,
    launch_s=0.0,
    link_efficiency=1e9,
    node_efficiency=1e9,
    contention=0.0,
    fixed_s=0.0,
    call_s=0.0,
)
"""Nothing takes time but FLOPs."""


def rows(**columns):
    return candidates(**{**LLAMA_7B, **H100, "seq_len": 4096, "micro_batch": 1, **columns})


def seconds(software=None, k=None, **columns):
    return step_time(rows(**columns), software or Software(), k or Constants())


def total(software=None, k=None, **columns):
    return float(seconds(software, k, **columns).total[0])


def many(num_rows, **columns):
    generator = np.random.Generator(np.random.Philox(key=7))
    drawn = {
        name: generator.choice(np.array(values, dtype=float), num_rows)
        for name, values in {
            "pp": (1, 2, 4),
            "dp": (1, 2, 16, 64),
            "cp": (1, 2),
            "tp": (1, 2, 8, 16),
            "zero_stage": (0, 1, 2, 3),
            "micro_batch": (1, 2, 8),
            "grad_accum": (1, 8, 32),
            "recompute": (NO_RECOMPUTE, SELECTIVE, FULL),
            "sequence_parallel": (0, 1),
        }.items()
    }
    return rows(**{**drawn, **columns})


def test_parts_are_not_negative_and_add_up_to_the_total():
    found = step_time(many(2000), Software(overlaps_tp_backward=True, dp_overlap=1.0), Constants())
    parts = [getattr(found, each.name) for each in fields(StepTime)]
    assert all((part >= 0).all() and np.isfinite(part).all() for part in parts)
    assert np.allclose(found.total, sum(parts), rtol=1e-12)


def test_with_ideal_constants_a_step_is_its_flops():
    """6 N a token without the embedding, and attention's 12 L D S."""
    c = rows(micro_batch=16)
    tokens = 16 * 4096
    multiplied = num_params(c)[0] - 32000 * 4096
    flops = 6 * multiplied * tokens + 12 * 32 * 4096 * 4096 * tokens
    software = Software(attention_backward=2.0)
    found = step_time(c, software, IDEAL).total[0]
    # finite depth and last waves cost some per cent at this size; norms are counted as if multiplied
    assert 1.0 < found * 989.5e12 / flops < 1.10


def test_a_rank_of_one_has_all_weights():
    c = rows()
    assert rank_params(c)[0] == pytest.approx(num_params(c)[0], rel=1e-5)
    split = rows(tp=2, pp=4)
    assert rank_params(split)[0] < rank_params(c)[0] / 7


def test_full_recomputation_is_another_forward_pass():
    plain, full = seconds(recompute=NO_RECOMPUTE), seconds(recompute=FULL)
    forward = full.recompute[0]
    assert plain.recompute[0] == 0
    # a backward pass has twice the products, 2.5 times attention and 1.5 times the elementwise bytes
    by_hand = plain.products[0] / 3 + plain.attention[0] / 3.5 + plain.elementwise[0] / 2.5
    assert forward == pytest.approx(by_hand, rel=0.05)
    stops = seconds(Software(checkpoint_stops_early=True), recompute=FULL).recompute[0]
    assert forward * 0.6 < stops < forward * 0.85


def test_selective_recomputation_is_what_the_program_says():
    nothing = Software(selective_attention=False)
    assert seconds(nothing, recompute=SELECTIVE).recompute[0] == 0
    found = seconds(recompute=SELECTIVE)
    assert found.recompute[0] == pytest.approx(found.attention[0] / 3.5)
    lean = replace(nothing, selective_elementwise=True)
    found = seconds(lean, recompute=SELECTIVE)
    assert found.recompute[0] == pytest.approx(found.elementwise[0] / 2.5)


def test_the_host_is_hidden_by_long_kernels_and_decides_over_short_ones():
    k = Constants(launch_s=1e-3)
    assert seconds(k=k, micro_batch=16).launches[0] < 0.01 * total(k=k, micro_batch=16)
    tiny = {"d_model": 128, "ffn_width": 512, "num_heads": 4, "num_kv_heads": 4, "head_width": 32}
    found = seconds(k=k, **tiny, seq_len=128, vocab_size=512)
    assert found.launches[0] + found.products[0] == pytest.approx(32 * 2.5e-3, rel=0.05)


def test_on_a_cpu_launches_come_on_top():
    k = Constants(launch_s=1e-3, is_synchronous=True)
    assert seconds(k=k, micro_batch=16).launches[0] == pytest.approx(32 * 2.5e-3)


def test_tensor_parallel_bytes_are_two_all_reduces_a_pass():
    k = replace(IDEAL, link_efficiency=1.0)
    found = seconds(k=k, tp=8).tp[0]
    wire = 2 * 7 / 8 * 2 * 4096 * 4096 / 450e9
    hops = 2 * 7 * collectives.HOP_S
    assert found == pytest.approx(32 * 2 * 2 * (wire + hops))
    half = seconds(Software(tp_overlap=0.5), k, tp=8).tp[0]
    assert half == pytest.approx(found / 2)
    slow = replace(k, gemm_efficiency=0.5)
    hidden = seconds(Software(overlaps_tp_backward=True), slow, tp=8).tp[0]
    assert hidden == pytest.approx(found / 2)  # all of a backward pass's
    assert seconds(Software(element_bytes=4.0), k, tp=8).tp[0] > 1.7 * found


def test_a_tensor_parallel_group_over_two_nodes_pays_for_the_network():
    inside, across = total(tp=8, num_layers=8), total(tp=16, num_layers=8, node_bytes_s=25e9)
    assert across > inside


@pytest.mark.parametrize(
    ("zero_stage", "bytes_a_weight", "micro_batches_that_pay"),
    [(0, 2 * 2, 1), (1, 2 + 2, 1), (2, 2, 5), (3, 3 * 2, 5)],
)
def test_data_parallel_bytes(zero_stage, bytes_a_weight, micro_batches_that_pay):
    k = replace(IDEAL, link_efficiency=1.0)
    c = rows(dp=8, zero_stage=zero_stage, grad_accum=5)
    wire = 7 / 8 * rank_params(c)[0] / 450e9
    once = 2 * wire if zero_stage == 2 else 0.0  # weights are gathered at the step's end
    by_hand = micro_batches_that_pay * bytes_a_weight * wire + once
    assert step_time(c, Software(), k).dp[0] == pytest.approx(by_hand, rel=0.01)


def test_data_parallel_bytes_hide_behind_a_micro_batch():
    overlapped = Software(dp_overlap=1.0)
    fast = seconds(overlapped, Constants(contention=0.0), dp=8, micro_batch=8).dp[0]
    slow = seconds(overlapped, Constants(contention=0.0), dp=64, micro_batch=8, node_bytes_s=1e9).dp[0]
    bare = seconds(Software(), Constants(), dp=64, micro_batch=8, node_bytes_s=1e9).dp[0]
    assert fast == 0
    assert 0 < slow < bare
    contended = seconds(overlapped, Constants(contention=0.5), dp=8, micro_batch=8).dp[0]
    assert contended == pytest.approx(seconds(dp=8, micro_batch=8).dp[0] / 2)


def test_the_bubble_is_the_schedules():
    k = replace(IDEAL, launch_s=0.0)
    plain = seconds(k=k, pp=4, grad_accum=8)
    work = plain.products[0] + plain.attention[0]
    assert plain.bubble[0] == pytest.approx(work * 3 / 8)
    chunked = seconds(k=k, pp=4, vpp=2, grad_accum=8, schedule=schedule.INTERLEAVED)
    assert chunked.bubble[0] == pytest.approx(plain.bubble[0] / 2)


def test_uneven_layers_make_the_fullest_stage_wait_for_none():
    even, uneven = total(num_layers=32, pp=4, grad_accum=8), total(num_layers=29, pp=4, grad_accum=8)
    assert uneven == pytest.approx(even, rel=0.01)  # 8 layers on the fullest stage in both


def test_a_model_of_one_expert_costs_as_much_as_a_dense_one():
    moe = {"num_moe_layers": 32, "num_experts": 1, "experts_per_token": 1, "expert_width": 11008}
    dense, one = seconds(), seconds(**moe)
    assert one.products[0] == pytest.approx(dense.products[0])
    slower = seconds(k=Constants(expert_efficiency=0.5), **moe)
    assert slower.products[0] > one.products[0] * 1.5


def test_experts_exchange_tokens_and_once_a_node_sends_less():
    moe = {
        "num_moe_layers": 32, "num_experts": 64, "experts_per_token": 8, "expert_width": 1408,
        "dp": 64, "ep": 64,
    }  # fmt: skip
    every = seconds(**moe).ep[0]
    once = seconds(Software(sends_once_a_node=True), **moe).ep[0]
    assert seconds(dp=64).ep[0] == 0
    assert 0.5 * every < once < 0.8 * every  # 8 experts lie on 5.25 of 8 nodes in the mean


def test_experts_optimizer_states_lie_on_the_ranks_that_hold_the_same_ones():
    moe = {"num_moe_layers": 32, "num_experts": 64, "experts_per_token": 2, "expert_width": 1408}
    c = rows(**moe, dp=64, ep=16)
    experts, everything = rank_expert_params(c)[0], rank_params(c)[0]
    assert experts == pytest.approx(32 * 64 / 16 * 3 * 4096 * 1408)
    found = step_time(c, Software(), IDEAL)
    owned = (everything - experts) / 64 + experts / 4  # 64 / 16 copies of each expert
    assert found.optimizer[0] == pytest.approx(OPTIMIZER_BYTES * owned / 3350e9)
    whole = step_time(rows(**moe, dp=64, ep=16, zero_stage=0), Software(), IDEAL)
    assert whole.optimizer[0] == pytest.approx(OPTIMIZER_BYTES * everything / 3350e9)


def test_experts_gradients_go_round_the_ranks_that_hold_the_same_ones():
    moe = {"num_moe_layers": 32, "num_experts": 64, "experts_per_token": 2, "expert_width": 1408}
    k = replace(IDEAL, link_efficiency=1.0)
    c = rows(**moe, dp=8, ep=8)
    dense = rank_params(c)[0] - rank_expert_params(c)[0]
    assert step_time(c, Software(), k).dp[0] == pytest.approx((2 + 2) * 7 / 8 * dense / 450e9, rel=0.01)
    c = rows(**moe, dp=8, ep=2)
    by_hand = (2 + 2) * (7 / 8 * dense + 3 / 4 * rank_expert_params(c)[0]) / 450e9
    assert step_time(c, Software(), k).dp[0] == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize(("heads", "kv_heads", "tp", "cp"), [(32, 32, 1, 8), (32, 8, 2, 4), (32, 2, 4, 2)])
def test_heads_exchanged_over_context_are_the_engines_bytes(heads, kv_heads, tp, cp):
    """parallel/volume.py counts what a rank deals out; (cp - 1) / cp of that leaves it."""
    k = replace(IDEAL, link_efficiency=1.0)
    found = seconds(Software(context="heads"), k, cp=cp, tp=tp, num_heads=heads, num_kv_heads=kv_heads)
    sizes = volume.Sizes(
        d_model=4096,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=128,
        vocab_size=32000,
        num_layers=32,
        weights=(),
        micro_batch_rows=1,
        seq_len=4096,
        num_micro_batches=1,
        element_bytes=2,
        tp_size=tp,
        cp_size=cp,
    )
    (sent,) = volume.cp_bytes(sizes).values()
    assert found.cp[0] == pytest.approx(sent * (cp - 1) / cp / 450e9)


def test_exchanged_heads_do_not_grow_with_context_ranks_and_gathered_keys_do():
    k = replace(IDEAL, link_efficiency=1.0)
    four, eight = (rows(cp=cp, seq_len=4096 * cp) for cp in (4, 8))  # as many tokens a rank
    heads, gathers = Software(context="heads"), Software()
    assert step_time(eight, heads, k).cp[0] < 1.2 * step_time(four, heads, k).cp[0]
    assert step_time(eight, gathers, k).cp[0] > 1.9 * step_time(four, gathers, k).cp[0]


def test_heads_that_do_not_divide_are_not_exchanged():
    odd = {"cp": 3, "seq_len": 4098}
    assert seconds(Software(context="heads"), **odd).cp[0] == seconds(**odd).cp[0]


def test_experts_hide_behind_another_micro_batch_under_dual_pipe_alone():
    moe = {
        "num_moe_layers": 32, "num_experts": 64, "experts_per_token": 2, "expert_width": 1408,
        "dp": 8, "ep": 8, "pp": 4, "grad_accum": 16,
    }  # fmt: skip
    dual = {"schedule": schedule.DUAL_PIPE_V, "vpp": 2}
    overlapped, k = Software(overlaps_experts=True), Constants(contention=0.0)
    assert seconds(overlapped, k, **moe, **dual).ep[0] == 0
    assert seconds(Software(), k, **moe, **dual).ep[0] > 0
    assert seconds(overlapped, k, **moe).ep[0] == seconds(Software(), k, **moe).ep[0] > 0


def test_unbalanced_context_waits_for_its_last_rank():
    uneven = seconds(Software(balances_context=False), cp=4).attention[0]
    assert uneven == pytest.approx(seconds(cp=4).attention[0] * 1.75)


def test_attention_without_a_fused_kernel_is_slower_on_long_rows():
    assert total(Software(is_fused_attention=False), seq_len=16384) > total(seq_len=16384)


@pytest.mark.parametrize(
    ("column", "slower"),
    [
        ("peak_flops", 500e12),
        ("mem_bytes_s", 2000e9),
        ("link_bytes_s", 100e9),
        ("node_bytes_s", 100e9),
    ],
)
def test_slower_hardware_is_never_faster(column, slower):
    software = Software(dp_overlap=1.0, overlaps_tp_backward=True)
    k = Constants(contention=0.0)  # a slow ring slows the computation beside it less
    fast, slow = many(1000), many(1000, **{column: slower})
    gain = step_time(fast, software, k).total / step_time(slow, software, k).total
    assert gain.max() < 1.002  # where the host decides, longer products hide more of a collective
    assert gain.min() < 0.99


def test_rows_do_not_depend_on_their_neighbours():
    c = many(300)
    alone = [step_time(c.rows(np.array([at])), Software(), Constants()).total[0] for at in (0, 17, 299)]
    together = step_time(c, Software(), Constants()).total
    assert np.allclose(together[[0, 17, 299]], alone, rtol=1e-12)


def test_60000_rows_take_less_than_0_3_seconds():
    moe = {"num_moe_layers": 30, "num_experts": 64, "experts_per_token": 6, "expert_width": 1408}
    c = many(60000, **moe, ep=8)
    step_time(c, Software(), Constants())
    took = []
    for _ in range(3):
        begin = time.process_time()
        step_time(c, Software(dp_overlap=1.0), Constants())
        took.append(time.process_time() - begin)
    assert min(took) < 0.3
