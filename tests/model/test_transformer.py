"""Unit: our transformer against diffusers' `HeliosTransformer3DModel`, over every switch of its config.

Tolerance in fp32: 1e-5 of the output's range. Both sides compute the same sums in another order (fused projections,
patches as one product), which costs a few units in the last place a layer: observed at most 1e-6. A wrong index,
scale or row shows as 1e-2 or more, as the tests that break things on purpose show.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from diffusers import HeliosTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.model import layers
from helios_cp.model.conditions import History
from helios_cp.model.transformer import HeliosTransformer

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "rope_dim": (4, 6, 6),
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 3,
}
SWITCHES = [
    {},
    {"is_amplify_history": True},
    {"is_amplify_history": True, "history_scale_mode": "scalar"},
    {"guidance_cross_attn": False},
    {"zero_history_timestep": False},
    {"cross_attn_norm": False},
    {"guidance_cross_attn": False, "zero_history_timestep": False, "is_amplify_history": True},
    {"num_layers": 1},
    {"num_attention_heads": 5, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "ffn_dim": 33, "out_channels": 7},
]
INDICES = {"short": (0, 19), "mid": (17, 18), "long": tuple(range(1, 17)), "noisy": tuple(range(20, 29))}
FRAMES = {"short": 2, "mid": 2, "long": 16}


def make_pair(**switches) -> tuple[HeliosTransformer3DModel, HeliosTransformer]:
    """The same random weights in both; no parameter keeps an initial value that would hide its absence."""
    torch.manual_seed(0)
    theirs = HeliosTransformer3DModel(**{**SMALL, **switches}).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = HeliosTransformer(TransformerConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@dataclasses.dataclass
class Inputs:
    """One forward: noisy latents, timesteps, text, and history latents by name."""

    latents: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    history: dict[str, torch.Tensor]

    @classmethod
    def random(cls, batch: int = 1, size=(10, 14), history_size=None, parts=("short", "mid", "long")) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        history_size = history_size or size
        return cls(
            torch.randn(batch, 4, 9, *size, generator=generator),
            torch.tensor([901, 317])[:batch],
            torch.randn(batch, 7, 20, generator=generator),
            {name: torch.randn(batch, 4, FRAMES[name], *history_size, generator=generator) for name in parts},
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        history = {name: latents.to(dtype) for name, latents in self.history.items()}
        return Inputs(self.latents.to(dtype), self.timestep, self.text.to(dtype), history)


@torch.no_grad()
def run_theirs(model: HeliosTransformer3DModel, inputs: Inputs) -> torch.Tensor:
    arguments = {"indices_hidden_states": torch.tensor([INDICES["noisy"]])}
    for name, latents in inputs.history.items():
        arguments[f"latents_history_{name}"] = latents
        arguments[f"indices_latents_history_{name}"] = torch.tensor([INDICES[name]])
    return model(inputs.latents, inputs.timestep, inputs.text, return_dict=False, **arguments)[0]


def as_history(inputs: Inputs) -> History | None:
    if not inputs.history:
        return None
    given = {f"{name}_indices": INDICES[name] for name in inputs.history}
    return History(**inputs.history, **given)


@torch.no_grad()
def run_ours(model: HeliosTransformer, inputs: Inputs) -> torch.Tensor:
    text = model.encode_text(inputs.text)
    history = as_history(inputs)
    condition = None if history is None else model.encode_history(history)
    return model(inputs.latents, inputs.timestep, text, condition, INDICES["noisy"])


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest error in units of the reference's range."""
    return ((result - reference).abs().max() / (reference.max() - reference.min())).item()


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_diffusers(switches, batch):
    theirs, ours = make_pair(**switches)
    inputs = Inputs.random(batch)
    assert relative_error(run_ours(ours, inputs), run_theirs(theirs, inputs)) <= 1e-5


@pytest.mark.parametrize("parts", [(), ("short",), ("short", "mid"), ("short", "long"), ("short", "mid", "long")])
@pytest.mark.parametrize("amplify", [False, True])
def test_with_and_without_each_history_part(parts, amplify):
    theirs, ours = make_pair(is_amplify_history=amplify)
    inputs = Inputs.random(parts=parts)
    assert relative_error(run_ours(ours, inputs), run_theirs(theirs, inputs)) <= 1e-5


@pytest.mark.parametrize(
    ("size", "history_size"),
    [((8, 8), (8, 8)), ((2, 2), (8, 8)), ((4, 6), (16, 24)), ((6, 10), (18, 22)), ((7, 9), (14, 10))],
    ids=str,
)
def test_odd_sizes(size, history_size):
    """Sizes that the mid and long patches do not divide, and that the noisy patch does not divide."""
    theirs, ours = make_pair(is_amplify_history=True)
    inputs = Inputs.random(size=size, history_size=history_size)
    result, reference = run_ours(ours, inputs), run_theirs(theirs, inputs)
    assert result.shape == reference.shape
    assert relative_error(result, reference) <= 1e-5


def test_parameter_names_and_views():
    theirs, ours = make_pair(is_amplify_history=True)
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    state = ours.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == expected
    state["blocks.0.attn1.to_k.weight"].fill_(7)
    assert (ours.blocks[0].attn1.to_qkv.weight[48:96] == 7).all(), "entries must be views of the fused weight"
    missing = theirs.state_dict()
    del missing["blocks.1.attn2.to_v.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(missing)


def test_fp32_parameters_are_those_of_diffusers(tmp_path):
    theirs, ours = make_pair(is_amplify_history=True)
    theirs.save_pretrained(tmp_path)
    loaded = HeliosTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    expected = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    assert expected == {name for name in loaded.state_dict() if ours.keeps_fp32(name)}
    ours.cast(torch.bfloat16)
    assert expected == {name for name, tensor in ours.state_dict().items() if tensor.dtype == torch.float32}


@pytest.mark.parametrize("switches", [{}, {"guidance_cross_attn": False}, {"zero_history_timestep": False}], ids=str)
def test_bfloat16_is_as_close_to_fp64_as_diffusers(switches, tmp_path):
    """Root mean square error against fp64, over a batch; 5 % covers the luck of which values round which way."""
    theirs, ours = make_pair(**switches)
    theirs.save_pretrained(tmp_path)
    low = HeliosTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    inputs = Inputs.random(2)
    exact = run_theirs(theirs.double(), inputs.to(torch.float64))
    ours.cast(torch.bfloat16)
    error = (run_ours(ours, inputs.to(torch.bfloat16)) - exact).square().mean().sqrt()
    their_error = (run_theirs(low, inputs.to(torch.bfloat16)) - exact).square().mean().sqrt()
    assert error <= 1.05 * their_error


def test_bfloat16_amplified_history():
    """diffusers raises here: its fp32 key scale makes the keys fp32. Ours stays within bf16's error of fp32."""
    theirs, ours = make_pair(is_amplify_history=True)
    inputs = Inputs.random()
    exact = run_theirs(theirs, inputs)
    ours.cast(torch.bfloat16)
    result = run_ours(ours, inputs.to(torch.bfloat16))
    assert result.dtype == torch.bfloat16
    assert relative_error(result.float(), exact) <= 0.03


def test_conditions_are_reused():
    """A second forward with the same conditions touches no text, history or rotary work, and gives the same bits."""
    _, ours = make_pair(is_amplify_history=True)
    inputs = Inputs.random()
    calls = []
    watched = [ours.patch_short, ours.patch_mid, ours.patch_long, ours.condition_embedder.text_embedder]
    watched += [block.attn2.to_kv for block in ours.blocks]
    for module in watched:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        text, history = ours.encode_text(inputs.text), ours.encode_history(as_history(inputs))
        first = ours(inputs.latents, inputs.timestep, text, history, INDICES["noisy"])
        once, tables = len(calls), ours.rotary.table.cache_info().misses
        tokens = history.tokens.clone()
        second = ours(inputs.latents, inputs.timestep, text, history, INDICES["noisy"])
    assert once == len(watched) and len(calls) == once
    assert ours.rotary.table.cache_info().misses == tables == 4
    assert torch.equal(first, second) and torch.equal(tokens, history.tokens)


def count_flops(function, *arguments) -> int:
    # PyTorch's counter knows the products of the plain attention, not the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*arguments)
    return counter.get_total_flops()


def test_flops_saved_are_exactly_the_repeated_work():
    """Ours is diffusers' count minus text K/V, history patches, t = 0 modulation and the last block's history rows."""
    theirs, ours = make_pair()
    inputs = Inputs.random()
    config = ours.config
    with torch.no_grad():
        text, history = ours.encode_text(inputs.text), ours.encode_history(as_history(inputs))
        run_ours(ours, inputs)  # fills the t = 0 rows
        count = count_flops(ours, inputs.latents, inputs.timestep, text, history, INDICES["noisy"])
    dim, ffn, length = config.dim, config.ffn_dim, inputs.text.shape[1]
    old, new = history.tokens.shape[1], 9 * 5 * 7
    per_layer_kv = 2 * 2 * length * dim * dim
    text_embedder = 2 * length * (config.text_dim * dim + dim * dim)
    zero_timestep = 2 * (config.freq_dim * dim + dim * dim + 6 * dim * dim)
    patches = 2 * dim * 4 * (2 * 35 * 4 + 1 * 12 * 32 + 4 * 4 * 256)
    pruned = old * (2 * 2 * dim * dim + 2 * 2 * dim * ffn) + 4 * old * (old + new) * dim
    expected = config.num_layers * per_layer_kv + text_embedder + zero_timestep + patches + pruned
    assert count_flops(run_theirs, theirs, inputs) - count == expected


def test_breaking_any_part_shows(monkeypatch):
    """Each mutation is a mistake that peers have made; all leave the tolerance far behind."""
    theirs, ours = make_pair(is_amplify_history=True)
    inputs = Inputs.random()
    reference = run_theirs(theirs, inputs)
    assert relative_error(run_ours(ours, inputs), reference) <= 1e-5
    monkeypatch.setattr(layers, "MAX_HISTORY_KEY_SCALE", 9.0)
    assert relative_error(run_ours(ours, inputs), reference) > 1e-4
    monkeypatch.undo()
    monkeypatch.setitem(INDICES, "long", tuple(range(2, 18)))
    assert relative_error(run_ours(ours, inputs), reference) > 1e-4
    monkeypatch.undo()
    zero = ours._zero_timestep
    ours._zero_timestep = (zero[0], torch.zeros_like(zero[1]))  # a zero vector is not the embedding of t = 0
    assert relative_error(run_ours(ours, inputs), reference) > 1e-4
    ours._zero_timestep = None
    for name, parameter in ours.named_parameters():
        kept = parameter.data.clone()
        parameter.data.mul_(1.1)
        ours._zero_timestep = None
        assert relative_error(run_ours(ours, inputs), reference) > 1e-5, f"{name} has no effect"
        parameter.data.copy_(kept)


def test_unsupported_configs_are_refused():
    with pytest.raises(RequestError, match="added_kv_proj_dim"):
        TransformerConfig.from_dict({"added_kv_proj_dim": 64})
    with pytest.raises(RequestError, match="qk_norm"):
        TransformerConfig.from_dict({"qk_norm": "layer_norm"})
    with pytest.raises(RequestError, match="rope_dim"):
        TransformerConfig.from_dict({"rope_dim": [8, 8, 8], "attention_head_dim": 16})
    without = HeliosTransformer(dataclasses.replace(make_pair()[1].config, has_multi_term_memory_patch=False))
    with pytest.raises(ValueError, match="has_multi_term_memory_patch"):
        without.encode_history(as_history(Inputs.random()))


def test_full_size_parameters_without_memory():
    with torch.device("meta"):
        model = HeliosTransformer(TransformerConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 14_312_427_584


@pytest.mark.parametrize(("heads", "dim"), itertools.product((1, 4), (8, 32)))
def test_rotation_in_bfloat16_rounds_once(heads, dim):
    """The product is taken in fp32: one rounding, so at most half a unit in the last place from fp64."""
    states = torch.randn(2, 5, heads, dim).bfloat16()
    angles = torch.randn(5, dim // 2, dtype=torch.float64)
    table = torch.polar(torch.ones_like(angles), angles)
    exact = torch.view_as_real(torch.view_as_complex(states.double().unflatten(-1, (-1, 2))) * table[:, None]).flatten(
        -2
    )
    result = layers.rotate_(states, torch.view_as_real(table.to(torch.complex64)))
    assert torch.equal(result, exact.bfloat16()) or relative_error(result.double(), exact) < 2**-9
