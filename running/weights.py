"""What a fit may start from: a file, the selected checkpoint of a run, or weights of torchvision.

module.read_weights = read_weights  # the command line does so; files need it not
"""

import difflib
import re
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.seed import isolate_rng

from lightning_modules import read_weight_file
from running.loading import find_checkpoint, read_config, selection


def read_weights(source: str) -> dict[str, Any]:
    """Returns a state dict.

    Args:
        source: path of a file or of a run folder, or a name such as
            "ResNet50_Weights.IMAGENET1K_V2", which is downloaded unless torch.hub has it.

    Raises:
        FileNotFoundError: there is no such file, folder or checkpoint.
        OSError: it cannot be downloaded.
        ValueError: it holds no weights, or torchvision has none of that name.
    """
    path = Path(source)
    if path.is_dir():
        return read_weight_file(str(find_checkpoint(path, selection(read_config(path)))))
    if re.fullmatch(r"\w+_Weights\.\w+", source) and not path.exists():
        return read_torchvision(source)
    return read_weight_file(source)


def read_torchvision(name: str) -> dict[str, Any]:
    """Returns weights of torchvision, with the names that its networks have today."""
    from torchvision import models  # slow to import

    known = {
        str(weights): network
        for network in models.list_models(module=models)
        for weights in models.get_model_weights(network)
    }
    if name not in known:
        alike = difflib.get_close_matches(name, known, 3, cutoff=0)
        raise ValueError(f"torchvision has no weights {name}: use {', '.join(alike)}")
    try:
        with isolate_rng(include_cuda=False):
            # Built rather than read: DenseNet's files have names of before.
            return models.get_model(known[name], weights=name, progress=False).state_dict()
    except (OSError, RuntimeError) as error:  # of no network, or of another checksum
        reason = " ".join(str(error).split())[:100]
        raise OSError(
            f"{name} cannot be had ({reason}): fetch {models.get_weight(name).url} where "
            "there is a network, and name the file in tuning.weights"
        ) from error
