"""What is gathered has the gradient of jax.lax.all_gather, in however many stages its sum is scattered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hybridnorm_jax.mesh import gathered
from hybridnorm_jax.mesh.device_mesh import make_mesh


@pytest.mark.parametrize("largest", [1, 4, 64])
@pytest.mark.parametrize(("mesh", "axes"), [({"fsdp": 8}, ("fsdp",)), ({"fsdp": 4, "context": 2}, ("fsdp", "context"))])
@pytest.mark.parametrize("shape", [(8, 16, 3), (3, 16)], ids=str)
def test_the_gradient_is_the_scattered_sum(mesh, axes, largest, shape, monkeypatch):
    """Every device multiplies what it gathered by numbers of its own, so that each part of the sum is seen."""
    monkeypatch.setattr(gathered, "LARGEST_STAGE", largest)
    rng = np.random.default_rng(0)
    x, factors = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in (shape, (8, *shape)))

    def loss(gather, x):
        def local(shard, factor):
            return (gather(shard, axes, 1) * factor[0]).sum()[None]

        split = PartitionSpec(None, axes), PartitionSpec(axes)
        return jax.shard_map(local, in_specs=split, out_specs=PartitionSpec(axes), check_vma=False)(x, factors).sum()

    def of_jax(shard, axes, dimension):
        return jax.lax.all_gather(shard, axes, axis=dimension, tiled=True)

    with jax.set_mesh(make_mesh(mesh, jax.devices()[:8])):
        value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(gathered.gather, x)))(x)
        expected = jax.jit(jax.value_and_grad(lambda x: loss(of_jax, x)))(x)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-5)


def test_stages_are_of_all_devices_and_of_neighbours_last():
    assert gathered._stages(64, of_channels=False) == [None]
    first, second = gathered._stages(128, of_channels=False)
    assert [len(groups) for groups in (first, second)] == [8, 16]
    assert second[0] == list(range(8))
    assert first[0] == list(range(0, 128, 8))
    assert all(sorted(device for group in groups for device in group) == list(range(128)) for groups in (first, second))
    assert [len(groups) for groups in gathered._stages(128, of_channels=True)] == [16, 8]
    assert gathered._stages(127, of_channels=False) == [None]
