"""Reading a recipe file: strict YAML, overrides, and errors that name place, rule and fix."""

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, Section

Kind = TypeVar("Kind", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers and booleans, no duplicate keys and no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise RecipeError(f"line {mark.line + 1}: YAML aliases are not allowed; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            if key in seen:
                line = key_node.start_mark.line + 1
                raise RecipeError(f"line {line}: key {key!r} is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
# PyYAML's own constructor reads a leading zero as octal, which YAML 1.2 does not.
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(loader.construct_scalar(node)),  # type: ignore[arg-type]
)


def parse_yaml(text: str, origin: str) -> object:
    """Safe YAML 1.2 scalars; raises `RecipeError` naming `origin` and the line."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecipeError as error:
        raise RecipeError(f"{origin}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{where}: not valid YAML ({problem})") from None
    finally:
        loader.dispose()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides; raises `RecipeError`."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(
            f"recipe {path} does not exist; give the path of a YAML file, such as "
            "recipes/quickstart.yaml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections, this is {type(tree).__name__}"
        )
    for override in overrides:
        apply_override(tree, override)
    return recipe_from_tree(tree, str(path))


def recipe_from_tree(tree: object, origin: str) -> Recipe:
    """Validate a plain tree; every problem is named with its place, rule and nearest known key."""
    return section_from_tree(Recipe, tree, origin)


def section_from_tree(kind: type[Kind], tree: object, origin: str) -> Kind:
    """The same for any section of a recipe."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(kind, problem) for problem in error.errors(include_url=False)]
        raise RecipeError(f"{origin}: " + "; ".join(problems)) from None


def apply_override(tree: dict[str, object], override: str) -> None:
    """Put the value of `section.key=value` into a plain tree; raises `RecipeError`."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    node: object = tree
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, override)
    parsed = parse_yaml(value, f"override {override!r}")
    if isinstance(node, list):
        node[_position(node, last, override)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} is not a section")


def _child(node: object, part: str, override: str) -> object:
    if isinstance(node, list):
        return node[_position(node, part, override)]
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise RecipeError(f"override {override!r}: {part!r} is inside a value, not a section")


def _position(node: list[object], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(
            f"override {override!r}: {part!r} must be a position from 0 to {len(node) - 1}"
        )
    return int(part)


def _explain(kind: type[Section], problem: object) -> str:
    assert isinstance(problem, dict)
    location = problem["loc"]
    place = ".".join(str(part) for part in location) or "recipe"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {place!r}; {hint}"
    if problem["type"] == "missing":
        return f"{place} is missing; it has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = "" if isinstance(problem.get("input"), dict) else f" (got {problem.get('input')!r})"
    return f"{place}: {message}{shown}"


def _known_keys(kind: type[Section], location: Sequence[object]) -> list[str]:
    """Keys of the section at `location`, found by walking the JSON schema."""
    schema = kind.model_json_schema()
    node = schema
    for part in location:
        choices = [node, *node.get("anyOf", [])]
        for choice in choices:
            choice = _resolve(schema, choice)
            if isinstance(part, int) and "items" in choice:
                node = choice["items"]
                break
            if part in choice.get("properties", {}):
                node = choice["properties"][part]
                break
    for choice in [node, *node.get("anyOf", [])]:
        keys = _resolve(schema, choice).get("properties")
        if keys:
            return sorted(keys)
    return []


def _resolve(schema: dict[str, dict[str, dict]], node: dict) -> dict:
    reference = node.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else node
