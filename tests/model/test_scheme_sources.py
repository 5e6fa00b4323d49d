"""Every scheme says where its equations stand and whose numbers it is compared with, and goldens bear that out."""

import json
from pathlib import Path

import pytest
from authors_models import CASES as AUTHORS

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.interop.architectures import config_from_json
from hybridnorm_jax.model.scheme import CHECKED_BY, WIDTH
from tests.model.test_goldens import CASES as HYBRIDNORM

GOLDENS = Path(__file__).parents[1] / "goldens"


def _of_authors():
    """The schemes of which tests reproduce numbers of the authors' code."""
    found = {scheme for scheme, _ in HYBRIDNORM.values()}
    found |= {keys.get("scheme", hn.PROJECTS[project].keys.get("scheme")) for project, keys in AUTHORS.values()}
    # sandwich is a baseline in the code of Mix-LN and ProRes, whose authors did not propose it.
    found -= {"sandwich"}
    # test_two_streams.py has the vision transformer; qkv_post is hybrid by another name.
    return found | {"siamese_post_pre", "qkv_post"}


def _of_transformers():
    """The schemes of the checkpoints of transformers whose logits tests reproduce."""
    files = [*GOLDENS.glob("architectures/hf_*/config.json"), *GOLDENS.glob("hf_*/config.json")]
    documents = [json.loads(file.read_text()) for file in files]
    # Those of Falcon with ALiBi are refused: tests/interop/test_architectures.py.
    read = [document for document in documents if not (document["model_type"] == "falcon" and document.get("alibi"))]
    return {config_from_json(document, "config.json")[1].scheme for document in read}


def _checked(by):
    return {name for name, scheme in hn.SCHEMES.items() if scheme.checked == by}


def test_every_scheme_of_the_table_has_a_source_and_says_who_checked_it():
    assert {name for name, scheme in hn.SCHEMES.items() if not scheme.source} == set()
    assert _checked(None) == set()


def test_what_authors_or_others_checked_has_numbers_of_theirs():
    assert _checked("authors' code") <= _of_authors()
    assert _checked("third party") == _of_transformers() - _of_authors()


def test_a_scheme_of_ones_own_need_not_say():
    hn.scheme("mine")(hn.SCHEMES["pre"].block)
    assert (hn.SCHEMES["mine"].source, hn.SCHEMES["mine"].checked) == ("", None)
    assert "source" not in hn.describe("mine", 2)
    hn.scheme("known", source="a paper", checked="equation only")(hn.SCHEMES["pre"].block)
    assert hn.describe("known", 2).splitlines()[-2:] == [
        "  source: a paper",
        f"  checked: equation only; {CHECKED_BY['equation only']}",
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checked": "me"}, r"checked='me' must be one of .*'third party', 'equation only', or None"),
        ({"source": 2503}, "source=2503: must be a text of one line"),
        ({"source": "a\nb"}, "must be a text of one line"),
    ],
)
def test_impossible_sources_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        hn.scheme("mine", **keys)(hn.SCHEMES["pre"].block)
    assert "mine" not in hn.SCHEMES


def test_the_list_has_every_scheme_and_every_kind_of_norm_within_120_columns(capsys):
    assert main(["schemes", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for name, scheme in hn.SCHEMES.items():
        (first,) = [number for number, line in enumerate(lines) if line.split(" ")[0] == name]
        assert scheme.checked in lines[first]
        assert scheme.source.split()[0] in lines[first]
        assert "Attn" in lines[first + 1]
        assert "FFN" in " ".join(lines[first + 1 : first + 3])
    for name, kind in hn.NORM_KINDS.items():
        (first,) = [number for number, line in enumerate(lines) if line.split(" ")[0] == name]
        assert f"    {kind.formula}" == lines[first + 1]


def test_the_list_says_what_the_equations_do_not():
    lines = hn.SCHEMES["hybrid_star"].summary(8).splitlines()
    assert lines[1] == "    N(x + Attn(x));  x + FFN(x)   [N of q k v per head, layer 0 differs]"
    lines = hn.SCHEMES["mix_ln"].summary(8).splitlines()
    assert lines[1] == "    x + Attn(N(x));  x + FFN(N(x))   [layers 0-1 differ]"
    assert "[embedding norm, no final norm]" in hn.SCHEMES["peri_no_final_norm"].summary(8)
    assert "[N of q k v over the projection, N of FFN's gate up]" in hn.SCHEMES["simple_norm"].summary(8)
    assert "[one N(X) for both]" in hn.SCHEMES["parallel_one_norm"].summary(8)
