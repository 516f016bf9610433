"""The settings of a run, a file a subject; engine/config.py puts them together. No torch is imported here."""
