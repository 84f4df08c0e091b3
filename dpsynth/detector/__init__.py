"""Telling synthetic from real images of the same kind by the traces that drawing leaves. Torch-free."""
