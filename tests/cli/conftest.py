"""Where `mea` is run, and a text to train on."""

import pytest


@pytest.fixture
def here(tmp_path):
    """An empty directory to run `mea` in."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} of a text to learn\n" for i in range(300)))
    return path
