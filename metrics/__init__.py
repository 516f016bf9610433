"""Rows in, numbers out: intervals, paired comparisons and verdicts.

Pure arithmetic over what the runs left behind. Reading files is in `rows` only; nothing here writes a file,
draws a chart, or imports torch or altair.
"""
