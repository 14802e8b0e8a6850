"""Transformers on sequences far longer than memory should allow, with exact gradients."""
