"""Memory and time of a training step, ours beside what a user would pick instead."""
