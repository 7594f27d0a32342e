"""AdaLoRA, changes of the whole weight, and LoRA's starts from the weights."""

import veneer
from subjects import Subject

SUBJECTS = {
    "AdaLoRA": Subject(veneer.AdaLoRA(total_steps=100, initial_rank=4, target_rank=2)),
    "MiSS": Subject(veneer.MiSS(rank=5)),
    "MiSS-mini": Subject(veneer.MiSS(rank=8, mini_rank=4)),
    "HiRA": Subject(veneer.HiRA(rank=4)),
    "SHiRA": Subject(veneer.SHiRA(rank=2, seed=0)),
    "LoRA-pissa": Subject(veneer.LoRA(rank=4, init="pissa")),
    "LoRA-olora": Subject(veneer.LoRA(rank=3, init="olora", use_rslora=True)),
    "LoRA-eva": Subject(veneer.LoRA(rank=4, init="eva")),
}
