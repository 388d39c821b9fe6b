"""The common suites of transformers for processors and image processors."""

from __future__ import annotations

import unittest
from typing import Any

from support import peer
from support.tiny_models import tiny_tokenizer
from unclipped.models.image_processing import UnclippedImageProcessor
from unclipped.models.processing import UnclippedProcessor

processing = peer.suite("test_processing_common")
images = peer.suite("test_image_processing_common")


UNFIT_PROCESSOR = {
    "test_apply_chat_template_tool_calls_no_content": "the template has no tool turns and refuses them by name",
    "test_if_input_has_mismatching_tokens_and_mm_data": "asks for the wording of transformers' own message",
}


@peer.unfit(UNFIT_PROCESSOR)
class ProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = UnclippedProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return UnclippedImageProcessor(rule="native", patch_size=8, min_tokens=1, max_tokens=16)

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"connector": "mlp(2)"}


class Tester(images.ImageProcessingTester):
    """Options and inputs of the image processor."""

    __test__ = False

    def __init__(self, parent: Any, **options: Any) -> None:
        fields = {"rule": "native", "patch_size": (8, 8), "min_tokens": 1, "max_tokens": 16}
        super().__init__(parent, **(fields | options))

    def _get_image_processing_classes(self) -> dict[str, Any]:
        return {"pil": UnclippedImageProcessor}

    def expected_output_image_shape(self, images: list[Any]) -> tuple[int, ...]:
        processor = UnclippedImageProcessor(**self.prepare_image_processor_dict())
        sizes = [image.size[::-1] if hasattr(image, "getbands") else None for image in images]
        patches = sum(processor.get_number_of_image_patches(*size) for size in sizes if size)
        return patches, 3 * self.patch_size[0] * self.patch_size[1]


PACKED = "patches of all images are packed in two dimensions; the suite expects the batch first, as in Qwen2-VL's tests"
UNFIT = {
    "test_call_numpy": PACKED,
    "test_call_numpy_4_channels": PACKED,
    "test_call_pil": PACKED,
    "test_call_pytorch": PACKED,
    "test_image_processor_to_json_string": "compares a list read from JSON with a tuple",
    "test_new_models_require_torchvision_backend": "asks for torchvision, which the project does without",
    "test_valid_kwargs_set": "asks for another name of the class of options",
}


@peer.unfit(UNFIT)
class ImageProcessorTest(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Tester
