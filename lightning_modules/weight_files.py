"""Files of weights, from here or elsewhere; of tensors and plain data alone, never of code."""

import pickle
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from archive import is_intact

OURS = "net."
"""How the weights of a network are called in a checkpoint of its LightningModule."""


def read_weight_file(source: str) -> dict[str, Any]:
    """Returns the state dict of a network that a file holds.

    Args:
        source: path of a state dict, of a dict that has one as "state_dict", of a checkpoint of
            ours, or of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no weights, is damaged, or safetensors is not installed.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {source}: correct tuning.weights")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if isinstance(weights, dict) and any(str(key).startswith(OURS) for key in weights):
        weights = {
            key.removeprefix(OURS): value for key, value in weights.items() if key.startswith(OURS)
        }
    if not isinstance(weights, dict) or not any(map(torch.is_tensor, weights.values())):
        raise ValueError(
            f"{source} is not a file of weights (tensors by name and plain data), or is damaged: "
            "correct tuning.weights"
        )
    return weights


def _read_torch(path: Path) -> Any:
    # Archives have checksums, which torch does not look at; older files have none.
    if is_zipfile(path) and not is_intact(path):
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # What torch raises depends on where the file stops making sense.
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError):
        return None


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path} needs the package safetensors: pip install it") from error
    try:
        return load_file(path)
    except SafetensorError:
        return None
