"""4-bit checkpoints in bitsandbytes' format, which this package reads and writes by itself."""
