"""All axes in one network: any width, exits between its units, and blocks that gates close.

    x_u = unit_u(x_{u-1}; width, gate_u),    logits_k = W_k[:, :C] mean(x_{u_k}) + b_k,
    C = channels of x_{u_k} at the width

Widths: Yu et al., Slimmable Neural Networks (ICLR 2019, arXiv 1812.08928); Yu and Huang,
    Universally Slimmable Networks (ICCV 2019, arXiv 1903.05134)
Exits: Teerapittayanon et al., BranchyNet (ICPR 2016, arXiv 1709.01686)
Depth: Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382)

At one width, `at(width)` is a network with exits like any other, so early exit, its thresholds, its
stream and its costs serve it; `extract` cuts it out.

Differences from the released code: those of `networks.slimmable`. No paper has an exit of every
width: here it reads out as the trunk does, by global average pooling and one linear layer, of which
a width uses the first inputs.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from reprlib import repr as shown

from torch import Tensor, nn

from networks.choices import check_counts
from networks.early_exit import MultiExitNetwork, Staged, State, run_all_exits
from networks.initialization import draw_weights
from networks.narrow import gather
from networks.slimmable import SlimmableNetwork, extract
from networks.slimmable_base import BlockGates, Slimmable
from networks.slimmable_layers import Narrow, SlimmableLinear, Width, WidthMult
from networks.slimmable_units import (
    extract_head,
    extract_units,
    run_units,
    sizes_of_units,
)


class NarrowWithExits(MultiExitNetwork):
    """An ordinary network with exits: one width of `SlimmableWithExits`.

    Args:
        stages: layers between two exits, shallow to deep.
        exits: from what is there (N, C, H, W) to logits.
        num_classes: number of logits.
    """

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[nn.Module], num_classes: int):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        self.num_classes = num_classes


class AtWidth(MultiExitNetwork):
    """A slimmable network with exits as it is at one width; it has no weights of its own.

    In evaluation and without gradients its stages are those of the narrow network that is kept, see
    `networks.narrow.KeptWidths`.

    Args:
        network: with exits.
        width_mult: one ratio, or one per group.
        gates: see `SlimmableNetwork`.
    """

    def __init__(
        self, network: "SlimmableWithExits", width_mult: WidthMult, gates: BlockGates | None
    ):
        super().__init__()
        self.network, self.width_mult, self.gates = network, width_mult, gates
        self.num_classes = network.num_classes
        self.training = network.training

    @property
    def training(self) -> bool:
        """That of the network: a view that has its own would forget what became of it."""
        return self.network.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode  # where torch, and who watches modules, expect it

    @property
    def num_exits(self) -> int:
        return self.network.num_exits

    # Made anew each time: the weights may have changed, and a copy has to call its own layers.
    @property
    def stages(self) -> Sequence[Callable[[State], State]]:
        return self.network.staged(self.width_mult, self.gates).stages

    @property
    def exits(self) -> Sequence[Callable[[State], Tensor]]:
        return self.network.staged(self.width_mult, self.gates).exits

    def kept(self) -> MultiExitNetwork | None:
        """Returns the narrow network that is kept, if any: another one once the weights change."""
        return self.network.kept(self.width_mult, self.gates)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the logits (N, num_classes) of every exit, shallow to deep."""
        return self.network(images, self.width_mult, self.gates)

    def extract(self, fold_bn: bool = False) -> MultiExitNetwork:
        """Returns the narrow network, see `networks.extract`."""
        return extract(self.network, self.width_mult, fold_bn, self.gates)


class SlimmableWithExits(MultiExitNetwork, Slimmable):
    """A slimmable network with exits: any width, any exit, and gates that close residual blocks.

    Its own stages and exits, as a network with exits has them, are those of the widest width.

    Args:
        trunk: its head is the last exit.
        exits_after: number of units behind the first layer before each early exit, rising; 0 is
            right after the first layer. The units of `SlimmableCifarResNet` are its blocks. Empty:
            there is no early exit.

    Raises:
        ValueError: exits that do not fit the trunk.
    """

    trunk_prefix = "trunk."

    def __init__(self, trunk: SlimmableNetwork, exits_after: Sequence[int] = ()):
        super().__init__()
        if not isinstance(trunk, SlimmableNetwork):
            raise ValueError(
                f"trunk is a {type(trunk).__name__}: give a slimmable network, such as "
                "SlimmableCifarResNet, or use WithExits"
            )
        num_units = len(trunk.units) - 1
        check_counts(0, exits_after=exits_after)
        bounds = [-1, *exits_after, num_units]
        if any(b <= a for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"exits_after is {shown(list(exits_after))}: give rising numbers from 0 to "
                f"{num_units - 1}, units behind the first layer"
            )
        self.trunk = trunk
        self.exits_after = tuple(exits_after)
        self.num_classes, self.in_channels = trunk.num_classes, trunk.in_channels
        self.width_mults, self.width_mult_range = trunk.width_mults, trunk.width_mult_range
        full = Width("full", tuple(trunk.group_channels))
        gates = trunk.split_gates(None)
        _, channels = sizes_of_units(trunk.units, gates, trunk.in_channels, full)
        self.early_exits = nn.ModuleList(
            SlimmableLinear(channels[number], trunk.num_classes) for number in exits_after
        )
        draw_weights(self.early_exits, "fan_out", draw_linear=partial(nn.init.normal_, std=0.01))

    @property
    def num_groups(self) -> int:
        return self.trunk.num_groups

    @property
    def num_blocks(self) -> int:
        return self.trunk.num_blocks

    @property
    def heads(self) -> list[SlimmableLinear]:
        """The linear layers of all exits."""
        return [*self.early_exits, self.trunk.fc]

    @property
    def num_exits(self) -> int:
        return len(self.heads)

    @property
    def stages(self) -> Sequence[Callable[[State], State]]:
        return self.staged(self.widest, None).stages

    @property
    def exits(self) -> Sequence[Callable[[State], Tensor]]:
        return self.staged(self.widest, None).exits

    def width(self, width_mult: WidthMult) -> Width:
        return self.trunk.width(width_mult)

    def in_early_exit(self, key: str) -> bool:
        return key.startswith("early_exits.")

    def at(self, width_mult: WidthMult, gates: BlockGates | None = None) -> AtWidth:
        """Returns this network at a width, a network with exits: for `early_exit` and the like.

        Args:
            width_mult: one ratio, or one per group.
            gates: see `forward`.

        Raises:
            ValueError: see `forward`.
        """
        self.width(width_mult)
        self.trunk.split_gates(gates)
        return AtWidth(self, width_mult, gates)

    def forward(
        self, images: Tensor, width_mult: WidthMult | None = None, gates: BlockGates | None = None
    ) -> list[Tensor]:
        """Returns the logits (N, num_classes) of every exit, shallow to deep.

        Args:
            images: (N, C, H, W).
            width_mult: one ratio, or one per group; None: the widest.
            gates: one per residual block, see `SlimmableNetwork`.

        Raises:
            ValueError: see `SlimmableNetwork`.
        """
        width_mult = self.widest if width_mult is None else width_mult
        return run_all_exits(self.staged(width_mult, gates), images)

    def bounds(self) -> list[tuple[int, int]]:
        """Returns the first unit of each stage, and the one behind its last."""
        ends = [number + 1 for number in self.exits_after]
        return list(itertools.pairwise([0, *ends, len(self.trunk.units)]))

    def staged(self, width_mult: WidthMult, gates: BlockGates | None) -> Staged:
        """Returns the stages and exits of a width."""
        plain = self.kept(width_mult, gates)
        if plain is not None:
            return Staged(plain.stages, plain.exits)
        units, width = list(self.trunk.units), self.width(width_mult)
        by_unit = self.trunk.split_gates(gates)
        sizes, channels = sizes_of_units(units, by_unit, self.in_channels, width)
        for (_, stop), head in zip(self.bounds(), self.heads, strict=True):
            sizes |= head.sizes(channels[stop - 1])
        width = width._replace(narrow=gather(sizes))
        stages = [
            partial(run_units, units[start:stop], by_unit[start:stop], width=width)
            for start, stop in self.bounds()
        ]
        return Staged(stages, [partial(read_out, head, width.narrow) for head in self.heads])

    def cut_out(self, width: Width, gates: BlockGates | None = None) -> NarrowWithExits:
        by_unit, channels = self.trunk.split_gates(gates), self.in_channels
        stages, exits = [], []
        for (start, stop), head in zip(self.bounds(), self.heads, strict=True):
            units = self.trunk.units[start:stop]
            layers, channels = extract_units(units, channels, width, by_unit[start:stop])
            stages.append(nn.Sequential(*layers))
            exits.append(extract_head(head, channels))
        return NarrowWithExits(stages, exits, self.num_classes).eval()


def read_out(head: SlimmableLinear, narrow: Narrow, x: Tensor) -> Tensor:
    """Returns logits (N, num_classes) of features (N, C, H, W)."""
    return head(x.mean((2, 3)), narrow)
