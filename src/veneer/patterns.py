"""How text names module paths: a glob over whole dotted endings, or `re:` and a regex over the whole path."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from functools import lru_cache

from veneer.errors import PlaceError


@lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    """A test for paths.

    `q_proj` and `*.q_proj` match `model.layers.0.self_attn.q_proj`, by whole components and never by substring; `re:`
    and a regular expression must match the whole path. Raises PlaceError where the expression is malformed.
    """
    if not pattern.startswith("re:"):
        whole = re.compile(rf"(?s:.*\.)?(?:{fnmatch.translate(pattern.replace('[', '[[]'))})")
        return lambda path: whole.match(path) is not None
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise PlaceError(f"'{pattern}' is no regular expression: {error}. Check its brackets and escapes.") from None
    return lambda path: expression.fullmatch(path) is not None
