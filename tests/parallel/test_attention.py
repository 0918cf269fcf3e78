"""Unit (and GPU): local attention with log-sum-exp, and the merge of partial results.

The reference is softmax attention written out in fp64. Tolerances: fp64 leaves rounding errors of about 1e-15, fp32 of
about 1e-6; half precision outputs are rounded to 8 (bfloat16) or 11 (float16) bits.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import attention as module
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


def _views(device, dtype):
    """Query, key and value as one projection gives them, and as an exchange of heads may leave them."""
    packed = torch.randn(2, 48, 3, 4, 64, device=device).to(dtype)
    yield packed.unbind(2)
    yield tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in packed.unbind(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ENGINES)
def test_views_on_cuda(engine):
    """With and without the log-sum-exp."""
    dtype = torch.bfloat16
    if reason := unavailable(engine, "cuda", dtype):
        pytest.skip(reason)
    for views in _views("cuda", dtype):
        expected, expected_lse = reference_attention(*views)
        out, lse = attend_with_lse(*views, engine)
        for found in (out, attend(*views, engine)):
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=TOLERANCE[dtype])


class _Strides(TorchDispatchMode):
    """Whether each tensor that cuDNN's attention was given is contiguous."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_dot_product_cudnn_attention.default:
            self.found += [tensor.is_contiguous() for tensor in args[:3]]
        return function(*args, **(kwargs or {}))


def test_cudnn_never_gets_views():
    """With and without the log-sum-exp, as it gives wrong results for them; on tensors without values."""
    for views in _views("meta", torch.bfloat16):
        with _Strides() as strides:
            attend(*views, "cudnn")
            attend_with_lse(*views, "cudnn")
        assert strides.found == [True] * 6


@pytest.mark.parametrize("always", [False, True])
def test_flash_attn_is_looked_up_once(monkeypatch, always):
    """Not in each of a forward's attention calls. Versions that always give the log-sum-exp know no argument for it."""
    asked = []

    def with_option(query, key, value, return_attn_probs=False):
        return (query, "lse", None) if return_attn_probs else query

    function = (lambda query, key, value: (query, "lse")) if always else with_option
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=function))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: asked.append(name))
    module._flash_attn_function.cache_clear()
    query = torch.ones(1, 2, 3, 4)
    for _ in range(3):
        assert attend_with_lse(query, query, query, "flash") == (query, "lse")
        assert attend(query, query, query, "flash") is query
    assert asked == ["flash_attn_interface"]
    module._flash_attn_function.cache_clear()


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
