"""An .npz file of the HybridNorm authors' parameters that is damaged or made to harm is refused in one line."""

import zipfile

import numpy as np
import pytest

import hybridnorm_jax as hn

CONFIG = hn.ModelConfig(scheme="pre", d_model=8, num_layers=1, num_heads=2, mlp_dim=16, vocab_size=11)
BLOCK = "transformer.blocks.0."
SHAPES = {
    "transformer.wte.weight": (11, 8),
    "transformer.ff_out.weight": (11, 8),
    "transformer.ln_f.weight": (8,),
    f"{BLOCK}attn_norm.weight": (8,),
    f"{BLOCK}ff_norm.weight": (8,),
    f"{BLOCK}att_proj.weight": (24, 8),
    f"{BLOCK}attn_out.weight": (8, 8),
    f"{BLOCK}ff_proj.weight": (32, 8),
    f"{BLOCK}ff_out.weight": (8, 16),
}
HEAD = "transformer.ff_out.weight"


def _arrays():
    rng = np.random.default_rng(0)
    return {name: rng.random(shape, np.float32) for name, shape in SHAPES.items()}


def _npy(header, data=b""):
    header = header.encode() + b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.fixture
def archive(tmp_path):
    """An .npz file of all arrays, some of whose members are other bytes, or are there besides."""

    def make(members=None, *, without=()):
        path = tmp_path / "model.npz"
        np.savez(path, **{name: array for name, array in _arrays().items() if name not in without})
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (members or {}).items():
                archive.writestr(name, content)
        return np.load(path)

    return make


def test_an_open_npz_file_is_read(archive):
    read = hn.params_from_olmo(CONFIG, archive())
    np.testing.assert_array_equal(read["head"]["kernel"], _arrays()[HEAD].T)


def test_a_member_that_unpacks_to_another_shape_is_refused_unread(archive, monkeypatch):
    """Its header says enough; the content could be any number of zeros."""
    bomb = _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}", bytes(1 << 20))
    arrays = archive({f"{HEAD}.npy": bomb}, without=[HEAD])
    read, original = [], np.lib.npyio.NpzFile.__getitem__

    def recorded(self, name):
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", recorded)
    with pytest.raises(hn.UserError, match=r"ff_out\.weight: shape \(1000000, 1000000\) in the checkpoint, \(11, 8\)"):
        hn.params_from_olmo(CONFIG, arrays)
    assert read == ["transformer.wte.weight"]


HEADERS = {
    "a pickle": ("{'descr': '|O', 'fortran_order': False, 'shape': (11, 8)}", "dtype object .* parameters are floats"),
    "integers": ("{'descr': '<i4', 'fortran_order': False, 'shape': (11, 8)}", "dtype int32 .* parameters are floats"),
    "no header": ("(" * 5000, "cannot be read from the checkpoint"),
    "nested": ("-" * 9000 + "1", "cannot be read from the checkpoint"),
    "cut off": ("{'descr': '<f4', 'fortran_order': False, 'shape': (11, 8)}", "cannot be read from the checkpoint"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_member_that_is_no_array_is_refused_by_name(archive, name):
    header, message = HEADERS[name]
    arrays = archive({f"{HEAD}.npy": _npy(header, bytes(8))}, without=[HEAD])
    with pytest.raises(hn.UserError, match=rf"transformer\.ff_out\.weight: {message}") as raised:
        hn.params_from_olmo(CONFIG, arrays)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("second", [f"{HEAD}.npy", f"param/{HEAD}.npy", HEAD])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(archive, second):
    arrays = archive({second: _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (11, 8)}", bytes(352))})
    with pytest.raises(hn.UserError, match=r"transformer\.ff_out\.weight: twice in the checkpoint"):
        hn.params_from_olmo(CONFIG, arrays)


def test_integers_in_memory_are_refused():
    arrays = _arrays() | {HEAD: np.ones((11, 8), np.int64)}
    with pytest.raises(hn.UserError, match=r"ff_out\.weight: dtype int64"):
        hn.params_from_olmo(CONFIG, arrays)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(hn.UserError, match="arrays: must map names to arrays, not list"):
        hn.params_from_olmo(CONFIG, [])
