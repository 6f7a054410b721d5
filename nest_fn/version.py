"""The version, where it can be read without anything else; pyproject.toml takes it from here."""

__version__ = "0.1.0"
