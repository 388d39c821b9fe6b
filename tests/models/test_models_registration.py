"""`import unclipped` in a new process: light, without effect outside; `register()` makes the Auto classes know us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LOAD = """
import sys
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert type(model).__name__ == "UnclippedForConditionalGeneration", type(model)
assert type(processor).__name__ == "UnclippedProcessor", type(processor)
assert type(processor.image_processor).__name__ == "UnclippedImageProcessor"
print("loaded")
"""
AUTO = "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
ORDERS = {
    "Auto classes first": AUTO + "import unclipped\nunclipped.register()\nunclipped.register()\n",
    "registered first": "import unclipped\nunclipped.register()\n" + AUTO,
    "one of our classes": "from unclipped import UnclippedModel\n" + AUTO,
    "our modules first": "import unclipped.models.modeling, unclipped\n" + AUTO + "unclipped.register()\n",
}


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "PIL", "pydantic")
    out = run(f"import sys, unclipped; print([name for name in {heavy} if name in sys.modules], unclipped.__version__)")
    assert out.split() == ["[]", "0.1.0"]


def test_recipe_sections_load_no_torch() -> None:
    code = "import sys, unclipped.models.config, unclipped.models.chat; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


@pytest.mark.parametrize("order", list(ORDERS.values()), ids=list(ORDERS))
def test_auto_classes(assembled: Any, order: str) -> None:
    assert run(order + LOAD, assembled.folder / "model").strip() == "loaded"


def test_importing_changes_nothing_outside() -> None:
    code = """
import sys, transformers
from transformers import CONFIG_MAPPING
finders, hooks = list(sys.meta_path), list(sys.path_hooks)
import unclipped
assert (sys.meta_path, sys.path_hooks) == (finders, hooks)
print("unclipped" in CONFIG_MAPPING)
"""
    assert run(code).strip() == "False"


def test_pipeline_from_a_folder(assembled: Any, tmp_path: Path) -> None:
    from support.tiny_models import tiny_image

    tiny_image(20, 40).save(tmp_path / "picture.png")
    code = """
import sys, unclipped
from transformers import pipeline
unclipped.register()
pipe = pipeline("image-text-to-text", model=sys.argv[1])
content = [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "what is this"}]
one, two = pipe(
    text=[[{"role": "user", "content": content}], [{"role": "user", "content": content + content[1:]}]],
    max_new_tokens=4, generate_kwargs={"do_sample": False, "min_new_tokens": 4}, return_full_text=False, batch_size=2,
)
print(repr(one[0]["generated_text"] if isinstance(one, list) else one["generated_text"]))
"""
    assert run(code, assembled.folder / "model", tmp_path / "picture.png").strip()


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "AutoProcessor", "AutoConfig"])
@pytest.mark.parametrize("trust", [None, True], ids=["default", "trust_remote_code"])
def test_without_the_package_every_auto_class_ends_in_an_error_that_names_it(
    assembled: Any, name: str, trust: bool | None
) -> None:
    """`AutoProcessor` would else give the tokenizer alone, and prompts without their images."""
    code = f"""
import sys
from transformers import {name}
try:
    found = {name}.from_pretrained(sys.argv[1], trust_remote_code={trust})
except (ValueError, OSError) as error:
    assert "unclipped" in str(error), error
    print("refused")
else:
    print(type(found).__name__)
"""
    assert run(code, assembled.folder / "model").endswith("refused\n")  # after transformers' question
