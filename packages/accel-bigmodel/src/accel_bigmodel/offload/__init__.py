"""Weights that are not where the model computes, brought there for each forward.

============  ==========================================================================
`division`    which tensors travel together, and whose forward needs them
`tensor`      one tensor of a module: what stands for it, and what it is on the device
`unit`        the tensors of a block, there while a forward needs them
`hooks`       what a module calls: before, behind, and around its state
`saved`       what autograd keeps for backward, fetched again instead
`streaming`   a model's tensors handed to the engine
`in_place`    where the CPU computes: tensors in host memory and mapped files as they are
`folder`      weights written to a folder, to be read from there
`offloading`  `cpu_offload`, `disk_offload`, and taking it back
`handover`    whole models that take turns on a device
`alignment`   inputs brought to where a module computes
`access`      the tensors of one module, looked at and set
============  ==========================================================================
"""
