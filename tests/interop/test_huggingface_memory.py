"""Reading a Hugging Face checkpoint needs little more memory than its parameters, writing one that of a few tensors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import hybridnorm_jax as hn
from hybridnorm_jax.interop.huggingface import save_huggingface
from hybridnorm_jax.interop.tensor_places import leaf_shapes

MEMORY = """
import sys
import hybridnorm_jax as hn
from hybridnorm_jax.interop.huggingface import load_huggingface

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

before = status("VmRSS")
config, params = load_huggingface(sys.argv[1])
print(status("VmHWM") - before)

# On a TPU or GPU host that would take the device.
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "reading a file has started the accelerator"
"""

DENSE = {"scheme": "pre", "num_layers": 12, "mlp_dim": 2048, "norm_eps": 1e-6}
EXPERTS = {"scheme": "pre_qk_projection", "num_layers": 4, "mlp_dim": 128, "num_experts": 64, "experts_per_token": 8}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(
    ("keys", "tensors"), [pytest.param(DENSE, 111, marks=pytest.mark.long), (EXPERTS, 4 * (3 * 64 + 9) + 3)]
)
def test_peak_memory_is_under_1_3_times_the_checkpoint(tmp_path, keys, tensors):
    config = hn.ModelConfig(d_model=512, num_heads=8, vocab_size=16_000, **keys)
    rng = np.random.default_rng(0)
    leaves = {path: rng.random(shape, np.float32) for path, shape in leaf_shapes(config).items()}
    save_huggingface(tmp_path / "big", config, unflatten_dict(leaves, sep="/"), max_shard_bytes=150_000_000)
    del leaves
    files = list((tmp_path / "big").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) in (2, 3)
    assert (tmp_path / "big" / "model.safetensors.index.json").read_text().count(".weight") == tensors
    assert size > 250_000_000
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "big"], check=True, capture_output=True, text=True, timeout=300
    )
    shutil.rmtree(tmp_path / "big")
    print(f"peak {int(run.stdout) / size:.3f} of the checkpoint")
    assert size < int(run.stdout) < 1.3 * size


WRITING = (
    MEMORY.split("before =")[0]
    + """
import numpy as np
from flax.traverse_util import unflatten_dict
from hybridnorm_jax.interop.huggingface import save_huggingface
from hybridnorm_jax.interop.tensor_places import leaf_shapes

config = hn.ModelConfig(d_model=512, num_heads=8, num_layers=16, mlp_dim=2048, vocab_size=16_000)
leaves = {path: np.ones(shape, np.float32) for path, shape in leaf_shapes(config).items()}
params = unflatten_dict(leaves, sep="/")
print(sum(leaf.nbytes for leaf in leaves.values()))
save_huggingface(sys.argv[1] + "/first", hn.ModelConfig(d_model=32, num_heads=4, vocab_size=16), unflatten_dict({
    path: np.ones(shape, np.float32)
    for path, shape in leaf_shapes(hn.ModelConfig(d_model=32, num_heads=4, vocab_size=16)).items()
}, sep="/"))
before = status("VmRSS")
save_huggingface(sys.argv[1] + "/big", config, params, dtype="bfloat16")
print(status("VmHWM") - before)
"""
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_peak_memory_of_writing_is_that_of_two_tensors(tmp_path):
    """Not of another copy of the model, though all of it goes into one file."""
    run = subprocess.run(
        [sys.executable, "-c", WRITING, tmp_path], check=True, capture_output=True, text=True, timeout=300
    )
    size, more = map(int, run.stdout.split())
    files = list((tmp_path / "big").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > size / 2
    shutil.rmtree(tmp_path)
    print(f"peak {more / size:.3f} of the model")
    assert more < 0.2 * size


# As a 7B checkpoint on a mesh, smaller: bfloat16, in shards, onto eight devices.
PLACED = (
    MEMORY.split("before =")[0]
    + """
import json
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from hybridnorm_jax.interop.huggingface import huggingface_config
from hybridnorm_jax.interop.tensor_places import leaf_shapes
from flax.traverse_util import flatten_dict, unflatten_dict

mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

def places(path):
    def of(shape):
        axis = next((axis for axis in range(len(shape) - 1, 0, -1) if shape[axis] % 8 == 0), None)
        return NamedSharding(mesh, P(*("fsdp" if each == axis else None for each in range(len(shape)))))
    shapes = leaf_shapes(huggingface_config(path))
    return unflatten_dict({path: of(shape) for path, shape in shapes.items()}, sep="/")

# The first time, programs are compiled and threads start, which needs memory of its own.
load_huggingface(sys.argv[1] + "/small", shardings=places(sys.argv[1] + "/small"))
before = status("VmRSS")
config, params = load_huggingface(sys.argv[1] + "/big", shardings=places(sys.argv[1] + "/big"))
peak = status("VmHWM") - before
for path, leaf in flatten_dict(params, sep="/").items():
    assert not leaf.is_fully_replicated or leaf.ndim < 2 or leaf.size < 1e5, path
digest = {path: float(leaf.astype("float32").sum()) for path, leaf in flatten_dict(params, sep="/").items()}
print(json.dumps({"peak": peak, "digest": digest}))
"""
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.long
def test_onto_a_mesh_the_host_holds_one_layer_at_a_time(tmp_path):
    """The devices are the host's own here, so their memory counts as well: the parameters once, and little more."""
    sizes = {"d_model": 768, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 3072, "vocab_size": 8000, "scheme": "pre"}
    rng = np.random.default_rng(0)
    for name, layers in (("small", 2), ("big", 24)):
        config = hn.ModelConfig(**sizes, num_layers=layers, param_dtype="bfloat16")
        leaves = {path: rng.random(shape, np.float32).astype("bfloat16") for path, shape in leaf_shapes(config).items()}
        params = unflatten_dict(leaves, sep="/")
        save_huggingface(tmp_path / name, config, params, max_shard_bytes=100_000_000)
    files = list((tmp_path / "big").glob("*.safetensors"))
    assert len(files) > 3
    size = sum(file.stat().st_size for file in files)
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PLACED, tmp_path],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | env,
    )
    shutil.rmtree(tmp_path)
    found = json.loads(run.stdout)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(found["digest"][path], leaf.astype(np.float32).sum(dtype=np.float64), rtol=1e-4)
    layer = sum(leaf[0].nbytes for path, leaf in leaves.items() if path.startswith("run_"))
    print(f"{(found['peak'] - size) / layer:.2f} layers more than the parameters, {found['peak'] / size:.3f} of them")
    assert found["peak"] - size < 3 * layer
