"""The average of a model's weights: arithmetic, shadow, teacher, and files."""

from __future__ import annotations

from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.names import canonical_name, unwrap
from hf_ema_scaling.ema.sharding import gathered
from hf_ema_scaling.ema.storage import AverageStateError, load_average, save_average
from hf_ema_scaling.ema.teacher import DeadTeacherError, EMATeacher, check_liveness, check_moved

__all__ = [
    "AverageStateError",
    "DeadTeacherError",
    "EMATeacher",
    "WeightAverage",
    "canonical_name",
    "check_liveness",
    "check_moved",
    "gathered",
    "load_average",
    "save_average",
    "unwrap",
]
