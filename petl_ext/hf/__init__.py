"""petl_ext inside transformers.Trainer."""

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "transformers"):
        raise
    raise ImportError(f"petl_ext.hf needs {error.name}: pip install {error.name}") from error

from petl_ext.hf.callback import SearchCallback
from petl_ext.hf.epochs import EpochCallback

__all__ = ["EpochCallback", "SearchCallback"]
