"""Quantized layers in place of a model's linear ones: of bitsandbytes or of torchao, which are imported when needed.

| module | what it owns |
|---|---|
| `options` | `BnbQuantizationConfig`, `TorchaoQuantizationConfig` |
| `selection` | which layers are quantized |
| `placement` | where they go, and what may be offloaded |
| `backend`, `bitsandbytes_layers`, `torchao_layers` | what a library is asked for, and each of them |
| `filling` | a model's tensors replaced one by one |
| `load` | `load_and_quantize_model` |
"""
