"""Mixup, cutmix and label smoothing are torchvision's and torch's, in the step of every method."""

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import methods
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torchvision.transforms import v2

from chance import key_to_seed
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier, LitResNet, Recipe
from lightning_modules.recipe import Mix, cut, mix_images, mix_labels

BLEND = Recipe(label_smoothing=0.1, mixup_alpha=0.4)
CUT = Recipe(label_smoothing=0.1, cutmix_alpha=1.0)
BOTH = Recipe(mixup_alpha=0.2, cutmix_alpha=1.0, mix_prob=0.8, cutmix_prob=0.3)
SIDE, CLASSES = 32, 10


def by_torchvision(images: Tensor, labels: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Mixes a batch by torchvision's classes, which get our lam and our box."""
    transform = (v2.MixUp if mix.box is None else v2.CutMix)(num_classes=CLASSES)
    params: dict[str, Any] = {"lam": mix.lam}
    if mix.box is not None:
        top, bottom, left, right = mix.box
        params = {"box": (left, top, right, bottom), "lam_adjusted": mix.lam}
    transform.make_params = lambda inputs: dict(params)
    return transform(images, labels)


def draws(recipe: Recipe, count: int) -> Iterator[Mix | None]:
    return (recipe.draw(SIDE, SIDE, 0, step, 0) for step in range(count))


# --- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [BLEND, CUT])
def test_mixing_is_torchvisions_bit_for_bit(recipe: Recipe) -> None:
    chance = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, SIDE, SIDE, generator=chance)
    labels = torch.tensor([3, 3, 1, 0, 9, 4])
    before = images.clone()
    for mix in draws(recipe, 5):
        expected = by_torchvision(images, labels, mix)
        assert torch.equal(mix_images(images, mix), expected[0])
        assert torch.equal(mix_labels(labels, mix, CLASSES), expected[1])
        assert not torch.equal(expected[0], images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_boxes_are_torchvisions(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = size
    transform = v2.CutMix(num_classes=CLASSES)
    for number in range(200):
        lam = number / 199
        row, column = number * 7 % height, number * 13 % width
        drawn = iter([column, row])  # in torchvision's order
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(drawn)]))  # noqa: B023
        monkeypatch.setattr(transform._dist, "sample", lambda shape: torch.tensor(lam).double())  # noqa: B023
        theirs = transform.make_params([torch.zeros(2, 3, height, width)])
        left, top, right, bottom = theirs["box"]
        assert cut(lam, row, column, height, width) == Mix(
            theirs["lam_adjusted"], (top, bottom, left, right)
        )


# --- the draws ------------------------------------------------------------------------------------


def test_draws_are_those_of_the_papers() -> None:
    """Moments of Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))."""
    for alpha in (0.2, 1.0):
        lams = torch.tensor([mix.lam for mix in draws(Recipe(mixup_alpha=alpha), 4000)])
        assert lams.mean() == pytest.approx(0.5, abs=0.03)
        assert lams.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)
    seen = list(draws(BOTH, 4000))
    is_cut = [mix.box is not None for mix in seen if mix is not None]
    assert len(is_cut) / len(seen) == pytest.approx(0.8, abs=0.03)
    assert sum(is_cut) / len(is_cut) == pytest.approx(0.3, abs=0.03)
    rows, columns = zip(*((sum(m.box[:2]), sum(m.box[2:])) for m in draws(CUT, 2000)), strict=True)
    for centres in (rows, columns):
        mean = torch.tensor(centres).double().mean() / 2
        assert mean == pytest.approx(SIDE / 2, abs=1)


def test_draws_are_a_function_of_the_key() -> None:
    assert list(draws(BOTH, 50)) == list(draws(BOTH, 50))
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({BLEND.draw(SIDE, SIDE, *key) for key in keys}) == 4
    # No other purpose has this stream.
    assert key_to_seed("mix", 0, 0, 0) != key_to_seed("widths", 0, 0, 0)


# --- in the step of every method ------------------------------------------------------------------


def module_of(method: str, recipe: Recipe) -> ImageClassifier:
    seed_everything(7, verbose=False)
    spec = copy.deepcopy(methods.METHODS[method])
    spec["init_args"]["recipe"] = recipe
    return methods.build(spec)


def fit(module: ImageClassifier, folder: Path, **arguments: Any) -> Any:
    defaults = {"limit_train_batches": 2, "limit_val_batches": 0}
    trainer = quiet_trainer(folder, **(defaults | arguments))
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=16))
    return trainer


def weights_of(module: ImageClassifier) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.net.parameters()])


RECIPES = {"mixup": BLEND, "cutmix": CUT}
FREQUENT = {
    ("stochastic_depth", "mixup"),
    ("branchynet", "cutmix"),
    ("universally_slimmable", "mixup"),
}
STEPS = itertools.product((name for name in methods.TRAINED if name != "recipe"), RECIPES)


@pytest.mark.parametrize(
    ("method", "kind"),
    [pytest.param(*each, marks=() if each in FREQUENT else pytest.mark.slow) for each in STEPS],
)
def test_step_is_that_of_a_batch_which_torchvision_has_mixed(
    method: str, kind: str, tmp_path: Path
) -> None:
    """All losses of a step, whatever exits and widths it has, see the same images and targets."""
    recipe = RECIPES[kind]
    ours, theirs = module_of(method, recipe), module_of(method, Recipe())
    step = theirs.training_step

    def step_of_mixed(batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        key = (theirs.seed, theirs.global_step, batch_idx)
        images, shares = by_torchvision(*batch, recipe.draw(SIDE, SIDE, *key))
        return step((images, shares * 0.9 + 0.1 / CLASSES), batch_idx)

    theirs.training_step = step_of_mixed
    for module in (ours, theirs):
        fit(module, tmp_path)
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=1e-4, atol=1e-5)
    plain = module_of(method, Recipe())
    fit(plain, tmp_path)
    assert (weights_of(plain) - weights_of(ours)).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["branchynet", "universally_slimmable"])
def test_recorded_steps_are_mixed_alike(method: str, tmp_path: Path) -> None:
    results = []
    for capture in ("none", "graphs"):
        module = module_of(method, CUT)
        module.capture = capture
        fit(module, tmp_path)
        results.append(weights_of(module))
    assert torch.equal(*results)
    assert any(run.chain is not None for run in module._recorded.values())


class Zeros(torch.nn.Module):
    """Answers with the mean of the pixels, for class 3."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(images),), 3), CLASSES) + self.scale


def test_training_accuracy_counts_the_larger_share(tmp_path: Path) -> None:
    module = LitResNet(Zeros(), recipe=Recipe(mixup_alpha=0.4))
    seen = []
    fit_step = module.training_step

    def watched(batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        mix = module.recipe.draw(SIDE, SIDE, 0, module.global_step, batch_idx)
        own, other = batch[1], batch[1].roll(1)
        seen.extend((own if mix.lam > 0.5 else other).tolist())
        seen_lams.append(mix.lam)
        return fit_step(batch, batch_idx)

    seen_lams: list[float] = []
    module.training_step = watched
    means = []
    module.log_now = lambda metrics, step: means.append(metrics)
    fit(module, tmp_path, limit_train_batches=8)
    assert min(seen_lams) < 0.5 < max(seen_lams)
    expected = sum(label == 3 for label in seen) / len(seen)
    assert means[-1]["train/acc"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_loss_of_a_validation_is_plain(tmp_path: Path) -> None:
    module = LitResNet(Zeros(), recipe=BOTH)
    trainer = quiet_trainer(tmp_path)
    (metrics,) = trainer.validate(module, datamodule=DigitsDataModule(), verbose=False)
    share = math.e / (math.e + 9)
    right = metrics["val/acc"]
    expected = -right * math.log(share) - (1 - right) * math.log((1 - share) / 9)
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-5)


def test_shares_of_classes_are_not_rounded_by_mixed_precision() -> None:
    module = LitResNet(Zeros(), recipe=BLEND)
    logits = torch.randn(4, CLASSES).bfloat16()
    shares = mix_labels(torch.tensor([3, 1, 4, 1]), Mix(0.7133, None), CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.label_loss(logits, shares)
    smooth = shares.double() * 0.9 + 0.1 / CLASSES
    expected = -(smooth * logits.double().log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = module.label_loss(logits.double(), shares)
    assert exact.item() == pytest.approx(expected.item(), rel=1e-7)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.0}, r"recipe.label_smoothing is 1.0: give a number in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1: give"),
        ({"label_smoothing": math.nan}, "label_smoothing is nan: give"),
        ({"label_smoothing": None}, "label_smoothing is None: give"),
        ({"mixup_alpha": True}, "mixup_alpha is True: give"),
        ({"mixup_alpha": "0.2"}, "mixup_alpha is '0.2': give"),
        ({"mixup_alpha": 0.0}, r"recipe.mixup_alpha is 0.0: give a number in \(0, inf\)"),
        ({"cutmix_alpha": -1.0}, "cutmix_alpha is -1.0: give a number in"),
        ({"mixup_alpha": math.inf}, "mixup_alpha is inf: give a number in"),
        ({"mixup_alpha": 1.0, "mix_prob": 1.5}, r"mix_prob is 1.5: give a number in \[0, 1\]"),
        ({"cutmix_prob": -0.5}, "cutmix_prob is -0.5: give a number"),
        ({"mix_prob": 0.5}, "mix_prob is given and nothing is mixed: give recipe.mixup_alpha"),
        ({"mixup_alpha": 1.0, "cutmix_prob": 0.2}, "chooses between two: give recipe.mixup_alpha"),
    ],
)
def test_mistake_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_one_image_has_nothing_to_be_mixed_with(tmp_path: Path) -> None:
    module = LitResNet(Zeros(), recipe=BLEND)
    trainer = quiet_trainer(tmp_path, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"this one holds one image: raise batch_size"):
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=1))


def test_one_image_that_is_left_of_an_epoch_stays_as_it_is(tmp_path: Path) -> None:
    """1,257 images are 157 batches of 8, and one image."""
    module = LitResNet(Zeros(), recipe=BLEND)
    label_loss, seen = module.label_loss, []
    module.label_loss = lambda logits, targets: (
        seen.append(targets.shape) or label_loss(logits, targets)
    )
    quiet_trainer(tmp_path, limit_val_batches=0).fit(
        module, datamodule=DigitsDataModule(batch_size=8)
    )
    assert seen == [(8, CLASSES)] * 157 + [(1,)]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe(mixup_alpha=0.2),
            "does not mix as recipe says: begin its",
        ),
        (
            Recipe(label_smoothing=0.1),
            "does not smooth labels as recipe says: take its losses from",
        ),
    ],
)
def test_a_recipe_that_a_method_does_not_follow_is_no_recipe(
    recipe: Recipe, message: str, tmp_path: Path
) -> None:
    class Naive(ImageClassifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    naive = Naive(methods.build(methods.SMALL_NET), recipe=recipe)
    with pytest.raises(ValueError, match=f"Naive {message}"):
        trainer.fit(naive, DigitsDataModule())
