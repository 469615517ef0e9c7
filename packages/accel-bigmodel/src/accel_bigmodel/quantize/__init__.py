"""Quantized layers in place of a model's linear ones: of bitsandbytes or of torchao, which are imported when needed."""
