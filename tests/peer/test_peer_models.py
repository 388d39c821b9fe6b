"""The common model suite of transformers on assembled models of five towers and five decoders."""

from __future__ import annotations

import os
import unittest
from typing import Any
from unittest.mock import patch

import pytest
import torch

from support import peer
from support.tiny_models import tiny_text_config, tiny_vision_config
from unclipped.encoders.llm_config import LLMVisionConfig
from unclipped.models.configuration import UnclippedConfig
from unclipped.models.modeling import UnclippedForConditionalGeneration, UnclippedModel

common = peer.suite("test_modeling_common")
configuration = peer.suite("test_configuration_common")
training = peer.suite("test_training_mixin")
parallel = peer.suite("test_tensor_parallel_mixin")

every = pytest.mark.skipif(not os.environ.get(peer.EVERY), reason=f"two of the five run unless {peer.EVERY} is set")

# The image token lies above what the training suite writes (1 to 19) and below what shrinking the vocabulary cuts off.
VOCABULARY, IMAGE = 99, 50
ROWS, TEXT_LENGTH, PATCH, SIDE = 3, 7, 8, 16
PATCHES = (SIDE // PATCH) ** 2


class Tester:
    """Configuration and inputs of a tiny assembled model: each row is one image of four tokens, then text."""

    __test__ = False

    def __init__(self, parent: Any, vision: str, decoder: str, tied: bool) -> None:
        self.parent, self.vision, self.decoder, self.tied = parent, vision, decoder, tied
        self.batch_size = ROWS
        self.seq_length = self.encoder_seq_length = TEXT_LENGTH + PATCHES
        self.num_hidden_layers = 2
        self.hidden_size = 32
        self.num_attention_heads = 4
        self.vocab_size = VOCABULARY
        self.is_training = True
        self.causal_lm_class = UnclippedForConditionalGeneration

    def get_config(self) -> UnclippedConfig:
        """The size of the vocabulary is on the outside too, where the training suite reads it."""
        text = tiny_text_config(self.decoder, vocab_size=VOCABULARY, tie_word_embeddings=self.tied)
        if self.vision == "llm":
            decoder = tiny_text_config(self.decoder, vocab_size=VOCABULARY)
            tower: Any = LLMVisionConfig(text_config=decoder, patch_size=PATCH)
        else:
            tower = tiny_vision_config(self.vision, image_size=SIDE, patch_size=PATCH)
        config = UnclippedConfig(
            tower, text, connector_config="mlp", image_token_id=IMAGE, tie_word_embeddings=self.tied
        )
        if self.parent._testMethodName == "test_training_overfit":
            config.vocab_size = VOCABULARY
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[UnclippedConfig, dict[str, Any]]:
        ids = common.ids_tensor([ROWS, self.seq_length], IMAGE - 2) + 2
        ids[:, :PATCHES] = IMAGE
        side = SIDE // PATCH
        inputs = {
            "pixel_values": common.floats_tensor([ROWS * PATCHES, 3 * PATCH * PATCH]),
            "image_grid_thw": torch.tensor([[1, side, side]] * ROWS),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        return self.get_config(), inputs


UNFIT = {
    "test_get_image_features_attentions": (
        "images of different sizes are packed and have no common shape of attention, so it is refused by name"
    ),
}
UNFIT_GEMMA3 = dict.fromkeys(
    [
        "test_model_rope_scaling_frequencies",
        "test_model_rope_scaling_from_config_0_linear",
        "test_model_rope_scaling_from_config_1_dynamic",
        "test_model_rope_scaling_from_config_2_yarn",
    ],
    "Gemma 3 has rotary parameters for each kind of layer, the suite sets one for all; Gemma 4's own tests skip it",
)
UNFIT_SAME_DECODER = {
    "test_internal_model_config_and_subconfig_are_same": (
        "the suite finds a part's configuration by its class; here tower and language model are both Qwen3"
    ),
}


class Suites(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,
    training.TrainingTesterMixin,
    parallel.TensorParallelTesterMixin,
):
    """What is the same for each pair of tower and decoder."""

    vision = decoder = ""
    tied = True
    model_tester: Any = None
    all_model_classes = (UnclippedModel, UnclippedForConditionalGeneration)
    _is_composite = True

    def setUp(self) -> None:
        super().setUp()
        for names, cls in (
            (common.MODEL_MAPPING_NAMES, UnclippedModel),
            (common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, UnclippedForConditionalGeneration),
        ):
            known = patch.dict(names, {"unclipped": cls.__name__})
            known.start()
            self.addCleanup(known.stop)
        self.model_tester = Tester(self, self.vision, self.decoder, self.tied)
        self.config_tester = configuration.ConfigTester(
            self, config_class=UnclippedConfig, has_text_modality=False, common_properties=["image_token_id"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


@peer.unfit(UNFIT, UNFIT_SAME_DECODER)
class LanguageModelTowerTest(Suites, unittest.TestCase):
    vision, decoder = "llm", "qwen3"


@peer.unfit(UNFIT)
class Dinov2LlamaTest(Suites, unittest.TestCase):
    vision, decoder, tied = "dinov2", "llama", False


@every
@peer.unfit(UNFIT, UNFIT_GEMMA3)
class ViTMAEGemma3Test(Suites, unittest.TestCase):
    vision, decoder = "vit_mae", "gemma3_text"


@every
@peer.unfit(UNFIT)
class IJepaMistralTest(Suites, unittest.TestCase):
    vision, decoder, tied = "ijepa", "mistral", False


@every
@peer.unfit(UNFIT)
class ViTSmolLM3Test(Suites, unittest.TestCase):
    vision, decoder = "vit", "smollm3"
