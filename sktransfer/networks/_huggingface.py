"""Networks of the package transformers, from a folder or the local cache; never downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sktransfer._threads import own_random_state
from sktransfer.networks import _weights
from sktransfer.networks._sources import BuiltSource, random_seed, skeleton, weights_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Files that define a network and its inputs; the digest is of these.
_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
_WEIGHTS += ["pytorch_model.bin.index.json"]
# Settings of networks for images and sounds, which may have a vocabulary, too.
_OF_OTHERS = ["vision_config", "image_size", "patch_size", "num_channels"]
_OF_OTHERS += ["conv_kernel", "num_mel_bins"]


def import_transformers():
    """Import transformers, or say which extra has it."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(
            "Networks named 'hf:…' need the package transformers, which is not installed: "
            "pip install sktransfer[hf]"
        )
    import transformers

    return transformers


def hf_folder(name: str) -> Path:
    """Return the folder of ``"hf:NAME_OR_FOLDER"``: as it is, or in the local cache of the hub."""
    place = name.removeprefix("hf:")
    path = Path(place).expanduser()
    if (path / "config.json").is_file():
        return path.absolute()
    if path.is_dir():
        raise FileNotFoundError(
            f"backbone={name!r}: the folder {str(path)!r} holds no config.json. A folder that "
            "save_pretrained of transformers wrote is needed."
        )
    import_transformers()
    from huggingface_hub import constants, errors, try_to_load_from_cache

    with contextlib.suppress(errors.HFValidationError):
        found = try_to_load_from_cache(place, "config.json")
        if isinstance(found, str):
            return Path(found).parent
    raise FileNotFoundError(
        f"backbone={name!r}: there is no such folder, and the cache {constants.HF_HUB_CACHE!r} "
        f"does not hold it. Nothing is downloaded: run `hf download {place}` once, or give the "
        "folder that holds config.json, the weights and the tokenizer or image processor."
    )


def read_config(name: str) -> PretrainedConfig:
    """Return the configuration of ``"hf:NAME_OR_FOLDER"``."""
    folder = hf_folder(name)
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"backbone={name!r}: transformers {transformers.__version__} cannot read "
            f"{str(folder / 'config.json')!r} ({error!s:.300}). Networks that bring code of their "
            "own are not loaded."
        ) from error


def is_text_name(backbone: object) -> bool:
    """Whether `backbone` names a network of texts alone; only its configuration is read."""
    if not (isinstance(backbone, str) and backbone.startswith("hf:")):
        return False
    config = read_config(backbone)
    return hasattr(config, "vocab_size") and not any(hasattr(config, k) for k in _OF_OTHERS)


def weights_files(folder: Path, name: str) -> list[Path]:
    """Return the files that hold the weights of a folder."""
    for first in _WEIGHTS:
        path = folder / first
        if path.is_file():
            if path.suffix != ".json":
                return [path]
            names = json.loads(path.read_text())["weight_map"].values()
            return [path, *(folder / part for part in sorted(set(names)))]
    raise FileNotFoundError(
        f"backbone={name!r}: {str(folder)!r} holds none of {', '.join(_WEIGHTS)}."
    )


def files_digest(paths: list[Path]) -> str:
    """Return the digest of files' names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{_weights.file_digest(path)};".encode())
    return digest.hexdigest()


class FolderSource(BuiltSource):
    """A network of transformers; beside its weights it depends on the `files` of its folder."""

    files: Sequence[str]

    def __init__(self, name: str, weights: object) -> None:
        self.name, self.is_random, self.seed = name, weights is None, random_seed.get()
        self.path = weights_path(weights)
        self.is_user_file = self.path is not None
        if not (self.is_random or self.is_user_file or weights == "DEFAULT"):
            raise ValueError(
                f"weights={weights!r} is not accepted for {name!r}: 'DEFAULT' means those of its "
                "folder, a path those of a file, None random ones."
            )
        self._place = str(hf_folder(name))
        self.config = read_config(name)

    @property
    def folder(self) -> Path:
        # A name may be relative to another working folder, a pickle come from another machine.
        is_there = Path(self._place, "config.json").is_file()
        return Path(self._place) if is_there else hf_folder(self.name)

    def digest_files(self) -> str:
        folder = self.folder
        files = [folder / name for name in ["config.json", *self.files]]
        files = [path for path in files if path.is_file()]
        if self.is_random:
            versions = f"{torch.__version__}:{import_transformers().__version__}"
            return f"random:{self.seed}:{versions}:{files_digest(files)}"
        if self.path is not None:
            return f"{files_digest(files)}:{_weights.file_digest(self.path)}"
        return files_digest([*files, *weights_files(folder, self.name)])

    def make(self, unused: tuple[str, ...] = ()) -> PreTrainedModel:
        """Make the model as float32 and without heads, with its weights or random ones.

        Weights whose names begin with one of `unused` may be missing.
        """
        if self.is_random:
            with own_random_state(self.seed), quiet():
                return _make_model(self.config)
        place = self.path or self.folder
        options = {"config": self.config, "local_files_only": True, "output_loading_info": True}
        options |= {"dtype": torch.float32}
        if self.path is not None:
            options["state_dict"] = dict(_weights.read_state_dict(self.path))
        try:
            with quiet():
                model, info = _model_class(self.config).from_pretrained(
                    None if self.path else str(place), **options
                )
        except Exception as error:
            raise ValueError(
                f"backbone={self.name!r}: its weights in {str(place)!r} cannot be "
                f"loaded ({type(error).__name__}: {error!s:.300})."
            ) from error
        missing = sorted(map(str, info["missing_keys"]))
        if any("pooler" in key for key in missing) and hasattr(model, "pooler"):
            model.pooler = None  # it was not trained
        missing = [key for key in missing if not key.startswith(unused) and "mask_token" not in key]
        if missing := [key for key in missing if "pooler" not in key]:
            raise ValueError(
                f"backbone={self.name!r}: {str(place)!r} lacks the weights of "
                f"{missing[:5]}, {len(missing)} in all."
            )
        return model


def make_skeleton(settings: Mapping) -> PreTrainedModel:
    """Make the model of a saved configuration without its weights; no file is read."""
    transformers = import_transformers()
    kind = settings["model_type"]
    others = {key: value for key, value in settings.items() if key != "model_type"}

    with quiet():
        config = transformers.AutoConfig.for_model(kind, **others)
        return skeleton(lambda: _make_model(config))  # type: ignore[return-value]


def projected_class(config: PretrainedConfig) -> str:
    """Return the class of a network with a projection, which AutoModel leaves out; or ``""``."""
    names = config.architectures or []
    return next((name for name in names if name.endswith("WithProjection")), "")


def _model_class(config: PretrainedConfig):
    """Return the class of a configuration's network, without heads."""
    transformers = import_transformers()
    if name := projected_class(config):
        return getattr(transformers, name)
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(f"transformers has no network for a {type(config).__name__} alone")
    return kind[0] if isinstance(kind, (tuple, list)) else kind


def _make_model(config: PretrainedConfig) -> PreTrainedModel:
    return _model_class(config)(config).float()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting what its user cannot act on."""
    logging = import_transformers().utils.logging
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
