"""Training a Transformer on text: configuration, data, the loop and what it leaves in a run directory."""
