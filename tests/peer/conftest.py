"""The markers of transformers' own test suites, so that `--strict-markers` knows them."""

from __future__ import annotations

import pytest

MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "is_expert_parallel_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' own suites")
