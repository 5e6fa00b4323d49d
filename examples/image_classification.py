"""Trains a small vision transformer to classify images, under any norm placement.

python examples/image_classification.py                        # on images that it makes itself
python examples/image_classification.py --data digits.npz      # arrays `images` (n, h, w[, c]) and `labels` (n,)
python examples/image_classification.py --data folder          # folder/CLASS/*.png, read with Pillow
python examples/image_classification.py --scheme hybrid_star --norm rmsnorm
"""

import argparse
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hybridnorm_jax as hn

HELD_OUT = 5  # one image in so many
SIZES = {"d_model": 64, "num_layers": 4, "num_heads": 4, "activation": "gelu", "attention_bias": True, "mlp_bias": True}


def made_images(count=2000, size=16):
    """Noise with a bright bar: across, upright, or along either diagonal, at a random place."""
    random = np.random.default_rng(0)
    images = random.normal(0, 0.6, (count, size, size, 1)).astype(np.float32)
    labels = random.integers(0, 4, count)
    for image, label in zip(images, labels, strict=True):
        row, column = random.integers(4, size - 4, 2)
        down, right = [(0, 1), (1, 0), (1, 1), (1, -1)][label]
        for step in range(-3, 4):
            image[row + step * down, column + step * right] += 2
    return images, labels


def read_folder(folder, size):
    """Every image below folder/CLASS, made square; classes are numbered in the order of their names."""
    from PIL import Image

    classes = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    if not files:
        raise hn.UserError(f"{folder}: holds no folders of images, one for each class")
    images = [np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file, _ in files]
    return np.stack(images), np.array([label for _, label in files])


def read_arrays(file):
    """The arrays of an .npz file, and what is wrong with them, if anything is."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except Exception as error:  # NumPy raises a dozen kinds
        raise hn.UserError(f"{file}: no .npz file with arrays `images` and `labels`: {error!r}") from error
    if images.ndim not in (3, 4) or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise hn.UserError(f"{file}: images: {images.dtype} {images.shape}: must be (n, h, w[, c]) of uint8 or floats")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise hn.UserError(f"{file}: labels: {labels.dtype} {labels.shape} must be {len(images)} integers from 0 on")
    return images, labels


def read(data, size):
    """Images (n, height, width, channels) in float32, about -1 to 1, and their labels."""
    if data is None:
        return made_images()
    images, labels = read_folder(data, size) if Path(data).is_dir() else read_arrays(data)
    if len(images) < 2 or not np.isfinite(images).all():
        raise hn.UserError(f"{data}: images: at least 2 are needed, without NaN and Inf")
    images = images[..., None] if images.ndim == 3 else images
    images = images / 127.5 - 1 if images.dtype == np.uint8 else images
    return images.astype(np.float32), labels.astype(np.int32)


def batches(images, labels, batch_size, seed):
    """Batches without end, each epoch in another order."""
    places = grain.MapDataset.source(np.arange(len(images))).seed(seed).shuffle().repeat()
    examples = places.map(lambda place: {"image": images[place], "label": labels[place]})
    return iter(examples.to_iter_dataset().batch(batch_size, drop_remainder=True))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an .npz file, or a folder with a folder of images for each class")
    parser.add_argument("--scheme", default="pre", choices=sorted(hn.SCHEMES), metavar="NAME")
    parser.add_argument("--norm", default="layernorm", choices=("layernorm", "rmsnorm", "crmsnorm"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="height and width that images of a folder are given")
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "size", "patch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    try:
        return train(options)
    except (hn.UserError, OSError) as error:  # each names the file
        raise SystemExit(f"error: {error}") from error


def train(options):
    """Trains, prints, and returns the share of the held-out images that are classified right."""
    images, labels = read(options.data, options.size)
    order = np.random.default_rng(0).permutation(len(images))
    held_out, rest = np.split(order, [max(len(order) // HELD_OUT, 1)])
    config = hn.EncoderConfig(
        scheme=options.scheme,
        norm=options.norm,
        norm_bias=options.norm == "layernorm",
        **SIZES,
        image_size=images.shape[1:3],
        patch_size=options.patch,
        num_channels=images.shape[3],
        num_classes=int(labels.max()) + 1,
    )
    model = hn.Encoder(config)
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0, options.rate, options.steps // 10, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    state = optimizer.init(params)

    def loss_of(params, batch):
        logits = model.apply({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @jax.jit
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def is_right(params, images, labels):
        return model.apply({"params": params}, images).argmax(-1) == labels

    stream = batches(images[rest], labels[rest], options.batch, seed=0)
    for number, batch in zip(range(1, options.steps + 1), stream, strict=False):
        params, state, loss = step(params, state, batch)
        if number % 20 == 0 or number == options.steps:
            print(f"step {number:5}  loss {float(loss):.4f}", flush=True)
    parts = np.array_split(held_out, max(len(held_out) // options.batch, 1))
    right = np.concatenate([np.asarray(is_right(params, jnp.asarray(images[part]), labels[part])) for part in parts])
    print(f"{options.scheme}: {right.mean():.1%} of {len(right)} held-out images are classified right")
    return float(right.mean())


if __name__ == "__main__":
    main()
