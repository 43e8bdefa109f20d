"""A trained network as a file for others, and such files read back: never pickled, and compared before they are kept.

`load` gives a network from what `pipeline export --format safetensors` wrote.
"""

from pipeline.export.description import Description, ExportError
from pipeline.export.weights import load

__all__ = ["Description", "ExportError", "load"]
