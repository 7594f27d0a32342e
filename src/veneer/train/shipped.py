"""The recipes that come with Veneer."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import RecipeError, closest

FOLDER = Path(__file__).parents[1] / "recipes"


def every() -> dict[str, str]:
    """name -> what it does, which is the comment on its first line."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for path in sorted(FOLDER.glob("*.yaml"))
    }


def named(name: str) -> Path:
    """The file of a shipped recipe; RecipeError with the nearest names where there is none."""
    if name not in every():
        near = closest(name, every()) or f" There are: {', '.join(every())}."
        raise RecipeError(f"'{name}' is no recipe that Veneer brings.{near}")
    return FOLDER / f"{name}.yaml"


def find(text: str) -> Path:
    """The file that a user means: a path, or the name of a shipped recipe."""
    if text in every() and not Path(text).exists():
        return named(text)
    if not Path(text).exists():
        near = closest(text, every())
        raise RecipeError(f"{text} is no file, and no recipe that Veneer brings.{near} See: veneer recipes list")
    return Path(text)
