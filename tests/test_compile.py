"""`speed.compile`: the elementwise work of lean layers, compiled, gives the gradients of the plain layers."""

from __future__ import annotations

import shutil

import pytest
import torch

import tiny
from peft_mllm.lean import Levers, install, remove

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler here"),
]


def loss_and_gradient(tuned, batch):
    loss = tuned.answer_losses(batch).mean()
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*tuned.trainable().values()])])


def test_compiled_layers_give_the_gradients_of_the_plain_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    tuned = tiny.stir(tiny.tune("lora"))
    tuned.model.eval()
    batches = [tiny.padded(tuned.family, tiny.samples(tuned.family)[:count]) for count in (3, 2)]
    plain = [loss_and_gradient(tuned, batch) for batch in batches]
    lean = install(tuned.base, tuned.family.anatomy, Levers(compiled=True))
    assert lean.used
    for batch, (loss, gradient) in zip(batches, plain, strict=True):
        found, ours = loss_and_gradient(tuned, batch)
        assert found == pytest.approx(loss, rel=1e-6)
        assert (ours - gradient).norm() <= 1e-5 * gradient.norm()
    assert any(tmp_path.rglob("*.so")), "nothing was compiled"
    remove(tuned.base, tuned.family.anatomy)
    torch.compiler.reset()
