"""What to train on: the `data` section of a recipe, read, checked, encoded and packed.

prepared = prepare(Data.of("conversations.jsonl"), tokenizer, seed=0)
Trainer(model, train_dataset=prepared.train, data_collator=prepared.collate, ...)
"""

from veneer.train.data.packing import check_packing
from veneer.train.data.prepare import Prepared, prepare, recognize
from veneer.train.data.report import Report
from veneer.train.data.schema import Data

__all__ = ["Data", "Prepared", "Report", "check_packing", "prepare", "recognize"]
