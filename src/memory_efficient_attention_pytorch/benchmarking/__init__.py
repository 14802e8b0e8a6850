"""Measure memory and time of a training step, ours beside common alternatives."""
