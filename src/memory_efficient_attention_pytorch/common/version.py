"""The package's version, from which the distribution's metadata is made."""

__version__ = "1.0.0"
