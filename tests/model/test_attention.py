"""Attention, rotation and norm against loops and plain formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmtrain.model.attend import attend, visible_after, visible_within_documents
from llmtrain.model.attention import KVCache
from llmtrain.model.config import ModelConfig
from llmtrain.model.norm import RMSNorm
from llmtrain.model.rope import rotate, rotation

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]])


def loop_attention(q_BHSK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, segments: torch.Tensor):
    """Every query, head and key by hand, in float64."""
    B, H, S, K = q_BHSK.shape
    group = H // k_BGSK.shape[1]
    out = torch.zeros(B, H, S, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(S):
                keys = [j for j in range(i + 1) if segments[b, j] == segments[b, i]]
                scores = [float(q_BHSK[b, h, i].double() @ k_BGSK[b, h // group, j].double()) for j in keys]
                weights = [math.exp((score - max(scores)) / math.sqrt(K)) for score in scores]
                for weight, j in zip(weights, keys, strict=True):
                    out[b, h, i] += weight / sum(weights) * v_BGSK[b, h // group, j].double()
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("is_bool", [True, False])
def test_attention_equals_a_loop_in_float64(num_kv_heads: int, is_bool: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHSK = torch.randn(2, 4, 9, 6, generator=generator)
    k_BGSK, v_BGSK = torch.randn(2, 2, num_kv_heads, 9, 6, generator=generator)
    mask = visible_within_documents(SEGMENTS)
    if not is_bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    ours = attend(q_BHSK, k_BGSK, v_BGSK, mask, False)
    expected = loop_attention(q_BHSK, k_BGSK, v_BGSK, SEGMENTS)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


def test_causal_attention_equals_a_loop_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHSK = torch.randn(2, 4, 9, 6, generator=generator)
    k_BGSK, v_BGSK = torch.randn(2, 2, 2, 9, 6, generator=generator)
    ours = attend(q_BHSK, k_BGSK, v_BGSK, None, True)
    expected = loop_attention(q_BHSK, k_BGSK, v_BGSK, torch.zeros_like(SEGMENTS))
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


def test_new_queries_see_the_whole_past_and_themselves() -> None:
    mask = visible_after(2, 3, torch.device("cpu"))
    assert mask is not None
    assert mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible_after(4, 1, torch.device("cpu")) is None


def test_a_full_cache_refuses_more() -> None:
    cfg = ModelConfig(vocab_size=8, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, ffn_width=8)
    cache = KVCache(cfg, batch_size=1, max_len=3, device=torch.device("cpu"), dtype=torch.float32)
    assert cache.num_bytes == 2 * 3 * 4 * 4
    cache.layers[0].append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(AssertionError, match="room for 3 positions, 4 needed"):
        cache.layers[0].append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))


def test_rotation_is_that_of_complex_numbers_and_keeps_lengths() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    x_BSHK = torch.randn(1, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x_BSHK, rotation(positions, width=8, theta=100.0, dtype=torch.float32))
    angles = positions[0, :, None].double() * 100.0 ** (-2 * torch.arange(4).double() / 8)
    expected = (
        torch.complex(x_BSHK[..., :4].double(), x_BSHK[..., 4:].double()) * torch.exp(1j * angles)[:, None]
    )
    torch.testing.assert_close(
        turned.double(), torch.cat([expected.real, expected.imag], -1), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(turned.norm(dim=-1), x_BSHK.norm(dim=-1))
    assert torch.equal(turned[:, positions[0] == 0], x_BSHK[:, positions[0] == 0])


def test_the_gradient_of_a_rotation_is_right() -> None:
    by = rotation(torch.arange(4)[None], width=6, theta=10.0, dtype=torch.float64)
    x_BSHK = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, by), x_BSHK)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_rmsnorm_and_its_gradients_equal_torchs(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, 1e-5).to(dtype)
    norm.weight.data = torch.randn(48, generator=generator).to(dtype)
    x_BSD = (3 * torch.randn(2, 7, 48, generator=generator)).to(dtype).requires_grad_()
    pull = torch.randn(2, 7, 48, generator=generator).to(dtype)
    ours = torch.autograd.grad(norm(x_BSD), (x_BSD, norm.weight), pull)
    reference = F.rms_norm(x_BSD, (48,), norm.weight, 1e-5)
    expected = torch.autograd.grad(reference, (x_BSD, norm.weight), pull)
    # bf16 keeps 8 bits; both sides round once at the end
    torch.testing.assert_close(norm(x_BSD), reference, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def test_rmsnorm_passes_gradcheck() -> None:
    norm = RMSNorm(5, 1e-5).double()
    x_BSD = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x_BSD)
