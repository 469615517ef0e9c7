"""What generation keeps in each layer of a chain."""

from __future__ import annotations

from typing import Any

from accel_bigmodel.kv_cache import kv_cache_bytes_per_layer
from accel_bigmodel.placing.chain import Chain
from accel_bigmodel.placing.workload import Workload

__all__ = ["kv_of_layers"]


def kv_of_layers(chain: Chain, config: Any, workload: Workload | None) -> list[int] | None:
    """Bytes of keys and values of each layer of a chain; ``None`` where the configuration does not tell them.

    They belong to the blocks, of an encoder-decoder to those of the decoder. Where the numbers of both differ, all
    blocks take an equal part.
    """
    if workload is None or not workload.kv_cache or config is None:
        return None
    sizes = kv_cache_bytes_per_layer(
        config,
        batch_size=workload.batch_size,
        length=workload.sequence_length,
        dtype=chain.dtype if workload.dtype is None else workload.dtype,
    )
    if not any(sizes):
        return None
    found = [0] * len(chain.layers)
    groups = chain.block_groups()
    fitting = next((group for group in reversed(groups) if len(group) == len(sizes)), None)
    if fitting is not None:
        for layer, size in zip(fitting, sizes, strict=True):
            found[layer] = size
        return found
    holders = [layer for group in groups for layer in group] or list(range(len(found)))
    for layer in holders:
        found[layer] = -(-sum(sizes) // len(holders))
    return found
