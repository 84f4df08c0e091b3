"""Synthetic medical images under patient-level differential privacy, checked, gated and signed."""

__version__ = "0.1.0"
