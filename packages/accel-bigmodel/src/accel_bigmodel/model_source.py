"""A model by name: what its configuration builds without memory, and where a checkpoint keeps its tensors.

Nothing is downloaded, and no weight is read. transformers, timm and huggingface_hub are imported where a name needs
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from accel_bigmodel.init import init_empty_weights
from accel_bigmodel.stored import INDEX_NAMES, StoredTensor, read_index
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError, MissingDependencyError

__all__ = ["ModelDescription", "describe_model"]

_TIMM_PREFIX = "timm/"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """What is known of a model before it is loaded. At least one of `model` and `stored` is there."""

    title: str
    """What it is called, for people."""
    model: nn.Module | None = field(default=None, repr=False)
    """Built with its parameters on the meta device; ``None`` where only the headers of a checkpoint are known."""
    config: Any = field(default=None, repr=False)
    """Of transformers, where it came from there."""
    stored: Mapping[str, StoredTensor] | None = field(default=None, repr=False)
    """Where a checkpoint keeps each tensor; ``None`` where there is none."""


def describe_model(name: str, *, model_class: str | None = None, trust_remote_code: bool = False) -> ModelDescription:
    """What `name` stands for, without weights and without a network.

    The first of these that fits:

    1. A folder, with a ``config.json`` of transformers or timm, with safetensors, or with both.
    2. A ``config.json``, a ``.safetensors`` file or a ``.safetensors.index.json``. With one of the latter two, a
       ``config.json`` in the same folder is read as well.
    3. ``timm/NAME`` or the name of a model that timm has.
    4. The name of a model on a hub that lies in the local cache of huggingface_hub.

    Args:
        name: one of these.
        model_class: the class of transformers that is built, such as ``"AutoModelForCausalLM"``; by default what the
            configuration names in ``architectures``.
        trust_remote_code: whether Python code that comes with a configuration may run, where there is such code.

    Raises:
        ConfigError: if there is no such model, or its configuration cannot be built.
        CheckpointError: if its safetensors are damaged or incomplete.
        MissingDependencyError: if the package that has its code is not installed.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _of_path(path, model_class, trust_remote_code)
    bare = name.removeprefix(_TIMM_PREFIX)
    if name.startswith(_TIMM_PREFIX):
        cached = _cached_folder(name)
        return ModelDescription(title=name, model=_timm_model(bare), stored=_stored(cached) if cached else None)
    if "/" not in name and _timm_names(name):
        return ModelDescription(title=f"{_TIMM_PREFIX}{name}", model=_timm_model(name))
    folder = _cached_folder(name)
    if folder is None:
        _refuse_unknown(name)
    return _of_config(folder / "config.json", name, _stored(folder), model_class, trust_remote_code)


def _of_path(path: Path, model_class: str | None, trusted: bool) -> ModelDescription:
    config = (path if path.is_dir() else path.parent) / "config.json"
    stored: Mapping[str, StoredTensor] | None = None
    if path.is_dir():
        stored = _stored(path) if config.is_file() else read_index(path)
    elif path.suffix == ".safetensors" or path.name.endswith(".index.json"):
        stored = read_index(path)
    elif path.suffix == ".json":
        config = path
    else:
        raise ConfigError(
            f"`{path}` is neither a configuration nor safetensors, and nothing else is read without running it. Give "
            f"a folder, a `config.json`, a `.safetensors` file or its `.index.json`."
        )
    if config.is_file():
        return _of_config(config, str(path), stored, model_class, trusted)
    if model_class is not None:
        raise ConfigError(
            f"`model_class={model_class!r}` was given for `{path}`, but there is no configuration beside its tensors "
            f"from which the class could be built. Put the model's `config.json` there, or leave the class out."
        )
    return ModelDescription(title=str(path), stored=stored)


def _stored(folder: Path) -> Mapping[str, StoredTensor] | None:
    """The tensors in a folder that may as well have none."""
    holds = any((folder / each).is_file() for each in INDEX_NAMES) or any(folder.glob("*.safetensors"))
    return read_index(folder) if holds or any(folder.glob("*.safetensors.index.json")) else None


def _of_config(
    config_path: Path,
    title: str,
    stored: Mapping[str, StoredTensor] | None,
    model_class: str | None,
    trusted: bool,
) -> ModelDescription:
    text = _read_config(config_path)
    if "model_type" not in text and isinstance(text.get("architecture"), str):
        return ModelDescription(title=title, model=_timm_model(text["architecture"], text), stored=stored)
    _check_config(config_path, text, model_class, trusted)
    transformers = _transformers(config_path)
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(config_path if config_path.name != "config.json" else config_path.parent),
            trust_remote_code=trusted,
            local_files_only=True,
        )
    except Exception as error:  # the hub's own errors of single fields are of no common class
        raise ConfigError(
            f"transformers {transformers.__version__} makes nothing of `{config_path}` ({_first_line(error)}). Install "
            f"a version that knows the model type {text.get('model_type')!r}, or correct the file."
        ) from error
    model = _build(transformers, config, text, config_path, model_class, trusted)
    return ModelDescription(title=title, model=model, config=config, stored=stored)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` is no JSON ({error}). Give the `config.json` of a model.") from error
    if not isinstance(text, dict) or not ("model_type" in text or "architecture" in text):
        raise ConfigError(
            f"`{path}` names neither a `model_type`, as a configuration of transformers does, nor an `architecture`, "
            f"as one of timm does, so it describes no model. Give the `config.json` of a model."
        )
    return text


def _check_config(path: Path, text: Mapping[str, Any], model_class: str | None, trusted: bool) -> None:
    brought = text.get("auto_map")
    if brought and not trusted and text["model_type"] not in _known_types(path):
        raise ConfigError(
            f"`{path}` describes a model whose code comes with it ({', '.join(sorted(map(str, brought)))}), and that "
            f"code would run here. Read it, then give `trust_remote_code=True` (`--trust-remote-code`)."
        )
    named = text.get("architectures")
    if named is not None and not isinstance(named, list):
        raise ConfigError(
            f"`{path}` has `architectures: {named!r}`, which should be a list of names of classes. Correct the file."
        )
    wrong = [
        key for key, value in text.items()
        if key.startswith(("num_", "n_")) and isinstance(value, int) and not isinstance(value, bool) and value < 0
    ]  # fmt: skip
    if wrong:
        raise ConfigError(f"`{path}` has `{wrong[0]}: {text[wrong[0]]}`, of which there can be none. Correct the file.")
    if model_class is None and not text.get("architectures"):
        raise ConfigError(
            f"`{path}` names no class in `architectures`, so which model it configures is not known: a "
            f"{text['model_type']!r} with what head? Give `model_class` (`--model-class`), such as "
            f"'AutoModelForCausalLM', or 'AutoModel' for the model without a head."
        )


def _known_types(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _transformers(path).CONFIG_MAPPING
    return found


def _build(
    transformers: Any, config: Any, text: Mapping[str, Any], path: Path, model_class: str | None, trusted: bool
) -> nn.Module:
    """The class that is asked for, or that the configuration names, with its parameters on the meta device."""
    name = model_class or str(text["architectures"][0])
    brought = None
    if model_class is None and trusted and text["model_type"] not in transformers.CONFIG_MAPPING:
        brought = _auto_class_of(text)
    found = getattr(transformers, brought or name, None)
    if found is None or not hasattr(found, "from_config" if _is_auto(found) else "_from_config"):
        known = [each for each in dir(transformers) if "For" in each or each.endswith("Model")]
        raise ConfigError(
            f"`{path}` is to be built as {name!r}, but transformers {transformers.__version__} has no model class of "
            f"that name.{did_you_mean(name, known)} Give another `model_class` (`--model-class`)."
        )
    try:
        with init_empty_weights():
            built = (
                found.from_config(config, trust_remote_code=trusted) if _is_auto(found) else found._from_config(config)
            )
    except Exception as error:
        raise ConfigError(
            f"`{path}` could not be built as {name!r} ({type(error).__name__}: {_first_line(error)}). Correct the "
            f"configuration, or give the class that fits it as `model_class` (`--model-class`)."
        ) from error
    result: nn.Module = built.eval()
    return result


def _is_auto(found: Any) -> bool:
    return str(getattr(found, "__name__", "")).startswith("Auto")


def _auto_class_of(text: Mapping[str, Any]) -> str | None:
    """Through which of transformers' automatic classes code that comes with a model gives the class it names first."""
    wanted = str(text["architectures"][0])
    brought: Mapping[str, Any] = text.get("auto_map") or {}
    return next((auto for auto, place in brought.items() if str(place).rpartition(".")[2] == wanted), None)


def _transformers(path: Path) -> Any:
    if find_spec("transformers") is None:
        raise MissingDependencyError("transformers", purpose=f"the code of the model that `{path}` configures")
    return import_module("transformers")


def _timm_names(pattern: str) -> list[str]:
    if find_spec("timm") is None:
        return []
    found: list[str] = _timm().list_models(pattern)
    return found


def _timm() -> Any:
    try:
        return import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter beside a torch of another version
        raise ConfigError(
            f"timm is installed here, but it cannot be imported ({_first_line(error)}). Install versions of timm and "
            f"torchvision that belong to this torch."
        ) from error


def _timm_model(name: str, text: Mapping[str, Any] | None = None) -> nn.Module:
    if find_spec("timm") is None:
        raise MissingDependencyError("timm", purpose=f"the code of the model {name!r}")
    timm = _timm()
    plain = name.partition(".")[0]  # what follows names a set of weights
    if plain not in timm.list_models():
        raise ConfigError(
            f"timm {timm.__version__} has no model {name!r}.{did_you_mean(plain, timm.list_models())} "
            f"`timm.list_models()` has them all."
        )
    given = text or {}
    options = {key: given[key] for key in ("num_classes", "global_pool") if key in given}
    with init_empty_weights():
        model: nn.Module = timm.create_model(plain, pretrained=False, **(options | given.get("model_args", {})))
    return model.eval()


def _cached_folder(name: str) -> Path | None:
    """Where the local cache keeps a model of a hub; ``None`` if it does not."""
    if find_spec("huggingface_hub") is None:
        return None
    hub = import_module("huggingface_hub")
    try:
        found = hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that a hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _refuse_unknown(name: str) -> NoReturn:
    local = name.startswith((".", "/", "~")) or name.endswith((".json", ".safetensors")) or name.count("/") > 1
    if local:
        folder = Path(name).expanduser().parent
        beside = [str(each) for each in folder.iterdir()] if folder.is_dir() else []
        raise ConfigError(
            f"There is no file or folder `{name}`.{did_you_mean(name, beside)} Give a folder with a "
            f"`config.json`, such a file itself, or safetensors."
        )
    if find_spec("huggingface_hub") is None:
        raise MissingDependencyError(
            "transformers", purpose=f"{name!r}, which is no file or folder here and may be a name on a hub"
        )
    raise ConfigError(
        f"{name!r} is no file or folder here, no model of timm{'' if find_spec('timm') else ' (not installed)'}, and "
        f"not in the local cache of the hub, and nothing is downloaded by itself. Its configuration is enough: "
        f"`hf download {name} config.json`, then ask again."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
