"""What a run folder keeps of how it was made: the resolved recipe and the environment."""

from __future__ import annotations

from pathlib import Path

from unclipped.core.config import FrozenConfig
from unclipped.core.errors import UsageError
from unclipped.core.files import write_json, write_text
from unclipped.recipes.validation import to_yaml


def record_run(config: FrozenConfig, output: Path, *, resume: bool) -> None:
    """Write `recipe.yaml` (reading it again gives the same run) and `environment.json` into the run folder.

    Raises UsageError when `resume` meets a folder whose recipe is another one: going on would mix two runs.
    """
    from unclipped.studies.environment import environment

    text = to_yaml(config)
    path = output / "recipe.yaml"
    if resume and path.exists() and path.read_text(encoding="utf-8") != text:
        raise UsageError(
            f"--resume: {path} differs from the recipe given; resume with "
            f"the same recipe ('{path}' itself works), or choose another --output"
        )
    write_text(path, text)
    write_json(output / "environment.json", environment())
