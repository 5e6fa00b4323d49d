"""Eight simulated devices for every test, and small shapes that compile once."""

import copy
import gc
import os
from importlib import metadata
from pathlib import Path

# The suite compiles hundreds of tiny programs and runs each a few times: LLVM's optimizations would take most of it.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
# Of what then remains the MLIR emitters of fusions take two thirds; later versions have no others, and end at the flag.
# And to split a program into parts, which are then compiled side by side, costs more than it saves: they are small, and
# the other workers have the other cores.
if metadata.version("jaxlib").startswith("0.10."):
    FLAGS += ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Shared by all workers and by the programs that tests start. JAX by default keeps only what took a second to compile.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Lines of Python in the programs' locations are a tenth of the time it takes to lower them, and no test reads them.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The programs that tests start would otherwise compile this package's source anew each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.training.program import Program, compiled_values

# Tracing makes millions of objects, and Python would look through them over and over: a sixth of the suite's time.
# They are collected after each file instead.
gc.disable()

SMALL = {"d_model": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 61}


@pytest.fixture(autouse=True, scope="module")
def _forget_what_is_compiled():
    """The programs of one file are of no use to the next one, and all of them are gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
    # What is left are modules and their like, for good. To look through them after every file took a tenth of the time.
    gc.freeze()


@pytest.fixture(scope="module")
def _programs():
    return {}


@pytest.fixture
def shared_programs(_programs, monkeypatch):
    """Runs of one file whose steps are the same compile them once. For files that train the same small model often."""
    build = Program.__init__

    def build_or_share(self, config, mesh=None):
        named = config.model.placements, config.model.norm_kind, hn.NORM_KINDS[config.model.attention_norm_kind]
        key = repr((compiled_values(config), *named, jax.config.read("jax_enable_x64"))), mesh
        if key not in _programs:
            build(self, config, mesh)
            _programs[key] = copy.copy(self)
        vars(self).update(vars(_programs[key].sharing(config)))

    monkeypatch.setattr(Program, "__init__", build_or_share)


@pytest.fixture(autouse=True)
def _tables_as_they_were():
    """What a test enters into the tables of schemes and of kinds of norms is gone after it."""
    before = {id(table): dict(table) for table in (hn.SCHEMES, hn.NORM_KINDS)}
    yield
    for table in (hn.SCHEMES, hn.NORM_KINDS):
        table.clear()
        table.update(before[id(table)])


@pytest.fixture
def small_config():
    """Makes a ModelConfig of three narrow layers, with the keys given."""
    return lambda **keys: hn.ModelConfig(**(SMALL | keys))


@pytest.fixture
def random_params():
    """Parameters of a config, drawn so that no two layers and no norm are alike: every leaf ~ N(0 or 1, 0.3^2).

    A leaf cannot be changed in place: JAX may still be reading it. A CPU's program takes an array of NumPy without a
    copy and runs while Python goes on, so a change after the call could reach it.
    """

    def draw(config, seed=0):
        shapes = abstract_params(config)
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            centre = 1.0 if path[-1].key == "scale" else 0.0
            drawn = np.asarray(centre + 0.3 * rng.standard_normal(shape.shape)).astype(shape.dtype)
            drawn.flags.writeable = False
            return drawn

        return jax.tree.map_with_path(leaf, shapes)

    return draw


@pytest.fixture
def tokens():
    """Two sequences of twelve token ids below 61."""
    return np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)


@pytest.fixture(scope="session")
def tpu_devices():
    """A slice of eight v5e chips to compile for; libtpu's compiler needs no TPU."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
        environment.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests may be compiling too
        environment.delenv("XLA_FLAGS")  # libtpu reads them too, and ends the process at one of a CPU
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
