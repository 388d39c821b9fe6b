"""Text files as samples: each document of .txt, .txt.gz or JSONL files is one sample, modelled whole.

Options of the source: those of `TextConfig` other than its paths (`field`, `exclude`, `document_characters`).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from unclipped.core.errors import UsageError
from unclipped.data.config import SourceConfig
from unclipped.data.sample import Sample
from unclipped.data.text import TextConfig, iterate_documents


class TextSource:
    """Documents held in memory; meant for the few megabytes that accompany image data."""

    def __init__(self, path: Path, config: SourceConfig) -> None:
        self.name = str(path)
        try:
            text_config = TextConfig(paths=(str(path),), **config.options)
        except (ValidationError, TypeError) as error:
            raise UsageError(f"source {config.source}: options: {str(error).splitlines()[-1].strip()}") from None
        self._documents = list(iterate_documents(text_config))
        self._stem = path.name.split(".")[0]

    @property
    def length(self) -> int:
        return len(self._documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self._documents):
            raise IndexError(f"{self.name}: index {index} out of {len(self._documents)}")
        return Sample.document(f"{self._stem}-{index}", self._documents[index])
