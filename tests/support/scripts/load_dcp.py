"""Load an exported DCP folder into a fresh model and optimizer with torch alone; print their digests as JSON.

load_dcp.py FOLDER nested|flat
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch.distributed.checkpoint as dcp
from plain_net import Net, digest, make_optimizer, optimizer_digest
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

folder, form = sys.argv[1:]
options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
model = Net()
optimizer = make_optimizer(model)
state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
dcp.load(state, checkpoint_id=folder)
model.load_state_dict(state["model"])
set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"], options=options)
assert not [name for name in sys.modules if name.partition(".")[0] in ("outlast", "safetensors")]
print(json.dumps({"weights": digest(model.state_dict()), "optimizer": optimizer_digest(optimizer)}))
