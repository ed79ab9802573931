"""Shapes that come out of the search are ones that people train."""

import math

import pytest

from llmtrain.model.size import num_params
from llmtrain.planner import shape
from llmtrain.planner.shape import candidates, choose_shape, shape_of

# num_params, d_model, num_layers of arXiv:2203.15556, table A9: our bounds must not shut them out
TABLE_A9 = [(44e6, 512, 8), (106e6, 640, 16), (425e6, 1280, 18), (1266e6, 2048, 22), (16183e6, 5120, 47)]


@pytest.mark.parametrize("target", [2e6, 1e7, 1e8, 1e9, 7e9, 7e10, 4e11])
def test_chosen_shape_has_nearly_the_wished_parameters(target):
    shape = choose_shape(target, vocab_size=8192 if target < 1e9 else 32_000)
    assert shape.size_ratio == pytest.approx(num_params(shape.model) / target)
    assert 0.8 < shape.size_ratio < 1.25


def test_a_wish_below_the_smallest_shape_gives_the_smallest():
    shape = choose_shape(1000, vocab_size=8192)
    assert num_params(shape.model) == min(num_params(model) for model in candidates(vocab_size=8192))
    assert shape.size_ratio > 100


def test_every_candidate_keeps_the_rules():
    for model in candidates(vocab_size=32_000):
        assert model.num_layers >= 2
        assert model.num_layers == 2 or 40 <= model.d_model / model.num_layers <= 130
        assert model.width_per_head in (32, 64, 128)
        multiple = 256 if model.d_model >= 1024 else 64
        assert model.ffn_width % multiple == 0
        assert 0 <= model.ffn_width - 8 / 3 * model.d_model < multiple
        assert model.num_kv_heads == (8 if model.d_model >= 4096 else model.num_heads)


@pytest.mark.parametrize(("size", "d_model", "num_layers"), TABLE_A9)
def test_chinchillas_shapes_are_within_the_aspect_bounds(size, d_model, num_layers):
    assert shape.ASPECT_LOW <= d_model / num_layers <= shape.ASPECT_HIGH, size


def test_preferred_aspect_goes_through_both_ends_of_table_a9():
    assert shape.preferred_aspect(512) == 512 / 8
    assert shape.preferred_aspect(5120) == pytest.approx(5120 / 47, rel=0.01)


def test_embeddings_are_shared_only_while_they_weigh_much():
    assert shape_of(d_model=256, num_layers=4, vocab_size=8192).tie_embeddings
    assert not shape_of(d_model=4096, num_layers=32, vocab_size=32_000).tie_embeddings


def test_the_7b_shape_is_llamas_but_for_rounding():
    # LLaMA 7B: 32 layers x 4096, 32 heads (arXiv:2302.13971, table 2); ffn 2/3 of 4 x 4096 (section 2.2),
    # which the released weights round up to 11008
    model = shape_of(d_model=4096, num_layers=32, vocab_size=32_000)
    assert (model.num_heads, model.width_per_head) == (32, 128)
    assert abs(math.log(model.ffn_width / 11_008)) < 0.01


@pytest.mark.parametrize("target", [1e9, 3e9, 7e9, 30e9, 70e9, 400e9])
def test_large_shapes_have_heads_and_layers_that_ranks_can_share(target):
    model = choose_shape(target, vocab_size=32_000).model
    assert model.num_heads % 4 == 0
    assert model.num_layers % 2 == 0
