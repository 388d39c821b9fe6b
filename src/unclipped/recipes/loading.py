"""From a recipe's name to a plain dictionary: files, built-in recipes, `extends`, and `key.path=value` overrides."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

from unclipped.core.config import merge
from unclipped.core.documents import MAX_DEPTH, MAX_YAML_BYTES, decoded, parse_yaml, read_bytes
from unclipped.core.errors import UsageError, nearest


def builtin_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("unclipped.recipes") / "builtin"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name: str, *, relative_to: Path | None = None, _seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe as a dictionary, its `extends` chain merged in (the extending recipe wins, lists are replaced).

    `name` is a YAML file, looked up beside the extending file first, or a built-in name.
    Raises UsageError for an unknown name, a file that is not a YAML mapping, or a circular chain.
    """
    text, where, folder = _find(name, relative_to)
    if where in _seen:
        raise UsageError(f"recipe {where}: 'extends' runs in a circle ({' -> '.join([*_seen, where])})")
    recipe = parse_yaml(text, f"recipe {where}", error=UsageError)
    if not isinstance(recipe, dict):
        raise UsageError(f"recipe {where}: expected a mapping of fields, found {type(recipe).__name__}")
    parent = recipe.pop("extends", None)
    if parent is None:
        return recipe
    if not isinstance(parent, str):
        raise UsageError(f"recipe {where}: 'extends' takes one recipe name, found {parent!r}")
    return merge(read_recipe(parent, relative_to=folder, _seen=(*_seen, where)), recipe)


def _find(name: str, relative_to: Path | None) -> tuple[str, str, Path | None]:
    """Text, printable origin and folder of a recipe."""
    candidates = [Path(name)] if relative_to is None else [relative_to / name, Path(name)]
    for path in candidates:
        if path.is_file():
            content = read_bytes(path, UsageError, limit=MAX_YAML_BYTES)
            return decoded(content, f"recipe {path}", UsageError), str(path), path.parent
    if name in builtin_names():
        file = resources.files("unclipped.recipes") / "builtin" / f"{name}.yaml"
        return file.read_text(encoding="utf-8"), name, None
    if Path(name).is_dir():
        raise UsageError(f"recipe {name}: is a folder; give a .yaml file or one of {', '.join(builtin_names())}")
    if name.endswith((".yaml", ".yml")) or "/" in name:
        raise UsageError(f"recipe {name}: no such file")
    raise UsageError(f"unknown recipe '{name}'; {nearest(name, builtin_names())}; or give a .yaml file")


def apply_overrides(recipe: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The recipe with each `key.path=value` set; values are read as YAML.

    A step into a list is an index or the `name` of one of its entries (`stages.align.steps=200`).
    Raises UsageError for text without `=`, and for a path that runs through something that has no fields.
    """
    changed = copy.deepcopy(recipe)
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not path.strip():
            raise UsageError(f"override '{override}': expected key.path=value, for example training.seed=1")
        try:
            value = parse_yaml(text, f"override '{override:.200}'", error=UsageError) if text else None
        except UsageError as error:
            raise UsageError(f"{error}; quote a text that is no YAML, as in key.path='\"text\"'") from None
        keys = path.strip().split(".")
        if len(keys) > MAX_DEPTH:
            raise UsageError(
                f"override '{override:.80}…': {len(keys):,} fields in each other; the limit is {MAX_DEPTH}"
            )
        _set(changed, keys, value, override)
    return changed


def _set(node: Any, keys: list[str], value: Any, override: str) -> None:
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        names = {str(item.get("name")): i for i, item in enumerate(node) if isinstance(item, dict) and "name" in item}
        index = int(key) if key.isdecimal() else names.get(key, -1)
        if not 0 <= index < len(node):
            valid = nearest(key, names) if names else f"valid: 0 to {len(node) - 1}"
            raise UsageError(f"override '{override}': no list entry '{key}'; {valid}")
        if rest:
            _set(node[index], rest, value, override)
        else:
            node[index] = value
        return
    if not isinstance(node, dict):
        raise UsageError(f"override '{override}': '{key}' lies inside a plain value, which has no fields")
    if not rest:
        node[key] = value
        return
    if node.get(key) is None:
        node[key] = {}
    _set(node[key], rest, value, override)
