"""What a run is: a schema, composed over recipe, data and cluster, and checked where the user types."""

from pipeline.config.composition import AXES, CONF, compose_config, from_mapping, read_config, to_yaml
from pipeline.config.identity import CIRCUMSTANCE, completed, differences, identity
from pipeline.config.rules import checked
from pipeline.config.schema import SCHEMA, Config, ConfigError

__all__ = [
    "AXES", "CIRCUMSTANCE", "CONF", "SCHEMA", "Config", "ConfigError", "checked", "completed", "compose_config",
    "differences", "from_mapping", "identity", "read_config", "to_yaml",
]  # fmt: skip
