"""The average of a model's weights: arithmetic, shadow, teacher, and files."""

from __future__ import annotations

from hf_ema_scaling.ema.accelerate_state import AverageRegistration, register_average
from hf_ema_scaling.ema.agreement import check_agreement
from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.liveness import check_before_labelling, check_liveness, check_moved, check_parity
from hf_ema_scaling.ema.names import canonical_name, unwrap
from hf_ema_scaling.ema.sharding import gathered
from hf_ema_scaling.ema.storage import AverageStateError, load_average, save_average
from hf_ema_scaling.ema.teacher import DeadTeacherError, EMATeacher

__all__ = [
    "AverageRegistration",
    "AverageStateError",
    "DeadTeacherError",
    "EMATeacher",
    "WeightAverage",
    "canonical_name",
    "check_agreement",
    "check_before_labelling",
    "check_liveness",
    "check_moved",
    "check_parity",
    "gathered",
    "load_average",
    "register_average",
    "save_average",
    "unwrap",
]
