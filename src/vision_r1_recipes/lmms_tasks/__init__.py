"""Tasks in lmms-eval's format, for its `--include_path`."""
