"""Writes docs/recipe.schema.json, the JSON Schema of recipes, for editors that check YAML while one types."""

import json
from pathlib import Path

from veneer.train import recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipe.schema.json"

if __name__ == "__main__":
    PAGE.write_text(json.dumps(recipe.schema(), indent=1) + "\n", encoding="utf-8")
