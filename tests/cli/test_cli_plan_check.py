"""`rankworks plan` and `rankworks check`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from workshop import Workshop, rankworks

from rankworks.core.registry import methods, unregister

WRONG = "def dense(self, weight): return 1.1 * super().dense(weight)"
BROKEN = '''
from rankworks.core.fields import Rank
from rankworks.core.forms.lowrank import LowRank
from rankworks.core.registry import delta


@delta("{key}", title="Mine", year=2026, paper="none")
class Mine(LowRank):
    """A method of one's own."""

    rank: int = Rank(4)
    {body}
'''


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    """Forget the methods that a test registered."""
    before = {(m.axis, m.key) for m in methods()}
    yield
    for axis, key in {(m.axis, m.key) for m in methods()} - before:
        unregister(axis, key)


def test_plan_counts_a_folder_s_model(workshop: Workshop) -> None:
    said = rankworks("plan", "--model", workshop.model, "--rank", "4", "--sequence", "32", "--json")
    told = said.json
    assert told["trainable_parameters"] == 4 * (7 * 2 * 2 * 32 - 2 * 2 * 16 + 2 * 3 * 32)
    assert told["adapter_bytes"] == 4 * told["trainable_parameters"]
    assert f"{told['trainable_parameters']:,} parameters" in said.err


def test_plan_takes_settings_and_targets(workshop: Workshop) -> None:
    words = ("plan", "--model", workshop.model, "--delta", "dora", "--targets", "q_proj,v_proj", "--sequence", "32")
    told = rankworks(*words, "rank=2", "init=pissa", "--json").json
    assert (told["delta"], told["init"], told["sites"]) == ("dora", "pissa", 4)
    assert told["settings"]["inner"]["rank"] == 2


def test_plan_counts_a_whole_model_and_takes_the_optimizer_s_settings(workshop: Workshop) -> None:
    words = ("plan", "--model", workshop.model, "--delta", "none", "--sequence", "32", "--optimizer", "galore")
    plain, said = rankworks(*words, "--json"), rankworks(*words, "optim.rank=2", "--layerwise", "--json")
    assert said.json["trainable_parameters"] == said.json["base_parameters"]
    assert said.json["optimizer_bytes"] < plain.json["optimizer_bytes"]
    assert said.json["gradient_bytes"] < plain.json["gradient_bytes"]
    assert "every weight" in said.err
    assert "one at a time" in said.err
    assert "adapter" not in said.err


def test_plan_says_whether_it_fits(workshop: Workshop) -> None:
    said = rankworks("plan", "--model", workshop.model, "--sequence", "16", "--fits", "2MB", "--json")
    fit = said.json["fit"]
    assert fit["memory_bytes"] == 2_000_000
    assert fit["fits"] == (fit["largest_batch"] >= 1)
    assert "largest batch" in said.err


def test_plan_all_compares_every_delta(workshop: Workshop) -> None:
    said = rankworks("plan", "--model", workshop.model, "--all", "--rank", "2", "--sequence", "16", "--json")
    told = said.json
    assert {p["delta"] for p in told["plans"]} | set(told["skipped"]) == {m.key for m in methods("delta")}
    for p in told["plans"]:
        assert f"{p['trainable_parameters']:,}" in said.err


def test_plan_lists_its_shapes() -> None:
    listed = rankworks("plan", "--shapes", "--json").json
    assert {"llama-2-7b", "smollm2-135m"} <= set(listed)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ((), "--model"),
        (("--model", "lama-2-7b"), "'llama-2-7b'"),
        (("--model", "smollm2-135m", "--delta", "lroa"), "'lora'"),
        (("--model", "smollm2-135m", "rnak=3"), "'rank'"),
        (("--model", "smollm2-135m", "--fits", "lots"), "24GB"),
        (("--model", "smollm2-135m", "--targets", "q_porj"), "q_proj"),
        (("--model", "smollm2-135m", "--budget", "1000"), "--all"),
        (("--model", "smollm2-135m", "rank"), "key=value"),
    ],
)
def test_plan_refuses_with_a_remedy(words: tuple[str, ...], hint: str) -> None:
    said = rankworks("plan", *words)
    assert said.status == 2
    assert hint in said.err


def test_check_passes_a_good_method_and_says_so() -> None:
    said = rankworks("check", "gaussian", "--json")
    told = said.json
    assert (said.status, told["ok"], told["key"], told["axis"]) == (0, True, "gaussian", "init")
    assert {row["verdict"] for row in told["rows"]} <= {"pass", "not applicable"}
    assert "No check fails" in said.err


def test_check_fails_a_broken_method_of_one_s_own(workshop: Workshop) -> None:
    file = workshop.write(BROKEN.format(key="cli-broken", body=WRONG), "broken.py")
    said = rankworks("check", "--from", f"{file}:Mine", "--json")
    assert said.status == 1
    failed = {row["check"] for row in said.json["rows"] if row["verdict"] == "fail"}
    assert any("merge" in name for name in failed)
    assert "checks fail" in said.err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ((), "rankworks check lora"),
        (("lroa",), "'lora'"),
        (("--from", "nowhere.py"), "does not exist"),
        (("--from", "no.such.module"), "could not be imported"),
    ],
)
def test_check_refuses_with_a_remedy(words: tuple[str, ...], hint: str) -> None:
    said = rankworks("check", *words)
    assert said.status == 2
    assert hint in said.err


def test_check_refuses_a_key_that_the_file_does_not_register(workshop: Workshop) -> None:
    file = workshop.write(BROKEN.format(key="cli-other", body=WRONG), "other_method.py")
    said = rankworks("check", "lora", "--from", file)
    assert said.status == 2
    assert "'cli-other'" in said.err
