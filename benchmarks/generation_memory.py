"""How many bytes of memory one step of generation moves, by the compiler of a TPU that nobody has to own.

    python benchmarks/generation_memory.py v5e:1x1 151m --batch 16 --slots 2048 [key=value ...]

A step writes one token of every sequence. It has to read all parameters and all filled slots of the cache once; here
all slots are filled. The numbers are counted in the compiled text, see planning/memory_traffic.py.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hybridnorm_jax.generation.decoding import read_prompts, write
from hybridnorm_jax.generation.generate import least_rows
from hybridnorm_jax.generation.ready_parameters import ready
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.kernels.cached_attention import blocks_of
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.planning.compilation import read_config
from hybridnorm_jax.planning.memory_traffic import memory_traffic, total_bytes
from hybridnorm_jax.planning.topologies import devices_of, parse_topology

PROMPT, STRIDE = 128, 32


def main() -> None:
    """Read the arguments, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("config", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slots", type=int, default=2048)
    arguments = parser.parse_args()
    config = read_config(arguments.config).model
    (device, *_) = devices_of(parse_topology(arguments.topology))
    print(json.dumps(step_memory(config, device, batch=arguments.batch, slots=arguments.slots)))


def step_memory(config: ModelConfig, device: jax.Device, *, batch: int, slots: int) -> dict[str, Any]:
    """What one step moves, what it has to move, and how much memory the compiled functions need beside that."""
    jax.config.update("jax_enable_compilation_cache", False)
    plain = dataclasses.replace(config, attention="xla", expert_dispatch="blocked", remat="none")
    model = Decoder(plain, unrolled=True)
    here = jax.sharding.SingleDeviceSharding(device)

    def on_device(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)

    params = on_device(jax.eval_shape(partial(ready, config), abstract_params(config)))
    rows = max(batch, least_rows(config, device))
    tokens = jax.ShapeDtypeStruct((rows, PROMPT), jnp.int32)
    number, row, stops = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (rows,), (1,)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    given = on_device((tokens, row, keys, stops))
    start = time.monotonic()
    read = read_prompts.lower(model, params, *given, slots=slots, sampling=Sampling()).compile()
    seconds_read = time.monotonic() - start
    writing = on_device(
        jax.eval_shape(lambda *a: read_prompts(model, *a, slots=slots, sampling=Sampling()), params, *given)
    )
    start = time.monotonic()
    lowered = write.lower(model, params, writing, given[-1], on_device(number), most=STRIDE, sampling=Sampling())
    written = lowered.compile()
    seconds_write = time.monotonic() - start
    moved = memory_traffic(written.as_text(), of_loop=True, unknown_trips=blocks_of(slots))
    needed = {"parameters": _bytes(params), "cache": _bytes(writing.cache) * batch // rows}
    return {
        "device": device.device_kind,
        "batch": batch,
        "slots": slots,
        **{f"{name}_mb": count / 1e6 for name, count in needed.items()},
        "moved_mb": total_bytes(moved) / 1e6,
        "ratio": total_bytes(moved) / sum(needed.values()),
        "temporaries_mb": written.memory_analysis().temp_size_in_bytes / 1e6,
        "temporaries_of_reading_mb": read.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_seconds": [round(seconds_read, 1), round(seconds_write, 1)],
        "most": [f"{each.name} {each.bytes * each.times / 1e6:.1f}" for each in moved[:6]],
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
