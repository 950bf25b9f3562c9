"""What a paper reports of an experiment, beside which a result is to be seen."""

from dataclasses import dataclass


@dataclass
class Paper:
    """The numbers of a paper; they decide nothing.

    Args:
        source: where they stand, as in "He et al. 2015, table 6".
        test_acc: accuracies by operating point, from 0 to 1; an error of 8.75% is 0.9125.

    Raises:
        ValueError: a number is no share.
    """

    source: str
    test_acc: dict[str, float]

    def __post_init__(self) -> None:
        for point, accuracy in self.test_acc.items():
            if not 0 <= accuracy <= 1:
                remedy = (
                    f", as in {accuracy / 100:.6g} for {accuracy:g}%" if 1 < accuracy <= 100 else ""
                )
                raise ValueError(
                    f"paper.test_acc.{point} is {accuracy}: give an accuracy from 0 to 1{remedy}"
                )
