"""Sharded data parallel by FSDP2, and the one strategy behind every mesh.

============  ======================================================================
`strategy`    `FSDPStrategy`: preparing, exchanging, norms and states
`plugin`      what users may set, in the terms of FSDP2
`fsdp1`       settings of FSDP1 in those terms
`units`       what is gathered at once, what stays out of it, what cannot be sharded
`weights`     where values come from while a model is sharded
`usage`       ranks that use different parameters in one backward
`statistics`  running statistics, which no gradient averages
============  ======================================================================
"""
