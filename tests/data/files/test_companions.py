"""Files that lie beside files of tokens and belong to them: used with them, and never read as tokens."""

import numpy as np
import pytest

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data

DOCUMENTS = [[*range(10 * number, 10 * number + 7)] for number in range(20)]


def write(folder, name="a"):
    """Tokens without separators, with the index of their documents."""
    np.save(folder / f"{name}.npy", np.concatenate(DOCUMENTS).astype("<u2"))
    np.save(folder / f"{name}.ends.npy", np.cumsum([len(each) for each in DOCUMENTS]).astype("<u8"))


def opened(*files, **others):
    section = DataSection(source="tokens", files=tuple(map(str, files)), validation_fraction=0.0, **others)
    return open_data(section, seq_len=6, vocab_size=200, progress=False)


@pytest.mark.parametrize("how", ["pattern", "names", "list"])
def test_an_index_that_a_pattern_matches_too_is_not_read_as_tokens(tmp_path, how):
    for name in ("a", "b"):
        write(tmp_path, name)
    names = sorted(tmp_path.glob("*.npy"))
    (tmp_path / "list.txt").write_text("*.npy\n")
    files = {"pattern": [tmp_path / "*.npy"], "names": names, "list": [f"@{tmp_path}/list.txt"]}[how]
    data = opened(*files, packing="padded")
    assert [file.name for file in data.sources[""].files] == ["a.npy", "b.npy"]
    # The index is used all the same: there is no separator.
    assert [row["tokens"].tolist() for row in data.train] == [document[:-1] for document in DOCUMENTS * 2]
    sets = opened(tmp_path / "a.npy", validation={"train": tuple(map(str, files))})
    assert sets.validation["train"].num_tokens == 2 * sum(map(len, DOCUMENTS))


@pytest.mark.parametrize("end", ["ends", "targets"])
def test_what_belongs_to_tokens_is_refused_where_it_is_named_alone(tmp_path, end):
    write(tmp_path)
    np.save(tmp_path / f"a.{end}.npy", np.arange(5, dtype="u1"))
    for files in (tmp_path / f"a.{end}.npy", tmp_path / f"*.{end}.npy"):
        with pytest.raises(
            DataError, match=rf"/a\.{end}\.npy: belongs to a\.npy and holds no tokens; name a\.npy only"
        ):
            opened(files)


def test_tokens_whose_name_only_looks_like_that_of_an_index_are_tokens(tmp_path):
    np.save(tmp_path / "weekends.ends.npy", np.arange(100, dtype="<u2"))
    assert opened(tmp_path / "*.npy").train_tokens == 100
