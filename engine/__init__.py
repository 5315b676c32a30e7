"""What no paper mentions: attention, decoding, the optimiser, videos, annotation files, processes and checkpoints."""
