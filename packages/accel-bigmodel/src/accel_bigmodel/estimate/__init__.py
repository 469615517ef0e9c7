"""How much memory a model needs, before it is loaded.

===========  ==========================================================
`predict`    `estimate_memory`: all of it
`options`    what is asked for
`result`     the answer, as data and as a table
`weights`    bytes by dtype and by way to quantize
`passes`     inference and training, run on fake tensors
`fakes`      models and batches without values
`rules`      what a GPU does otherwise
`blocks`     checkpointing and sharding at the borders of blocks
`optimizers` by name
`batches`    made up by a model's kind
`tracker`    which memory is alive
`leftovers`  what a model's code kept of a trace
===========  ==========================================================
"""
