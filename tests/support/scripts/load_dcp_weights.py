"""Load the model's weights of an exported DCP folder with torch alone, whatever the model is; print their digest.

load_dcp_weights.py FOLDER
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from plain_net import digest

metadata = dcp.FileSystemReader(sys.argv[1]).read_metadata().state_dict_metadata
state = {
    name: torch.empty(entry.size, dtype=entry.properties.dtype)
    for name, entry in metadata.items()
    if name.startswith("model.")
}
dcp.load(state, checkpoint_id=sys.argv[1])
assert not [name for name in sys.modules if name.partition(".")[0] in ("outlast", "safetensors")]
print(json.dumps({"weights": digest({name.removeprefix("model."): tensor for name, tensor in state.items()})}))
