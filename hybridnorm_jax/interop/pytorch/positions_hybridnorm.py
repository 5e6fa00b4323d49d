"""How a HybridNorm model knows where tokens stand, and which of them each sees: rotations, tables, biases, masks."""

import math

import torch
from torch.nn import functional as F  # noqa: N812

# Values of rotary_layers.
NO_ROTATION, FIRST_ROTATION, SECOND_ROTATION = 0, 1, 2


# ---- Rotations.


def rotations(config, position_ids, dtype):
    """{rotation of a layer: (cos, sin)}, each (batch, 1, tokens, rotary_dim / 2), in float32 at least."""
    if config.positions != "rope":
        return {}
    dtype = torch.promote_types(dtype, torch.float32)
    position_ids = position_ids.to(dtype)
    used = set(config.layer_rotations) - {NO_ROTATION}
    return {rotation: _turn(config, rotation, position_ids) for rotation in sorted(used)}


def _turn(config, rotation, positions):
    first = rotation == FIRST_ROTATION
    base = config.rotary_base if first else config.second_rotary_base
    even = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=positions.dtype)
    frequencies = base ** -(even / config.rotary_dim)
    factor = 1.0
    if first:
        frequencies = SCALINGS[config.rotary_scaling](config, frequencies, positions)
        factor = attention_factor(config)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (factor * cos, factor * sin)


def _linear(config, frequencies, positions):
    """Positions count as if there were `rotary_factor` times fewer."""
    return frequencies / config.rotary_factor


def _llama3(config, frequencies, positions):
    """Long waves are stretched by rotary_factor, short ones are not, and those between in part.

    A wave is short where the original length holds more than the second of rotary_bounds of it, long where it holds
    fewer than the first.
    """
    fewest, most = config.rotary_bounds
    waves = config.rotary_original_length * frequencies / (2 * math.pi)
    kept = ((waves - fewest) / (most - fewest)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rotary_factor)


def _yarn(config, frequencies, positions):
    """As llama3, but what is kept falls linearly with the channel's number between two channels (2309.00071)."""
    slow, fast = config.rotary_bounds
    first, last = _yarn_channel(config, fast), _yarn_channel(config, slow)
    if config.rotary_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotary_dim - 1)
    last = last + 0.001 if first == last else last
    channel = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
    kept = 1 - ((channel - first) / (last - first)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rotary_factor)


def _yarn_channel(config, waves):
    """The channel, a fraction, of which the original length holds so many waves."""
    original = config.rotary_original_length / (2 * math.pi * waves)
    return config.rotary_dim * math.log(original) / (2 * math.log(config.rotary_base))


def _longrope(config, frequencies, positions):
    """Each wavelength has a factor of its own, another one where a text is longer than the original length."""
    short, long = (
        torch.tensor(factors, device=frequencies.device, dtype=frequencies.dtype)
        for factors in (config.rotary_short_factors, config.rotary_long_factors)
    )
    # All tokens of a row have the factors of its last one, (batch, 1, 1, rotary_dim / 2).
    is_long = positions.max(dim=-1).values >= config.rotary_original_length
    return frequencies / torch.where(is_long[:, None, None, None], long, short)


def check_growth(config, position_ids, past):
    """Raise ValueError where a text grows beyond longrope's original length while a cache holds its first tokens.

    Their keys were rotated by the short factors, and all tokens of the longer text have the long ones.

    Args:
      position_ids: of the new tokens. past: how many tokens the cache holds.
    """
    original = config.rotary_original_length
    if config.positions != "rope" or config.rotary_scaling != "longrope" or not past:
        return
    was_short, is_long = position_ids[:, 0] <= original, position_ids.max(dim=-1).values >= original
    if (was_short & is_long).any():
        wrong = f"a text with a cache grows beyond {original} tokens (rotary_original_length)"
        raise ValueError(f"{wrong}, where longrope rotates all its tokens anew; give it whole, or use_cache=False")


SCALINGS = {
    "none": lambda config, frequencies, positions: frequencies,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def attention_factor(config):
    """What cos and sin are multiplied with."""
    kind, factor = config.rotary_scaling, config.rotary_factor
    if kind not in ("yarn", "longrope"):
        return 1.0
    if config.rotary_attention_factor is not None:
        return config.rotary_attention_factor
    if factor <= 1:
        return 1.0
    if kind == "yarn":
        return 0.1 * math.log(factor) + 1
    return math.sqrt(1 + math.log(factor) / math.log(config.rotary_original_length))


def rotate(x, by):
    """RoPE on the leading channels of each head, channel i paired with i + half; the others pass unchanged."""
    cos, sin = by
    half = cos.shape[-1]
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], dim=-1)


# ---- Tables.


def sinusoids(positions, width, dtype):
    """(batch, tokens, width): sines and then cosines of position / 10000^(i / (width / 2 - 1)), as fairseq has them."""
    half = width // 2
    wide = torch.promote_types(dtype, torch.float32)
    channel = torch.arange(half, device=positions.device, dtype=wide)
    angles = positions[..., None].to(wide) * torch.exp(channel * (-math.log(10000) / (half - 1)))
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(table, (0, width - 2 * half)).to(dtype)


# ---- Masks and what is added to scores.


def seen_keys(attention_mask, queries, past, slots, device, window=0, explicit=False, causal=True):
    """Which keys each query sees, (batch, 1, queries, keys), True where it does; None: its own and all before, or all.

    Every query sees its own key, that of padding too: a row that sees nothing would be NaN.

    Args:
      attention_mask: (batch, tokens so far), 0 at padding; or a mask of four axes, which is taken as it is; or None.
      past: how many tokens were before the first query.
      slots: of a cache that has them all from the beginning; None: there are as many keys as tokens.
      window: how many keys a query sees, its own and those just before, or on both sides; 0: all.
      explicit: never None.
      causal: a query sees no later key.
    """
    keys = past + queries if slots is None else slots
    own = torch.arange(queries, device=device)[:, None] + past
    key = torch.arange(keys, device=device)
    if attention_mask is not None and attention_mask.ndim == 4:
        return _within(attention_mask, _is_near(own, key, window, causal)) if window else attention_mask
    if slots is None and attention_mask is not None and attention_mask.shape[1] != keys:
        raise ValueError(f"attention_mask is of {attention_mask.shape[1]} tokens, but there are {keys} so far")
    # A look at values or at lengths would break a graph, or bind it to them.
    is_compiling = torch.compiler.is_compiling()
    if attention_mask is not None and queries > 1 and not is_compiling and attention_mask.all():
        attention_mask = None
    if window and slots is None and not is_compiling and keys <= window:
        window = 0
    is_plain = attention_mask is None and slots is None and not window and not explicit
    if is_plain and queries in (1, keys):
        return None
    seen = key <= own if causal else torch.ones_like(key - own, dtype=torch.bool)
    if window:
        seen = seen & _is_near(own, key, window, causal)
    if attention_mask is None:
        return seen[None, None]
    is_token = F.pad(attention_mask.to(device, torch.bool), (0, keys - attention_mask.shape[1]))
    return ((seen & is_token[:, None]) | (key == own))[:, None]


def _is_near(own, key, window, causal):
    """Which keys are within the window of each query: before it alone, where it sees no later ones anyway."""
    return own - key < window if causal else (own - key).abs() < window


def _within(mask, is_near):
    """A caller's mask, of truth values or of numbers that are added, without what is not near."""
    if mask.dtype == torch.bool:
        return mask & is_near
    return mask.masked_fill(~is_near, torch.finfo(mask.dtype).min)


def alibi_bias(config, attention_mask, queries, past, slots, device, dtype):
    """ALiBi (2108.12409): what is added to the scores, (batch or 1, heads, queries, keys), in float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    slopes = alibi_slopes(config.num_attention_heads, config.alibi_max, device, dtype)[:, None, None]
    keys = past + queries if slots is None else slots
    key = torch.arange(keys, device=device)
    if config.alibi_bfloat16:
        # Rounded, slopes times positions of keys are no longer slopes times distances, so positions must be those of
        # the tokens, without padding.
        if attention_mask is not None and attention_mask.ndim == 2:
            padded = F.pad(attention_mask.long(), (0, keys - attention_mask.shape[1]), value=1)
            key = (padded.cumsum(-1) - 1).clamp(min=0)[:, None, None]
        rounded = slopes.bfloat16() * key.bfloat16()
        rounded = rounded if rounded.ndim == 4 else rounded[None]
        return config.alibi_scale * rounded.to(dtype).expand(-1, -1, queries, -1)
    # Distances, so that those of near keys are exact in every dtype. What a row has in common a softmax does not see.
    own = torch.arange(queries, device=device)[:, None] + past
    return (config.alibi_scale * slopes * (key - own))[None]


def alibi_slopes(heads, largest, device, dtype):
    """2^(-largest h / n), h = 1, ..., n, n the greatest power of two in `heads`; then every second of those of 2n."""
    power = 2 ** int(math.log2(heads))
    exponents = [largest * (h + 1) / power for h in range(power)]
    exponents += [largest * (2 * h + 1) / (2 * power) for h in range(heads - power)]
    return 2.0 ** -torch.tensor(exponents, device=device, dtype=dtype)


def masks(config, attention_mask, queries, past, slots, device, dtype):
    """{window of a layer: its mask}: truth values, or what is added to the scores; None as of seen_keys."""
    has_bias = config.positions == "alibi"
    bias = alibi_bias(config, attention_mask, queries, past, slots, device, dtype) if has_bias else None
    found = {}
    for window in sorted(set(config.layer_windows)):
        explicit = has_bias or config.scores_need_eager
        kind = {"window": window, "explicit": explicit, "causal": config.causal}
        mask = seen_keys(attention_mask, queries, past, slots, device, **kind)
        found[window] = mask if bias is None else _biased(mask, bias, dtype)
    return found


def _biased(mask, bias, dtype):
    """One mask of a mask and a bias; what is not seen has the least number there is."""
    if mask.dtype == torch.bool:
        return bias.to(dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return (bias + mask).clamp(min=torch.finfo(dtype).min).to(dtype)


def positions_of(attention_mask, queries, past, device):
    """0, 1, ... of the tokens of each row; padding does not count."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -queries:]
    return (torch.arange(queries, device=device) + past)[None]
