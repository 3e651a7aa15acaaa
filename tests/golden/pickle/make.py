"""Writes the files of this folder with torch.save; src/adapter/pickle/tests.rs knows what they hold.

    python tests/golden/pickle/make.py

Made with torch 2.11. Old-format files name storages by address, so that a second run writes other bytes.
"""

from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent

base = torch.arange(12, dtype=torch.float32) / 8 - 0.5
matrix = base.reshape(3, 4)
everything = {
    "m.lora_up.weight": matrix,
    "m.lora_down.weight": matrix.t(),
    "m.alpha": torch.tensor(4.0),
    "int.alpha": 8,
    "float.alpha": 0.5,
    "alpha": 2,
    "rows": matrix[1:],
    "columns": matrix[:, 1::2],
    "permuted": base.reshape(2, 3, 2).permute(2, 0, 1),
    "expanded": torch.tensor([1.5]).expand(2, 2),
    "tied": matrix,
    "parameter": torch.nn.Parameter(torch.tensor([[1.0, -2.0]])),
    "half": base[:4].half(),
    "bfloat16": base[:4].bfloat16(),
    "double": base[:2].double(),
    "long": torch.tensor([-(2**40), 7]),
    "bool": torch.tensor([True, False, True]),
    "float8": base[:4].to(torch.float8_e4m3fn),
    "empty": torch.zeros(3, 0),
    "ss_network_module": "networks.lora",
    "ss_tag": "é",
    "step": 300,
    "learning_rate": 1e-4,
    "done": True,
    "nothing": None,
    "list": [1, "two", (3.0, 4), 2**70],
    "shape": torch.Size([3, 4]),
    "dtype": torch.float16,
}
ordered = OrderedDict([("a.lora_up.weight", matrix), ("a.alpha", torch.tensor(4.0))])
# Protocol 2 writes bytes as a call of `_codecs.encode`, which is not read.
blob = OrderedDict(ordered, blob=b"bytes")
layer = torch.nn.Linear(2, 1)
with torch.no_grad():
    layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    layer.bias.copy_(torch.tensor([3.0]))

torch.save(everything, HERE / "zip.pt")
torch.save(everything, HERE / "legacy.pt", _use_new_zipfile_serialization=False)
torch.save(blob, HERE / "protocol4.pt", pickle_protocol=4)
torch.save(blob, HERE / "legacy_protocol5.pt", pickle_protocol=5, _use_new_zipfile_serialization=False)
torch.save({"state_dict": ordered, "optimizer": {"exp_avg": base}, "epoch": 3, "ss_tag": "outer"}, HERE / "nested.pt")
# A module's own state dict carries the versions of its layers as an attribute.
torch.save(layer.state_dict(), HERE / "module.pt")
