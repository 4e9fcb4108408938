"""One YAML is one run: the schema, and how a file and ``key=value`` overrides become it.

::

    RUN.yaml + ["staleness.budget=4", ...]  ->  load()  ->  RunConfig (frozen dataclasses)

Every process reads the same file and takes its own section and the shared ones. Unknown keys and
sections are errors that suggest the near name; values are validated here, once, so the code
behind sees only what can be run. There is no interpolation and no default outside the schema.
"""

from common.config.deciding import BrokerSection, ObrsSection, StalenessSection
from common.config.processes import (
    ActorSection,
    EngineSection,
    LearnerSection,
    OptimSection,
    ReplicaSection,
    WeightsSection,
)
from common.config.reading import defaults, load, merge, read_overrides, read_yaml, to_yaml
from common.config.run import RANGES, RunConfig, RunSection
from common.config.sampling import MAX_HELD_OUT, EvaluationSection, ModelSection, RolloutSection, TaskEntry, TaskSection
from common.config.units import MEGABYTE
from common.joint import JointSection, WarmstartSection
from common.objective import AdvantageSection

__all__ = [
    "MAX_HELD_OUT",
    "MEGABYTE",
    "RANGES",
    "ActorSection",
    "AdvantageSection",
    "BrokerSection",
    "EngineSection",
    "EvaluationSection",
    "JointSection",
    "LearnerSection",
    "ModelSection",
    "ObrsSection",
    "OptimSection",
    "ReplicaSection",
    "RolloutSection",
    "RunConfig",
    "RunSection",
    "StalenessSection",
    "TaskEntry",
    "TaskSection",
    "WarmstartSection",
    "WeightsSection",
    "defaults",
    "load",
    "merge",
    "read_overrides",
    "read_yaml",
    "to_yaml",
]
