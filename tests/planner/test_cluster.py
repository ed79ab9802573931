"""Clusters from their tables, from conf/cluster and from a user; layouts; both as columns."""

import csv
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmtrain.errors import ConfigError
from llmtrain.planner import hardware
from llmtrain.planner.cost import architecture, candidates, cluster, layout
from llmtrain.planner.cost.cluster import (
    ClusterConfig,
    cluster_names,
    find_cluster,
    find_gpu,
    gpu_names,
    resolve_cluster,
)
from llmtrain.planner.cost.layout import Layout

CONF = Path(__file__).parents[2] / "conf" / "cluster"
PUBLISHED = Path(__file__).parents[3] / "shared" / "planner_data" / "hardware_gpus.csv"


@pytest.fixture
def quick_measurement(monkeypatch):
    monkeypatch.setattr(hardware, "GEMM_SIZES", (64, 256))
    monkeypatch.setattr(hardware, "MEASURE_S", 0.01)


def composed(name, **given):
    """What Hydra makes of cluster=name cluster.FIELD=VALUE."""
    config = OmegaConf.merge(
        OmegaConf.structured(ClusterConfig), OmegaConf.load(CONF / f"{name}.yaml"), given
    )
    return OmegaConf.to_object(config)


def test_every_cluster_has_a_file_and_every_file_a_cluster():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(cluster_names())


@pytest.mark.parametrize("name", sorted(set(cluster_names()) - {"this_machine", "custom"}))
def test_a_file_means_its_row(name):
    assert OmegaConf.load(CONF / f"{name}.yaml") == {"name": name}  # numbers are in the tables alone
    found = resolve_cluster(composed(name, nodes=2))
    assert found == find_cluster(name, 2)
    assert found.name == name
    assert found.source
    assert all(value > 0 for value in cluster.columns(found, "fp32").values())


def test_a_known_cluster_is_what_its_row_says():
    found = find_cluster("h100_sxm_8x", num_nodes=16)
    assert found.num_gpus == 128
    assert found.gpu.peak("bf16") == 989.5e12
    assert found.node_bytes_s == 400e9
    assert cluster.columns(found) == {
        "peak_flops": 989.5e12,
        "mem_bytes_s": 3.35e12,
        "num_multiprocessors": 132.0,
        "gpus_per_node": 8.0,
        "link_bytes_s": 450e9,
        "node_bytes_s": 400e9,
    }
    assert found.price_usd_per_gpu_hour is None


@pytest.mark.parametrize("name", gpu_names())
def test_a_gpu_names_its_sources_and_what_is_from_memory(name):
    gpu = find_gpu(name)
    assert gpu.source
    columns = set(cluster._rows(cluster.GPUS_TABLE)[name])
    assert set(gpu.unverified) <= columns
    assert gpu.peak("fp32") <= gpu.peak("fp16")
    assert 20 * 2**30 < gpu.mem_bytes < 300 * 2**30


IN_PUBLISHED = {
    "a100_sxm_40gb": "A100-SXM-40",
    "a100_sxm_80gb": "A100-SXM-80",
    "h100_sxm": "H100-SXM-80",
    "h100_pcie": "H100-PCIe-80",
    "h200_sxm": "H200-SXM",
    "b200_sxm": "B200-SXM",
    "mi300x": "MI300X",
    "rtx_4090": "RTX 4090",
}


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs shared/planner_data")
@pytest.mark.parametrize("name", IN_PUBLISHED)
def test_a_gpus_peak_and_bandwidth_are_the_collected_ones(name):
    with PUBLISHED.open(encoding="utf-8") as file:
        row = {row["name"]: row for row in csv.DictReader(file)}[IN_PUBLISHED[name]]
    gpu = find_gpu(name)
    assert gpu.peak("bf16") == float(row["bf16_dense_tflops"]) * 1e12
    assert gpu.mem_bytes_s == float(row["mem_bw_gbs"]) * 1e9
    assert gpu.mem_bytes <= float(row["mem_gb"]) * 2**30


def test_a_users_numbers_stand_in_place_of_the_rows():
    found = resolve_cluster(
        composed(
            "p5en_48xlarge",
            nodes=4,
            gpus_per_node=4,
            network_gbps=1600,
            peak_tflops=800,
            mem_gib=100,
            mem_gbs=4000,
            link_gbs=400,
            num_multiprocessors=100,
            price_usd_per_gpu_hour=3.5,
            goodput=0.8,
        )
    )
    assert (found.num_gpus, found.node_bytes_s, found.goodput) == (16, 200e9, 0.8)
    assert (found.price_usd_per_gpu_hour, found.price_date, found.price_source) == (3.5, None, "given")
    assert {found.gpu.peak(p) for p in cluster.PRECISIONS} == {800e12}
    assert (found.gpu.mem_bytes, found.gpu.mem_bytes_s) == (100 * 2**30, 4e12)
    assert (found.gpu.link_bytes_s, found.gpu.num_multiprocessors) == (400e9, 100)
    assert find_cluster("h100_sxm_8x", gpu="h200_sxm").gpu == find_gpu("h200_sxm")


def test_a_shipped_price_has_its_date_and_source():
    found = find_cluster("p5en_48xlarge")
    assert (found.price_usd_per_gpu_hour, found.price_date) == (7.912, "2026-08")
    priced = [find_cluster(name) for name in cluster._rows(cluster.NODES_TABLE)]
    for each in priced:
        has_price = each.price_usd_per_gpu_hour is not None
        assert has_price == bool(each.price_date) == bool(each.price_source), each.name


def test_this_machine_is_measured_and_shared_by_its_ranks(quick_measurement):
    alone, two = find_cluster("this_machine"), find_cluster("this_machine", gpus_per_node=2, peak_tflops=0.1)
    assert 1e8 < alone.gpu.peak("fp32") < 1e14
    assert alone.gpu.source.startswith("measured here")
    assert two.gpu.peak("fp32") == 0.1e12
    assert two.num_gpus == 2
    assert two.gpu.mem_bytes == alone.gpu.mem_bytes / 2
    assert 1e8 < two.gpu.mem_bytes_s < 1e13
    assert "2 processes at once" in two.gpu.source


def test_a_custom_cluster_is_what_is_given():
    found = find_cluster("custom", 2, gpu="a100_sxm_40gb", gpus_per_node=4, network_gbps=100)
    assert (found.num_gpus, found.gpu, found.node_bytes_s) == (8, find_gpu("a100_sxm_40gb"), 12.5e9)
    own = find_cluster(
        "custom",
        gpus_per_node=1,
        peak_tflops=100,
        mem_gib=10,
        mem_gbs=500,
        link_gbs=16,
        num_multiprocessors=40,
    )
    assert own.gpu.peak("fp16") == 100e12


def test_unknown_names_are_refused_with_the_nearest_and_with_what_to_do():
    with pytest.raises(
        ConfigError, match=r"unknown cluster 'h100_8x'; did you mean 'h100_\w+8x'\?.*add a row"
    ):
        find_cluster("h100_8x")
    with pytest.raises(ConfigError, match=r"unknown GPU 'h100'; did you mean .*cluster.peak_tflops"):
        find_cluster("h100_sxm_8x", gpu="h100")
    with pytest.raises(
        ConfigError, match="unknown field of a cluster 'network'; did you mean 'network_gbps'"
    ):
        find_cluster("h100_sxm_8x", network=400)
    with pytest.raises(ConfigError, match=r"v100_sxm_32gb has no matrix products in bf16; it has fp16, fp32"):
        cluster.columns(find_cluster("v100_sxm_8x"))
    with pytest.raises(ConfigError, match=r"without cluster.gpu needs cluster.mem_gib, cluster.mem_gbs"):
        find_cluster("custom", peak_tflops=100, gpus_per_node=1)
    with pytest.raises(ConfigError, match=r"cluster=custom needs cluster.gpus_per_node"):
        find_cluster("custom", gpu="l4")
    with pytest.raises(ConfigError, match=r"cluster.nodes=2 needs cluster.network_gbps"):
        find_cluster("custom", 2, gpu="l4", gpus_per_node=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodes": 0}, "cluster.nodes=0 must be at least 1"),
        ({"gpus_per_node": -8}, "cluster.gpus_per_node=-8 must be at least 1"),
        ({"network_gbps": 0.0}, "cluster.network_gbps=0.0 must be above 0"),
        ({"peak_tflops": float("nan")}, "cluster.peak_tflops=nan must be above 0"),
        ({"price_usd_per_gpu_hour": -2.0}, "cluster.price_usd_per_gpu_hour=-2.0 must be at least 0"),
        ({"goodput": 1.5}, "cluster.goodput=1.5 must be above 0 and at most 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig(name="h100_sxm_8x", **given)


# -- layouts


def test_a_layouts_sizes():
    found = Layout(seq_len=4096, pp=2, dp=4, cp=2, tp=8, micro_batch_rows=3, grad_accum=5)
    assert found.world_size == 128
    assert found.global_batch_rows == 60
    assert found.global_batch_tokens == 60 * 4096


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp": 0}, "layout.tp=0 must be a whole number, at least 1"),
        ({"micro_batch_rows": 1.5}, "layout.micro_batch_rows=1.5 must be a whole number"),
        ({"zero_stage": 4}, "layout.zero_stage=4 must be 0, 1, 2 or 3"),
        ({"recompute": "ful"}, "unknown layout.recompute 'ful'; did you mean 'full'"),
        ({"schedule": "1f1b"}, "unknown layout.schedule '1f1b'"),
        ({"precision": "int8"}, "unknown layout.precision 'int8'"),
        ({"cp": 3}, "layout.seq_len=2048 is not a multiple of layout.cp=3"),
        ({"dp": 4, "ep": 3}, r"layout.ep=3 does not divide layout.dp \* layout.cp = 4 \* 1"),
        ({"vpp": 2}, "layout.vpp=2 with layout.pp=1"),
        ({"pp": 2, "schedule": "dual_pipe_v"}, "dual_pipe_v has two chunks a rank; set layout.vpp=2, not 1"),
        (
            {"pp": 4, "vpp": 2, "schedule": "interleaved", "grad_accum": 6},
            "layout.grad_accum=6 is not a multiple of layout.pp=4",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Layout(**({"seq_len": 2048} | given))


def test_model_layout_and_cluster_together_are_one_candidate():
    found = candidates.candidates(
        **architecture.columns(architecture.find_model("mixtral_8x7b")),
        **layout.columns(
            Layout(
                seq_len=4096,
                pp=4,
                vpp=2,
                dp=8,
                tp=2,
                ep=8,
                micro_batch_rows=2,
                grad_accum=8,
                recompute="full",
                sequence_parallel=True,
                schedule="interleaved",
            )
        ),
        **cluster.columns(find_cluster("h100_sxm_8x", 8)),
    )
    assert len(found) == 1
    assert (found.micro_batch[0], found.recompute[0], found.schedule[0]) == (2, candidates.FULL, 1)
    assert (found.sequence_parallel[0], found.ep[0], found.num_moe_layers[0]) == (1, 8, 32)
    assert found.tokens[0] == 8192
