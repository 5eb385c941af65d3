"""Datasets: samples to calibrate with and samples held out, streamed from disk in a model's own input format.

A data source is one of

- an `.npz` whose arrays are named like the model's inputs and ready to feed, plus optional `labels`; arrays with the
  prefix `test_` are held out, and without any a seeded tenth is;
- a folder of images, with one sub-folder for each class when labelled;
- a YAML data card that says how such an archive or folder is to be read (`onnxmerge.data.card`);
- `module:function`, a Python function that yields batches;
- `noise`, a stand-in where there are no data (`onnxmerge.data.stand_in`).
"""

from onnxmerge.data.dataset import Batch, Dataset, InputSpec, Split
from onnxmerge.data.options import parse_data_option
from onnxmerge.data.source import load_dataset

__all__ = ["Batch", "Dataset", "InputSpec", "Split", "load_dataset", "parse_data_option"]
