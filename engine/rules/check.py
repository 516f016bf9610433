"""What a rule between settings is."""

Check = tuple[tuple[str, ...], bool, str]  # (settings that decide it, is broken, message)
