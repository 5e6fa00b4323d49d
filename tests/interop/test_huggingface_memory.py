"""Reading a Hugging Face checkpoint needs little more memory than its parameters, writing one that of a few tensors."""

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
@pytest.mark.parametrize(("keys", "tensors"), [(DENSE, 111), (EXPERTS, 4 * (3 * 64 + 9) + 3)])
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
