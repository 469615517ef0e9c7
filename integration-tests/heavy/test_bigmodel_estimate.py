"""Estimates of real transformers models against what torch's allocator hands out when they run and train."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

from accel_bigmodel.estimate.allocator import allocator_peak_bytes
from accel_bigmodel.estimate.options import EstimateOptions
from accel_bigmodel.estimate.passes import cached_tensors, trace_generation, trace_inference, trace_training
from accel_bigmodel.estimate.predict import estimate_memory
from accel_bigmodel.estimate.weights import weights_of
from accel_bigmodel.kv_cache import kv_cache_bytes_per_layer
from accel_bigmodel.model_source import describe_model
from accel_state.errors import ConfigError

pytestmark = pytest.mark.heavy

TOLERANCE = 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels take scratch memory for each thread, which is large beside models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama() -> Any:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=512, n_embd=128, n_layer=3, n_head=4))


def t5() -> Any:
    sizes = {"vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


def bert() -> Any:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_attention_heads=4))


def vit() -> Any:
    # Deep, as kernels of convolutions take scratch memory of the size of their images, which nobody predicts.
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=64))


def resnet() -> Any:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    )


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 500, (4, 128)), "labels": torch.randint(0, 500, (4, 128))}


def sentences() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 500, (8, 128)), "labels": torch.zeros(8, dtype=torch.int64)}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(16, 3, 64, 64), "labels": torch.zeros(16, dtype=torch.int64)}


def mixtral() -> Any:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = hf.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    return hf.MixtralForCausalLM(config)


def bart() -> Any:
    sizes = {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=512, **sizes, **heads))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "llama": (llama, tokens), "gpt2": (gpt2, tokens), "t5": (t5, tokens), "bert": (bert, sentences),
    "vit": (vit, images), "resnet": (resnet, images), "mixtral": (mixtral, tokens), "bart": (bart, tokens),
}  # fmt: skip


def storage_bytes(tensors: Any) -> int:
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def measure_training(model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, bf16: bool) -> int:
    held: dict[str, Any] = {}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            held["outputs"] = model(**batch)
        held["outputs"].loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held.clear()
    gc.collect()
    states = [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    there = storage_bytes([*model.parameters(), *model.buffers(), *states, *batch.values()])
    return there + allocator_peak_bytes(lambda: (step(), step()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", ["adamw", "sgd bf16"])
def test_training_peaks_within_the_promise(name: str, setting: str) -> None:
    torch.manual_seed(0)
    make, make_batch = MODELS[name]
    model, batch = make().train(), make_batch()
    optimizer, bf16 = setting.split()[0], "bf16" in setting
    options = EstimateOptions(device="cpu", optimizer=optimizer, mixed_precision="bf16" if bf16 else "no")
    predicted = trace_training(model, batch, options).total_bytes
    made = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    assert predicted == pytest.approx(measure_training(model, batch, made(model.parameters()), bf16), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
def test_checkpointing_peaks_as_transformers_does_it(name: str) -> None:
    torch.manual_seed(0)
    make, make_batch = MODELS[name]
    model, batch = make().train(), make_batch()
    predicted = trace_training(model, batch, EstimateOptions(device="cpu", checkpointing=True)).total_bytes
    assert predicted < trace_training(model, batch, EstimateOptions(device="cpu")).total_bytes
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    measured = measure_training(model, batch, torch.optim.AdamW(model.parameters()), False)
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_inference_peaks_within_the_promise(name: str) -> None:
    make, make_batch = MODELS[name]
    model, batch = make().eval(), make_batch()
    del batch["labels"]
    if name in ("t5", "bart"):
        batch["decoder_input_ids"] = torch.randint(0, 500, (4, 128))
    predicted = trace_inference(model, batch, EstimateOptions(device="cpu"))

    def run() -> None:
        with torch.no_grad():
            model(**batch)

    run()
    there = storage_bytes([*model.parameters(), *model.buffers(), *batch.values()])
    assert predicted.total_bytes == pytest.approx(there + allocator_peak_bytes(run), rel=TOLERANCE)
    if name in ("llama", "gpt2", "t5"):
        cache = sum(kv_cache_bytes_per_layer(model.config, batch_size=4, length=128, dtype="float32"))
        assert predicted.parts["key-value cache"] == pytest.approx(cache, abs=4096)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_last_new_token_peaks_within_the_promise(name: str) -> None:
    make, make_batch = MODELS[name]
    model, batch = make().eval(), make_batch()
    del batch["labels"]
    if name == "t5":
        batch["decoder_input_ids"] = torch.randint(0, 500, (4, 96))
    predicted = trace_generation(model, batch, EstimateOptions(device="cpu"))
    with torch.no_grad():
        outputs = model(**batch, use_cache=True)
    cache = getattr(outputs, "cache", None) or outputs.past_key_values
    following: dict[str, Any] = {"input_ids": torch.zeros(4, 1, dtype=torch.int64)}
    there = [*model.parameters(), *model.buffers(), *cached_tensors(cache), following["input_ids"]]
    if name == "t5":
        encoded = outputs.encoder_last_hidden_state
        following = {"decoder_input_ids": following["input_ids"], "encoder_outputs": (encoded,)}
        there.append(encoded)
    del outputs
    with torch.no_grad():
        peak = allocator_peak_bytes(lambda: model(**following, past_key_values=cache, use_cache=True))
    assert predicted is not None
    # A layer's old keys are freed once the new ones are there, which the profiler does not see.
    layer = max(kv_cache_bytes_per_layer(model.config, batch_size=4, length=129, dtype="float32"))
    assert storage_bytes(there) < predicted.total_bytes <= 1.01 * (storage_bytes(there) + peak)
    assert predicted.parts["key-value cache"] >= storage_bytes(cached_tensors(cache)) - 2 * layer


CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grouped": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "head size": ("Qwen3Config", "Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "one head": ("FalconConfig", "FalconForCausalLM", {}),
    "newer falcon": ("FalconConfig", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "windows": ("Gemma2Config", "Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_caches_of_transformers_have_the_bytes_that_configurations_tell(name: str) -> None:
    config_class, model_class, more = CONFIGURATIONS[name]
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(hf, config_class)(**sizes, **more)
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 64
    model = getattr(hf, model_class)(config).eval()
    with torch.no_grad():
        outputs = model(input_ids=torch.randint(0, 30, (2, 10)), use_cache=True)
        cache = getattr(outputs, "cache", None) or outputs.past_key_values
        # Of a window, the layer's memory is its size once a token follows the prompt.
        model(input_ids=torch.randint(0, 30, (2, 1)), past_key_values=cache, use_cache=True)
    real = [storage_bytes([layer.keys]) + storage_bytes([layer.values]) for layer in cache.layers]
    assert kv_cache_bytes_per_layer(config, batch_size=2, length=11, dtype="float32") == real


def test_a_folder_is_described_and_estimated_without_its_weights(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    found = describe_model(str(tmp_path))
    assert isinstance(found.model, hf.GPT2LMHeadModel)
    assert {each.device.type for each in found.model.parameters()} == {"meta"}
    assert found.stored is not None
    assert "transformer.h.0.attn.c_attn.weight" in found.stored
    by_name = estimate_memory(str(tmp_path), EstimateOptions(device="cpu", batch_size=2, sequence_length=32))
    by_model = estimate_memory(gpt2(), EstimateOptions(device="cpu", batch_size=2, sequence_length=32))
    assert by_name.training == by_model.training
    assert by_name.weights == by_model.weights
    (tmp_path / "model.safetensors").unlink()
    assert describe_model(str(tmp_path)).stored is None


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_made_up_for_every_kind(name: str) -> None:
    options = EstimateOptions(batch_size=2, sequence_length=16, new_tokens=4, checkpointing=name != "resnet")
    found = estimate_memory(MODELS[name][0](), options)
    assert found.inference.peak is not None, found.inference.unknown
    assert found.training is not None
    assert found.training.peak is not None, found.training.unknown
    assert found.generation is not None
    generates = name in ("llama", "gpt2", "t5", "mixtral", "bart")
    assert (found.generation.peak is not None) == generates, found.generation.unknown


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_is_traced_where_it_multiplies_in_groups(dtype: str) -> None:
    found = estimate_memory(mixtral(), EstimateOptions(sequence_length=16, dtype=dtype))
    assert found.training is not None
    assert found.training.peak is not None, found.training.unknown
    expected = found.weights[0 if dtype == "float32" else 1].total_bytes
    assert found.training.peak.parts["weights"] == pytest.approx(expected, rel=0.05)


def test_what_transformers_does_not_know(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="names no class in `architectures`"):
        describe_model(str(tmp_path))
    with pytest.raises(ConfigError, match="Did you mean 'LlamaForCausalLM'"):
        describe_model(str(tmp_path), model_class="LlamaForCausalML")
    with pytest.raises(ConfigError, match="not in the local cache of the hub"):
        describe_model("nobody/has-this")


def test_quantized_linear_layers_take_the_bytes_that_the_table_tells() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantization = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(512, 256, bias=False))
    rows = {each.name: each.total_bytes for each in weights_of(model)}

    packed = bitsandbytes.nn.Params4bit(torch.randn(256, 512), quant_type="nf4", compress_statistics=False).to("cpu")
    state = packed.quant_state
    assert rows["bitsandbytes nf4"] == storage_bytes([packed.data, state.absmax, state.code])

    double = bitsandbytes.nn.Params4bit(torch.randn(256, 512), quant_type="nf4", compress_statistics=True).to("cpu")
    state = double.quant_state
    parts = [double.data, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    assert rows["bitsandbytes nf4, double"] == storage_bytes(parts)

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    names, _ = model[0].weight.__tensor_flatten__()
    assert rows["torchao int8"] == storage_bytes([getattr(model[0].weight, each) for each in names])


def test_the_command_prints_the_table(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    words = [sys.executable, "-m", "accel_launch", "estimate", str(tmp_path), "--sequence-length", "32"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    for part in ("bfloat16", "key-value cache", "optimizer states", "at its worst moment:"):
        assert part in done.stdout
