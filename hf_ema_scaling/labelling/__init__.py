"""Labels for a whole data set by one averaged model, written once and kept."""

from hf_ema_scaling.labelling.heads import Head
from hf_ema_scaling.labelling.loading import head_of, load_head
from hf_ema_scaling.labelling.run import label_dataset
from hf_ema_scaling.labelling.summary import LabellingSummary

__all__ = ["Head", "LabellingSummary", "head_of", "label_dataset", "load_head"]
