"""Checkpoints that transformers saved, loaded into its models without values: outputs equal those of the originals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_bigmodel import init_empty_weights
from accel_bigmodel.loading import ReadSettings, load_checkpoint_and_dispatch, load_checkpoint_in_model
from accel_bigmodel.stored import map_tensor
from accel_state.errors import CheckpointError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.heavy

SMALL = ReadSettings(num_threads=3, chunk_bytes=4096)
TOKENS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    """With a head tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> Any:
    """With experts that are one parameter in the model and many in the file."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def t5() -> Any:
    """With three embeddings and a head that are one."""
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


MAKERS = [llama, gpt2, mixtral, t5]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def original(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def empty(make: Callable[[], Any]) -> Any:
    with init_empty_weights():
        return make().eval()


def outputs(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(TOKENS, **more).logits  # type: ignore[no-any-return]


def shards(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_shards_that_were_saved_are_loaded(make: Callable[[], Any], original: Any, tmp_path: Path) -> None:
    model = empty(make)
    result = load_checkpoint_in_model(model, shards(original, tmp_path), reading=SMALL)
    assert not any(each.is_meta for each in model.parameters())
    assert (result.missing, result.unexpected) == ((), ())
    assert torch.equal(outputs(model), outputs(original))


def test_pickled_weights_are_loaded(make: Callable[[], Any], original: Any, tmp_path: Path) -> None:
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    model = empty(make)
    load_checkpoint_in_model(model, tmp_path, reading=SMALL)
    assert torch.equal(outputs(model), outputs(original))


def test_a_dtype_is_converted_on_the_way(make: Callable[[], Any], original: Any, tmp_path: Path) -> None:
    model = empty(make)
    load_checkpoint_in_model(model, shards(original, tmp_path), dtype="bf16", reading=SMALL)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    expected = original.state_dict()
    assert all(torch.equal(each, expected[name].to(each.dtype)) for name, each in model.state_dict().items())


def test_a_sharded_index_that_lost_a_shard_names_it(original: Any, tmp_path: Path, make: Callable[[], Any]) -> None:
    lost = sorted(shards(original, tmp_path).glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        load_checkpoint_in_model(empty(make), tmp_path)


def test_weights_that_stay_on_disk_are_those_of_the_model(
    make: Callable[[], Any], original: Any, tmp_path: Path
) -> None:
    model = empty(make)
    result = load_checkpoint_in_model(
        model, shards(original, tmp_path / "saved"), {"": "disk"}, tmp_path / "offload", reading=SMALL
    )
    expected = dict(original.named_parameters(remove_duplicate=False))
    assert result.stored.keys() == expected.keys()
    assert all(torch.equal(map_tensor(each), expected[name]) for name, each in result.stored.items())
    # Only what is stored in another form than the model needs was written.
    written = {name for name, each in result.stored.items() if each.path.parent == tmp_path / "offload"}
    assert all(".experts." in name for name in written)
    assert bool(written) == (make is mixtral)


@pytest.mark.parametrize("device_map", ["auto", "sequential", {"": "cpu"}, {"": "disk"}])
def test_a_dispatched_model_gives_the_same_outputs(
    make: Callable[[], Any], original: Any, tmp_path: Path, device_map: Any
) -> None:
    model = load_checkpoint_and_dispatch(
        empty(make), shards(original, tmp_path / "saved"), device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(outputs(model), outputs(original))


def test_a_checkpoint_of_the_whole_is_diagnosed_for_its_base(tmp_path: Path) -> None:
    model = llama()
    shards(model, tmp_path)
    with init_empty_weights():
        base = transformers.LlamaModel(model.config)
    with pytest.raises(CheckpointError, match=r"begin with 'model\.' and those of the model do not.*ModuleDict"):
        load_checkpoint_in_model(base, tmp_path)
    result = load_checkpoint_in_model(torch.nn.ModuleDict({"model": base}), tmp_path, strict=False)
    assert result.unexpected == ("lm_head.weight",)
    with torch.no_grad():
        assert torch.equal(base(TOKENS)[0], model.model(TOKENS)[0])
