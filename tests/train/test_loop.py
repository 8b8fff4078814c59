"""The loop: what must not change the result, what must stop it, and what it tells."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from training import adapted, make_examples, make_loop, weights

from rankworks.core.errors import ConfigError, DivergedError, TrainingError
from rankworks.train.checkpoint import trained_tensors
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.hooks import Hook
from rankworks.train.loop import Loop
from tiny import tiny_llama


def trained(**settings) -> dict[str, torch.Tensor]:
    loop = make_loop(**settings)
    loop.run()
    return weights(loop.model)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 2, "accumulate": 4},
        {"packing": False},
        {"gradient_checkpointing": True},
        {"loss_chunk_mib": 1},
        {"save_every": None},
    ],
    ids=lambda s: next(iter(s)),
)
def test_these_settings_do_not_change_the_result(settings: dict):
    reference, other = trained(), trained(**settings)
    for name, tensor in reference.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-6, rtol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    first, again, other = trained(), trained(), trained(seed=5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_step_equals_one_written_by_hand():
    model = adapted()
    loop = make_loop(model, steps=1, schedule="constant", warmup=0, clip=None, packing=False, weight_decay=0.1)
    reference = adapted()
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    examples = [make_examples()[i] for i in torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8].tolist()]
    total, count = torch.zeros(()), 0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        total = total + reference(input_ids=ids, labels=labels).loss * example.learned
        count += example.learned
    mean = total / count
    mean.backward()
    optimizer.step()
    loop.run()
    assert loop.history.losses[0] == pytest.approx(mean.item(), rel=1e-5)
    for name, tensor in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], tensor, atol=1e-5, rtol=1e-4)


def test_only_the_adapter_changes_and_the_loss_falls():
    model = adapted()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    loop = make_loop(model, steps=40)
    losses = loop.run().losses
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert not model.training


def test_bf16_and_full_fine_tuning_run():
    loop = make_loop(precision="bf16", steps=3)
    assert all(math.isfinite(loss) for loss in loop.run().losses)
    whole = make_loop(tiny_llama(tie=True), steps=3, lr=1e-3)
    assert all(math.isfinite(loss) for loss in whole.run().losses)


def test_a_classifier_is_trained():
    from rankworks.train.batching.batches import Example
    from tiny import tiny_bert_classifier

    model = tiny_bert_classifier()
    examples = [Example((1, 10 + 20 * (i % 3), 5, *range(30, 30 + i)), label=i % 3) for i in range(12)]
    loop = Loop(model, examples, TrainConfig(steps=30, batch_size=6), OptimConfig(lr=5e-3), progress=False)
    losses = loop.run().losses
    assert losses[-1] < 0.5 * losses[0]


class Recorder(Hook):
    """Writes down when it is called."""

    def __init__(self):
        self.calls: list[tuple[str, int]] = []
        self.norms: list[float] = []

    def on_start(self, moment):
        self.calls.append(("on_start", moment.step))

    def before_forward(self, moment):
        self.calls.append(("before_forward", moment.step))

    def after_backward(self, moment):
        self.calls.append(("after_backward", moment.step))
        grads = [p.grad for p in moment.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def after_step(self, moment):
        self.calls.append(("after_step", moment.step))

    def on_end(self, moment):
        self.calls.append(("on_end", moment.step))


def test_hooks_are_called_in_their_moments_and_see_clipped_gradients():
    hook = Recorder()
    make_loop(hooks=[hook], steps=2, batch_size=4, accumulate=2, clip=0.01).run()
    step = ["before_forward", "before_forward", "after_backward", "after_step"]
    assert hook.calls == [("on_start", 0), *[(n, 1) for n in step], *[(n, 2) for n in step], ("on_end", 2)]
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in hook.norms)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, value: float):
    class Poison(Hook):
        def before_forward(self, moment):
            if moment.step == 4:
                next(p for p in moment.model.parameters() if p.requires_grad).data.fill_(value)

    loop = make_loop(folder=tmp_path, hooks=[Poison()], save_every=2)
    with pytest.raises(DivergedError, match=r"stopped at step 4: the loss became (nan|inf).*step-00000002.*optim\.lr"):
        loop.run()
    fresh = make_loop(folder=tmp_path, hooks=[Poison()], save_every=2)
    assert fresh.restore()
    assert fresh.step == 2
    assert all(torch.isfinite(t).all() for t in trained_tensors(fresh.model).values())


def test_metrics_lines_and_tensorboard(tmp_path: Path):
    loop = make_loop(folder=tmp_path, log_every=2, eval_every=3, tensorboard=True, evaluate=lambda: {"loss": 1.5})
    history = loop.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert lines[1] == {"step": 3, "valid": {"loss": 1.5}}
    assert lines[0]["loss"] == history.losses[1]
    assert set(lines[0]) >= {"lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "elapsed"}
    assert history.tokens_per_second > 0
    assert history.peak_memory_bytes > 10**7
    assert list((tmp_path / "tensorboard").iterdir())


def test_steps_from_epochs():
    assert TrainConfig(epochs=2, batch_size=8).total_steps(24) == 6
    assert TrainConfig(epochs=1, batch_size=8).total_steps(25) == 4
    assert TrainConfig(epochs=0.5, batch_size=4, accumulate=2).total_steps(24) == 2
    assert TrainConfig(batch_size=8).total_steps(3) == 1
    with pytest.raises(ConfigError, match="not both"):
        TrainConfig(steps=1, epochs=1)


def test_nothing_to_train_and_no_labels_are_errors():
    from rankworks.train.batching.batches import Example

    model = tiny_llama().requires_grad_(False)
    with pytest.raises(TrainingError, match=r"nothing to train.*adapt"):
        make_loop(model)
    empty = [Example((3, 4), (-100, -100))]
    loop = Loop(adapted(), empty, TrainConfig(steps=1, batch_size=1), OptimConfig(), progress=False)
    with pytest.raises(TrainingError, match="no token of the batch of step 1 has a label"):
        loop.run()


def test_out_of_memory_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    loop = make_loop()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(loop, "objective", full)
    with pytest.raises(TrainingError, match=r"out of memory at step 1.*train\.batch_size.*accumulate"):
        loop.run()


@pytest.mark.slow
def test_compiling_does_not_change_the_result_and_happens_once_for_all_layers_and_lengths():
    """Packed documents of new lengths come with every step, and three layers share the first two's graphs."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    made: list[int] = []

    class Count(Hook):
        def after_step(self, moment):
            made.append(graphs["unique_graphs"])

    def short(**settings):
        loop = make_loop(adapted(layers=3), steps=4, batch_size=4, hooks=[Count()], **settings)
        loop.run()
        return loop

    reference, compiled = short(), short(compile=True)
    wanted, found = weights(reference.model), weights(compiled.model)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)
    assert made[3] < made[4] == made[7], made  # the plain run makes none, the first compiled step makes them all
    assert not any(m._compiled_call_impl for m in compiled.model.modules()), "the model is as it was"
