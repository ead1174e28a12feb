"""How stored images become network inputs: statistics, and the size of a crop."""

import dataclasses

# Statistics of the CIFAR-10 training images on the scale [0, 1].  The paper's code uses them
# for CIFAR-100 and SVHN too.  They depend on the data and are not covered by the guarantee.
MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)
ENLARGED = 1.2  # how much larger than its crop a photograph is


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How stored images become network inputs (paper, appendix on data, and its code).

    mean, std: of each colour on the scale [0, 1].
    crop: 0 if a view is the whole image moved by up to 4 pixels, with mirrored edges; otherwise views are
      squares with sides of that many pixels inside a larger image, whose sides are `enlarged`.
    """

    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    crop: int = 0

    @property
    def enlarged(self) -> int:
        """Side in pixels of an image before a random crop: 268 for 224."""
        return int(self.crop * ENLARGED)


SMALL_IMAGES = Recipe()


def photographs(size: int) -> Recipe:
    """Returns the recipe for views of size x size pixels, with the usual statistics of ImageNet."""
    return Recipe((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size)
