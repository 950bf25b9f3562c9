"""What every generic test loops over: a row per method, small enough to train in seconds."""

import importlib
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import pytest

SMALL_NET = {
    "class_path": "networks.CifarResNet",
    "init_args": {"depth": 8, "num_classes": 10, "in_channels": 1},
}

CALLBACK_ARGUMENTS = {"BNRecalibration": {"num_images": 128}}

METHODS: dict[str, dict[str, Any]] = {
    "resnet": {
        "class_path": "lightning_modules.LitResNet",
        "init_args": {"net": SMALL_NET},
    },
    "stochastic_depth": {
        "class_path": "lightning_modules.LitStochasticDepth",
        "init_args": {"net": SMALL_NET},
    },
    "stochastic_depth_row": {
        "class_path": "lightning_modules.LitStochasticDepth",
        "init_args": {"net": SMALL_NET, "mode": "row", "rescale": True},
    },
    "vision_transformer": {
        "class_path": "lightning_modules.LitStochasticDepth",
        "init_args": {
            "net": {
                "class_path": "networks.VisionTransformer",
                "init_args": {
                    "image_size": 32,
                    "patch_size": 8,
                    "num_layers": 2,
                    "num_heads": 2,
                    "hidden_dim": 16,
                    "mlp_dim": 32,
                    "num_classes": 10,
                    "in_channels": 1,
                    "dropout": 0.1,
                },
            },
            "mode": "row",
            "rescale": True,
            "decay": "drop_path",
        },
    },
    "convnext": {
        "class_path": "lightning_modules.LitStochasticDepth",
        "init_args": {
            "net": {
                "class_path": "networks.ConvNeXt",
                "init_args": {
                    "depths": [1, 2],
                    "channels": [8, 16],
                    "num_classes": 10,
                    "in_channels": 1,
                    "layer_scale": 0.1,
                },
            }
        },
    },
    "branchynet": {
        "class_path": "lightning_modules.LitBranchyNet",
        "init_args": {
            "net": {
                "class_path": "networks.ResNetWithExits",
                "init_args": {"trunk": SMALL_NET, "exits_after": [0, 2]},
            }
        },
    },
    "with_exits": {
        "class_path": "lightning_modules.LitBranchyNet",
        "init_args": {
            "net": {
                "class_path": "networks.WithExits",
                "init_args": {
                    "network": {
                        "class_path": "timm.create_model",
                        "init_args": {"model_name": "test_efficientnet"},
                        # a dropout that its own forward calls as a function
                        "dict_kwargs": {"num_classes": 10, "in_chans": 1, "drop_rate": 0.2},
                    },
                    "after": ["blocks.1.0", "blocks.2"],
                },
            }
        },
    },
    "slimmable": {
        "class_path": "lightning_modules.LitSlimmable",
        "init_args": {
            "net": {
                "class_path": "networks.SlimmableCifarResNet",
                "init_args": {"depth": 8, "in_channels": 1, "width_mults": [0.25, 1.0]},
            }
        },
    },
    "densenet": {
        "class_path": "lightning_modules.LitDenseNet",
        "init_args": {
            "net": {
                "class_path": "networks.CifarDenseNet",
                "init_args": {
                    "depth": 13,
                    "growth_rate": 6,
                    "drop_rate": 0.2,
                    "memory_efficient": True,
                    "in_channels": 1,
                },
            }
        },
    },
    "msdnet": {
        "class_path": "lightning_modules.LitMSDNet",
        "init_args": {
            "net": {
                "class_path": "networks.MSDNet",
                "init_args": {
                    "num_blocks": 3,
                    "base": 1,
                    "step": 1,
                    "num_channels": 4,
                    "growth_rate": 4,
                    "growth_factors": [1, 2],
                    "bottleneck_factors": [1, 2],
                    "in_channels": 1,
                    "lazy": True,
                },
            }
        },
    },
    "universally_slimmable": {
        "class_path": "lightning_modules.LitUniversallySlimmable",
        "init_args": {
            "net": {
                "class_path": "networks.SlimmableCifarResNet",
                "init_args": {"depth": 8, "in_channels": 1, "width_mult_range": [0.25, 1.0]},
            },
            "eval_widths": [0.25, 0.6, 1.0],
        },
    },
}


METHODS["branchynet_calibrated"] = {
    "class_path": "lightning_modules.LitBranchyNet",
    "init_args": {
        **METHODS["branchynet"]["init_args"],
        "calibrate_exits": True,
        "max_accuracy_drop": 0.02,
        "halve_validation": True,
    },
}

METHODS["recipe"] = {
    "class_path": "lightning_modules.LitStochasticDepth",
    "init_args": {
        "net": SMALL_NET,
        "recipe": {
            "class_path": "lightning_modules.Recipe",
            "init_args": {
                "label_smoothing": 0.1,
                "mixup_alpha": 0.4,
                "cutmix_alpha": 1.0,
                "mix_prob": 0.8,
            },
        },
    },
}

METHODS["slimmable_exits"] = {
    "class_path": "lightning_modules.LitSlimmableExits",
    "init_args": {
        "net": {
            "class_path": "networks.SlimmableWithExits",
            "init_args": {
                "trunk": METHODS["universally_slimmable"]["init_args"]["net"],
                "exits_after": [0, 2],
            },
        },
        "eval_widths": [0.6],
        "num_widths": 3,
        "final_survival_prob": 0.5,
    },
}

TRAINED = tuple(name for name in METHODS if name != "branchynet_calibrated")
"""The rows that differ in how they train."""
ANSWERING = tuple(name for name in METHODS if name != "recipe")
"""The rows that differ in how they answer."""
WITH_EXITS = ("branchynet", "branchynet_calibrated", "msdnet", "with_exits", "slimmable_exits")
"""The rows whose images may leave early."""

OF_ANY_WIDTH = ("universally_slimmable", "slimmable_exits")
"""The rows whose BNs are recalibrated."""

# Whoever resumes and agrees in the row that they resemble rarely fails in these.
VARIANTS = (
    *("resnet", "stochastic_depth_row", "vision_transformer", "convnext"),
    *("branchynet_calibrated", "with_exits", "slimmable", "slimmable_exits", "densenet"),
    "recipe",
)


def variants_slow(names: Iterable[str], others: Sequence[str] = VARIANTS) -> list[Any]:
    """Returns rows for a test that takes long."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if name in others else name for name in names]


EXPENSIVE = variants_slow(METHODS, (*VARIANTS, "msdnet", "universally_slimmable"))


def build(spec: Any) -> Any:
    """Returns the object that a class or function and its arguments stand for, or a plain value."""
    if not isinstance(spec, dict):
        return spec
    room, name = spec["class_path"].rsplit(".", 1)
    arguments = {**spec["init_args"], **spec.get("dict_kwargs", {})}
    arguments = {key: build(value) for key, value in arguments.items()}
    return getattr(importlib.import_module(room), name)(**arguments)


def config(method: str) -> dict[str, Any]:
    """Returns a whole experiment: the method on a few batches of the digits."""
    model = deepcopy(METHODS[method])
    model["init_args"]["optimizer"] = {
        "class_path": "torch.optim.SGD",
        "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
    }
    model["init_args"]["lr_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.MultiStepLR",
        "init_args": {"milestones": [1, 2]},
    }
    callbacks = ["GradientMagnitudeLogger", "ThroughputMonitor"]
    if "StochasticDepth" in model["class_path"] or method == "slimmable_exits":
        callbacks.append("SurvivalProbabilityLogger")
    if method in WITH_EXITS:
        callbacks.append("ExitStatistics")
    if method in OF_ANY_WIDTH:
        callbacks.append("BNRecalibration")
    return {
        "seed_everything": 7,
        "model": model,
        "data": {"class_path": "datamodules.DigitsDataModule", "init_args": {"batch_size": 64}},
        "checkpoint": {"select": "best", "every_n_steps": 3},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "limit_train_batches": 7,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": f"callbacks.{name}", "init_args": CALLBACK_ARGUMENTS.get(name, {})}
                for name in callbacks
            ],
        },
    }
