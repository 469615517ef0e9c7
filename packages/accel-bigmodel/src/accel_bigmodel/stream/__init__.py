"""The transfer engine: weights on their way from host memory or files to the device that computes, ahead of time.

============  =====================================================================
`device`      what a device must be able to do: copy, mark, wait
`layout`      where the tensors of a unit lie in its bytes
`source`      where these bytes come from: host memory, files
`host_memory` host memory that a device copies from at the speed of the bus
`staging`     what is not in such memory, read through buffers that are
`order`       which unit is needed next
`engine`      what is on the device, and what comes when
============  =====================================================================

A *unit* is what is moved as a whole, such as a block of a transformer. Nothing here knows modules.
"""

from accel_bigmodel.stream.device import AcceleratorTransfers, Mark, Transfers
from accel_bigmodel.stream.engine import Engine, Load
from accel_bigmodel.stream.host_memory import HostMemory
from accel_bigmodel.stream.layout import Layout
from accel_bigmodel.stream.source import FileSource, HostSource, OpenFile, Source

__all__ = [
    "AcceleratorTransfers", "Engine", "FileSource", "HostMemory", "HostSource", "Layout", "Load", "Mark", "OpenFile",
    "Source", "Transfers",
]  # fmt: skip
