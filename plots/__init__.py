"""Frames in, charts and pages out: altair charts, DVC plot templates, the offline page and the report.

May import metrics, polars and altair; never torch, and never computes a result of its own.
"""
