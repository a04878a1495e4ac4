"""Parameters that no rule can merge are found before any data are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn

from com_lightning import Average, ChainOfMergesCallback, MergeError
from tests.helpers import Classifier, make_experts


def test_files_in_float8(tmp_path: Any) -> None:
    state = {name: tensor.clone() for name, tensor in make_experts()[0].state_dict().items()}
    state["body.0.weight"] = state["body.0.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "a.safetensors")
    merger = ChainOfMergesCallback({"a": tmp_path / "a.safetensors", "b": Classifier(3)}, Average())
    with pytest.raises(MergeError, match=r"expert 'a': body.0.weight is float8_e4m3fn, .* convert it to bfloat16"):
        merger.merge(Classifier(3))


class Spectral(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.filter = nn.Linear(3, 3), nn.Parameter(torch.ones(3, dtype=torch.complex64))


def test_complex_parameters_are_private_or_an_error() -> None:
    experts = {"a": Spectral(), "b": Spectral()}
    with pytest.raises(MergeError, match=r"filter is complex64, .* name it in `private`"):
        ChainOfMergesCallback(experts, Average()).merge(Spectral())
    merger = ChainOfMergesCallback(experts, Average(), private=["filter"])
    merger.merge(Spectral())
    assert str(merger.report.parameters["filter"]) == "private"


class Packed(nn.Parameter):
    """As libraries of quantisation have them: packed values, and what they mean beside them."""

    quant_state = "nf4"


def test_quantised_parameters() -> None:
    model = Classifier(3)
    layer = model.get_submodule("body.0")
    layer.register_parameter("weight", Packed(model.state_dict()["body.0.weight"]))
    with pytest.raises(MergeError, match=r"the model: body.0.weight is quantised .*without quantisation"):
        ChainOfMergesCallback({"a": Classifier(3), "b": Classifier(3)}, Average()).merge(model)
