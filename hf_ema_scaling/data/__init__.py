"""From data sets to the micro-batches of one optimizer step."""

from hf_ema_scaling.data.collator import CTCCollator, MicroBatch, MicroBatchCollator, TwoSourceDataset
from hf_ema_scaling.data.sampler import Draw, SampledStep, ScheduledBatchSampler
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, DataSource, ReferenceStream

__all__ = [
    "LABELLED",
    "UNLABELLED",
    "CTCCollator",
    "DataSource",
    "Draw",
    "MicroBatch",
    "MicroBatchCollator",
    "ReferenceStream",
    "SampledStep",
    "ScheduledBatchSampler",
    "TwoSourceDataset",
]
