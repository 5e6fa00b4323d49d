"""How much memory a device has."""

import jax

from hybridnorm_jax.mesh.device_room import room_of


def test_a_cpus_devices_share_the_memory_of_the_machine():
    room = room_of(jax.devices()[0])
    assert 0 < room * jax.local_device_count() < 2**50
