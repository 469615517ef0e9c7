"""Models by name: files and folders, and what is said of names that stand for nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel import model_source
from accel_bigmodel.model_source import describe_model
from accel_state.errors import CheckpointError, ConfigError, MissingDependencyError
from accel_state.tensor_format import TensorShape, file_header


def write_safetensors(path: Path) -> None:
    shapes = {"a.weight": TensorShape((4, 8), torch.float16), "b": TensorShape((3,), torch.int64)}
    path.write_bytes(file_header(shapes) + bytes(sum(each.nbytes for each in shapes.values())))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Third parties that a test puts there; all others are not installed."""
    modules: dict[str, Any] = {}

    monkeypatch.setattr(model_source, "find_spec", lambda name: object() if name in modules else None)
    monkeypatch.setattr(model_source, "import_module", lambda name: modules[name])
    return modules


class TinyNet(nn.Module):
    """Stands for a model of a library that is not installed here."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(1))

    @classmethod
    def _from_config(cls, config: Any) -> TinyNet:
        return cls(config)


class AutoTiny:
    """Stands for an automatic class of transformers."""

    @staticmethod
    def from_config(config: Any, trust_remote_code: bool) -> TinyNet:
        return TinyNet(config)


def stand_in_transformers(**more: Any) -> SimpleNamespace:
    def from_pretrained(path: str, *, trust_remote_code: bool, local_files_only: bool) -> Any:
        assert local_files_only
        folder = Path(path)
        text = json.loads((folder / "config.json" if folder.is_dir() else folder).read_text())
        if text["model_type"] == "future":
            raise ValueError("The checkpoint has model type `future`\nand so on")
        return SimpleNamespace(**text)

    given = {
        "__version__": "5.0",
        "CONFIG_MAPPING": {"tiny": object},
        "AutoConfig": SimpleNamespace(from_pretrained=from_pretrained),
        "TinyForCausalLM": type("TinyForCausalLM", (TinyNet,), {}),
        "AutoModel": type("AutoModel", (AutoTiny,), {}),
    }
    return SimpleNamespace(**{**given, **more})


def write_config(folder: Path, **entries: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "tiny", "architectures": ["TinyForCausalLM"], **entries}))
    return path


def test_headers_alone_tell_names_dtypes_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file)
    for name in (str(file), str(tmp_path)):
        found = describe_model(name)
        assert (found.title, found.model, found.config) == (name, None, None)
        assert found.stored is not None
        assert {name: each.shape for name, each in found.stored.items()} == {"a.weight": (4, 8), "b": (3,)}


def test_a_configuration_builds_the_class_it_names_without_memory(tmp_path: Path, installed: dict[str, Any]) -> None:
    installed["transformers"] = stand_in_transformers()
    write_config(tmp_path)
    write_safetensors(tmp_path / "model.safetensors")
    for name in (tmp_path, tmp_path / "model.safetensors"):
        found = describe_model(str(name))
        assert type(found.model).__name__ == "TinyForCausalLM"
        assert found.model is not None
        assert found.stored is not None
        assert {each.device.type for each in found.model.parameters()} == {"meta"}
        assert not found.model.training
        assert found.config.model_type == "tiny"
    assert describe_model(str(tmp_path / "config.json")).stored is None


def test_another_class_may_be_asked_for(tmp_path: Path, installed: dict[str, Any]) -> None:
    installed["transformers"] = stand_in_transformers()
    path = write_config(tmp_path, architectures=None)
    assert isinstance(describe_model(str(path), model_class="AutoModel").model, TinyNet)
    with pytest.raises(ConfigError, match=r"names no class in `architectures`.*--model-class"):
        describe_model(str(path))
    with pytest.raises(ConfigError, match=r"no model class of that name. Did you mean 'TinyForCausalLM'"):
        describe_model(str(path), model_class="TinyForCausalML")


def test_code_that_comes_with_a_model_runs_only_if_trusted(tmp_path: Path, installed: dict[str, Any]) -> None:
    auto = type("AutoModelForCausalLM", (AutoTiny,), {})
    installed["transformers"] = stand_in_transformers(AutoModelForCausalLM=auto)
    brought = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Odd"}
    path = write_config(tmp_path, model_type="odd", architectures=["Odd"], auto_map=brought)
    with pytest.raises(ConfigError, match=r"code would run here. Read it, then give `trust_remote_code=True`"):
        describe_model(str(path))
    assert isinstance(describe_model(str(path), trust_remote_code=True).model, TinyNet)


def test_a_model_type_of_a_later_version(tmp_path: Path, installed: dict[str, Any]) -> None:
    installed["transformers"] = stand_in_transformers()
    path = write_config(tmp_path, model_type="future")
    with pytest.raises(ConfigError, match=r"makes nothing of .*model type `future`\)"):
        describe_model(str(path))


def test_a_configuration_that_cannot_be_built(tmp_path: Path, installed: dict[str, Any]) -> None:
    def refuse(config: Any) -> Any:
        raise ValueError("hidden size must be divisible")

    odd = type("TinyForCausalLM", (TinyNet,), {"_from_config": staticmethod(refuse)})
    installed["transformers"] = stand_in_transformers(TinyForCausalLM=odd)
    with pytest.raises(ConfigError, match=r"could not be built as 'TinyForCausalLM' .*must be divisible"):
        describe_model(str(write_config(tmp_path)))


def test_a_package_that_is_missing_is_named(tmp_path: Path, installed: dict[str, Any]) -> None:
    with pytest.raises(MissingDependencyError, match="`transformers` is needed for the code of the model"):
        describe_model(str(write_config(tmp_path)))
    with pytest.raises(MissingDependencyError, match="`timm` is needed for the code of the model 'resnet18'"):
        describe_model("timm/resnet18")
    with pytest.raises(MissingDependencyError, match="`transformers` is needed for 'some/name', which is no file"):
        describe_model("some/name")


def stand_in_timm() -> SimpleNamespace:
    """Stands for timm, whose torchvision has no version for this torch."""
    names = ["tiny_net"]
    return SimpleNamespace(
        __version__="1.0",
        list_models=lambda pattern="": [each for each in names if not pattern or each == pattern],
        create_model=lambda name, pretrained, **options: TinyNet(SimpleNamespace(name=name, **options)),
    )


def test_models_of_timm_by_name_and_by_configuration(tmp_path: Path, installed: dict[str, Any]) -> None:
    installed["timm"] = stand_in_timm()
    for name in ("timm/tiny_net", "tiny_net", "timm/tiny_net.a1_in1k"):
        assert isinstance(describe_model(name).model, TinyNet)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tiny_net", "num_classes": 7}))
    model: Any = describe_model(str(tmp_path)).model
    assert model.config.num_classes == 7
    with pytest.raises(ConfigError, match=r"has no model 'tiny_nat'. Did you mean 'tiny_net'"):
        describe_model("timm/tiny_nat")


def test_a_timm_that_cannot_be_imported(installed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["timm"] = None

    def fail(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(model_source, "import_module", fail)
    with pytest.raises(ConfigError, match=r"cannot be imported .*torchvision::nms.*belong to this torch"):
        describe_model("timm/resnet18")


def test_a_name_of_a_hub_is_looked_up_in_the_cache_only(tmp_path: Path, installed: dict[str, Any]) -> None:
    cached = {"org/tiny": str(write_config(tmp_path))}

    def look_up(name: str, file: str) -> Any:
        if " " in name:
            raise ValueError("no name of a repository")
        return cached.get(name)

    installed["transformers"] = stand_in_transformers()
    installed["huggingface_hub"] = SimpleNamespace(try_to_load_from_cache=look_up)
    found = describe_model("org/tiny")
    assert found.title == "org/tiny"
    assert isinstance(found.model, TinyNet)
    for name in ("org/other", "odd name"):
        with pytest.raises(ConfigError, match=f"nothing is downloaded by itself.*`hf download {name} config.json`"):
            describe_model(name)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    odd = tmp_path / "weights.bin"
    odd.write_bytes(b"")
    with pytest.raises(ConfigError, match="neither a configuration nor safetensors"):
        describe_model(str(odd))
    for text, said in (("{", "is no JSON"), ("[]", "describes no model"), ('{"a": 1}', "describes no model")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            describe_model(str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match=r"There is no file or folder .*Did you mean .*weights.bin"):
        describe_model(str(tmp_path / "weights.bim"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        describe_model(str(empty))


def test_a_class_without_a_configuration(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"`model_class='AutoModel'` was given .*no configuration beside"):
        describe_model(str(tmp_path), model_class="AutoModel")


def test_third_parties_are_not_imported_before_a_name_needs_them(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors")
    before = set(sys.modules)
    describe_model(str(tmp_path))
    assert not {"transformers", "timm", "huggingface_hub"} & (set(sys.modules) - before)
