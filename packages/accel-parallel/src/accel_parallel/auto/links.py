"""How long collectives take, in the alpha-beta model of rings. Pure.

A ring of p ranks passes each piece on p - 1 times (Patarin and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", JPDC 2009; Thakur et al., IJHPCA 2005):

* all-gather and reduce-scatter of n bytes: ``hops * alpha + (p - 1) / p * n / beta``;
* all-reduce, one after the other: twice that.

Of the p - 1 hops, (nodes - 1) leave a node and have its latency. Bandwidth is that of the narrowest link: rings that
leave a node share its network cards, of which a group of k ranks a node has the k of its own devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel_parallel.auto.hardware import Hardware

__all__ = ["Group"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Ranks `stride` apart, as an axis of a mesh groups them."""

    size: int
    stride: int = 1
    """Distance in rank between neighbours; ranks fill one node after the other."""
    hardware: Hardware

    @property
    def per_node(self) -> int:
        """Members that share a node."""
        return max(1, min(self.size, self.hardware.devices_per_node // self.stride))

    @property
    def num_nodes(self) -> int:
        """Nodes that it spans."""
        return -(-self.size // self.per_node)

    @property
    def leaves_node(self) -> bool:
        """Whether it spans several nodes."""
        return self.num_nodes > 1

    def gather_s(self, size_bytes: float) -> float:
        """Seconds of an all-gather or a reduce-scatter, `size_bytes` being those of the whole."""
        if self.size == 1 or size_bytes <= 0:
            return 0.0
        outside = self.num_nodes - 1
        inside = self.size - 1 - outside
        hardware = self.hardware
        latency = inside * hardware.intra_node.latency_s + outside * hardware.inter_node.latency_s
        bandwidth = hardware.inter_node.bytes_per_s * self.per_node if outside else hardware.intra_node.bytes_per_s
        if inside:
            bandwidth = min(bandwidth, hardware.intra_node.bytes_per_s)
        return latency + (self.size - 1) / self.size * size_bytes / bandwidth

    def reduce_s(self, size_bytes: float) -> float:
        """Seconds of an all-reduce of `size_bytes`."""
        return 2.0 * self.gather_s(size_bytes)
