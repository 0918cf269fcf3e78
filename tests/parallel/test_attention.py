"""Unit (and GPU): local attention with log-sum-exp, and the merge of partial results.

The reference is softmax attention written out in fp64. Tolerances: fp64 leaves rounding errors of about 1e-15, fp32 of
about 1e-6; half precision outputs are rounded to 8 (bfloat16) or 11 (float16) bits.
"""

import pytest
import torch

from parallel.attention import ENGINES, attend, attend_with_lse, merge, unavailable
from tests.parallel.reference import random_qkv, reference_attention

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 1, 1, 1, 4), (2, 5, 7, 3, 8), (1, 33, 130, 2, 128), (2, 3, 1, 5, 16)]


def _check(shape, dtype, engine, device):
    query, key, value = random_qkv(*shape, dtype=dtype, device=device)
    expected, expected_lse = reference_attention(query, key, value)
    out, lse = attend_with_lse(query, key, value, engine)
    assert out.shape == query.shape
    assert out.dtype == dtype
    assert lse.shape == expected_lse.shape
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=max(tolerance, 1e-4 * (dtype.itemsize == 2)))
    torch.testing.assert_close(attend(query, key, value, engine).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_native_attention_and_log_sum_exp_on_cpu(shape, dtype):
    _check(shape, dtype, "native", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_and_log_sum_exp_on_cuda(engine, dtype):
    if reason := unavailable(engine, "cuda", dtype):
        pytest.skip(reason)
    for shape in ((1, 33, 130, 2, 128), (2, 5, 7, 3, 64)):
        _check(shape, dtype, engine, "cuda")


def test_strided_tensors():
    packed = torch.randn(2, 6, 3, 3, 8, dtype=torch.float64)
    query, key, value = packed.unbind(2)
    out, lse = attend_with_lse(query, key, value)
    expected, expected_lse = reference_attention(query, key, value)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_empty_parts(queries, keys):
    query, key, value = random_qkv(2, queries, keys, 3, 8)
    out, lse = attend_with_lse(query, key, value)
    assert torch.equal(out, torch.zeros(2, queries, 3, 8, dtype=torch.float64))
    assert torch.equal(lse, torch.full((2, 3, queries), -torch.inf, dtype=torch.float64))
    assert torch.equal(attend(query, key, value), out)


def _halves(cut, dtype=torch.float64):
    query, key, value = random_qkv(2, 5, 9, 3, 8, dtype)
    parts = [attend_with_lse(query, k, v) for k, v in ((key[:, :cut], value[:, :cut]), (key[:, cut:], value[:, cut:]))]
    return parts, reference_attention(query, key, value)


@pytest.mark.parametrize("cut", range(10))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merge_of_two_parts_is_attention_over_both(cut, dtype):
    (a, b), (expected, expected_lse) = _halves(cut, dtype)
    out, lse = merge(*a, *b)
    assert out.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=max(TOLERANCE[dtype], 1e-6))


def test_merge_of_two_empty_parts_is_empty():
    query, key, value = random_qkv(1, 2, 0, 3, 4)
    part = attend_with_lse(query, key, value)
    out, lse = merge(*part, *part)
    assert torch.equal(out, torch.zeros_like(query))
    assert torch.isneginf(lse).all()


def test_merge_of_far_apart_scores_does_not_overflow():
    query, key, value = random_qkv(1, 3, 4, 2, 8, torch.float32)
    key = key * 300
    a = attend_with_lse(query, key[:, :2], value[:, :2])
    b = attend_with_lse(query, key[:, 2:], value[:, 2:])
    expected, _ = reference_attention(query, key, value)
    # Scores of several hundred carry fp32 rounding errors of 1e-5, which the softmax passes on.
    torch.testing.assert_close(merge(*a, *b)[0].double(), expected, rtol=0, atol=1e-3)


def test_merge_keeps_nan():
    """A broken part must not be hidden by the handling of empty ones."""
    (a, b), _ = _halves(4)
    assert merge(*a, b[0] * torch.nan, b[1])[0].isnan().all()
    assert merge(*a, b[0], b[1] * torch.nan)[0].isnan().all()


def test_merge_without_rescale_is_wrong():
    """The tolerance is tight enough: averaging the parts, as if both had equal weight, is far beyond it."""
    (a, b), (expected, _) = _halves(4)
    assert (merge(*a, *b)[0] - expected).abs().max() < 1e-13
    assert ((a[0] + b[0]) / 2 - expected).abs().max() > 1e-2


def test_engines_that_cannot_run_here_say_why():
    assert unavailable("native", "cpu") is None
    assert unavailable("native", "mps") is None
    assert unavailable("flash", "cpu") == "flash attention needs a CUDA device, not cpu; use native"
    assert unavailable("cudnn", "cuda", torch.float32) == (
        "cudnn attention takes float16 and bfloat16, not float32; use native"
    )
    with pytest.raises(ValueError, match="attention engine 'sage': allowed are native, cudnn, flash"):
        unavailable("sage", "cpu")


def test_missing_flash_attn_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "package flash-attn (2 or 3), which is not installed" in unavailable("flash", "cuda", torch.bfloat16)
