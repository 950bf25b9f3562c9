"""Checkpoint files: written whole or not at all, and read only if they are whole."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from archive import is_intact

WHOLE = {"pytorch-lightning_version", "state_dict", "global_step"}
"""Keys of what Lightning saves."""


def is_damaged(path: Path) -> bool:
    """Tells whether a checkpoint has lost its bytes, as opposed to holding what is refused."""
    if not is_intact(path):
        return True
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return False
    except (RuntimeError, ValueError):  # torch does not find its way in the archive
        return True
    return False


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, then renames: a checkpoint is either the old one or the new one.

    Loads tensors and plain data only: a checkpoint that holds other pickles is refused, not
    executed. So is one whose checksums do not hold.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None
    ) -> None:
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            # A RuntimeError is how torch may report a full disk.
            if isinstance(error, OSError | RuntimeError):
                raise OSError(f"cannot write {path}, the one before it is kept: {error}") from error
            raise

    def load_checkpoint(
        self,
        path: Path,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint {path}: correct --ckpt_path")
        problem: Exception | None = None
        if is_intact(Path(path)):
            try:
                checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
                # Lightning hands weights from forked ranks to their parent as a bare `.temp.ckpt`.
                is_temporary = Path(path).name == ".temp.ckpt"
                is_dict = isinstance(checkpoint, dict)
                if is_temporary or (is_dict and checkpoint.keys() >= WHOLE):
                    return checkpoint
                if is_dict and any(isinstance(each, torch.Tensor) for each in checkpoint.values()):
                    raise ValueError(
                        f"{path} holds weights alone, and no state of a training: start from them "
                        "by --model.init_args.tuning.weights"
                    )
            except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
                problem = error
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain data, or is damaged: copy another "
            "over it (previous.ckpt, best.ckpt), or delete it to start anew"
        ) from problem
