"""What a run will cost before it runs, and which method to choose. `veneer.plan(model, method)` plans one."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.plan.plan import Plan


class _Callable(ModuleType):
    def __call__(self, model: Any, method: Any = None, where: str | None = None, **options: Any) -> "Plan":
        """Plan a step; see `veneer.plan.plan.plan`."""
        from veneer.plan.plan import plan

        return plan(model, method, where, **options)


sys.modules[__name__].__class__ = _Callable
