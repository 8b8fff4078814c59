"""The suite can fail: every broken method is caught by the checks of that name, and the good one passes them all."""

from __future__ import annotations

import broken
import broken_optimizers
import broken_schedules
import broken_starts
import pytest

from rankworks.conformance import check_method, checks
from rankworks.core.registry import register, unregister

# What each broken class must be caught by. Others may see it too: one fault often breaks several promises.
DELTAS = {
    broken.WrongDense: [
        "forward_is_the_layer_with_the_change",
        "factors_are_exact",
        "merged_equals_unmerged",
        "reported_export_error_is_true",
        "exported_merged_model_is_the_adapted_one",
        "two_adapters_add_up",
    ],
    broken.TurnedDense: ["dense_has_the_weights_shape"],
    broken.ChangedAtTheStart: ["output_is_unchanged_at_the_start"],
    broken.StateNotSaved: ["saving_and_loading_is_exact", "seed_alone_decides", "adapter_is_on_the_base_it_saw"],
    broken.TrainedButFrozen: ["saving_and_loading_is_exact", "training_resumes_exactly", "branch_is_pure"],
    broken.WrongCount: ["count_is_the_real_count", "state_is_complete_and_no_more"],
    broken.Unseeded: ["seed_alone_decides", "global_random_state_is_untouched", "training_repeats"],
    broken.SeedOfItsOwn: ["seed_alone_decides"],
    broken.BankFromGlobal: ["global_random_state_is_untouched", "seed_alone_decides", "saving_and_loading_is_exact"],
    broken.Counting: ["branch_is_pure"],
    broken.Caching: ["branch_is_pure"],
    broken.MixesRows: ["rows_are_independent", "forward_is_the_layer_with_the_change"],
    broken.WritesItsInput: ["branch_is_pure"],
    broken.OneShapeOnly: ["any_batch_shape_works"],
    broken.WrongFactors: ["factors_are_exact", "exported_lora_is_the_change"],
    broken.IgnoresScale: ["forward_is_the_layer_with_the_change", "merged_equals_unmerged"],
    broken.WritesTheBase: ["detaching_restores", "base_is_never_trained"],
    broken.WritesTheBaseAtSetup: ["base_names_are_kept", "output_is_unchanged_at_the_start"],
    broken.UnfreezesTheBias: ["base_is_never_trained"],
    broken.WidensTheOutput: ["bfloat16_base_works"],
    broken.NoCast: ["bfloat16_base_works"],
    broken.Detached: ["gradients_reach_every_tensor", "gradients_are_derivatives", "autocast_works"],
    broken.WrongBackward: ["gradients_are_derivatives"],
    broken.ForgetsTheBias: ["forward_is_the_layer_with_the_change", "merged_equals_unmerged"],
    broken.RankZeroIsFine: ["rank_zero_is_refused"],
    broken.MendsBadSettings: ["bad_settings_are_refused"],
    broken.DropsUnknownSettings: ["unknown_setting_is_refused"],
    broken.ReadsAnotherNumber: ["spec_round_trips_through_json"],
    broken.TakesAnyTensor: ["loading_is_strict"],
    broken.DenseGrows: ["dense_has_the_weights_shape", "merged_equals_unmerged"],
    broken.DenseWritesTheWeight: ["unmerging_restores"],
    broken.DropsAlways: ["dropout_acts_in_training_only"],
    broken.NeverDrops: ["dropout_acts_in_training_only"],
    broken.DropsWithoutRescaling: ["dropout_acts_in_training_only"],
    broken.PlainAttribute: ["tensors_move_with_the_model"],
    broken.HiddenParameter: ["count_is_the_real_count", "state_is_complete_and_no_more"],
    broken.SharedBetweenAdapters: ["two_adapters_do_not_touch"],
    broken.Closure: ["copy_is_independent"],
    broken.MovingNames: ["state_is_plain", "saving_and_loading_is_exact"],
    broken.TrainsWhatIsStored: ["frozen_tensors_stay", "branch_is_pure"],
    broken.NoisyInTraining: ["branch_is_pure", "training_repeats", "checkpointing_gives_the_same_gradients"],
    broken.BranchesOnData: ["compiles_without_a_break"],
    broken.ClimbsTheLoss: ["training_lowers_the_loss", "gradients_are_derivatives"],
    broken.LosesItsBias: ["bias_without_a_place_is_refused", "merged_equals_unmerged"],
    broken.ConvolvesWithoutStride: ["forward_is_the_layer_with_the_change"],
}
STARTS = {
    broken_starts.StartsElsewhere: ["output_is_unchanged_at_the_start", "change_is_nothing_at_the_start"],
    broken_starts.StartsNowhere: [
        "start_is_finite_and_used",
        "gradients_reach_every_tensor",
        "training_lowers_the_loss",
    ],
    broken_starts.StartsInfinite: ["start_fits_every_shape"],
    broken_starts.StartsUnseeded: ["seed_alone_decides", "global_random_state_is_untouched"],
    broken_starts.StartsTallOnly: ["start_fits_every_shape", "start_is_finite_and_used"],
    broken_starts.ClaimsToIgnoreAlpha: ["start_product_ignores_alpha_where_claimed"],
}
SCHEDULES = {
    broken_schedules.ClimbsInItsHook: ["schedule_learns"],
    broken_schedules.ShakesUnseeded: ["schedule_repeats"],
    broken_schedules.ForgetsItsCount: ["schedule_resumes_exactly"],
    broken_schedules.SilencesTheForward: ["merged_equals_the_scheduled"],
    broken_schedules.DoublesTheScaleUntold: ["scheduled_file_reads_back"],
    broken_schedules.SaysAnotherDense: ["factors_are_the_change", "merged_equals_the_scheduled"],
}
OPTIMIZERS = {
    broken_optimizers.ClimbsTheLoss: ["optimizer_learns", "bfloat16_works"],
    broken_optimizers.Noisy: ["optimizer_repeats", "layerwise_is_the_same"],
    broken_optimizers.KeepsItToItself: ["optimizer_resumes_exactly", "state_is_what_the_formula_says"],
    broken_optimizers.SaysTooLittle: ["state_is_what_the_formula_says"],
    broken_optimizers.LeavesVectorsOut: ["groups_hold_everything_once"],
    broken_optimizers.NeverStands: ["rate_of_zero_moves_nothing"],
    broken_optimizers.StepsWithoutGradients: ["what_has_no_gradient_stays"],
    broken_optimizers.NeedsTheOthers: ["layerwise_is_the_same"],
    broken_optimizers.ChangesTypes: ["bfloat16_works"],
    broken_optimizers.WritesTheBase: ["what_is_frozen_stays"],
    broken_optimizers.DecaysUpwards: ["decay_shrinks_matrices"],
    broken_optimizers.ReadsAnotherNumber: ["optimizer_settings_round_trip"],
}
# Those whose fault is an exception of torch's: types and sizes that do not fit.
RAISING = {
    broken_optimizers.ChangesTypes,
    broken.WidensTheOutput,
    broken.NoCast,
    broken.OneShapeOnly,
    broken_starts.StartsTallOnly,
}


@pytest.fixture
def registered():
    """Register a class for one test."""
    done = []

    def put(cls: type, axis: str) -> type:
        done.append((axis, "under-test"))
        broken.GLOBAL.clear()
        return register(axis, "under-test", title=cls.__name__, year=2024, paper="none")(cls)

    yield put
    for axis, key in done:
        unregister(axis, key)


@pytest.mark.parametrize(
    ("cls", "axis"),
    [
        (broken.Good, "delta"),
        (broken.NoEmbeddings, "delta"),
        (broken_starts.GoodStart, "init"),
        (broken_schedules.GoodSchedule, "rank"),
        (broken_optimizers.GoodOptimizer, "optimizer"),
    ],
)
def test_the_good_methods_pass_everything(registered, cls, axis):
    report = check_method(registered(cls, axis))
    assert report.ok, str(report)


@pytest.mark.parametrize("cls", DELTAS, ids=lambda c: c.__name__)
def test_a_broken_delta_is_caught(registered, cls):
    _caught(cls, check_method(registered(cls, "delta"), only=DELTAS[cls]), DELTAS[cls])


@pytest.mark.parametrize("cls", STARTS, ids=lambda c: c.__name__)
def test_a_broken_start_is_caught(registered, cls):
    _caught(cls, check_method(registered(cls, "init"), only=STARTS[cls]), STARTS[cls])


@pytest.mark.parametrize("cls", SCHEDULES, ids=lambda c: c.__name__)
def test_a_broken_schedule_is_caught(registered, cls):
    _caught(cls, check_method(registered(cls, "rank"), only=SCHEDULES[cls]), SCHEDULES[cls])


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda c: c.__name__)
def test_a_broken_optimizer_is_caught(registered, cls):
    _caught(cls, check_method(registered(cls, "optimizer"), only=OPTIMIZERS[cls]), OPTIMIZERS[cls])


def _caught(cls, report, names):
    assert not report.ok
    assert [row.check for row in report.failures()] == [r.check for r in report.rows], str(report)
    assert {row.check for row in report.failures()} == set(names)
    accidents = [row for row in report.failures() if "raised" in row.detail]
    assert not accidents or cls in RAISING, str(report)


def test_a_failure_says_what_and_where_to_look(registered):
    row = check_method(registered(broken.WrongCount, "delta"), only=["count_is_the_real_count"]).rows[0]
    assert row.detail.startswith("count_is_the_real_count [linear]: expected")
    assert "Look at count(), setup()" in row.detail


def test_a_fault_at_one_kind_of_layer_is_told_with_the_kind(registered):
    only = ["forward_is_the_layer_with_the_change"]
    row = check_method(registered(broken.ConvolvesWithoutStride, "delta"), only=only).rows[0]
    assert "[conv]" in row.detail


def test_an_exception_inside_a_method_is_a_failure_with_its_message(registered):
    class Raises(broken.Good):
        def branch(self, x):
            raise ZeroDivisionError("in the branch")

    row = check_method(registered(Raises, "delta"), only=["branch_is_pure"]).rows[0]
    assert row.verdict == "fail"
    assert "ZeroDivisionError: in the branch" in row.detail


# Promises that core keeps for every method: no class of a method's can break them.
GUARDED_BY_CORE = {"unclaimed_kinds_are_refused", "merging_again_changes_nothing", "export_has_at_most_twice_the_rank"}


def test_every_other_check_has_been_seen_to_fail():
    seen = {
        name
        for names in [*DELTAS.values(), *STARTS.values(), *SCHEDULES.values(), *OPTIMIZERS.values()]
        for name in names
    }
    assert seen | GUARDED_BY_CORE == {c.name for c in checks()}
