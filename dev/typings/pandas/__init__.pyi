# The type checker does not know what the columns of a frame hold, so pandas counts as untyped.
from typing import Any

def __getattr__(name: str) -> Any: ...
