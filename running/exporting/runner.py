"""Early exit on batches, without the project that trained it: needs onnxruntime and numpy alone.

python run.py IMAGES.npy prints class, probability and exit of each image, uint8 (N, C, H, W); or
from run import EarlyExit; probabilities, exits = EarlyExit()(images)
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


class EarlyExit:
    """Stages and exits; `folder` holds them and `manifest.json`, `options` are onnxruntime's."""

    def __init__(self, folder=Path(__file__).parent, options=None):
        self.manifest = json.loads(Path(folder, "manifest.json").read_text())
        providers = onnxruntime.get_available_providers()

        def load(kind):
            paths = [str(Path(folder, part[kind])) for part in self.manifest["exits"]]
            return [onnxruntime.InferenceSession(path, options, providers) for path in paths]

        self.stages, self.exits = load("stage"), load("exit")

    def __call__(self, images):
        """Returns probabilities (N, classes) and exits (N,), from 1, of uint8 (N, C, H, W)."""
        num_classes = self.exits[0].get_outputs()[0].shape[1]
        answers = np.zeros((len(images), num_classes), np.float32)
        taken = np.zeros(len(images), np.int64)
        rows, state = np.arange(len(images)), [images]  # of the images that are still inside
        for index, part in enumerate(self.manifest["exits"]):
            if len(rows) == 0:
                break
            state = run(self.stages[index], state)
            probabilities, scores = run(self.exits[index], state)
            leaving = np.ones(len(rows), bool)
            if part["threshold"] is not None:  # NaN stays inside
                limit = np.float32(part["threshold"])
                by_entropy = self.manifest["criterion"] == "entropy"
                leaving = scores < limit if by_entropy else scores >= limit
            answers[rows[leaving]], taken[rows[leaving]] = probabilities[leaving], index + 1
            rows, state = rows[~leaving], [values[~leaving] for values in state]
        return answers, taken


def run(session, values):
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, values, strict=True)))


if __name__ == "__main__":
    network = EarlyExit()
    labels = network.manifest["class_names"]
    for answer, exit_taken in zip(*network(np.load(sys.argv[1])), strict=True):
        best = answer.argmax()
        print(labels[best] if labels else best, answer[best], exit_taken)
