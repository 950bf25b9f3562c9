"""Networks whose BNs and biases are no longer as they were made, so that each of them counts."""

from torch import nn


def randomize(network: nn.Module) -> nn.Module:
    """Draws the numbers of each BN and the biases; returns the network in float64, training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.2)
    return network.double().train()
