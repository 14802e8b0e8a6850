"""Attention and the loss as plain functions."""
