"""Schemes that go along a sphere in the place of sums; formula.py has the steps.

In the equations X is a block's input, Y the attention's result, and u(v) = v / |v|.
"""

from hybridnorm_jax.model.placement import BlockPlacement, SublayerPlacement
from hybridnorm_jax.model.scheme import scheme


@scheme(
    "ngpt",
    final_norm=False,
    initializer="ngpt",
    sphere=True,
    source="nGPT (2410.01131), eqs. 10 and 11",
    checked="authors' code",
)
def ngpt(layer: int, num_layers: int) -> BlockPlacement:
    """Y = u(u(X) + |g| (u(Attn(X)) - u(X))), and so the FFN. nGPT (2410.01131), eqs. 10 and 11.

    q, k, gate, up and the logits have learned scales, and training keeps all matrices normalized: see
    BlockPlacement.sphere and Scheme.sphere. It needs no weight decay and no warm-up.
    """
    sublayer = SublayerPlacement(joins="chord", layer_scale="channel")
    return BlockPlacement(sublayer, sublayer, sphere=True)


@scheme("geonorm", embedding_norm=True, source="GeoNorm (2601.22095), from a third party", checked="equation only")
def geonorm(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X cos a + |X| v/|v| sin a, v what Attn(X) has orthogonal to X, a = |v|/|X|; so the FFN. GeoNorm (2601.22095).

    The formula is a third party's, and that a is |v|/|X|, as of the exponential map, our reading. The paper also lets
    steps shrink with the layer, by a rule not known to us: a scheme of your own with branch_scale.
    """
    sublayer = SublayerPlacement(joins="geodesic")
    return BlockPlacement(sublayer, sublayer)
