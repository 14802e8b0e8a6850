"""Fixtures for models of transformers."""

import pytest


@pytest.fixture
def chunks_of_a_few_tokens(monkeypatch):
    """MLPs that are called in chunks take three, however few tokens there are."""
    pytest.importorskip("transformers")
    from memory_efficient_attention_pytorch.huggingface import feed_forward

    monkeypatch.setattr(feed_forward, "chunks_for", lambda x, hidden: min(3, x.shape[1]))
