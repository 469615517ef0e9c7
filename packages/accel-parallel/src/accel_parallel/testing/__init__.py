"""For tests: the contract that every `Strategy` keeps, those of third parties too.

A package that brings a strategy calls `check_contract` with its name, and nothing else::

    def test_contract():
        check_contract("mine", world_sizes=(2, 3))
"""

from __future__ import annotations

from accel_parallel.testing.contract import check_contract, contract_states, contract_trace
from accel_parallel.testing.reference import Trace, reference_trace
from accel_parallel.testing.scenarios import SCENARIOS, ContractModel, Scenario

__all__ = [
    "SCENARIOS",
    "ContractModel",
    "Scenario",
    "Trace",
    "check_contract",
    "contract_states",
    "contract_trace",
    "reference_trace",
]
