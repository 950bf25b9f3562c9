"""The first losses of every method, written down: a refactor may not change them.

Regenerate, after a change that is meant to change them, with the exact versions of
`constraints.txt`: ``OMP_NUM_THREADS=1 python tests/test_golden_losses.py``.
"""

from pathlib import Path

import methods
import pytest
import torch
import yaml
from pytorch_lightning import Trainer, seed_everything

from benchmarks.timing import cpu_name
from datamodules import DigitsDataModule

FILE = Path(__file__).with_name("golden_losses.yaml")


def machine() -> dict[str, str | int]:
    """Returns what the last bits of a loss depend on."""
    return {
        "torch": str(torch.__version__),
        "cpu": cpu_name().strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def losses(method: str) -> list[float]:
    """Returns the losses of the first five steps on the digits."""
    seed_everything(7, verbose=False)
    module = methods.build(methods.METHODS[method])
    module.seed = 7
    seen = []
    step = module.training_step
    module.training_step = lambda *batch: seen.append(step(*batch)) or seen[-1]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet["enable_model_summary"] = False
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=5, limit_val_batches=0, **quiet)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=32, seed=7))
    return [loss.item() for loss in seen]


@pytest.mark.parametrize("method", methods.TRAINED)
def test_losses_are_the_golden_ones(method: str) -> None:
    golden = yaml.safe_load(FILE.read_text())
    assert method in golden["losses"], "a new method: write its losses down, see above"
    if golden["machine"] == machine():
        assert losses(method) == golden["losses"][method]
    else:  # other CPUs and versions round otherwise; another draw or order shows all the same
        assert losses(method) == pytest.approx(golden["losses"][method], rel=2e-3)


if __name__ == "__main__":
    content = {"machine": machine(), "losses": {name: losses(name) for name in methods.TRAINED}}
    FILE.write_text(yaml.safe_dump(content))
