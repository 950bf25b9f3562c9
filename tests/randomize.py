"""Networks whose BNs and biases are no longer as they were made, so that each of them counts."""

from torch import nn


def randomize(network: nn.Module) -> nn.Module:
    """Draws the numbers of each BN and the biases, and returns the network in training mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return network.train()
