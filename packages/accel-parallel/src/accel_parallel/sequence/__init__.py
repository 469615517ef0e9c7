"""Sequences divided over ranks: context parallel and Ulysses.

===========  ==============================================================
`layout`     who holds which tokens, and cutting a batch
`context`    attention of local queries to keys and values of all ranks
`ulysses`    attention of some heads to whole sequences
`ring`       torch's ring attention, where a device has its kernels
`attention`  `SequenceParallel`: where attention is caught, and sent on
`arguments`  models of transformers: what they are given, and what is refused
===========  ==============================================================
"""
