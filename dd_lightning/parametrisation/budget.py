"""Budget: how many images fit into so many stored numbers."""

from dataclasses import dataclass

from dd_lightning.parametrisation.images import Images
from dd_lightning.parametrisation.labels import Labels
from dd_lightning.system.checks import check_count


@dataclass(frozen=True)
class Budget:
    """What distilled data may cost to keep: pixels, bases, coefficients, learned labels and rates all count.

    Attributes:
        images_per_class: as many numbers as so many images a class with fixed labels take, pixel by pixel, with the
            learning rates.
        numbers: so many.

    Raises:
        ValueError: a number below 1, or both.
    """

    images_per_class: int | None = None
    numbers: int | None = None

    def __post_init__(self) -> None:
        given = {"images_per_class": self.images_per_class, "numbers": self.numbers}
        given = {name: value for name, value in given.items() if value is not None}
        check_count(**given)
        if len(given) == 2:
            raise ValueError("give images_per_class or numbers, not both")

    def __bool__(self) -> bool:
        return self.images_per_class is not None or self.numbers is not None

    def fitting(
        self,
        images: Images,
        labels: Labels,
        shape: tuple[int, int, int],
        classes: int,
        num_classes: int,
        steps: int = 1,
        epochs: int = 1,
    ) -> int:
        """How many images of a class fit into each step.

        Args:
            shape: of an image.
            classes: that have images.
            num_classes: that a label tells apart.
            steps, epochs: which have a learning rate each.

        Raises:
            ValueError: not even one does.
        """
        rates, (channels, height, width) = steps * epochs, shape
        plain = (self.images_per_class or 0) * channels * height * width * classes * steps + rates
        total = plain if self.numbers is None else self.numbers
        if total < classes:
            raise ValueError(f"numbers={total} is less than one number for each of {classes} classes")
        shared, own = images.numbers(shape)
        if shared + rates > total:
            raise ValueError(
                f"what all images share takes {shared:,} numbers and the learning rates {rates}, more than the "
                f"{total:,} of the budget; images.count=K sets how many bases there are"
            )
        each = classes * steps * (own + labels.numbers(num_classes))
        fitting = (total - shared - rates) // each
        if fitting < 1:
            raise ValueError(
                f"one image of each class takes {shared + rates + each:,} numbers, the budget has {total:,}"
            )
        return fitting
