"""Bytes sent, worked out by hand for a small model. tests/dist/test_volume.py counts them on ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from llmtrain.parallel.config import ContextKind
from llmtrain.parallel.volume import Sizes, bytes_per_step

ALONE = Sizes(
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    vocab_size=96,
    num_layers=2,
    weights=((96 * 32, 80 * 33), (32, 32)),
    micro_batch_rows=2,
    seq_len=24,
    num_micro_batches=4,
    element_bytes=4,
)
X = 2 * 24 * 32 * 4


def test_one_rank_sends_nothing():
    assert bytes_per_step(ALONE) == {}


def test_tp_reduces_at_every_border_and_gathers_three_numbers_a_position():
    # a block: 2 leave forward, 2 enter backward; the embedding's leave, the head's enter
    expected = {"all_reduce": 4 * (2 * 4 + 2) * X, "all_gather": 4 * 2 * 24 * 3 * 4}
    assert bytes_per_step(replace(ALONE, tp_size=2)) == {"tp": expected}


def test_recomputation_repeats_attentions_leave_alone():
    tp = replace(ALONE, tp_size=2)
    kept = bytes_per_step(tp)["tp"]["all_reduce"]
    assert bytes_per_step(replace(tp, recompute_every=1))["tp"]["all_reduce"] - kept == 4 * 2 * X
    assert bytes_per_step(replace(tp, recompute_every=2))["tp"]["all_reduce"] - kept == 4 * 1 * X


def test_a_stage_recomputes_by_the_blocks_number_in_the_model():
    later = replace(ALONE, first_layer=3, num_layers=4, recompute_every=3)  # 3, 4, 5, 6: 3 and 6
    assert later.num_recomputed == 2
    assert replace(later, first_layer=4).num_recomputed == 1
    assert replace(later, recompute_every=0).num_recomputed == 0


def test_sequence_parallelism_sends_half_in_gathers_and_sums_the_norms_gradients():
    volume = bytes_per_step(replace(ALONE, tp_size=2, sequence_parallel=True))["tp"]
    norms = (2 * 2 + 1) * 32 * 4
    assert volume == {
        "all_reduce": 4 * norms,
        "all_gather": 4 * (10 * X // 2 + 2 * 24 * 3 * 4),
        "reduce_scatter": 4 * 10 * X,
    }


def test_ranks_that_share_a_key_value_head_sum_its_gradient():
    shared = bytes_per_step(replace(ALONE, tp_size=2, num_kv_heads=1))["tp"]["all_reduce"]
    alone = bytes_per_step(replace(ALONE, tp_size=2))["tp"]["all_reduce"]
    assert shared - alone == 4 * 2 * 2 * (8 * 32) * 4


def test_context_by_heads_moves_queries_keys_values_and_the_result_twice():
    cp = replace(ALONE, cp_size=2, dp_size=1, zero_stage=0)
    each_head = 2 * 12 * 8 * 4
    assert bytes_per_step(cp)["cp"] == {"all_to_all": 4 * 2 * 2 * each_head * (4 + 2 + 2 + 4)}
    # one key/value head for four query heads on two ranks: each rank needs it
    assert bytes_per_step(replace(cp, num_kv_heads=1))["cp"] == bytes_per_step(cp)["cp"]


def test_the_rings_gradients_come_home_in_fp32():
    ring = replace(ALONE, cp_size=4, context=ContextKind.sequence, element_bytes=2)
    kv = 2 * 6 * 2 * 2 * 8
    a_block = (3 + 3) * kv * 2 + 4 * kv * 4
    assert bytes_per_step(ring)["cp"] == {"send": 4 * 2 * a_block}
    again = bytes_per_step(replace(ring, recompute_every=1))["cp"]["send"]
    assert again == 4 * 2 * (a_block + 3 * kv * 2)


def test_a_middle_stage_sends_activations_on_and_gradients_back():
    told = 2 * 8 * 2 * 24 + 4 * 2 * 24
    pp = replace(ALONE, pp_size=3, has_embedding=False, has_head=False)
    assert bytes_per_step(pp) == {"pp": {"send": 4 * (2 * X + told)}}
    last = replace(pp, has_head=True, tie_embeddings=True)
    assert bytes_per_step(last) == {"pp": {"send": 4 * X, "all_reduce": 96 * 32 * 4}}
    assert bytes_per_step(replace(pp, tie_embeddings=True)) == bytes_per_step(pp)


def test_zero_stages_differ_in_how_often_gradients_and_weights_travel():
    count = 96 * 32 + 80 * 33 + 64
    by_stage = {stage: bytes_per_step(replace(ALONE, dp_size=4, zero_stage=stage)) for stage in range(4)}
    assert by_stage[0] == {"data": {"all_reduce": 4 * count}}
    partitions = (96 * 32 + 80 * 33) // 4 + 64 // 4
    assert by_stage[1] == {"data": {"all_gather": 4 * partitions, "all_reduce": 4 * count}}
    assert by_stage[2] == {"data": {"all_gather": 4 * partitions, "all_reduce": 4 * 4 * count}}
    assert by_stage[3] == {"data": {"all_gather": 4 * count // 4, "reduce_scatter": 4 * 4 * count}}
    split = bytes_per_step(replace(ALONE, dp_size=4, zero_stage=3, persistence_threshold=33))
    assert split["data"]["all_gather"] == 4 * (4 * (96 * 32 + 80 * 33) // 4 + 64 // 4)


def test_partitions_and_pieces_are_rounded_up():
    odd = replace(ALONE, dp_size=4, weights=((9, 5),))
    assert bytes_per_step(odd)["data"] == {"all_gather": 4 * 4, "all_reduce": 4 * 14}
    bf16 = replace(odd, element_bytes=2)
    assert bytes_per_step(bf16)["data"] == {"all_gather": 2 * 4, "all_reduce": 2 * 16}
    whole = bytes_per_step(replace(odd, zero_stage=3))["data"]
    assert whole == {"all_gather": 4 * (3 + 2), "reduce_scatter": 4 * 4 * 4 * (3 + 2)}


def test_volumes_load_without_torch():
    code = "import sys, llmtrain.parallel.volume; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
