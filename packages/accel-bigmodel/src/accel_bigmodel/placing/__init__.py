"""Device maps: where the layers of a model should lie, what that costs, and why.

============  ====================================================================
`memory`      budgets of places, read from the machine or stated; `DeviceMap`
`workload`    what runs, and on what: sizes of the input, speeds
`chain`       a model as a chain of layers, and which of them hang together
`census`      that chain counted from a model or from the headers of its checkpoint
`cost`        bytes in every place and seconds a forward, for any placement
`search`      placements: the fastest, the most even, the first that fits
`plan`        a placement as a device map, or why there is none
`kept`        bytes of keys and values in each layer
`infer`       `infer_auto_device_map`, `get_balanced_memory`
`check`       `check_device_map`
`explain`     `explain_device_map`: tables and numbers
`picture`     what lies where, as SVG and HTML
============  ====================================================================

All but `memory.get_max_memory` without an argument is pure: nothing is moved, no value is read, no device is touched.
"""

from __future__ import annotations

from accel_bigmodel.placing.census import census, census_of_headers
from accel_bigmodel.placing.check import check_device_map
from accel_bigmodel.placing.explain import Explanation, explain_device_map
from accel_bigmodel.placing.infer import get_balanced_memory, infer_auto_device_map, plan_model
from accel_bigmodel.placing.memory import DeviceMap, get_max_memory
from accel_bigmodel.placing.plan import Plan, plan_device_map
from accel_bigmodel.placing.workload import DeviceSpeed, Machine, Workload

__all__ = [
    "DeviceMap",
    "DeviceSpeed",
    "Explanation",
    "Machine",
    "Plan",
    "Workload",
    "census",
    "census_of_headers",
    "check_device_map",
    "explain_device_map",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "plan_device_map",
    "plan_model",
]
