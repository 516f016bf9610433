"""Kernels of our own. Each module needs triton, so it is imported where it is used, never at start-up."""
