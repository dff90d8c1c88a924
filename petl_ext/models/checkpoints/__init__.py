"""Checkpoints of the original authors: the one place that knows their names.

Sources: the authors' ViLT and METER code bases, those of APT and DAS, which add layers to both, and that of DVP. All
save Lightning checkpoints, whose weights are under "state_dict". The tables in vilt.py, meter.py and dvp.py give each
key of such a file its name here.
"""

from petl_ext.models.checkpoints.dvp import load_dvp_checkpoint
from petl_ext.models.checkpoints.meter import load_meter_checkpoint
from petl_ext.models.checkpoints.report import CheckpointReport, KeyOutcome
from petl_ext.models.checkpoints.vilt import load_vilt_checkpoint

__all__ = ["CheckpointReport", "KeyOutcome", "load_dvp_checkpoint", "load_meter_checkpoint", "load_vilt_checkpoint"]
