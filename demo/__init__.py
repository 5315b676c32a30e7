"""A toy Charades-STA, a tiny Qwen2.5-VL, and the runs on them."""
