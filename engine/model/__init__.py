"""Qwen2.5-VL: its input, attention, decoding, adapters, optimiser; loading it, spreading it over GPUs."""
