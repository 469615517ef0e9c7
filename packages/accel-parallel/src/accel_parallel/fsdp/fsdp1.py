"""Settings of FSDP1 in terms of FSDP2, each one; what has no meaning any more is refused with its successor. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["translate"]

_STRATEGIES: Mapping[str, tuple[bool, bool]] = {
    "FULL_SHARD": (True, False),
    "SHARD_GRAD_OP": (False, False),
    "HYBRID_SHARD": (True, True),
    "HYBRID_SHARD_ZERO2": (False, True),
}
"""For each strategy, whether parameters are resharded after forward, and whether shards stay within a node."""

_NUMBERED = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""As users of FSDP1 number them, from 1."""

_WRAP_NAMES = {"TRANSFORMER_BASED_WRAP": "transformer_based_wrap", "SIZE_BASED_WRAP": "size_based_wrap",
               "NO_WRAP": "no_wrap"}  # fmt: skip

_ALWAYS: Mapping[str, tuple[Any, str]] = {
    "limit_all_gathers": (True, "FSDP2 bounds its memory itself, without a limit on exchanges"),
    "use_orig_params": (True, "FSDP2 always keeps the model's own parameters, and never flattens them"),
    "backward_prefetch": ("BACKWARD_PRE", "FSDP2 always gathers the next unit while one computes in backward"),
}
"""What FSDP2 always does: the value that says so, and why another is refused."""

_SUCCESSORS: Mapping[str, str] = {
    "param_init_fn": "Build the model on the meta device and give `weights_path`, or set `cpu_ram_efficient_loading`.",
    "state_dict_config": "Set `state_dict_type`; whole states are gathered on the host of rank 0 in any case.",
    "optim_state_dict_config": "Set `state_dict_type`; whole states are gathered on the host of rank 0 in any case.",
}


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of FSDP2 that these stand for.

    Args:
        given: every setting of the plugin by name.

    Returns:
        What changes: successors with their values, and ``None`` for what they took the place of.

    Raises:
        ConfigError: for a setting without a meaning under FSDP2, with what to use instead.
    """
    if given["fsdp_version"] not in (1, 2):
        raise ConfigError(f"`fsdp_version={given['fsdp_version']!r}` does not exist. Use 2, or leave it out.")
    changed: dict[str, Any] = {"fsdp_version": 2}
    changed |= _sharding(given)
    changed |= _names(given)
    for name, (value, why) in _ALWAYS.items():
        found = _plain_name(given[name])
        if found not in (None, value):
            raise ConfigError(f"`{name}={given[name]!r}` cannot be had: {why}. Leave `{name}` out.")
        changed[name] = None
    for name, successor in _SUCCESSORS.items():
        if given[name] is not None:
            raise ConfigError(f"`{name}` belongs to FSDP1 and has no meaning under FSDP2. {successor}")
    return changed


def _sharding(given: Mapping[str, Any]) -> dict[str, Any]:
    strategy, reshard = given["sharding_strategy"], given["reshard_after_forward"]
    named = _plain_name(reshard) if _is_name(reshard) else None
    if strategy is not None and named is not None:
        raise ConfigError(
            f"`sharding_strategy={strategy!r}` and `reshard_after_forward={reshard!r}` both name a strategy of FSDP1. "
            f"Give one of them."
        )
    name = _strategy_name(strategy) if strategy is not None else named
    if name is None:
        return {}
    if name == "NO_SHARD":
        raise ConfigError(
            "`NO_SHARD` keeps the whole model on every process, which is what DDP does, and faster. "
            "Leave the FSDP plugin out, or set `ParallelismConfig(dp_replicate_size=...)`."
        )
    if name not in _STRATEGIES:
        known = [*_STRATEGIES, "NO_SHARD"]
        raise ConfigError(
            f"{name!r} is no sharding strategy of FSDP1.{did_you_mean(name, known)} "
            f"Set `reshard_after_forward` to True or False, or use one of {', '.join(_STRATEGIES)}."
        )
    reshards, hybrid = _STRATEGIES[name]
    return {"sharding_strategy": None, "reshard_after_forward": reshards, "hybrid": hybrid or given["hybrid"]}


def _names(given: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    policy = given["auto_wrap_policy"]
    if isinstance(policy, str):
        changed["auto_wrap_policy"] = _WRAP_NAMES.get(policy.upper(), policy)
    state = _plain_name(given["state_dict_type"])
    if state == "LOCAL_STATE_DICT":
        raise ConfigError(
            "`state_dict_type='LOCAL_STATE_DICT'` saved flattened parameters, which FSDP2 does not have. "
            "Use 'SHARDED_STATE_DICT'."
        )
    changed["state_dict_type"] = state
    return changed


def _strategy_name(value: Any) -> str:
    number = int(value) if isinstance(value, int) or str(value).isdigit() else None
    if number is not None and 1 <= number <= len(_NUMBERED):
        return _NUMBERED[number - 1]
    return str(_plain_name(value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "name")


def _plain_name(value: Any) -> Any:
    """The name of a member of one of torch's enums, or a string in capitals without what is before its dot."""
    if hasattr(value, "name") and not isinstance(value, type):
        return value.name
    return value.rsplit(".", 1)[-1].upper() if isinstance(value, str) else value
