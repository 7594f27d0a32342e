"""Writes docs/laws.md: the laws, a sentence each, and what is stated to be impossible, from the tests themselves."""

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "laws.md"
ELSEWHERE = {  # laws that need a base or a world of their own
    "a_quantized_base_equals_its_dense_twin": "test_quantized.py",
    "two_processes_do_what_one_does": "test_two_processes.py",
}
HEAD = """# The laws

Every method keeps every law on every family of models: {families}.

`tests/laws.py` has them. The default tests hold each method to each law and to each family; `scripts/matrix` holds all
to all and writes a dated table into `bench/results/`.
"""
IMPOSSIBLE = """## Stated impossibilities

Where a law cannot hold, Veneer says so with an error, and a test sees that it does. Nothing else is left out.
"""
PLACELESS = """## Families without a place

A method whose default finds nothing on a family refuses to stand there.
"""


def sentences() -> dict[str, str]:
    """What each law says, by its name: the first sentence of its docstring."""
    from laws import LAWS

    said = {law.__name__: law.__doc__ for law in LAWS}
    for name, file in ELSEWHERE.items():
        module = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        said[name] = next(
            ast.get_docstring(node)
            for node in module.body
            if isinstance(node, ast.FunctionDef) and node.name == f"test_{name}"
        )
    return {name: " ".join(text.split("\n\n")[0].split()) for name, text in said.items()}


def words(pattern: str) -> str:
    """A pattern over a message as the words it stands for."""
    return re.sub(r"\\(.)", r"\1", pattern).replace(".*", " … ")


def in_words(name: str) -> str:
    """A function's name as words."""
    return name.replace("_", " ")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shipped() -> dict:
    """The subjects whose method Veneer exports, by name; the tests have a few methods of their own."""
    from subjects import SUBJECTS

    return {name: one for name, one in SUBJECTS.items() if type(one.method).__module__.startswith("veneer.")}


def impossibilities() -> list[tuple[str, str, str, str]]:
    """A row (method, law, families, what Veneer says) for each group of families with one reason."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, subject in shipped().items():
        for law in subject.impossible:
            for family in subject.families:
                stated = subject.stated(law, family)
                if stated is not None:
                    said = f"`{stated[0].__name__}`: … {words(stated[1])} …"
                    rows.setdefault((name, law, said), []).append(family)
    return [
        (name, in_words(law), "all" if tuple(on) == shipped()[name].families else ", ".join(on), said)
        for (name, law, said), on in rows.items()
    ]


def page() -> str:
    """The whole page."""
    from tiny import FAMILIES

    placeless = [(n, ", ".join(f for f in FAMILIES if f not in s.families)) for n, s in shipped().items()]
    parts = [
        HEAD.format(families=", ".join(FAMILIES)),
        table(("law", "what it says"), [(in_words(name), text) for name, text in sentences().items()]) + "\n",
        IMPOSSIBLE,
        table(("method", "law", "on", "what Veneer says"), impossibilities()) + "\n",
        PLACELESS,
        table(("method", "families"), [row for row in placeless if row[1]]) + "\n",
    ]
    return "\n".join(parts)


def main() -> None:
    """Writes the page."""
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
