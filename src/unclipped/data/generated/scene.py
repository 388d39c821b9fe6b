"""A scene is the ground truth of a generated image, and the image is painted from the scene and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from unclipped.data.generated.lettering import Lettering, Stamp

Colour = tuple[int, int, int]

PALETTE: dict[str, Colour] = {
    "red": (205, 25, 30),
    "green": (15, 135, 45),
    "blue": (30, 65, 210),
    "orange": (235, 125, 0),
    "purple": (135, 40, 170),
    "black": (20, 20, 20),
    "brown": (115, 70, 30),
    "pink": (235, 80, 160),
    "teal": (0, 140, 145),
}
INK: Colour = (35, 35, 35)  # text and lines whose colour is not asked for
FAINT: Colour = (150, 150, 150)  # rules and grids


@dataclass(slots=True)
class Item:
    """One painted object: its kind, ink box (x0, y0, x1, y1) in px (right and bottom excluded), colour, and facts.

    Without stamps the whole box is filled.
    """

    kind: str
    box: tuple[int, int, int, int]
    rgb: Colour
    stamps: Sequence[Stamp] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "box": list(self.box), "rgb": list(self.rgb), **self.facts}


@dataclass(slots=True)
class Scene:
    """Objects in painting order on a plain background; `noise` is the standard deviation in grey levels (0…255)."""

    height: int
    width: int
    background: Colour
    noise: float = 0.0
    noise_seed: int = 0
    items: list[Item] = field(default_factory=list)

    def write(self, lettering: Lettering, x: int, y: int, rgb: Colour, text: str, **facts: Any) -> Item:
        """Add a string whose ink box has its top left corner at (x, y)."""
        box = (x, y, x + lettering.width, y + lettering.height)
        item = Item("text", box, rgb, lettering.stamps, {"string": text, **facts})
        self.items.append(item)
        return item

    def fill(self, kind: str, box: tuple[int, int, int, int], rgb: Colour, **facts: Any) -> Item:
        """Add a filled rectangle."""
        item = Item(kind, box, rgb, None, facts)
        self.items.append(item)
        return item

    def stamp(self, kind: str, mask: Image.Image, x: int, y: int, rgb: Colour, **facts: Any) -> Item:
        """Add one mask whose ink reaches all its four edges, top left corner at (x, y)."""
        item = Item(kind, (x, y, x + mask.width, y + mask.height), rgb, ((mask, 0, 0),), facts)
        self.items.append(item)
        return item

    def strings(self) -> list[str]:
        """Every string that the image shows."""
        return [item.facts["string"] for item in self.items if "string" in item.facts]

    def paint(self) -> Image.Image:
        """The RGB image, height × width px."""
        image = Image.new("RGB", (self.width, self.height), self.background)
        for item in self.items:
            x0, y0, x1, y1 = item.box
            if item.stamps is None:
                image.paste(item.rgb, (x0, y0, x1, y1))
                continue
            for mask, x, y in item.stamps:
                image.paste(item.rgb, (x0 + x, y0 + y), mask)
        if self.noise > 0:
            image = self._with_noise(image)
        return image

    def _with_noise(self, image: Image.Image) -> Image.Image:
        generator = np.random.Generator(np.random.PCG64(self.noise_seed))
        pixels = np.asarray(image, dtype=np.float32)  # (H, W, 3)
        pixels = pixels + self.noise * generator.standard_normal(pixels.shape, dtype=np.float32)
        return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {
            "height": self.height,
            "width": self.width,
            "background": list(self.background),
            "noise": self.noise,
            "objects": [item.as_dict() for item in self.items],
        }
