"""Image–text pairs: the view of a sample that contrastive and captioning objectives take.

A pair is an ordinary sample (one user turn with one image, one assistant turn whose text is the caption), so the same
files train an encoder and a vision-language model. Text beside the image in the user turn is the instruction and is
not part of the pair.
"""

from __future__ import annotations

from unclipped.core.errors import DataError
from unclipped.data.sample import ImagePart, Sample


def pair_of(sample: Sample) -> tuple[ImagePart, str]:
    """The image and the caption of `sample`, white space around the caption removed.

    Raises DataError naming the sample when it does not hold exactly one image, in a user turn, and exactly one
    assistant turn with text.
    """
    images = [image for turn in sample.turns if turn.role == "user" for image in turn.images]
    if len(images) != 1 or len(sample.images) != 1:
        raise DataError(
            f"sample {sample.id}: an image-text pair needs exactly one image, in a user turn; "
            f"found {len(images)} there and {len(sample.images)} in all"
        )
    captions = [turn.text.strip() for turn in sample.turns if turn.role == "assistant"]
    if len(captions) != 1:
        raise DataError(
            f"sample {sample.id}: an image-text pair needs exactly one assistant turn with text, its caption; "
            f"found {len(captions)}; split conversations into one row a caption"
        )
    if not captions[0]:
        raise DataError(f"sample {sample.id}: the caption is empty; add the text or remove the row")
    return images[0], captions[0]
