"""Load an exported safetensors folder, in Hugging Face's layout, with safetensors alone; print its digest as JSON.

load_safetensors.py FOLDER
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from plain_net import digest
from safetensors import safe_open

folder = pathlib.Path(sys.argv[1])
index = folder / "model.safetensors.index.json"
if index.exists():
    files = json.loads(index.read_text())["weight_map"]
else:
    with safe_open(folder / "model.safetensors", "pt") as file:
        files = dict.fromkeys(file.keys(), "model.safetensors")
tensors = {}
for name, path in files.items():
    with safe_open(folder / path, "pt") as file:
        tensors[name] = file.get_tensor(name)
assert not [name for name in sys.modules if name.partition(".")[0] == "outlast"]
print(json.dumps({"weights": digest(tensors), "files": sorted(set(files.values()))}))
