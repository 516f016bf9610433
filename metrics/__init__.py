"""Rows in, numbers out: intervals, paired comparisons, verdicts and language-model units.

Pure arithmetic over what the runs left behind. Reading files is in `rows` only; nothing here writes a file,
draws a chart, or imports torch or altair.
"""
