"""Layer graphs: counts against published figures and transformers' own modules, FLOPs against the papers'."""

import dataclasses
import math

import pytest

from llmtrain.errors import ConfigError
from llmtrain.model import size
from llmtrain.model.config import Family, ModelConfig
from llmtrain.planner.cost import architecture, candidates
from llmtrain.planner.cost.architecture import (
    build,
    find_model,
    flops_per_token,
    from_model_config,
    hoffmann_flops_per_token,
    model_names,
    num_active_params,
    num_multiplied_params,
    num_non_embedding_params,
    num_params,
    params_by_part,
    weights,
)

ALL_PARAMS = {
    # sums over the tensors of the released checkpoints; each family is also built by transformers below
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
    "llama1_7b": 6_738_415_616,
    "llama1_13b": 13_015_864_320,
    "llama1_30b": 32_528_943_616,
    "llama1_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "tinyllama_1b": 1_100_048_384,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v3": 671_026_419_200,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "bloom_176b": 176_247_271_424,
}
NON_EMBEDDING_PARAMS = {  # README of EleutherAI/pythia
    "pythia_70m": 18_915_328,
    "pythia_160m": 85_056_000,
    "pythia_410m": 302_311_424,
    "pythia_1b": 805_736_448,
    "pythia_1_4b": 1_208_602_624,
    "pythia_2_8b": 2_517_652_480,
    "pythia_6_9b": 6_444_163_072,
    "pythia_12b": 11_327_027_200,
}
WITHOUT_INPUT_EMBEDDING = {  # allenai/OLMo-ladder@67a3f44 src/scaling/utils.py
    "olmo2_190m": 190_354_176,
    "olmo2_370m": 371_262_464,
    "olmo2_600m": 597_382_464,
    "olmo2_760m": 758_220_288,
    "olmo2_1b": 1_279_395_840,
    "olmo2_3b": 3_169_537_280,
    "olmo2_7b": 6_887_575_552,
    "olmo2_13b": 13_202_396_160,
}
ROUNDED = {  # as printed
    "gpt3_125m": "125e6 1e6",  # arXiv:2005.14165, table D.1
    "gpt3_350m": "356e6 1e6",
    "gpt3_760m": "760e6 1e6",
    "gpt3_2_7b": "2.65e9 1e7",
    "gpt3_6_7b": "6.66e9 1e7",
    "gpt3_175b": "174.6e9 1e8",
    "palm_8b": "8.63e9 1e7",  # arXiv:2204.02311, table 1
    "palm_62b": "62.50e9 1e7",
    "palm_540b": "540.35e9 2e7",  # 540.354 without the norms' scales
    "gopher_280b": "280e9 1e9",
    "chinchilla_70b": "70e9 1e9",
    "megatron_22b": "22e9 1e9",
    "megatron_530b": "529.6e9 1e8",  # arXiv:2104.04473, table 1
    "megatron_1t": "1008.0e9 1e8",
    "deepseek_v2": "236e9 1e9",
    "mixtral_8x22b": "141e9 1e9",
}
ACTIVE = {  # arXiv:2401.04088, 2412.19437, 2405.04434, 2505.09388
    "mixtral_8x7b": "13e9 1e9",
    "deepseek_v3": "37e9 1e9",
    "deepseek_v2": "21e9 1e9",
    "qwen3_30b_a3b": "3.3e9 1e8",
}
TABLE_A9 = [  # millions, d_model, ffn_width, head_width, num_heads, num_layers: arXiv:2203.15556
    (44, 512, 2048, 64, 8, 8), (57, 576, 2304, 64, 9, 9), (74, 640, 2560, 64, 10, 10),
    (90, 640, 2560, 64, 10, 13), (106, 640, 2560, 64, 10, 16), (117, 768, 3072, 64, 12, 12),
    (140, 768, 3072, 64, 12, 15), (163, 768, 3072, 64, 12, 18), (175, 896, 3584, 64, 14, 14),
    (196, 896, 3584, 64, 14, 16), (217, 896, 3584, 64, 14, 18), (251, 1024, 4096, 64, 16, 16),
    (278, 1024, 4096, 64, 16, 18), (306, 1024, 4096, 64, 16, 20), (425, 1280, 5120, 128, 10, 18),
    (489, 1280, 5120, 128, 10, 21), (509, 1408, 5632, 128, 11, 18), (552, 1280, 5120, 128, 10, 24),
    (587, 1408, 5632, 128, 11, 21), (632, 1536, 6144, 128, 12, 19), (664, 1408, 5632, 128, 11, 24),
    (724, 1536, 6144, 128, 12, 22), (816, 1536, 6144, 128, 12, 25), (893, 1792, 7168, 128, 14, 20),
    (1018, 1792, 7168, 128, 14, 23), (1143, 1792, 7168, 128, 14, 26), (1266, 2048, 8192, 128, 16, 22),
    (1424, 2176, 8704, 128, 17, 22), (1429, 2048, 8192, 128, 16, 25), (1593, 2048, 8192, 128, 16, 28),
    (1609, 2176, 8704, 128, 17, 25), (1731, 2304, 9216, 128, 18, 24), (1794, 2176, 8704, 128, 17, 28),
    (2007, 2304, 9216, 128, 18, 28), (2283, 2304, 9216, 128, 18, 32), (2298, 2560, 10240, 128, 20, 26),
    (2639, 2560, 10240, 128, 20, 30), (2980, 2560, 10240, 128, 20, 34), (3530, 2688, 10752, 128, 22, 36),
    (3802, 2816, 11264, 128, 22, 36), (4084, 2944, 11776, 128, 22, 36), (4516, 3072, 12288, 128, 24, 36),
    (6796, 3584, 14336, 128, 28, 40), (9293, 4096, 16384, 128, 32, 42), (11452, 4352, 17408, 128, 32, 47),
    (12295, 4608, 18432, 128, 36, 44), (12569, 4608, 18432, 128, 32, 47), (13735, 4864, 19456, 128, 32, 47),
    (14940, 4992, 19968, 128, 32, 49), (16183, 5120, 20480, 128, 40, 47),
]  # fmt: skip
# printed size, num_layers, d_model, ffn_width, num_heads, head_width, FLOPs / 6ND: arXiv:2203.15556
TABLE_A4 = [
    ('73M', 10, 640, 2560, 10, 64, 1.03), ('305M', 20, 1024, 4096, 16, 64, 1.1),
    ('552M', 24, 1280, 5120, 10, 128, 1.08), ('1.1B', 26, 1792, 7168, 14, 128, 1.04),
    ('1.6B', 28, 2048, 8192, 16, 128, 1.03), ('6.8B', 40, 3584, 14336, 28, 128, 0.99),
]  # fmt: skip
MPT_COUNTS = [  # model, seq_len, params: mosaicml/llm-foundry@8c8dd48 scripts/train/benchmarking/README.md
    ('125m', 512, 124131840), ('125m', 1024, 124525056), ('125m', 2048, 125311488),
    ('125m', 4096, 126884352), ('125m', 8192, 130030080), ('125m', 16384, 136321536),
    ('125m', 32768, 148904448), ('13b', 512, 12846090240), ('13b', 1024, 12848711680),
    ('13b', 2048, 12853954560), ('13b', 4096, 12864440320), ('13b', 8192, 12885411840),
    ('13b', 32768, 13011240960), ('1b', 512, 1312804864), ('1b', 1024, 1313853440),
    ('1b', 2048, 1315950592), ('1b', 4096, 1320144896), ('1b', 8192, 1328533504), ('1b', 16384, 1345310720),
    ('1b', 32768, 1378865152), ('1b', 65536, 1445974016), ('30b', 2048, 29975214080),
    ('30b', 8192, 30019254272), ('350m', 512, 354412544), ('350m', 1024, 354936832),
    ('350m', 2048, 355985408), ('350m', 4096, 358082560), ('350m', 8192, 362276864),
    ('350m', 16384, 370665472), ('350m', 32768, 387442688), ('3b', 512, 2647905280),
    ('3b', 1024, 2649216000), ('3b', 2048, 2651837440), ('3b', 4096, 2657080320), ('3b', 8192, 2667566080),
    ('3b', 16384, 2688537600), ('3b', 32768, 2730480640), ('3b', 65536, 2814366720),
    ('70b', 2048, 64862437376), ('760m', 512, 758111232), ('760m', 1024, 758897664),
    ('760m', 2048, 760470528), ('760m', 4096, 763616256), ('760m', 8192, 769907712),
    ('760m', 16384, 782490624), ('760m', 32768, 807656448), ('7b', 512, 6652567552),
    ('7b', 1024, 6654664704), ('7b', 2048, 6658859008), ('7b', 4096, 6667247616), ('7b', 8192, 6684024832),
    ('7b', 16384, 6717579264), ('7b', 65536, 6918905856),
]  # fmt: skip


def chinchilla(d_model, ffn_width, head_width, num_heads, num_layers):
    return build(
        "gopher",
        d_model=d_model,
        ffn_width=ffn_width,
        head_width=head_width,
        num_heads=num_heads,
        num_layers=num_layers,
        vocab_size=32_000,
    )


@pytest.mark.parametrize("name", ALL_PARAMS)
def test_all_parameters_are_the_published_ones(name):
    assert num_params(find_model(name)) == ALL_PARAMS[name]


@pytest.mark.parametrize("name", NON_EMBEDDING_PARAMS)
def test_pythias_parameters_without_embeddings_are_the_published_ones(name):
    assert num_non_embedding_params(find_model(name)) == NON_EMBEDDING_PARAMS[name]


@pytest.mark.parametrize("name", WITHOUT_INPUT_EMBEDDING)
def test_the_ladders_parameters_are_the_published_ones(name):
    arch = find_model(name)
    assert num_params(arch) - params_by_part(arch)["embedding"] == WITHOUT_INPUT_EMBEDDING[name]
    assert num_multiplied_params(arch) == WITHOUT_INPUT_EMBEDDING[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_round_to_what_the_paper_prints(name):
    printed, unit = map(float, ROUNDED[name].split())
    assert abs(num_params(find_model(name)) - printed) <= unit / 2


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_what_the_paper_prints_with_or_without_the_input_embedding(name):
    printed, unit = map(float, ACTIVE[name].split())
    arch = find_model(name)
    assert num_multiplied_params(arch) - unit / 2 <= printed <= num_active_params(arch) + unit / 2


@pytest.mark.parametrize(("name", "seq_len", "count"), MPT_COUNTS)
def test_mpt_counts_are_the_published_ones_at_every_length(name, seq_len, count):
    arch = find_model(f"mpt_{name}")
    longer = dataclasses.replace(arch, embedding=dataclasses.replace(arch.embedding, positions=seq_len))
    assert num_params(longer) == count


@pytest.mark.parametrize("row", TABLE_A9)
def test_chinchillas_table_a9_is_exact_to_the_printed_million(row):
    assert round(num_params(chinchilla(*row[1:])) / 1e6) == row[0]


def test_table_a9_needs_the_matrix_of_relative_positions():
    millions, *shape = TABLE_A9[-1]
    without = sum(w.num_params for w in weights(chinchilla(*shape)) if w.name != "relative positions")
    assert without / 1e6 < 0.93 * millions


@pytest.mark.parametrize(("_", "layers", "d_model", "ffn", "heads", "head_width", "ratio"), TABLE_A4)
def test_chinchillas_table_a4_within_a_hundredth(_, layers, d_model, ffn, heads, head_width, ratio):
    arch = chinchilla(d_model, ffn, head_width, heads, layers)
    found = hoffmann_flops_per_token(arch, 2048, with_ends=False) / (6 * num_params(arch))
    assert found == pytest.approx(ratio, rel=0.01)


def test_table_a4_leaves_embedding_and_logits_out():
    _, layers, d_model, ffn, heads, head_width, ratio = TABLE_A4[0]
    arch = chinchilla(d_model, ffn, head_width, heads, layers)
    ends = hoffmann_flops_per_token(arch, 2048, with_ends=True) - hoffmann_flops_per_token(
        arch, 2048, with_ends=False
    )
    assert ends == 12 * 32_000 * d_model
    assert hoffmann_flops_per_token(arch, 2048, with_ends=True) / (6 * num_params(arch)) > 1.4 * ratio


def llama_like(num_layers, d_model, num_heads, num_kv_heads, ffn_width, vocab_size, **more):
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": d_model,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": ffn_width,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
    } | more


LATENT = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
MODULES = {  # model: class, config
    "gpt2_355m": ("GPT2LMHeadModel", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "llama3_405b": ("LlamaForCausalLM", llama_like(126, 16384, 128, 8, 53248, 128256)),
    "llama3_2_1b": (
        "LlamaForCausalLM",
        llama_like(16, 2048, 32, 8, 8192, 128256, tie_word_embeddings=True),
    ),
    "pythia_12b": (
        "GPTNeoXForCausalLM",
        {
            "num_hidden_layers": 36,
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "intermediate_size": 20480,
            "vocab_size": 50688,
        },
    ),
    "olmo2_13b": ("Olmo2ForCausalLM", llama_like(40, 5120, 40, 40, 13824, 100352)),
    "mixtral_8x7b": ("MixtralForCausalLM", llama_like(32, 4096, 32, 8, 14336, 32000, num_local_experts=8)),
    "mixtral_8x22b": ("MixtralForCausalLM", llama_like(56, 6144, 48, 8, 16384, 32768, num_local_experts=8)),
    "qwen2_5_7b": ("Qwen2ForCausalLM", llama_like(28, 3584, 28, 4, 18944, 152064)),
    "qwen3_8b": ("Qwen3ForCausalLM", llama_like(36, 4096, 32, 8, 12288, 151936, head_dim=128)),
    "qwen3_30b_a3b": (
        "Qwen3MoeForCausalLM",
        llama_like(48, 2048, 32, 4, 6144, 151936, head_dim=128, num_experts=128, moe_intermediate_size=768),
    ),
    "gemma2_9b": (
        "Gemma2ForCausalLM",
        llama_like(42, 3584, 16, 8, 14336, 256000, head_dim=256, tie_word_embeddings=True),
    ),
    "bloom_176b": (
        "BloomForCausalLM",
        {"n_layer": 70, "hidden_size": 14336, "n_head": 112, "vocab_size": 250880},
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        llama_like(
            60,
            5120,
            128,
            128,
            12288,
            102400,
            **LATENT,
            n_routed_experts=160,
            n_shared_experts=2,
            moe_intermediate_size=1536,
            first_k_dense_replace=1,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        llama_like(
            61,
            7168,
            128,
            128,
            18432,
            129280,
            **LATENT,
            n_routed_experts=256,
            n_shared_experts=1,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
        ),
    ),
    "t5_small": (
        "T5ForConditionalGeneration",
        {"num_layers": 6, "d_model": 512, "num_heads": 8, "d_kv": 64, "d_ff": 2048},
    ),
    "t5_11b": (
        "T5ForConditionalGeneration",
        {"num_layers": 24, "d_model": 1024, "num_heads": 128, "d_kv": 128, "d_ff": 65536},
    ),
    "bert_base": ("BertModel", {}),  # the class's defaults are this model
    "bert_large_mlm": (
        "BertForMaskedLM",
        {
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_parameters_are_those_of_the_module_that_transformers_builds(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    class_name, sizes = MODULES[name]
    module_class = getattr(transformers, class_name)
    with torch.device("meta"):
        module = module_class(module_class.config_class(**sizes))
    count = sum(parameter.numel() for parameter in module.parameters())
    count += sum(  # DeepSeek-V3's bias an expert, which transformers keeps as a buffer
        buffer.numel() for path, buffer in module.named_buffers() if path.endswith("e_score_correction_bias")
    )
    assert num_params(find_model(name)) == count


CONFIGS = [
    ModelConfig(vocab_size=8192, num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, ffn_width=704),
    ModelConfig(
        vocab_size=1000,
        num_layers=3,
        d_model=96,
        num_heads=6,
        num_kv_heads=3,
        ffn_width=100,
        head_width=20,
        tie_embeddings=True,
    ),
    ModelConfig(
        family=Family.gpt2,
        vocab_size=500,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=200,
        head_width=24,
        max_positions=128,
    ),
]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_our_own_model_has_the_counts_and_flops_of_model_size(cfg):
    arch = from_model_config(cfg)
    assert num_params(arch) == size.num_params(cfg)
    assert num_non_embedding_params(arch) == size.num_non_embedding_params(cfg)
    assert num_multiplied_params(arch) == size.num_multiplied_params(cfg)
    parts = params_by_part(arch)
    assert {part: parts[part] for part in size.num_params_by_part(cfg)} == size.num_params_by_part(cfg)
    for convention in size.FLOPS_CONVENTIONS:
        assert flops_per_token(arch, 512, convention) == size.flops_per_token(cfg, 512, convention=convention)


@pytest.mark.parametrize("name", model_names())
def test_parts_add_up_and_active_parameters_are_no_more_than_all(name):
    arch = find_model(name)
    assert sum(params_by_part(arch).values()) == num_params(arch)
    has_experts = any(weight.part == "experts" for weight in weights(arch))
    assert (num_active_params(arch) < num_params(arch)) == has_experts


INEXACT = {"olmo2", "qwen2", "qwen3", "gemma2", "gopher", "bloom", "deepseek_v3", "palm"}
"""Families with vectors (Gopher: a matrix) that columns do not know."""


@pytest.mark.parametrize("name", [name for name in model_names() if not name.startswith("t5")])
def test_columns_hold_the_parameters_of_every_preset_with_one_stack(name):
    arch = find_model(name)
    columns = architecture.columns(arch)
    cluster = dict.fromkeys(
        ("peak_flops", "mem_bytes_s", "num_multiprocessors", "gpus_per_node", "link_bytes_s", "node_bytes_s"),
        1.0,
    )
    (found,) = candidates.num_params(candidates.candidates(**columns, seq_len=2048, micro_batch=1, **cluster))
    family = architecture._model_rows()[name]["family"]
    if family in INEXACT:
        unknown = sum(w.num_params for w in weights(arch) if w.name == "relative positions")
        assert found == pytest.approx(num_params(arch) - unknown, rel=1e-3)
    elif family.startswith("bert"):
        assert found == num_params(arch) - params_by_part(arch)["head"]
    else:
        assert found == num_params(arch)


def test_flops_of_an_encoder_decoder_count_three_attentions_and_mask_one():
    arch = find_model("t5_base")
    weights_part = 6 * num_multiplied_params(arch)
    one = 12 * 12 * 12 * 64 * 512  # 12 layers, 12 heads of 64
    assert flops_per_token(arch, 512) == weights_part + 3 * one
    assert flops_per_token(arch, 512, "causal") == weights_part + 2.5 * one
    assert flops_per_token(arch, 512, "fused") == weights_part + 3 * one * 14 / 12


def test_flops_of_latent_attention_know_two_widths():
    arch = find_model("deepseek_v3")
    scores = flops_per_token(arch, 4096) - 6 * num_multiplied_params(arch)
    assert scores == 6 * 61 * 128 * (192 + 128) * 4096


def test_flops_of_experts_are_of_the_active_ones():
    all_used, two_used = (
        build(
            "llama",
            num_layers=2,
            d_model=64,
            num_heads=4,
            vocab_size=100,
            num_experts=8,
            experts_per_token=used,
            expert_width=128,
        )
        for used in (8, 2)
    )
    assert num_params(all_used) == num_params(two_used)
    gap = flops_per_token(all_used, 16) - flops_per_token(two_used, 16)
    assert gap == 6 * 2 * 6 * 3 * 64 * 128


def test_narayanans_closed_form_is_palms_count_with_every_key():
    """72 B s l h^2 (1 + s / 6h + V / 12 l h) a step without recomputation (arXiv:2104.04473, appendix)."""
    arch = find_model("megatron_175b")
    layers, width, seq_len = 96, 12288, 2048
    closed = 72 * layers * width**2 * (1 + seq_len / (6 * width) + 51200 / (12 * layers * width))
    assert flops_per_token(arch, seq_len) == pytest.approx(closed, rel=2e-4)  # biases and norms


def test_unknown_names_and_impossible_sizes_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"unknown model 'llama3_8'; did you mean 'llama3_8b'\?.*add a row"):
        find_model("llama3_8")
    with pytest.raises(ConfigError, match="unknown family of models 'lama'; did you mean 'llama'"):
        build("lama")
    with pytest.raises(ConfigError, match="unknown size of a model 'layers'"):
        build("llama", layers=2)
    with pytest.raises(ConfigError, match="mine: vocab_size=0 must be at least 1"):
        build("llama", "mine", num_layers=2, d_model=64, num_heads=4)
    with pytest.raises(ConfigError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        build("llama", num_layers=2, d_model=64, num_heads=4, num_kv_heads=3, vocab_size=10)
    with pytest.raises(ConfigError, match="experts_per_token=9 must be from 1 to num_experts=8"):
        build(
            "llama", num_layers=2, d_model=64, num_heads=4, vocab_size=9, num_experts=8, experts_per_token=9
        )
    with pytest.raises(ConfigError, match='qk_norm=\'some\' must be "", "head" or "all"'):
        architecture.Attention(num_heads=2, num_kv_heads=2, head_width=8, qk_norm="some")
    with pytest.raises(ConfigError, match="'empty' has no stack"):
        architecture.Architecture(
            name="empty", d_model=8, embedding=architecture.Embedding(vocab_size=8), head=None
        )
    with pytest.raises(ConfigError, match="unknown FLOPs convention 'plam'; did you mean 'palm'"):
        flops_per_token(find_model("gpt2_124m"), 8, "plam")
    with pytest.raises(ConfigError, match="seq_len=0 must be at least 1"):
        flops_per_token(find_model("gpt2_124m"), 0)


def test_columns_refuse_what_they_cannot_hold():
    with pytest.raises(ConfigError, match="t5_base has an encoder and a decoder"):
        architecture.columns(find_model("t5_base"))
    arch = find_model("llama3_8b")
    ((count, block),) = arch.decoder.blocks

    def with_blocks(*blocks):
        return dataclasses.replace(arch, decoder=dataclasses.replace(arch.decoder, blocks=blocks))

    narrow = dataclasses.replace(block, attention=dataclasses.replace(block.attention, head_width=64))
    with pytest.raises(ConfigError, match="llama3_8b has blocks of more kinds"):
        architecture.columns(with_blocks((count, block), (2, narrow)))
    plain = dataclasses.replace(
        block, ffn=architecture.Moe(num_experts=4, experts_per_token=1, width=8, is_gated=False)
    )
    with pytest.raises(ConfigError, match="llama3_8b has gated and plain feed-forwards"):
        architecture.columns(with_blocks((count, block), (2, plain)))


def test_every_row_of_the_table_says_where_its_shape_comes_from():
    for name, row in architecture._model_rows().items():
        assert row["source"], name
        assert math.isfinite(num_params(find_model(name)))
