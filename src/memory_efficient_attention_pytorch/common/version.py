"""The package's version, written here alone: the distribution's metadata is made from it."""

__version__ = "1.0.0"
