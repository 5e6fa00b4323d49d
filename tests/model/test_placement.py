"""Schemes are what the papers' equations say."""

import math

import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.model.runs import Layer, runs
from hybridnorm_jax.model.schemes import Scheme

PAPER = {
    # name: (attention, feed-forward) of the last of 4 layers, as SublayerPlacement.formula prints them
    "pre": ("x + Attn(N(x))", "x + FFN(N(x))"),
    "post": ("N(x + Attn(x))", "N(x + FFN(x))"),
    "hybrid": ("N(x + Attn(x))", "x + FFN(x)"),
    "hybrid_star": ("N(x + Attn(x))", "x + FFN(x)"),
    "hybrid_output_norm": ("N(x + N(Attn(x)))", "x + FFN(x)"),
    "hybrid_depth_scaled": ("N(x + 0.5 Attn(x))", "x + 0.5 FFN(x)"),
    "span": ("N(x + Attn(x))", "N(X + FFN(x))"),
    "mix_ln": ("x + Attn(N(x))", "x + FFN(N(x))"),
    "sandwich": ("x + N(Attn(N(x)))", "x + N(FFN(N(x)))"),
    "peri": ("x + N(Attn(N(x)))", "x + N(FFN(N(x)))"),
    "pre_qk_projection": ("x + Attn(N(x))", "x + FFN(N(x))"),
    "reordered": ("x + N(Attn(x))", "x + N(FFN(x))"),
    "deepnorm": ("N(1.682 x + Attn(x))", "N(1.682 x + FFN(x))"),
    "layernorm_scaling": ("x + Attn(0.5 N(x))", "x + FFN(0.5 N(x))"),
    "keel": ("N(8 x + Attn(N(x)))", "N(8 x + FFN(N(x)))"),
    "b2t": ("N(x + Attn(x))", "N((x + X) + FFN(x))"),
    "parallel": ("x + Attn(N(x))", "x + FFN(N(X))"),
    "parallel_one_norm": ("x + Attn(N(x))", "x + FFN(N(X))"),
    "parallel_qk": ("x + Attn(N(x))", "x + FFN(N(X))"),
    "parallel_one_norm_qk": ("x + Attn(N(x))", "x + FFN(N(X))"),
    "sandwich_qk": ("x + N(Attn(N(x)))", "x + N(FFN(N(x)))"),
    "pre_post": ("N(x + Attn(N(x)))", "x + FFN(x)"),
    "post_pre": ("x + Attn(x)", "N(x + FFN(N(x)))"),
    "post_final_norm": ("N(x + Attn(x))", "N(x + FFN(x))"),
    "mix_ln_12": ("x + Attn(N(x))", "x + FFN(N(x))"),
    "mix_ln_50": ("x + Attn(N(x))", "x + FFN(N(x))"),
    "peri_no_final_norm": ("x + N(Attn(N(x)))", "x + N(FFN(N(x)))"),
    "peri_bare": ("x + N(Attn(N(x)))", "x + N(FFN(N(x)))"),
    "deepnorm_final_norm": ("N(1.682 x + Attn(x))", "N(1.682 x + FFN(x))"),
    "deepnorm_pre": ("1.682 x + Attn(N(x))", "1.682 x + FFN(N(x))"),
    "layernorm_scaling_learned": ("x + Attn(N(x))", "x + FFN(N(x))"),
    "keel_pre_first": ("N(8 x + Attn(N(x)))", "N(8 x + FFN(N(x)))"),
    "sub_ln": ("x + Attn(N(x))", "x + FFN(N(x))"),
    "normformer": ("x + N(Attn(N(x)))", "x + FFN(N(x))"),
    "normformer_before": ("x + N(Attn(N(x)))", "x + FFN(N(x))"),
    "normformer_residual": ("x + N(Attn(N(x)))", "w x + FFN(N(x))"),
    "simple_norm": ("x + N(Attn(x))", "x + N(FFN(x))"),
    "hybrid_layer_scale": ("N(x + g Attn(x))", "x + g FFN(x)"),
    "hybrid_rezero": ("N(x + a Attn(x))", "x + a FFN(x)"),
    "hybrid_skipinit": ("N(x + a Attn(x))", "x + a FFN(x)"),
    "siamese_hybrid_pre": (
        "N(x + 0.3536 z),  s + z,  z = Attn(w x + N(s))",
        "x + 0.3536 z,  s + z,  z = FFN(N(x + N(s)))",
    ),
    "siamese_attn_norm": (
        "N(x + 0.3536 z),  s + z,  z = Attn(N(x) + N(s))",
        "x + 0.3536 z,  s + z,  z = FFN(N(x + N(s)))",
    ),
    "siamese_post_pre": (
        "N(x) + 0.3536 z,  s + z,  z = Attn(N(N(x) + N(s)))",
        "N(x) + 0.3536 z,  s + z,  z = FFN(N(N(x) + N(s)))",
    ),
    "residual": ("N(x + z),  s + z,  z = Attn(x)", "N(x + z),  s + z,  z = FFN(x)"),
    "prores_pre": ("x + t Attn(N(x))", "x + t FFN(N(x))"),
    "prores_post": ("N(x + t Attn(x))", "N(x + t FFN(x))"),
    "prores_sandwich": ("x + t N(Attn(N(x)))", "x + t N(FFN(N(x)))"),
    "prores_deepnorm": ("N(1.682 x + t Attn(x))", "N(1.682 x + t FFN(x))"),
    "branch_norm": ("N(x + t Attn(x))", "N(x + t FFN(x))"),
    "ngpt": ("u(u(x) + g (u(Attn(x)) - u(x)))", "u(u(x) + g (u(FFN(x)) - u(x)))"),
    "geonorm": ("exp_x(Attn(x))", "exp_x(FFN(x))"),
    "kc_post": ("N(x + Attn(x))", "x + FFN(x)"),
    "qkv_pre": ("x + Attn(x)", "x + FFN(N(x))"),
    "pre_qkc_post": ("N(x + Attn(N(x)))", "x + FFN(x)"),
    "pre_kv_pre": ("x + Attn(N(x))", "x + FFN(N(x))"),
}
NO_FINAL_NORM = {"post", "span", "deepnorm", "keel", "keel_pre_first", "b2t", "post_pre", "residual"}
NO_FINAL_NORM |= {"peri_no_final_norm", "peri_bare", "branch_norm", "ngpt"}
EMBEDDING_NORM = {"peri", "peri_no_final_norm", "post_pre", "geonorm"}


@pytest.mark.parametrize("name", PAPER)
def test_equations(name):
    placement = hn.SCHEMES[name].placements(4)[-1]
    assert (placement.attention.formula("Attn"), placement.feed_forward.formula("FFN")) == PAPER[name]


def test_the_table_is_complete():
    ablations = {
        form.replace("#", normalized)
        for form in ("#_post", "#_pre", "pre_#_post", "pre_#_pre")
        for normalized in ("qk", "kv", "qkv", "qkc", "kc", "qkvc")
    }
    named = {name for name in PAPER if name not in ablations}
    assert set(hn.SCHEMES) == ablations | named


def test_norms_around_the_blocks():
    assert {name for name, scheme in hn.SCHEMES.items() if not scheme.final_norm} == NO_FINAL_NORM
    assert {name for name, scheme in hn.SCHEMES.items() if scheme.embedding_norm} == EMBEDDING_NORM


def test_norms_inside_attention():
    block = hn.SCHEMES["qkvc_post"].block(0, 2)
    assert {block.q_norm, block.k_norm, block.v_norm, block.context_norm} == {"head"}
    block = hn.SCHEMES["kc_pre"].block(0, 2)
    assert (block.q_norm, block.k_norm, block.v_norm, block.context_norm) == (None, "head", None, "head")
    block = hn.SCHEMES["reordered"].block(0, 2)
    assert (block.q_norm, block.k_norm, block.v_norm) == ("projection", "projection", None)


def test_first_blocks_that_differ():
    star = hn.SCHEMES["hybrid_star"].placements(3)
    assert star[0].attention.formula("A") == "x + A(N(x))"
    assert star[0].feed_forward.formula("F") == "x + F(N(x))"
    assert star[0].v_norm == "head"
    assert hn.SCHEMES["span"].block(0, 3).attention.formula("A") == "N(x + A(N(x)))"
    keel = hn.SCHEMES["keel"].placements(4)
    assert keel[0].attention.formula("A") == "x + A(N(x))"
    assert keel[0].feed_forward.formula("F") == "N(x + F(N(x)))"
    assert keel[1].attention.formula("A") == "N(8 x + A(N(x)))"
    mixed = hn.SCHEMES["mix_ln"].placements(9)
    assert [placement.attention.post for placement in mixed] == [True] * 2 + [False] * 7


def test_scales():
    assert hn.SCHEMES["deepnorm"].block(0, 8).attention.residual_scale == 2.0
    assert hn.SCHEMES["hybrid_output_norm"].block(0, 8).attention.branch_norm_init == 0.25
    assert hn.SCHEMES["layernorm_scaling"].block(3, 8).feed_forward.input_scale == 0.5
    assert hn.SCHEMES["hybrid_depth_scaled"].block(1, 8).attention.branch_scale == 1 / math.sqrt(2)


def test_runs_group_equal_structure_and_keep_the_scales():
    grouped = runs(map(Layer, hn.SCHEMES["hybrid_star"].placements(6)))
    assert [(run.start, run.length) for run in grouped] == [(0, 1), (1, 5)]
    assert grouped[1].scales("attention") == (None, None, None, None)
    (scaled,) = runs(map(Layer, hn.SCHEMES["layernorm_scaling"].placements(4)))
    assert scaled.scales("feed_forward") == (None, None, tuple(1 / math.sqrt(depth) for depth in (1, 2, 3, 4)), None)


def test_runs_hold_layers_of_equal_parameters_whatever_their_windows_and_rotations():
    (placement,) = hn.SCHEMES["pre"].placements(1)
    layers = [Layer(placement, window=4), Layer(placement, rotation=0), Layer(placement, has_experts=True)]
    assert [(run.start, run.length, run.has_experts) for run in runs(layers)] == [(0, 2, False), (2, 1, True)]


@pytest.mark.parametrize("name", hn.SCHEMES)
def test_every_scheme_is_hashable_and_prints_itself(name):
    scheme = hn.SCHEMES[name]
    assert len({hash(scheme.placements(5)), hash(scheme.placements(5))}) == 1
    assert scheme.table(5).startswith(f"{name}, 5 layers")


def test_a_scheme_of_ones_own_is_one_entry():
    @hn.scheme("mine", final_norm=False, initializer="megatron")
    def mine(layer, num_layers):
        sublayer = hn.SublayerPlacement(pre=True, branch_scale=1 / num_layers)
        return hn.BlockPlacement(sublayer, sublayer)

    try:
        config = hn.ModelConfig(scheme="mine", num_layers=4)
        assert config.initializer_name == "megatron"
        assert not config.has_final_norm
        assert isinstance(hn.SCHEMES["mine"], Scheme)
        with pytest.raises(ValueError, match="already"):
            hn.scheme("mine")(mine)
    finally:
        del hn.SCHEMES["mine"]


def test_impossible_placements_are_refused():
    with pytest.raises(ValueError, match="residual"):
        hn.SublayerPlacement(residual="all")
    with pytest.raises(ValueError, match="q_norm"):
        hn.BlockPlacement(q_norm="heads")
    with pytest.raises(ValueError, match="twice"):
        hn.BlockPlacement(hn.SublayerPlacement(residual="both"))
