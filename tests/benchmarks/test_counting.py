"""Unit: the counter of kernels, bytes and FLOPs against counts made by hand, on meta tensors and on real ones.

All numbers are exact. The bytes of an operation are those of its inputs, each once, and of its result.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measuring import counting
from benchmarks.measuring.counting import Counter, Counts, count

DEVICES = ("meta", "cpu")
ROWS, COLUMNS = 6, 10
SIZE = ROWS * COLUMNS  # elements


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def matrix(device):
    return torch.empty(ROWS, COLUMNS, device=device)


def elementwise(kernels: int, moved: int) -> Counts:
    return Counts(kernels=kernels, elementwise_bytes=moved)


def test_views_and_fresh_memory_cost_nothing(matrix):
    def program():
        matrix.view(-1)[2:7].unsqueeze(0).expand(3, -1)
        matrix.t().unflatten(0, (5, 2)).movedim(0, 1).unbind(1)
        matrix.split(2)
        torch.view_as_complex(matrix.view(ROWS, -1, 2))
        matrix.reshape(-1, 2).flatten()
        matrix.detach().float().contiguous()  # already are
        F.dropout(matrix, 0.5, training=False)
        torch.empty_like(matrix), matrix.new_empty(3), torch.empty(2, device=matrix.device)

    assert count(program) == Counts()


def test_a_reshape_that_must_copy(matrix):
    assert count(lambda: matrix.t().reshape(-1)) == elementwise(1, 4 * 2 * SIZE)


def test_out_of_place_and_in_place(matrix):
    assert count(lambda: matrix + matrix.clone()) == elementwise(2, 4 * (2 + 3) * SIZE)
    assert count(lambda: matrix.mul_(2)) == elementwise(1, 4 * 2 * SIZE)
    assert count(lambda: matrix.add_(matrix.clone())) == elementwise(2, 4 * (2 + 3) * SIZE)
    assert count(lambda: torch.exp(matrix, out=torch.empty_like(matrix))) == elementwise(1, 4 * 2 * SIZE)


def test_overwriting_reads_nothing_of_the_old(matrix):
    assert count(matrix.zero_) == elementwise(1, 4 * SIZE)
    assert count(lambda: matrix[:, :3].fill_(1)) == elementwise(1, 4 * ROWS * 3)
    source = torch.empty(ROWS, 4, device=matrix.device)
    assert count(lambda: matrix[:, 1:5].copy_(source)) == elementwise(1, 4 * 2 * ROWS * 4)
    assert count(lambda: torch.zeros(7, device=matrix.device)) == elementwise(1, 4 * 7)


def test_broadcasting_reads_the_small_operand_once(matrix):
    row = torch.empty(COLUMNS, device=matrix.device)
    expected = elementwise(1, 4 * (SIZE + COLUMNS + SIZE))
    assert count(lambda: matrix * row) == expected
    assert count(lambda: matrix * row.expand(ROWS, COLUMNS)) == expected
    assert count(lambda: row.expand(ROWS, COLUMNS).contiguous()) == elementwise(1, 4 * (COLUMNS + SIZE))


def test_the_same_operand_twice_is_read_once(matrix):
    assert count(lambda: matrix * matrix) == elementwise(1, 4 * 2 * SIZE)


def test_reduction(matrix):
    assert count(lambda: matrix.sum(1)) == elementwise(1, 4 * (SIZE + ROWS))


def test_cat_and_stack(matrix):
    assert count(lambda: torch.cat([matrix, matrix[:2]])) == elementwise(1, 4 * 2 * (SIZE + 2 * COLUMNS))
    assert count(lambda: torch.cat([matrix, matrix.clone()])) == elementwise(2, 4 * (2 + 4) * SIZE)


def test_change_of_dtype(matrix):
    assert count(matrix.bfloat16) == elementwise(1, (4 + 2) * SIZE)
    half = matrix.bfloat16()
    assert count(half.copy_, matrix) == elementwise(1, (4 + 2) * SIZE)
    assert count(lambda: half * matrix) == elementwise(1, (2 + 4 + 4) * SIZE)
    assert count(matrix.to, torch.float32) == Counts()


def test_layer_norm_writes_its_statistics(matrix):
    weight, bias = torch.empty(2, COLUMNS, device=matrix.device)
    moved = 4 * (2 * SIZE + 2 * COLUMNS + 2 * ROWS)
    assert count(F.layer_norm, matrix, (COLUMNS,), weight, bias) == elementwise(1, moved)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_is_one_kernel_unless_dtypes_differ(matrix):
    norm = torch.nn.RMSNorm(COLUMNS, eps=1e-6, device=matrix.device)
    assert count(norm, matrix) == elementwise(1, 4 * (2 * SIZE + COLUMNS))
    pieces = count(norm, matrix.bfloat16())
    assert pieces.kernels > 5 and pieces.elementwise_bytes > 2 * 2 * (2 * SIZE + COLUMNS)


def test_linear(device):
    states, layer = torch.empty(2, 3, 5, device=device), torch.nn.Linear(5, 7, device=device)
    moved = 4 * (2 * 3 * 5 + 5 * 7 + 7 + 2 * 3 * 7)
    assert count(layer, states) == Counts(kernels=1, matrix_bytes=moved, flops=2 * (2 * 3) * 5 * 7)
    bare = torch.nn.Linear(5, 7, bias=False, device=device)
    assert count(bare, states) == Counts(1, 0, moved - 4 * 7, 2 * 6 * 5 * 7)


def test_convolution(device):
    layer = torch.nn.Conv3d(4, 5, (1, 2, 2), stride=(1, 2, 2), device=device)
    latents = torch.empty(1, 4, 3, 6, 8, device=device)
    outputs = 5 * 3 * 3 * 4
    moved = 4 * (4 * 3 * 6 * 8 + 5 * 4 * 4 + 5 + outputs)
    assert count(layer, latents) == Counts(kernels=1, matrix_bytes=moved, flops=2 * 4 * 4 * outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_attention_is_one_kernel_whatever_computes_it(device, dtype, backend):
    """Its result is laid out as that of the fused kernels: joining the heads costs nothing."""
    batch, heads, queries, keys, dim = 2, 3, 12, 20, 8
    query = torch.empty(batch, queries, heads, dim, device=device, dtype=dtype)
    key, value = torch.empty(2, batch, keys, heads, dim, device=device, dtype=dtype)

    def program():
        out = F.scaled_dot_product_attention(*(states.transpose(1, 2) for states in (query, key, value)))
        assert out.shape == (batch, heads, queries, dim)
        return out.transpose(1, 2).flatten(2) if backend == "flash" else out

    backends = {"flash": torch.nn.attention.SDPBackend.FLASH_ATTENTION, "math": torch.nn.attention.SDPBackend.MATH}
    with torch.nn.attention.sdpa_kernel(backends[backend]):
        counts = count(program)
    moved = dtype.itemsize * batch * heads * dim * (2 * queries + 2 * keys)
    assert counts == Counts(1, 0, moved, 4 * batch * heads * queries * keys * dim)


def test_attention_that_returns_its_log_sum_exp_has_flops(matrix):
    """The CPU's own kernel, called by name, which PyTorch's table of formulas lacks."""
    query = torch.empty(1, 2, 4, 8)
    counts = count(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, query, query, query)
    assert counts.flops == 4 * 2 * 4 * 4 * 8 and counts.kernels == 1


def test_operations_by_name(matrix):
    with torch.inference_mode(), Counter() as counter:
        matrix + 1
        matrix + 2
        matrix.exp()
    assert counter.operations == {
        "aten.add.Tensor": elementwise(2, 4 * 4 * SIZE),
        "aten.exp.default": elementwise(1, 4 * 2 * SIZE),
    }
    assert counter.total == elementwise(3, 4 * 6 * SIZE)


def test_counting_changes_no_result():
    states = torch.randn(1, 2, 5, 8)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 8))

    def program():
        return F.scaled_dot_product_attention(layers(states), states, states)

    results = []
    assert count(lambda: results.append(program())).kernels == 5
    assert torch.equal(results[0], program())


def test_outside_inference_mode_it_refuses(matrix):
    with pytest.raises(RuntimeError, match="inference_mode"), Counter():
        matrix + 1


def test_sums_and_differences():
    first, second = Counts(1, 20, 300, 4000), Counts(5, 60, 700, 8000)
    assert first + second == Counts(6, 80, 1000, 12000) and first + second - second == first
    assert first * 3 == first + first + first


def test_breaking_a_rule_shows(matrix, monkeypatch):
    """Without its rule each of these programs is charged for what it does not do."""
    row = torch.empty(COLUMNS, device=matrix.device).expand(ROWS, COLUMNS)
    programs = {
        "_FREE": lambda: torch.empty_like(matrix),
        "_OVERWRITING": matrix.zero_,
        "_elements": lambda: matrix + row,
    }
    right = {name: count(program) for name, program in programs.items()}
    monkeypatch.setattr(counting, "_FREE", set())
    monkeypatch.setattr(counting, "_OVERWRITING", set())
    monkeypatch.setattr(counting, "_elements", torch.Tensor.numel)
    for name, program in programs.items():
        assert count(program).elementwise_bytes > right[name].elementwise_bytes, name
