"""CITATION.cff has what the schema of the Citation File Format 1.2.0 asks for, and says what pyproject.toml says."""

import tomllib

import yaml
from pages import REPOSITORY

REQUIRED = {"authors", "cff-version", "message", "title"}
# The keys of schema 1.2.0 at the top; any other is an error there.
KNOWN = REQUIRED | {
    "abstract",
    "commit",
    "contact",
    "date-released",
    "doi",
    "identifiers",
    "keywords",
    "license",
    "license-url",
    "preferred-citation",
    "references",
    "repository",
    "repository-artifact",
    "repository-code",
    "type",
    "url",
    "version",
}


def test_the_citation_file_is_valid():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert REQUIRED <= set(citation) <= KNOWN
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert all(isinstance(citation[key], str) and citation[key] for key in ("message", "title", "version", "abstract"))
    for author in citation["authors"]:
        is_entity, is_person = "name" in author, {"family-names", "given-names"} & set(author)
        assert bool(is_entity) != bool(is_person)
    assert len(set(citation["keywords"])) == len(citation["keywords"])


def test_version_and_license_are_those_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
