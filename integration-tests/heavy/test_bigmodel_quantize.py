"""Models quantized by the real bitsandbytes and torchao, and trained on top by the real peft, on a CPU."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accel_bigmodel import find_tied_parameters, init_empty_weights
from accel_bigmodel.dispatch import DeviceTable, dispatch
from accel_bigmodel.offload.division import group_tensors
from accel_bigmodel.offload.offloading import remove_hooks
from accel_bigmodel.offload.streaming import stream_tensors
from accel_bigmodel.quantize import filling
from accel_bigmodel.quantize.load import load_and_quantize_model
from accel_bigmodel.quantize.options import BnbQuantizationConfig, TorchaoQuantizationConfig
from accel_bigmodel.quantize.selection import quantized_layers
from accel_bigmodel.testing import FakeTransfers
from accel_state.errors import CheckpointError, ConfigError

INT8 = BnbQuantizationConfig(load_in_8bit=True)
FP4 = BnbQuantizationConfig(load_in_4bit=True)
NF4 = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
AO8 = TorchaoQuantizationConfig(weights="int8")
AO8_GROUPS = TorchaoQuantizationConfig(weights="int8", group_size=32)
AO4 = TorchaoQuantizationConfig(weights="int4", group_size=32)
ALL = {"int8": INT8, "fp4": FP4, "nf4": NF4, "torchao int8": AO8, "torchao groups": AO8_GROUPS, "torchao int4": AO4}
BNB = {name: ALL[name] for name in ("int8", "fp4", "nf4")}
ERROR = {"int8": 0.04, "fp4": 0.5, "nf4": 0.4, "torchao int8": 0.04, "torchao groups": 0.04, "torchao int4": 0.4}
"""How far the logits of this model go by being quantized, in the mean, as a share of their size."""


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().mean() / theirs.abs().mean()).item()


def llama_config(**settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "use_cache": False,
            "initializer_range": 0.1,
            **settings,
        }
    )


def llama(**settings: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**settings)).eval()


def empty_llama(**settings: Any) -> Any:
    with init_empty_weights():
        return llama(**settings)


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(tokens()).logits
    return result


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sharded checkpoint of `llama()`."""
    folder: Path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize("name", ALL)
def test_streamed_and_in_place_are_one_and_near_the_original(name: str, stored: Path) -> None:
    streamed = load_and_quantize_model(empty_llama(), ALL[name], weights_location=stored, device_map={"": "cpu"})
    original = llama()
    in_place = load_and_quantize_model(copy.deepcopy(original), ALL[name])
    assert torch.equal(logits(streamed), logits(in_place))
    assert 0 < error(logits(streamed), logits(original)) < ERROR[name]
    layers = [each for each, module in original.named_modules() if isinstance(module, nn.Linear) and each != "lm_head"]
    assert len(layers) == 14
    assert quantized_layers(streamed) == quantized_layers(in_place) == layers
    assert type(streamed.lm_head) is nn.Linear
    assert not any(each.requires_grad for each in streamed.parameters())
    assert all(each.device.type == "cpu" for each in [*streamed.parameters(), *streamed.buffers()])


@pytest.mark.parametrize("name", ALL)
def test_a_tied_head_stays_tied_and_whole(name: str, tmp_path: Path) -> None:
    original = llama(tie_word_embeddings=True)
    original.save_pretrained(tmp_path)
    model = load_and_quantize_model(empty_llama(tie_word_embeddings=True), ALL[name], tmp_path, {"": "cpu"})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert find_tied_parameters(model) == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert 0 < error(logits(model), logits(original)) < ERROR[name]


@pytest.mark.parametrize("name", BNB)
def test_transformers_quantizes_to_the_same(name: str, stored: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config: Any = BNB[name]
    settings = (
        {"load_in_8bit": True}
        if config.load_in_8bit
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        stored, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32, device_map={"": "cpu"}
    )
    ours = load_and_quantize_model(empty_llama(), config, stored, {"": "cpu"})
    for layer in quantized_layers(ours):
        assert torch.equal(ours.get_submodule(layer).weight, theirs.get_submodule(layer).weight), layer
    theirs.save_pretrained(stored / f"theirs {name}")
    again = load_and_quantize_model(empty_llama(), config, stored / f"theirs {name}", {"": "cpu"})
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("name", BNB)
def test_a_quantized_state_dict_is_loaded_as_it_is(name: str, stored: Path, tmp_path: Path) -> None:
    model = load_and_quantize_model(empty_llama(), BNB[name], stored, {"": "cpu"})
    before = logits(model)
    state = {key: each.contiguous() for key, each in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again = load_and_quantize_model(empty_llama(), BNB[name], tmp_path, {"": "cpu"})
    assert torch.equal(logits(again), before)
    for key, each in again.state_dict().items():
        assert torch.equal(each, state[key]), key
    other = FP4 if name == "nf4" else NF4
    match = "stored as nf4.*'fp4'.*Give `bnb_4bit_quant_type='nf4'`" if name == "nf4" else "quantized|stored as"
    with pytest.raises((ConfigError, CheckpointError), match=match):
        load_and_quantize_model(empty_llama(), other, tmp_path, {"": "cpu"})
    with pytest.raises((ConfigError, CheckpointError), match=r"before they were quantized|quantized otherwise"):
        load_and_quantize_model(empty_llama(), AO8, tmp_path, {"": "cpu"})


def test_double_quantization_is_not_changed_behind_the_back(stored: Path, tmp_path: Path) -> None:
    model = load_and_quantize_model(empty_llama(), NF4, stored, {"": "cpu"})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    plain = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ConfigError, match=r"stored with double quantization.*Give `bnb_4bit_use_double_quant=True`"):
        load_and_quantize_model(empty_llama(), plain, tmp_path, {"": "cpu"})


@pytest.mark.parametrize("name", ALL)
def test_torch_dtype_and_what_stays_float32(name: str, stored: Path) -> None:
    settings = {field: getattr(ALL[name], field) for field in ALL[name].__dataclass_fields__}
    config = type(ALL[name])(**{**settings, "torch_dtype": "bf16", "keep_in_fp32_modules": ["norm", "o_proj"]})
    model = load_and_quantize_model(empty_llama(), config, stored, {"": "cpu"})
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # not saved, so as its constructor made it
    assert type(model.model.layers[1].self_attn.o_proj) is nn.Linear
    assert len(quantized_layers(model)) == 12


@pytest.mark.parametrize("name", ALL)
def test_one_tensor_at_a_time_is_in_memory(name: str, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    sources: list[weakref.ref[Any]] = []
    original = filling.map_tensor

    def watch(source: Any) -> torch.Tensor:
        tensor = original(source)
        sources.append(weakref.ref(tensor.untyped_storage()))
        alive.append(sum(each() is not None for each in sources))
        return tensor

    monkeypatch.setattr(filling, "map_tensor", watch)
    load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"})
    assert len(alive) > 20
    assert max(alive) == 1


def dequantized(model: Any) -> Any:
    """`llama()` with the weights that the quantized `model` stands for."""
    import bitsandbytes as bnb

    plain = llama()
    for name in quantized_layers(model):
        layer, weight = plain.get_submodule(name), model.get_submodule(name).weight
        if isinstance(weight, bnb.nn.Params4bit):
            values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(weight, bnb.nn.Int8Params):
            values = weight.data.float() * weight.SCB.unsqueeze(1) / 127
        else:
            values = weight.dequantize()
        layer.weight = nn.Parameter(values.to(torch.float32).clone(), requires_grad=False)
    return plain


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))


def loss_of(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=tokens(), labels=tokens()).loss
    return result


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """Copies of all tensors, those of torchao taken apart."""
    found: dict[str, Any] = {}
    for key, each in state.items():
        parts = each.__tensor_flatten__()[0] if hasattr(each, "__tensor_flatten__") else []
        for part in parts:
            found[f"{key}.{part}"] = getattr(each, part).clone()
        if not parts:
            found[key] = each.detach().clone()
    return found


TRAINABLE = {name: config for name, config in ALL.items() if name != "torchao int4"}


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_of_adapters_are_those_of_the_dequantized_model(name: str, stored: Path) -> None:
    quantized = load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"})
    plain = with_adapters(dequantized(quantized)).train()
    model = with_adapters(quantized).train()
    for trained in (model, plain):
        loss_of(trained).backward()
    ours = {key: each.grad for key, each in model.named_parameters() if each.requires_grad}
    theirs = {key: each.grad for key, each in plain.named_parameters() if each.requires_grad}
    assert len(ours) == 12
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        assert grad.abs().max() > 0, key
        torch.testing.assert_close(grad, theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRAINABLE)
def test_adapters_train_and_nothing_below_them_changes(name: str, stored: Path) -> None:
    quantized = load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"})
    before = bits(quantized.state_dict())
    model = with_adapters(quantized).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():  # an evaluation between steps must not change how the next step trains
            loss_of(model.eval())
        model.train()
    assert losses[-1] < losses[0] - 1
    after = bits(model.unload().state_dict())
    assert before.keys() == after.keys()
    assert [key for key, each in before.items() if not torch.equal(each, after[key])] == []


def test_peft_prepares_it_for_training(stored: Path) -> None:
    from peft import prepare_model_for_kbit_training

    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype="bf16")
    model = load_and_quantize_model(empty_llama(), config, stored, {"": "cpu"})
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (True, False)
    model = with_adapters(prepare_model_for_kbit_training(model)).train()
    assert type(model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    loss_of(model).backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_int4_of_torchao_has_no_gradient_and_says_so(stored: Path) -> None:
    model = with_adapters(load_and_quantize_model(empty_llama(), AO4, stored, {"": "cpu"})).train()
    with pytest.raises((RuntimeError, ConfigError), match=r"derivative|adapters"):
        loss_of(model).backward()


@pytest.mark.parametrize("name", BNB)
def test_a_quantized_weight_cannot_be_made_to_require_a_gradient(name: str, stored: Path) -> None:
    model = load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"}).train()
    with pytest.raises(RuntimeError, match=r"does not require grad"):
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"floating point"):
        model.requires_grad_(True)


def test_a_weight_of_torchao_that_requires_a_gradient_is_refused_in_the_forward(stored: Path) -> None:
    model = load_and_quantize_model(empty_llama(), AO8, stored, {"": "cpu"}).train()
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"\[64, 64\], Int8Tensor.*never be trained.*Train adapters"):
        loss_of(model)
    with torch.no_grad():
        loss_of(model)


@pytest.mark.parametrize("name", BNB)
def test_sizes_that_are_no_multiple_of_32_and_training_after_an_evaluation(name: str) -> None:
    torch.manual_seed(0)
    model = load_and_quantize_model(nn.Sequential(nn.Linear(40, 52), nn.ReLU(), nn.Linear(52, 3)), ALL[name]).eval()
    rows = torch.randn(5, 40)
    with torch.no_grad():
        first = model(rows)
    rows.requires_grad_()
    second = model.train()(rows)
    second.sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(first, second.detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ALL)
def test_copies_and_generation(name: str, stored: Path) -> None:
    model = load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"})
    twin = copy.deepcopy(model)
    expected = model.generate(tokens(), max_new_tokens=6, do_sample=False)
    assert torch.equal(twin.generate(tokens(), max_new_tokens=6, do_sample=False), expected)
    assert expected.shape == (2, 15)


@pytest.mark.parametrize("name", ALL)
def test_twice_is_refused(name: str) -> None:
    model = load_and_quantize_model(llama(), ALL[name])
    with pytest.raises(ConfigError, match=r"quantized already.*13 more"):
        load_and_quantize_model(model, INT8)


def test_groups_that_do_not_divide() -> None:
    def model(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, 2))

    eight = TorchaoQuantizationConfig(weights="int8", group_size=24)
    with pytest.raises(ConfigError, match=r"'0' \(64 inputs, 32 outputs\).*groups of 24 do not divide its 64 inputs"):
        load_and_quantize_model(model(64, 32), eight)
    with pytest.raises(ConfigError, match=r"rows by 16, and it has 40 outputs.*`weights='int8'`, or put '0'"):
        load_and_quantize_model(model(64, 40), AO4)
    with pytest.raises(ConfigError, match=r"no kernel for groups of 256"):
        load_and_quantize_model(model(256, 32), TorchaoQuantizationConfig(weights="int4", group_size=256))
    refused = model(64, 40)
    before = [each.clone() for each in refused.parameters()]
    with pytest.raises(ConfigError, match=r"cannot be quantized"):
        load_and_quantize_model(refused, AO4)
    assert all(torch.equal(old, new) for old, new in zip(before, refused.parameters(), strict=True))


def test_what_a_checkpoint_lacks_or_has_too_much_is_named(stored: Path, tmp_path: Path) -> None:
    state = {key: each.clone() for key, each in llama().state_dict().items()}
    state["model.norm.wieght"] = state.pop("model.norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    match = "1 of the model's tensors are not in it: `model.norm.weight` .the other side has 'model.norm.wieght'"
    with pytest.raises(CheckpointError, match=match):
        load_and_quantize_model(empty_llama(), INT8, tmp_path, {"": "cpu"})
    with pytest.raises(CheckpointError, match=r"tensors of another shape"):
        load_and_quantize_model(empty_llama(intermediate_size=96), INT8, stored, {"": "cpu"})


class Scaled(nn.Module):
    """A layer to quantize, and something that is kept besides tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64)
        self.scales = torch.zeros(2)

    def get_extra_state(self) -> torch.Tensor:
        return self.scales

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scales = state


@pytest.mark.parametrize("name", ["int8", "torchao int8"])
def test_what_modules_keep_besides_tensors_is_loaded(name: str, tmp_path: Path) -> None:
    original = nn.Sequential(Scaled())
    original[0].scales = torch.tensor([1.0, 2.0])
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    with init_empty_weights():
        empty = nn.Sequential(Scaled())
    model = load_and_quantize_model(empty, ALL[name], tmp_path, {"": "cpu"})
    assert model[0].scales.tolist() == [1.0, 2.0]
    assert quantized_layers(model)
    save_file({k: v for k, v in original.state_dict().items() if "extra" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of the model's tensors are not in it: `0._extra_state`"):
        load_and_quantize_model(nn.Sequential(Scaled()), ALL[name], tmp_path, {"": "cpu"})


def test_layers_that_a_model_reads_the_dtype_of(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    settings["vocab_size"] = 50
    torch.manual_seed(0)
    original = T5ForConditionalGeneration(T5Config(**settings)).eval()
    original.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = T5ForConditionalGeneration(T5Config(**settings)).eval()
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype="bf16")
    model = load_and_quantize_model(empty, config, tmp_path, {"": "cpu"})
    assert model.decoder.block[0].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    batch = {"input_ids": tokens() % 50, "decoder_input_ids": tokens()[:, :3] % 50}
    with torch.no_grad():
        ours, theirs = model(**batch).logits, original(**batch).logits
    assert error(ours, theirs) < 0.6


def streamed(model: Any) -> tuple[Any, FakeTransfers]:
    """A copy of `model` whose parameters are brought to a stand-in for a device in each forward."""
    made, transfers = copy.deepcopy(model), FakeTransfers()
    held = [each for each in group_tensors(made) if each.places[0].is_parameter]
    stream_tensors(made, held, {}, transfers=transfers, num_slots=2)
    return made, transfers


@pytest.mark.parametrize("name", ["torchao int8", "torchao groups"])
def test_weights_of_torchao_are_streamed(name: str, stored: Path) -> None:
    model = load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"})
    offloaded, transfers = streamed(model)
    with transfers.watch():
        assert torch.equal(logits(offloaded), logits(model))
    assert transfers.copied_bytes < 0.6 * sum(each.numel() for each in llama().parameters()) * 4
    remove_hooks(offloaded)
    assert quantized_layers(offloaded) == quantized_layers(model)


@pytest.mark.parametrize("name", BNB)
def test_weights_of_bitsandbytes_are_not(name: str, stored: Path) -> None:
    model = load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"})
    with pytest.raises(ConfigError, match=r"`(Int8Params|Params4bit)` cannot be offloaded.*Keep its module"):
        streamed(model)


class HostTable(DeviceTable):
    """Any number of devices, all of them the CPU."""

    def device(self, place: Any) -> torch.device:
        return torch.device("cpu")

    def transfers(self, place: Any) -> None:
        return None


@pytest.mark.parametrize("name", ALL)
def test_spread_over_devices(name: str, stored: Path) -> None:
    model = load_and_quantize_model(empty_llama(), ALL[name], stored, {"": "cpu"})
    expected, state = logits(model), bits(model.state_dict())
    spread = {"model.embed_tokens": 0, "model.layers.0": 0, "model": 1, "lm_head": 1}
    dispatch(model, spread, HostTable())
    assert torch.equal(logits(model), expected)
    assert len(quantized_layers(model)) == 14
    after = bits(model.state_dict())
    assert after.keys() == state.keys()
    assert all(torch.equal(each, after[key]) for key, each in state.items())
