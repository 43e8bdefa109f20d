"""What a run is: a schema, composed over recipe, data and cluster, and checked where the user types."""

from pipeline.config.composition import (
    AXES,
    CONF,
    combinations,
    compose_config,
    from_mapping,
    overridden,
    read_config,
    to_yaml,
)
from pipeline.config.identity import CIRCUMSTANCE, completed, differences, identity
from pipeline.config.rules import checked, nearest, statistics_group
from pipeline.config.schema import KEYS, SCHEMA, Config, ConfigError, by_key

__all__ = [
    "AXES", "CIRCUMSTANCE", "CONF", "KEYS", "SCHEMA", "Config", "ConfigError", "by_key", "checked", "combinations",
    "completed", "compose_config", "differences", "from_mapping", "identity", "nearest", "overridden", "read_config",
    "statistics_group", "to_yaml",
]  # fmt: skip
