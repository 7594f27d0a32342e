"""Which method does best on one's own task: several of them, each in its own process, on the recipe's rows.

    comparison = compare("recipe.yaml", ["lora", "qlora", "full"], Path("runs/compared"), seeds=3)

`contenders` says who takes part, `cells` what one run measures, `running` runs them all and goes on after an
interruption, `statistics` makes intervals of seeds and examples, `summary` and `report` tell what came of it.
"""

from veneer.compare.running import Budget, Comparison, Search, compare

__all__ = ["Budget", "Comparison", "Search", "compare"]
