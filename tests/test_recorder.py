"""The recorder notices values that leave torch, and keeps fast paths out of a pass."""

import pytest
import torch
from torch import nn

from vitx.tape.recorder import FunctionMode, Recorder
from vitx.tape.tape import Tape

LEAVES = {
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "array": lambda x: __import__("numpy").asarray(x),
    "dlpack": lambda x: torch.utils.dlpack.from_dlpack(x.__dlpack__()),
    "storage": lambda x: x.untyped_storage(),
    "pointer": lambda x: x.data_ptr(),
}


@pytest.mark.parametrize("way", LEAVES)
def test_what_leaves_torch_is_seen(way):
    tensor, other = torch.randn(3), torch.zeros(2)
    with FunctionMode(lambda given: "live" if given is tensor else None) as mode:
        tensor * 2
        LEAVES[way](other)
        assert not mode.exported
        LEAVES[way](tensor)
        assert mode.exported


def test_the_fast_path_of_multi_head_attention_is_kept_out():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    tape = Tape(layer)
    recorder, tokens = Recorder(tape), torch.randn(1, 5, 8)
    with torch.no_grad(), recorder.recording():
        recorder.begin(tokens)
        layer(tokens)
    assert len(tape.attentions) == 1
    assert not any("transformer_encoder" in step.name for step in tape.steps)
