"""What the command line shows of a selection: while it searches, when it has chosen, and from the adapter alone."""

from __future__ import annotations

import json
import shlex

import pytest
from workshop import Workshop, rankworks

from rankworks.core.select import in_words
from rankworks.train.searching.relax import ScoreSteps

SEARCH = "search.steps=3"


def test_names_in_few_words() -> None:
    layers = [f"model.layers.{i}" for i in (3, 0, 1, 2, 7, 9, 10)]
    assert in_words(layers) == "model.layers 0-3, 7, 9-10"
    modules = ["h.0.attn.q", "h.1.attn.q", "h.1.mlp", "embed"]
    assert in_words(modules) == "attn.q of h 0-1; mlp of h 1; embed"
    assert in_words([]) == "none"


@pytest.mark.parametrize(
    ("select", "shown"),
    [
        ("{select: layra, first: 1, last: 0}", "model.layers 0"),
        ("{select: flexora, top_k: 2}", "model.layers 0-1"),
        ("{select: diffora, rho: 1.0}", "self_attn.q_proj of model.layers 0-1"),
    ],
)
def test_what_was_chosen_is_shown_at_the_end_and_by_inspect(workshop: Workshop, select: str, shown: str) -> None:
    said = rankworks("train", workshop.yaml, f"adapt.select={select}", SEARCH, "--json")
    assert said.status == 0, said.err
    assert f"chosen {shown}" in " ".join(said.err.split())
    assert said.json["chosen"]
    lines = [line.strip() for line in said.err.split("try next")[1].splitlines() if line.strip()]
    for line in lines:
        done = rankworks(*shlex.split(line)[1:])
        assert done.status == 0, done.err
    seen = rankworks("inspect", workshop.folder / "run")
    assert seen.status == 0
    told = " ".join(seen.out.split())
    assert f"select {select.split(',')[0].split()[-1]} (" in told
    if "layra" not in select:
        assert f"chosen {shown}" in told


def test_a_stopped_search_says_how_to_go_on_and_goes_on(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", workshop.yaml, "adapt.select=flexora", "search.steps=4", "train.save_every=1"]

    def interrupted(self, moment) -> None:
        if moment.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScoreSteps, "after_step", interrupted)
        said = rankworks(*words)
    assert said.status == 130
    assert "The search's checkpoint of step 2 is safe" in " ".join(said.err.split())
    again = rankworks(*words, "--json")
    assert again.status == 0, again.err
    assert "going on with the search after its step 2" in " ".join(again.err.split())
    assert json.loads((workshop.folder / "run" / "search.json").read_text())["steps"] == 4


def test_a_selection_that_must_search_is_refused_where_there_are_no_data(workshop: Workshop) -> None:
    said = rankworks("plan", "--model", workshop.model, "select=flexora")
    assert said.status == 2
    assert "flexora chooses by a search on data" in " ".join(said.err.split())
    assert rankworks("plan", "--model", workshop.model, "select=layra").status == 0
