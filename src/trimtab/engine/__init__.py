"""The training engine for frozen bases: packed batches, attention over them, one loop."""
