"""Gated DeltaNet language models, end to end. Importing this loads nothing heavy: take what you need from the submodules."""

__version__ = "0.1.0"
