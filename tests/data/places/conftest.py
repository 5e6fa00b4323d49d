"""Servers of files, and a cache of what is fetched from them."""

import os

import pytest
from fetched_files import MIB
from remote_servers import s3_environment, s3_server, web_server

from hybridnorm_jax.data.places import patience
from hybridnorm_jax.data.places.local_copies import LocalCopies


@pytest.fixture
def web(monkeypatch):
    """A web server, and waits that a test can afford."""
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    with web_server() as files:
        yield files


@pytest.fixture(scope="package")
def bucket():
    """The address of a server of S3, and its credentials in the environment.

    One for all modules: the client that a process has keeps the address that it has met first.
    """
    pytest.importorskip("s3fs")
    before = dict(os.environ)
    with s3_server() as url:
        os.environ.update(s3_environment(url))
        yield url
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def copies(tmp_path):
    return LocalCopies(str(tmp_path / "cache"), 64 * MIB)
