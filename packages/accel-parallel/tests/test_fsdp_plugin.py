"""Options of FSDP2, and those of FSDP1 in its terms."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import pytest
import torch

from accel_parallel import FullyShardedDataParallelPlugin
from accel_parallel.fsdp.precision import precision_policy
from accel_state.errors import ConfigError


class ShardingStrategy(Enum):
    """As torch's own of FSDP1 is spelled."""

    FULL_SHARD = auto()
    SHARD_GRAD_OP = auto()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sharding_strategy": "FULL_SHARD"}, {"reshard_after_forward": True, "hybrid": False}),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, {"reshard_after_forward": False, "hybrid": False}),
        ({"sharding_strategy": "HYBRID_SHARD"}, {"reshard_after_forward": True, "hybrid": True}),
        ({"sharding_strategy": "HYBRID_SHARD_ZERO2"}, {"reshard_after_forward": False, "hybrid": True}),
        ({"sharding_strategy": 2}, {"reshard_after_forward": False}),
        ({"sharding_strategy": "1"}, {"reshard_after_forward": True}),
        ({"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}, {"reshard_after_forward": False}),
        ({"reshard_after_forward": "shard_grad_op"}, {"reshard_after_forward": False}),
        ({"reshard_after_forward": "ShardingStrategy.FULL_SHARD"}, {"reshard_after_forward": True}),
        ({"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, {"auto_wrap_policy": "transformer_based_wrap"}),
        ({"state_dict_type": "StateDictType.FULL_STATE_DICT"}, {"state_dict_type": "FULL_STATE_DICT"}),
        ({"fsdp_version": 1, "backward_prefetch": "BACKWARD_PRE"}, {"fsdp_version": 2, "backward_prefetch": None}),
        ({"use_orig_params": True, "limit_all_gathers": True}, {"use_orig_params": None, "limit_all_gathers": None}),
    ],
)
def test_settings_of_fsdp1_become_their_successors(given: dict[str, Any], expected: dict[str, Any]) -> None:
    plugin = FullyShardedDataParallelPlugin(**given)
    assert {name: getattr(plugin, name) for name in expected} == expected
    assert plugin.sharding_strategy is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "Leave the FSDP plugin out"),
        ({"sharding_strategy": "FULL_SHARDS"}, "Did you mean 'FULL_SHARD'"),
        ({"sharding_strategy": 1, "reshard_after_forward": "FULL_SHARD"}, "both name a strategy"),
        ({"backward_prefetch": "BACKWARD_POST"}, "FSDP2 always gathers the next unit"),
        ({"limit_all_gathers": False}, "FSDP2 bounds its memory itself"),
        ({"use_orig_params": False}, "never flattens them"),
        ({"param_init_fn": print}, "give `weights_path`"),
        ({"state_dict_config": object()}, "Set `state_dict_type`"),
        ({"state_dict_type": "LOCAL_STATE_DICT"}, "Use 'SHARDED_STATE_DICT'"),
        ({"state_dict_type": "WHOLE"}, "Use one of FULL_STATE_DICT"),
        ({"fsdp_version": 3}, "`fsdp_version=3` does not exist"),
        ({"auto_wrap_policy": "transformer_wrap"}, "Did you mean 'transformer_based_wrap'"),
        ({"auto_wrap_policy": "size_based_wrap"}, "Set `min_num_params`"),
        ({"auto_wrap_policy": "no_wrap", "min_num_params": 5}, "has no effect with `auto_wrap_policy='no_wrap'`"),
        ({"transformer_cls_names_to_wrap": ["A"], "min_num_params": 5}, "two ways to choose units"),
        ({"min_num_params": 0}, "is no number of parameters"),
        ({"reshard_after_forward": 1}, "number of processes to reshard to"),
        ({"mixed_precision_policy": "bf15"}, "Did you mean 'bf16'"),
        ({"cpu_ram_efficient_loading": True, "weights_path": "a"}, "Give one of them"),
        ({"cpu_ram_efficient_loading": True, "sync_module_states": False}, "Set `sync_module_states=True`"),
        ({"ignored_modules": "("}, "is no regular expression"),
        ({"ignored_params": 5}, "Give a list"),
        ({"activation_checkpointing": "false"}, "`activation_checkpointing='false'` is neither true nor false"),
        ({"min_num_params": "1e6"}, "`min_num_params='1e6'` is no number"),
        ({"weights_path": ""}, "`weights_path=''` is no path"),
    ],
)
def test_what_means_nothing_is_refused_with_the_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        FullyShardedDataParallelPlugin(**given)


def test_precision_is_given_as_a_word_or_in_parts() -> None:
    policy = precision_policy(FullyShardedDataParallelPlugin(mixed_precision_policy="bf16"))
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    parts = {"param_dtype": "bf16", "reduce_dtype": torch.bfloat16, "output_dtype": "float32"}
    policy = precision_policy(FullyShardedDataParallelPlugin(mixed_precision_policy=parts))
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert precision_policy(FullyShardedDataParallelPlugin()).param_dtype is None
    assert precision_policy(FullyShardedDataParallelPlugin(mixed_precision_policy=policy)) is policy
    with pytest.raises(ConfigError, match="has no part `params`"):
        precision_policy(FullyShardedDataParallelPlugin(mixed_precision_policy={"params": "bf16"}))
    with pytest.raises(ConfigError, match="which is no dtype"):
        precision_policy(FullyShardedDataParallelPlugin(mixed_precision_policy={"param_dtype": "b16"}))
