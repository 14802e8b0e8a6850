"""Memory of a training step, known before it runs."""
