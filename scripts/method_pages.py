"""Writes docs/methods/: one page for each public method, and a table of them, from the methods' own docstrings.

A method's docstring is its page. It opens with a summary line and has every section of SECTIONS: the section's name and
a colon alone on a line, then an indented body. A line `name: text` under Defaults describes the option of that name.
"""

import dataclasses
import inspect
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

SECTIONS = ("Formula", "Shapes", "Defaults", "Cost", "Merging", "Errors", "Paper", "Example")
FENCES = {"Formula": "text", "Shapes": "text", "Example": "python"}  # shown as written
FOLDER = Path(__file__).parents[1] / "docs" / "methods"


class DocstringError(Exception):
    """A method's docstring cannot be its page."""


def split(method: type) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the body of each section."""
    docstring = inspect.cleandoc(method.__doc__ or "")
    head, *parts = re.split(rf"^({'|'.join(SECTIONS)}):[ ]*$", docstring, flags=re.MULTILINE)
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    faults = [] if head.strip() else ["no summary line before the first section"]
    for section in SECTIONS:
        if section not in bodies:
            faults.append(f"no section '{section}:' alone on a line")
        elif not bodies[section].strip():
            faults.append(f"section '{section}:' is empty")
        elif re.search(r"^\S", bodies[section], flags=re.MULTILINE):
            faults.append(f"section '{section}:' has a line that is not indented; sections are {', '.join(SECTIONS)}")
    if faults:
        raise DocstringError("\n".join(f"{method.__name__}: {fault}" for fault in faults))
    return head.strip(), {section: inspect.cleandoc(body) for section, body in bodies.items()}


def options(method: type, defaults: str) -> tuple[list[tuple[str, str, str, str]], str]:
    """A row (name, type, default, meaning) for each option, and what else stands under Defaults."""
    fields = [field for field in dataclasses.fields(method) if field.init]
    meanings: dict[str, str] = {}
    prose, current = [], ""
    for line in defaults.splitlines():
        name, colon, text = line.partition(": ")
        if colon and name in {field.name for field in fields}:
            current = name
            meanings[current] = text.strip()
        elif current and line.startswith(" "):
            meanings[current] += " " + line.strip()
        else:
            current = ""
            prose.append(line)
    hints = get_type_hints(method)
    rows = [(f.name, type_name(hints[f.name]), default(f), meanings.get(f.name, "")) for f in fields]
    return rows, "\n".join(prose).strip()


def type_name(hint: object) -> str:
    """The type as one would write it: no module names, and no bounds from Annotated."""
    return hint.__name__ if isinstance(hint, type) else re.sub(r"(?<!')\b(?:[a-z_]+\.)+(?=\w)", "", str(hint))


def default(field: "dataclasses.Field[object]") -> str:
    """The default as it would be typed, or `required`."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(method: type) -> str:
    """The page of one method."""
    head, bodies = split(method)
    rows, prose = options(method, bodies["Defaults"])
    code = [(f"`{name}`", f"`{kind}`", f"`{value}`", meaning) for name, kind, value, meaning in rows]
    bodies["Defaults"] = "\n\n".join(filter(None, [table(("option", "type", "default", "meaning"), code), prose]))
    out = [f"# {method.__name__}", head]
    for section in SECTIONS:
        fence = FENCES.get(section)
        out += [f"## {section}", f"```{fence}\n{bodies[section]}\n```" if fence else bodies[section]]
    return "\n\n".join(out) + "\n"


def index(methods: list[type]) -> str:
    """The table of all methods."""
    rows = [(f"[{m.__name__}]({m.__name__}.md)", " ".join(split(m)[0].split("\n\n")[0].split())) for m in methods]
    return "# Methods\n\n" + table(("method", "what it does"), rows) + "\n"


def public_methods() -> list[type]:
    """The methods that veneer exports."""
    import veneer
    from veneer.delta import Method

    exported = [getattr(veneer, name) for name in veneer.__all__]
    return [x for x in exported if isinstance(x, type) and issubclass(x, Method) and x is not Method]


def write(methods: list[type], folder: Path) -> None:
    """Replaces the folder with the methods' pages; every docstring is checked before anything is written."""
    faults, pages = [], {}
    for method in methods:
        try:
            pages[method.__name__] = page(method)
        except DocstringError as error:
            faults.append(str(error))
    if faults:
        raise DocstringError("\n".join(faults))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in (pages | {"index": index(methods)}).items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def main() -> int:
    """Writes the pages, or says what each incomplete docstring lacks."""
    try:
        write(public_methods(), FOLDER)
    except DocstringError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def on_config(config: Any) -> Any:
    """A MkDocs hook: puts the pages at the end of the navigation."""
    pages = sorted(FOLDER.glob("*.md"), key=lambda path: (path.stem != "index", path.stem))
    config.nav.append({"Methods": [f"methods/{path.name}" for path in pages]})
    return config


if __name__ == "__main__":
    sys.exit(main())
